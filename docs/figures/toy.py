"""Draws docs/figures/toy.png: one student family, three divergences: where the mass goes, and what pushes it.

    python docs/figures/toy.py

The student and its teacher are those of `abkd.analysis.toy`. The last panel is the push on a class of teacher
probability 0.2, q^beta |p^alpha - q^alpha| / alpha.
"""

from pathlib import Path

from abkd.analysis.plots import draw
from abkd.analysis.toy import push_panel, toy_panels

POINTS = {"forward KL (1, 0)": (1.0, 0.0), "α-β (0.2, 0.7)": (0.2, 0.7), "reverse KL (0, 1)": (0.0, 1.0)}

if __name__ == "__main__":
    draw((*toy_panels(POINTS), push_panel(POINTS)), Path(__file__).with_suffix(".png"))
