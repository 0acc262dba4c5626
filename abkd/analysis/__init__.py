"""Analysis: where the probability mass went. Numbers in `mass`, drawings in `plots`."""
