"""A small data set as a folder of images."""

import numpy as np
from PIL import Image


def write_pictures(root):
    """train/ and test/ with 20 + 6 images of 8 x 8 pixels in two classes."""
    rng = np.random.default_rng(0)
    for split, count in [("train", 20), ("test", 6)]:
        for name, level in [("bright", 150), ("dark", 30)]:
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = rng.integers(level, level + 80, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root
