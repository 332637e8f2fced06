"""Operation counts and memory use of the models, computed from shapes alone."""
