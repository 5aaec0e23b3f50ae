"""Rewards in either host: kinds, files, scorers in another process."""
