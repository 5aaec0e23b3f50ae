"""Measured claims: one script and one table each."""
