"""Restoration in either host."""
