"""Published few-step students: one JSON file each, the class that holds one, and how a file becomes it."""
