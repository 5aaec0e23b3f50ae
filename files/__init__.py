"""Files of every kind: written whole or not at all, read as if from a stranger, kept inside their folders."""
