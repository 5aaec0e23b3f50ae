"""Jobs: a training in a process of its own, how it starts and how it is looked at."""
