"""The trainer: objectives (one paper, one file) and the engine around them."""
