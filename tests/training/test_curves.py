"""Pictures are drawn whatever backend matplotlib is to show the user's own figures with."""

import os

from processes import printed_by

from fastconv import extras
from fastconv.extras import import_extra

DRAW = """
import io, os, sys
from PIL import Image
from fastconv.bench import plots
from fastconv.training import curves

def size_of(draw):
    file = io.BytesIO()
    draw(file)
    return Image.open(file).size

curve = {"epoch": 1, "train_loss": 2, "train_accuracy": 0.1, "validation_loss": 2, "validation_accuracy": 0.2}
row = {"contender": "eager", "images": 8, "ms": (1, 2, 3), "floor_ms": 1, "channels": 4, "side": 4, "dtype": "fp"}
print(*size_of(lambda file: curves.plot([curve], file)), *size_of(lambda file: plots.draw_batches([row], file)))
print(os.environ["MPLBACKEND"], "matplotlib.pyplot" in sys.modules)
"""


def test_a_backend_that_is_not_installed():
    """Notebooks set MPLBACKEND for the programs that they start, too."""
    # The name that a notebook sets, of a package that need not be there.
    backend = "module://no_such_package.backend_inline"
    assert printed_by("-c", DRAW, MPLBACKEND=backend).split() == ["1080", "432", "960", "504", backend, "False"]


def test_a_backend_that_is_installed_stays_the_users(monkeypatch):
    matplotlib = import_extra("matplotlib")
    monkeypatch.setitem(matplotlib.rcParams, "backend", "agg")
    monkeypatch.setenv("MPLBACKEND", "svg")
    # What the first import does: a second one, or one without the module's parts, would not be the same.
    extras._import_matplotlib()
    assert matplotlib.rcParams["backend"] == os.environ["MPLBACKEND"] == "svg"
