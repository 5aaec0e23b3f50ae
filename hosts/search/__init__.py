"""Searches in either host: running, files, records and reports."""
