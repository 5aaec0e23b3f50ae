"""The embedded model: small trained weights, how they were made, and their loader."""
