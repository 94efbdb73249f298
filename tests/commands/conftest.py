import shutil

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and test/ with 20 + 6 images of 8 x 8 pixels in two classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in [("train", 20), ("test", 6)]:
        for name, level in [("bright", 150), ("dark", 30)]:
            (root / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = rng.integers(level, level + 80, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def other_pixels(folder, tmp_path):
    """Data with the classes and counts of `folder`, but one other pixel."""
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other/test/dark/0.png"
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path)
    return tmp_path / "other"
