"""The nodes: a schema and a few lines each, no maths."""
