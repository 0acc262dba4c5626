"""The search for alpha and beta: which points, in which order, how far apart they must be to differ."""
