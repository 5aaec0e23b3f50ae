"""Preference sets: pairs of pictures, what a person still has to answer, and exchange with other formats."""
