"""The maths of training: one paper, one file; what they share is in `parts`."""
