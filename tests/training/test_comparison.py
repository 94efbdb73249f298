"""Runs as rows, tables and files, with statistics by NumPy."""

import csv
import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from fastconv import modules
from fastconv.training.comparison import files, lecture, plots, reading, rows, tables
from fastconv.training.comparison.reading import Run
from fastconv.training.environment import Environment
from fastconv.training.folder import FolderError
from fastconv.training.recipe import RECIPES, Recipe
from fastconv.training.summary import multiplications

ENVIRONMENT = Environment("cpu", "auto", 2, 1, {"torch": "2.14"})


def make(recipe, accuracies, finished=True, **facts):
    """A run with these validation accuracies, and a test accuracy that is a hundredth more than the last."""
    history = [
        {
            "epoch": i,
            "train_loss": 1.0,
            "train_accuracy": 0.5,
            "validation_loss": 2.0,
            "validation_accuracy": value,
        }
        for i, value in enumerate(accuracies, 1)
    ]
    given = {
        "path": Path(f"runs/{recipe.width}-{recipe.seed}/checkpoint.pt"),
        "environment": ENVIRONMENT,
        "data": "/images",
        "data_checksum": "0" * 64,
        "train_images": 80,
        "is_cifar10": False,
        "parameters": 100 * recipe.width,
        "multiplications": 1_234_567,
        "seconds": 10.0 + recipe.seed,
        "evaluation_seconds": 4.0,
    }
    test = {"test_loss": 3.0, "test_accuracy": accuracies[-1] + 0.01} if finished else None
    return Run(recipe=recipe, epoch=len(history), history=history, test=test, **(given | facts))


def names(*runs):
    return [row.name for row in rows.compare(runs)]


def test_runs_that_differ_in_nothing_but_their_seeds_are_one_row():
    accuracies = {0: 0.61, 3: 0.67, 4: 0.655}
    same = [make(Recipe(seed=seed), [0.5, value]) for seed, value in accuracies.items()]
    row, other = rows.compare([*same, make(Recipe(width=64), [0.7, 0.8])])
    assert row.runs == same
    values = np.array(list(accuracies.values()))
    assert row.validation == pytest.approx((values.mean(), values.std(ddof=1)))
    assert row.test == pytest.approx((values.mean() + 0.01, values.std(ddof=1)))
    seconds = np.array([6.0, 9.0, 10.0])
    assert row.seconds == pytest.approx((seconds.mean(), seconds.std(ddof=1)))
    assert [each.value for each in row.curve] == pytest.approx([0.5, values.mean()])
    assert other.validation == (0.8, None)
    assert (row.name, other.name) == ("width 32", "width 64")


def test_a_repeated_seed_counts_once():
    (row,) = rows.compare([make(Recipe(), [0.5, 0.6]), make(Recipe(), [0.5, 0.7], path=Path("copy"))])
    assert row.validation == (0.6, None)


def test_other_devices_precisions_and_data_are_other_rows_that_say_so():
    gpu = Environment("NVIDIA H200", "auto", 64, 1, {})
    run = make(Recipe(), [0.5])
    assert names(run, make(Recipe(), [0.5], environment=gpu)) == [
        "width 32, depth 5, patch 4, on cpu, threads 2",
        "width 32, depth 5, patch 4, on NVIDIA H200",
    ]
    # A GPU does not add up in the order of the host's threads.
    assert len(names(*(make(Recipe(), [0.5], environment=replace(gpu, threads=n)) for n in (1, 2)))) == 1
    assert names(run, make(Recipe(precision="bf16"), [0.5])) == ["precision fp32", "precision bf16"]
    portable = make(Recipe(), [0.5], environment=replace(ENVIRONMENT, backend="portable"))
    assert [name.split(", ")[-1] for name in names(run, portable)] == ["backend auto", "backend portable"]
    other = make(Recipe(), [0.5], data_checksum="1" * 64)
    assert [name.split(", ")[-2:] for name in names(run, other)] == [
        ["data images", "00000000"],
        ["data images", "11111111"],
    ]
    # The same data in another place is no difference.
    assert names(run, make(Recipe(width=64), [0.5], data="/copy")) == ["width 32", "width 64"]


def test_unfinished_runs_are_rows_of_their_own_marked_by_the_epochs_done():
    done = make(Recipe(), [0.1, 0.2, 0.3, 0.4, 0.5])
    begun = make(Recipe(seed=1), [0.1, 0.2], finished=False)
    none = replace(begun, recipe=Recipe(seed=2), history=[], epoch=0)
    found = rows.compare([done, begun, none])
    assert [row.name.removeprefix("width 32, depth 5, patch 4") for row in found] == [
        "",
        ", 2 of 5 epochs done",
        ", 0 of 5 epochs done",
    ]
    assert [row.validation for row in found] == [(0.5, None), (0.2, None), None]
    assert [row.test is None for row in found] == [False, True, True]


def test_parameters_and_multiplications_are_those_of_the_model():
    """By hand: each output takes a product for each of its weights, and its bias counts as one more."""
    width, depth, patch, classes = 4, 2, 2, 3
    first, second = 16 * 16, 8 * 8
    expected = first * width * (3 * patch**2 + 1)
    expected += second * (2 * width * (width * 4 + 1) + classes * (2 * width + 1))
    for pixels, channels in ((first, width), (second, 2 * width)):
        expected += depth * pixels * channels * (4 * (49 + 1) + (4 * channels + 1) + (channels + 1))
    assert multiplications(Recipe(width=width, depth=depth, patch=patch), (3, 32, 32), classes) == expected
    assert sum(p.numel() for p in modules.Classifier().parameters()) == lecture.PARAMETERS


SEEDS = [make(Recipe(width=w, seed=s), [0.4, 0.5 + s / 100], is_cifar10=True) for w in (16, 32) for s in (0, 1)]


def test_the_lecture_stands_beside_full_runs_on_cifar10_only():
    found = rows.compare(SEEDS)
    assert tables.cells(found)[-1] == ["the lecture", "235,434", "6.62 M", "114", "59.73", "", "1"]
    for other in (replace(SEEDS[0], is_cifar10=False), replace(SEEDS[0], recipe=Recipe(limit=100))):
        assert len(tables.cells(rows.compare([other]))) == 1


def test_the_table_in_markdown_and_on_a_console(tmp_path):
    found = rows.compare(SEEDS)
    lines = tables.markdown(found).splitlines()
    deviation = f"{np.std([50, 51], ddof=1):.2f}"
    expected = f"| width 16 | 1,600 | 1.23 M | 6.5 | 50.50 ± {deviation} | 51.50 ± {deviation} | 2 |"
    assert lines[2] == expected
    assert {line.count("|") for line in lines[:5]} == {8}
    with open(tmp_path / "printed", "w") as file:
        tables.show(found, Console(file=file))
    printed = (tmp_path / "printed").read_text()
    assert [cell.strip() for cell in expected.strip("| ").split("|")] == [
        cell.strip() for cell in printed.splitlines()[2].replace("  ", "|").split("|") if cell.strip()
    ]
    assert "Trained on cpu, threads: 2; with 80 images of /images." in printed


def test_the_csv_has_a_line_for_each_run_with_everything(tmp_path):
    unfinished = replace(SEEDS[3], test=None)
    found = rows.compare([*SEEDS[:3], unfinished])
    files.write(found, tmp_path, "compare")
    with open(tmp_path / "compare.csv", newline="") as file:
        read = list(csv.DictReader(file))
    by_run = {line["run"]: line for line in read}
    for run in [*SEEDS[:3], unfinished]:
        line = by_run[str(run.path.parent)]
        assert {name: line[name] for name in asdict(run.recipe)} == {
            name: "" if value is None else str(value) for name, value in asdict(run.recipe).items()
        }
        assert float(line["validation_accuracy"]) == run.history[-1]["validation_accuracy"]
        assert line["test_accuracy"] == ("" if run.test is None else str(run.test["test_accuracy"]))
        assert float(line["training_seconds"]) == run.seconds - 4
        assert (line["finished"], line["device"], line["torch"]) == (str(run.test is not None), "cpu", "2.14")
    assert [line["row"] for line in read] == [
        "width 16",
        "width 16",
        "width 32",
        "width 32, 2 of 5 epochs done",
    ]


def test_pictures_are_as_wide_as_a_readme_whatever_they_show(tmp_path):
    many = [
        make(replace(recipe, width=w, depth=d, seed=s), [0.1 * d, 0.2], is_cifar10=True)
        for recipe, w, d, s in itertools.product(RECIPES.values(), (8, 16, 32), (3, 5), (0, 1))
    ]
    for runs in (SEEDS[:1], many, [make(Recipe(), [0.5])]):
        written = files.write(rows.compare(runs), tmp_path, "compare")
        assert written == ["compare.md", "compare.csv", "compare.png", "compare-curves.png"]
        for name in written[2:]:
            with Image.open(tmp_path / name) as picture:
                assert picture.width == 900
                assert 400 <= picture.height < 700


def test_names_in_pictures_are_no_formulas_and_not_cut(tmp_path):
    odd = [replace(row, name=f"$a_{{$ {row.name} " + 30 * "word ") for row in rows.compare(SEEDS)]
    texts = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "legend", lambda self, handles, names, **_: texts.extend(names))
        files.write(odd, tmp_path, "first")
    assert len(texts) == 2 * len(odd)
    assert {text.replace("\n", " ").replace(r"\$", "$") for text in texts} == {row.name.strip() for row in odd}
    assert max(len(line) for text in texts for line in text.splitlines()) < 120
    files.write(odd, tmp_path, "second")
    with Image.open(tmp_path / "second.png") as picture:
        assert picture.height > 4 * 100 + 2 * 2 * 20


def test_a_name_does_not_break_the_markdown_table():
    row, *_ = rows.compare(SEEDS)
    line = tables.markdown([replace(row, name="a|b")]).splitlines()[2]
    assert line.startswith(r"| a\|b |")


def test_styles_are_distinct():
    styles = itertools.islice(plots._styles(), math.lcm(len(plots.COLOURS), len(plots.MARKERS)))
    assert len({tuple(style.items()) for style in styles}) == len(plots.COLOURS) * len(plots.MARKERS)


def test_before_the_first_epoch_there_is_a_table_and_no_picture(tmp_path):
    none = replace(SEEDS[0], history=[], epoch=0, test=None)
    assert files.write(rows.compare([none]), tmp_path, "sweep", "\nthe end\n") == ["sweep.md", "sweep.csv"]
    assert (tmp_path / "sweep.md").read_text().endswith("\nthe end\n")


def test_runs_are_found_in_folders_and_by_name(tmp_path):
    for name in ("sweep/width-8", "sweep/width-128", "sweep/width-16", "run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "checkpoint.pt").touch()
    (tmp_path / "sweep/notes").mkdir()
    paths = [tmp_path / "run/checkpoint.pt", tmp_path / "sweep", tmp_path / "run"]
    found = [str(path.parent.relative_to(tmp_path)) for path in reading.find(paths)]
    assert found == ["run", "sweep/width-8", "sweep/width-16", "sweep/width-128"]
    # "runs" as a whole, and "runs/*" after a comparison.
    assert len(reading.find([tmp_path])) == 4
    (tmp_path / "comparison").mkdir()
    (tmp_path / "comparison" / files.names("compare")[1]).touch()
    assert len(reading.find(sorted(tmp_path.iterdir()))) == 4
    for name in ("sweep/notes", "comparison"):
        with pytest.raises(FolderError, match=f"{name} holds no run; give the folder of a run or of a sweep, or"):
            reading.find([tmp_path / name])


def test_files_of_others_are_not_replaced(tmp_path):
    (tmp_path / "compare.csv").write_text("mine")
    with pytest.raises(FolderError, match=r"holds compare\.csv, which would be replaced; give another --out"):
        files.check_new(tmp_path, files.names("compare"))
    files.check_new(tmp_path, files.names("sweep"))
    with pytest.raises(FolderError, match=r"--out is .*compare\.csv, a file; give a directory"):
        files.check_new(tmp_path / "compare.csv", files.names("compare"))
