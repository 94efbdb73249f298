import shutil

import pytest
from pictures import write_pictures
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture
def other_pixels(folder, tmp_path):
    """Data with the classes and counts of `folder`, but one other pixel."""
    shutil.copytree(folder, tmp_path / "other")
    path = tmp_path / "other/test/dark/0.png"
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path)
    return tmp_path / "other"
