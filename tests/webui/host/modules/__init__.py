"""Stand-ins for what Forge Neo documents of itself, as far as the script uses it; written for these tests."""
