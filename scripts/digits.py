"""scikit-learn's digits (1,797 grey 8 x 8 images of ten classes) as images for a recipe: DIGITS.npz with both splits.

    pip install scikit-learn; python scripts/digits.py DIGITS.npz

The last 500 are the test images: they were written by other people than the first ones.
"""

import sys

import numpy as np
from sklearn.datasets import load_digits

NUM_TEST = 500

found = load_digits()
images = (found.images * 255 / 16).round().astype(np.uint8)
splits = {"train": slice(None, -NUM_TEST), "test": slice(-NUM_TEST, None)}
arrays = {f"{name}_images": images[part] for name, part in splits.items()}
arrays |= {f"{name}_labels": found.target[part] for name, part in splits.items()}
np.savez(sys.argv[1], **arrays)
