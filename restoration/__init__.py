"""Degradations, tiling, colour fix, captions: what image restoration needs beside a network."""
