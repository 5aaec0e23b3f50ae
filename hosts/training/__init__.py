"""Training in either host: what a run is made of, its plan, the run itself."""
