"""The notebook: what is written, and, executed on a small data set, what its cells print."""

import base64
import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from fastconv.notebook import convert
from fastconv.training import cifar10

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

SOURCE = convert.LECTURE.read_text(encoding="utf-8")
# The test is to see every cell work, not to wait for good answers.
SMALL = {
    "IMAGES": 640,
    "EPOCHS": 2,
    "STEPS": 1,
    "WIDTHS": "2,4",
    "PATCHES": "8",
    "SEEDS": 1,
    "SWEEP_IMAGES": 32,
    "SWEEP_EPOCHS": 1,
}


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """CIFAR-10's binary version, in full size: ten shades of grey, one for each class, with noise."""
    folder = tmp_path_factory.mktemp("cifar") / cifar10.BINARY_FOLDER
    folder.mkdir()
    numbers = np.random.default_rng(0)
    records = numbers.integers(0, 16, (10_000, 1 + 3072), dtype=np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    records[:, 1:] += 24 * records[:, :1]
    first, *others = [folder / f"{name}.bin" for name in (*cifar10.TRAIN_BATCHES, cifar10.TEST_BATCH)]
    first.write_bytes(records.tobytes())
    for other in others:
        os.link(first, other)
    return folder.parent


def cells_of_source():
    """Kind and lines of each cell, by the rules of the percent format."""
    cells = re.split(r"^# %%", SOURCE, flags=re.MULTILINE)[1:]
    return [("markdown" if cell.startswith(" [markdown]") else "code", cell.splitlines()[1:]) for cell in cells]


def test_the_notebook_is_valid_without_outputs_and_has_each_cell_of_the_source(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("notebook")
    assert (code, err) == (0, "")
    assert out == "Wrote fastconv.ipynb; open it with:\n  jupyter lab fastconv.ipynb\n"
    assert os.listdir() == ["fastconv.ipynb"]
    found = nbformat.read("fastconv.ipynb", as_version=nbformat.NO_CONVERT)
    nbformat.validate(found)
    assert (found.nbformat, found.nbformat_minor) == (4, 5)
    assert found.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in found.cells}) == len(found.cells)
    for cell, (kind, lines) in zip(found.cells, cells_of_source(), strict=True):
        assert cell.cell_type == kind
        if kind == "markdown":
            assert cell.source == "\n".join(line[2:] for line in lines).strip()
        else:
            assert (cell.execution_count, cell.outputs) == (None, [])
            shell = [line[2:] if line.startswith("# !") else line for line in lines]
            assert cell.source == "\n".join(shell).strip()
    assert any(line.startswith("!") for cell in found.cells for line in cell.source.splitlines())


def test_a_setting_replaces_the_value_of_one_line():
    found = convert.convert("# %%\nA = 1  # why\nB = A\n\n# %%\nAA = 1\n", {"A": r"C:\new"})
    assert [cell["source"] for cell in found["cells"]] == ["A = 'C:\\\\new'  # why\nB = A", "AA = 1"]


def test_the_data_directory_is_written_as_an_absolute_path(run, cifar, tmp_path, monkeypatch):
    monkeypatch.chdir(cifar)
    assert run("notebook", tmp_path / "new.ipynb", "--data", ".")[0] == 0
    cells = json.loads((tmp_path / "new.ipynb").read_text())["cells"]
    first = next(cell["source"] for cell in cells if cell["cell_type"] == "code")
    assert f"\nDATA = {str(cifar)!r}  #" in first


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("there.ipynb", "there.ipynb is there; give the path of a new file, or remove this one"),
        ("link.ipynb", "link.ipynb is there; give the path of a new file"),
        ("new.txt", "PATH is .*new.txt; expected a name that ends in .ipynb"),
        ("", "it is empty; give a path"),
        ("missing/new.ipynb", "missing/new.ipynb cannot be written: No such file or directory"),
        ("there.ipynb/new.ipynb", "there.ipynb/new.ipynb cannot be written: Not a directory"),
    ],
)
def test_a_path_that_cannot_be_written_is_refused(run, tmp_path, path, message):
    (tmp_path / "there.ipynb").write_text("mine")
    (tmp_path / "link.ipynb").symlink_to("nowhere")
    code, _out, err = run("notebook", path and tmp_path / path)
    assert code == 2
    assert re.search(message, " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())), err
    assert sorted(os.listdir(tmp_path)) == ["link.ipynb", "there.ipynb"]
    assert (tmp_path / "there.ipynb").read_text() == "mine"


def test_data_other_than_cifar10_is_refused(run, tmp_path):
    for name in ("train/ape", "train/bee", "test/ape", "test/bee"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "zoo" / name / "1.png")
    for directory, message in [
        (tmp_path / "missing", "missing is not a directory; give the one that holds the data set"),
        (tmp_path, "holds no data set; expected cifar-10-batches-py"),
        (tmp_path / "zoo", "zoo has the classes ape, bee; expected CIFAR-10, which the notebook is about"),
    ]:
        code, _out, err = run("notebook", tmp_path / "new.ipynb", "--data", directory)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "new.ipynb").exists()


# One test, because with pytest-xdist several would be several executions.
@pytest.mark.slow
def test_executed_its_cells_print_what_its_text_says(cifar, tmp_path, monkeypatch):
    # As a user has it: the tests' interpreter of Triton is not installed in the kernel's process.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found = nbformat.from_dict(convert.convert(SOURCE, {"DATA": str(cifar), **SMALL}))
    nbclient.NotebookClient(found, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in found.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)

    for name in ["(the model)", *(f"conv_block_{stage}.{i}" for stage in (1, 2) for i in range(5))]:
        assert re.search(rf"{re.escape(name)} +│.*│ swapped", printed), name
    assert "11 swapped, 0 skipped" in printed

    errors = re.findall(r"(\S+) +error of the logits (\S+), of 66 gradients at most (\S+)", printed)
    assert [name for name, *_ in errors] == ["PyTorch", "fastconv"]
    assert all(0 < float(error) < 1e-5 for _, *found in errors for error in found)
    assert len(re.findall(r"(?:PyTorch|fastconv) +\d+\.\d ms per step of 128 images", printed)) == 2

    metrics = re.findall(r"epoch (\d), (\w+): +loss (\S+), accuracy (\S+) %", printed)
    names = [(epoch, name) for epoch in "12" for name in ("training", "validation")]
    assert [tuple(found[:2]) for found in metrics] == names
    assert all(0 < float(accuracy) <= 100 for *_, accuracy in metrics)
    assert float(metrics[2][2]) < float(metrics[0][2])

    for width in (2, 4):
        assert re.search(rf"[12]/2 width-{width}: validation \d+\.\d+ %", printed)
        assert re.search(rf"^width {width} .*\d+\.\d+", printed, flags=re.MULTILINE)
    # No progress bar, which would draw itself again and again.
    assert "\x1b[2K" not in printed

    answers = re.findall(r"(alone|beside .*): +\w+ \d+\.\d %, \w+ \d+\.\d %, \w+ \d+\.\d %", printed)
    assert answers == ["alone", "beside other test images", "beside the darkest images"]

    # The images, the curves, the homework and the prediction.
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert os.listdir(tmp_path) == ["fastconv-notebook"]
    assert "`fastconv-notebook`" in found.cells[0].source
