"""What "better" means: reward models behind one protocol."""
