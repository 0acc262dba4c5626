"""Draws docs/figures/plane.png: where the named divergences lie in the (alpha, beta) plane, and what alpha and beta do.

    python docs/figures/plane.py

The curves on the right are the two factors of the gradient on one class, |dD / d ln q| =
q^beta |p^alpha - q^alpha| / alpha: its hardness over the size of the error, its confidence over the student's own
probability.
"""

from pathlib import Path

from abkd.analysis.figures import FIGURES
from abkd.analysis.plots import draw

if __name__ == "__main__":
    draw(FIGURES["plane"].numbers(), Path(__file__).with_suffix(".png"), FIGURES["plane"].layout)
