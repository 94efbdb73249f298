"""Lists of options as recipes, their names, and the file that holds them."""

import itertools
import json
from dataclasses import asdict, replace

import pytest

from fastconv.training import labels
from fastconv.training.data import DataError
from fastconv.training.folder import FolderError
from fastconv.training.recipe import RECIPES, Recipe
from fastconv.training.sweep import axes, plan


def test_every_combination_is_a_run_named_by_what_varies():
    recipes = axes.combinations({"width": [32, 64], "depth": [3], "flip": [True, False], "seed": [0, 1]})
    expected = {
        f"width-{width}_flip-{'on' if flip else 'off'}_seed-{seed}": Recipe(
            width=width, depth=3, flip=flip, seed=seed, train_metrics="running"
        )
        for seed, width, flip in itertools.product([0, 1], [32, 64], [True, False])
    }
    found = plan.named(recipes)
    assert found == expected
    assert list(found) == list(expected)


def test_a_single_run_has_a_name():
    assert list(plan.named(axes.combinations({}))) == ["run"]


def test_options_keep_what_else_a_recipe_has():
    lecture, modern = axes.combinations({"recipe": ["lecture", "modern"], "label_smoothing": [0.2]})
    running = {"train_metrics": "running", "label_smoothing": 0.2}
    assert lecture == replace(RECIPES["lecture"], **running)
    assert modern == replace(RECIPES["modern"], **running)


def test_recipes_on_two_bases_are_named_by_the_base_and_what_else_differs():
    recipes = axes.combinations({"recipe": ["lecture", "modern"], "batch_size": [64, 128], "seed": [5]})
    assert list(plan.named(recipes)) == [
        f"{base}_batch-size-{size}" for base in ("lecture", "modern") for size in (64, 128)
    ]
    # What is the same change to both bases is not what differs, though the values do.
    changed = [replace(each, epochs=9) for each in RECIPES.values()]
    assert [labels.words(each) for each in labels.differences(changed)] == ["lecture", "modern"]


def test_recipes_that_keep_most_of_their_base_are_named_by_their_changes():
    modern = RECIPES["modern"]
    one_at_a_time = [modern, replace(modern, flip=False), replace(modern, crop=0), replace(modern, whiten=False)]
    names = [labels.words(each) for each in labels.differences(one_at_a_time)]
    assert names == ["modern", "modern, flip off", "modern, crop 0", "modern, whiten off"]
    # Not if one changes half of what differs, or more.
    grid = [*one_at_a_time, replace(modern, flip=False, crop=0)]
    assert labels.words(labels.differences(grid)[0]) == "whiten on, crop 4, flip on"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("width", "32, 64", [32, 64]),
        ("lr", "1e-3,2", [0.001, 2.0]),
        ("flip", "on,off", [True, False]),
        ("precision", "fp32,bf16", ["fp32", "bf16"]),
        ("limit", "none,100", [None, 100]),
        ("recipe", "modern", ["modern"]),
    ],
)
def test_lists_of_values(name, text, expected):
    assert axes.values(name, text) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("width", "32,", "width is '32,'; expected integers, separated by commas: '' is none"),
        ("width", "32;64", "expected integers, separated by commas: '32;64' is none"),
        ("lr", "fast", "lr is 'fast'; expected numbers, separated by commas"),
        ("flip", "yes", "expected some of on, off, separated by commas: 'yes' is none"),
        ("limit", "all", "expected integers or none, separated by commas: 'all' is none"),
        ("recipe", "new", "recipe is 'new'; expected some of lecture, modern"),
        ("width", "32,16,32", "width is '32,16,32'; 32 is there twice: give each value once"),
    ],
)
def test_lists_that_are_none(name, text, message):
    with pytest.raises(ValueError, match=message):
        axes.values(name, text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"width": [32, 10**6], "depth": [3, 5]},
            "width 1000000, depth 3: width is 1000000; expected 1 to 10,000",
        ),
        ({"lr": [0.1, 0.01], "weight_decay": [20.0]}, "lr 0.1: weight_decay is 20.0; expected 0 to 10"),
        ({"epochs": [0]}, "^epochs is 0; expected 1 to"),
        ({"width": list(range(1, 41)), "depth": list(range(1, 31))}, "has 1,200 runs; expected at most 1,000"),
        (
            {"recipe": ["lecture", "modern"], **{name: [value] for name, value in asdict(Recipe()).items()}},
            "modern is the same run as lecture; give one of them",
        ),
    ],
)
def test_combinations_that_are_no_recipes_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        axes.combinations(given)


@pytest.fixture
def saved(tmp_path):
    runs = plan.named(axes.combinations({"lr": [1e-3, 1e-4], "limit": [None, 7], "seed": [0, 2**32 - 1]}))
    found = plan.Plan(plan.FORMAT, "/images", "0" * 64, runs)
    found.save(tmp_path)
    return found


def test_a_plan_is_read_as_it_was_saved(saved, tmp_path):
    found = plan.load(tmp_path)
    assert found == saved
    assert list(found.runs) == list(saved.runs)


def damaged(change):
    def apply(text):
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[:-20], "cannot be used: "),
        (lambda text: "[" * 100_000, "cannot be used: "),
        (lambda text: "\xff", "cannot be used: "),
        (lambda text: "[]", r"the sweep is \[\]; expected a dict"),
        (damaged(lambda content: content.pop("runs")), "the sweep lacks runs"),
        (damaged(lambda content: content.update(more=1)), "the sweep has an unknown 'more'"),
        (damaged(lambda content: content.update(format=2)), "it has format 2, and this fastconv reads 1"),
        (damaged(lambda content: content.update(runs={})), "its runs are not named by the options"),
        (
            damaged(lambda content: content["runs"].update({"../x": content["runs"].popitem()[1]})),
            "its runs are not named by the options in which they differ; start a new sweep in another --out",
        ),
        (damaged(lambda content: next(iter(content["runs"].values())).update(width=0)), "width is 0; expected 1"),
        (damaged(lambda content: next(iter(content["runs"].values())).update(lr=float("nan"))), "lr is nan"),
        (damaged(lambda content: next(iter(content["runs"].values())).pop("lr")), "lacks lr"),
    ],
)
def test_a_plan_that_is_damaged_is_refused_in_one_line(saved, tmp_path, damage, message):
    path = tmp_path / plan.PLAN
    path.write_text(damage(path.read_text()), encoding="latin-1")
    with pytest.raises(FolderError, match=message) as refused:
        plan.load(tmp_path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(str(path))


def test_a_plan_is_not_looked_for_in_a_pipe(tmp_path):
    (tmp_path / plan.PLAN).mkdir()
    with pytest.raises(FolderError, match=r"sweep\.json is not a file; give with --out the folder of a sweep"):
        plan.load(tmp_path)


def test_a_sweep_goes_on_only_with_its_own_data(saved, dataset):
    with pytest.raises(
        DataError, match=r"trained on other pixels or labels; give with --data .*, then in /images"
    ):
        saved.check_data(dataset)
    replace(saved, data_checksum=dataset.checksum).check_data(dataset)
