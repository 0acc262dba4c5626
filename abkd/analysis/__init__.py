"""Analysis: where the probability mass went, and why.

Numbers: `log_ratio` (one step and its two factors), `movement` (where a step moves the mass), `mass` (mass by rank),
`theorems` (the paper's statements), `toy`, `sweep` (runs and trials together). `panels` holds what a figure shows,
`figures` lists the figures, `plots` draws, `table` prints.
"""
