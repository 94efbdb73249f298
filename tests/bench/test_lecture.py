"""The lecture's program: an oracle for our training, and a contender whose times are given here."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, Subset

from fastconv.bench import command, results, trainings
from fastconv.bench.clock import Clock
from fastconv.bench.tools import readme
from fastconv.operations import reference
from fastconv.training import Recipe, loop
from fastconv.training.cifar10 import CIFAR10_CLASSES
from fastconv.training.data import Dataset, ImageSet, split_indices
from fastconv.training.sets import epoch_order

pytest.importorskip("torchvision", exc_type=ImportError)
from fastconv.bench import end_to_end, lecture

CPU = torch.device("cpu")


def make_dataset(count):
    """Images so small that the lecture's model is fast."""
    pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8)
    images = ImageSet(pixels, torch.randint(10, (count,)))
    return Dataset(images, images.subset(torch.arange(5)), CIFAR10_CLASSES, "random images")


def test_from_equal_weights_the_lectures_losses_are_ours(tmp_path):
    # 300 training images, in batches of 128, 128 and 44; 75 validation images, in one, whose order does not count.
    dataset = make_dataset(375)
    recipe = Recipe(epochs=2, train_metrics="running")
    state = loop.prepare(recipe, dataset, CPU, None)
    model = reference.Classifier()
    model.load_state_dict(state.model.state_dict())
    loop.go_on(state, tmp_path / "checkpoint.pt", loop.Observer())

    training, validation = lecture.split(dataset.train, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lecture.LEARNING_RATE)
    criterion = torch.nn.CrossEntropyLoss()
    for epoch, ours in enumerate(state.history):
        losses = []

        def noted(logits, labels, losses=losses):
            losses.append(criterion(logits, labels))
            return losses[-1]

        order = epoch_order(len(training), recipe.seed, epoch)
        loader = DataLoader(Subset(training, order.tolist()), batch_size=lecture.BATCH_SIZE)
        lecture.train(model, loader, noted, optimizer)
        loss, accuracy = lecture.evaluate(model, DataLoader(validation, batch_size=128), criterion)
        mean = sum(size * loss.item() for size, loss in zip((128, 128, 44), losses, strict=True)) / 300
        assert ours["train_loss"] == pytest.approx(mean, rel=1e-5)
        assert ours["validation_loss"] == pytest.approx(loss, rel=1e-5)
        assert ours["validation_accuracy"] == accuracy


def test_the_lectures_split_and_images_are_ours():
    images = make_dataset(50).train
    ours = [part.tolist() for part in split_indices(50)]
    assert [part.indices for part in lecture.split(images, None)] == ours
    assert [part.indices for part in lecture.split(images, 7)] == [part[:7] for part in ours]
    ((pixels, labels),) = DataLoader(lecture.CIFAR10(images), batch_size=50)
    assert torch.equal(pixels, images.images.float() / 255)
    assert torch.equal(labels, images.labels)


def test_each_moment_belongs_to_one_part(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def numbers():
        nonlocal now
        for number in range(2):
            now += 10
            yield number
        now += 5

    clock = Clock()
    now += 1
    with clock.part("training"):
        for _ in clock.each("loading", numbers()):
            now += 100
            with clock.part("moving"):
                now += 1000
    now += 1
    with clock.part("training"):
        now += 3
    assert clock.seconds == {
        (): 2,
        ("training",): 203,
        ("training", "loading"): 25,
        ("training", "moving"): 2000,
    }


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(lecture, "BATCH_SIZE", 4)
    return make_dataset(50)


def test_the_lectures_model_has_the_classes_of_the_data(few_images):
    three = replace(
        few_images, train=ImageSet(few_images.train.images, few_images.train.labels % 3), classes="abc"
    )
    row = end_to_end.run_lecture(three, CPU, Recipe(limit=8))
    # That of guessing: with ten classes it would be 2.3.
    assert 0.6 < row["metrics"]["train_loss"] < 1.6


def test_rounds_have_both_programs_parts_and_their_scales(few_images):
    recipe = Recipe(batch_size=4, epochs=3, limit=8)
    advances = []
    found = list(end_to_end.measure(few_images, CPU, recipe, 2, advances.append))
    assert advances == ["round 1", "round 2"]
    for i, (theirs, ours) in enumerate(found):
        assert (theirs["contender"], ours["contender"]) == (trainings.LECTURE, trainings.FASTCONV)
        assert (theirs["epochs"], ours["epochs"]) == (1, 3)
        for row in (theirs, ours):
            assert (row["round"], row["images"], row["of"]) == (i, [8, 8], [40, 10])
            assert all(seconds >= 0 for part in row["seconds"].values() for seconds in part.values())
        # Five times the training images, and three epochs; 10 instead of 8 validation images.
        assert list(theirs["scale"].values()) == [15, 15, 3.75]
        assert list(ours["scale"].values()) == [5, 50 / 16]
        assert set(theirs["metrics"]) <= set(ours["metrics"])


ABOUT = {
    "device": "A CPU",
    "driver": None,
    "threads": 2,
    "torch": "2.0",
    "triton": "3.0",
    "python": "3.11",
    "system": "Linux",
    "commit": "0123456789abcdef",
    "dirty": False,
    "date": "2026-01-02",
}


def made_rows(ours=(1.0, 2.0)):
    parts = {
        lecture.TRAINING: {"loading": 2.0, "moving": 0.125, "computing": 7.875},
        lecture.EVALUATION: {"loading": 1.0, "moving": 0.0, "computing": 3.0},
        lecture.VALIDATION: {"loading": 1.0, "moving": 0.0, "computing": 4.0},
    }
    shared = {"level": trainings.LEVEL, "images": [1280, 640], "of": [40_000, 10_000]}
    theirs = {**shared, "contender": trainings.LECTURE, "epochs": 1, "seconds": parts}
    theirs["scale"] = dict(zip(parts, (10.0, 10.0, 2.0), strict=True))
    rows = []
    for i, seconds in enumerate(ours):
        own = {"training": {"computing": 2 * seconds}, "evaluations": {"computing": seconds}}
        row = {**shared, "contender": trainings.FASTCONV, "epochs": 5, "seconds": own, "round": i}
        rows += [{**theirs, "round": i}, row | {"scale": {"training": 4.0, "evaluations": 2.0}}]
    return rows


def test_times_are_scaled_to_the_whole_and_ratios_are_of_rounds():
    rows = made_rows()
    assert trainings.totals(rows, trainings.LECTURE) == [150, 150]
    assert trainings.totals(rows, trainings.FASTCONV) == [10, 20]
    assert trainings.ratio(rows) == pytest.approx((9, 11.25, 13.5))
    assert trainings.table(rows) == (
        """\
| seconds | loading | moving | computing | together |
|---|---:|---:|---:|---:|
| the lecture's program: training | 20 | 1.25 | 79 | 100 |
| the lecture's program: evaluation on training images | 10 | 0.00 | 30 | 40 |
| the lecture's program: evaluation on validation images | 2.00 | 0.00 | 8.00 | 10 |
| **the lecture's program** |  |  |  | **150** |
| fastconv train: training |  |  | 12 | 12 |
| fastconv train: evaluations |  |  | 3.00 | 3.00 |
| **fastconv train** |  |  |  | **15** |

Ours is 11.2 times as fast (9.0 - 13.5). Times are scaled from 1,280 training and 640 validation images, """
        "the lecture's program from one of 5 epochs."
    )


def test_the_headline_names_the_machine_and_what_was_scaled():
    rows = [row | {"images": row["of"]} for row in made_rows()]
    assert trainings.headline(ABOUT | {"device": "A GPU", "driver": "1"}, rows) == (
        "The lecture's training with all its evaluations takes **15 s with `fastconv train` instead of 150 s "
        "with the lecture's program: 11.2 times as fast** (A GPU; scaled from all images, the lecture's program "
        "from one of 5 epochs)."
    )


def test_the_readme_shows_the_newest_training_of_each_kind_of_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert readme.section("training").strip() == ""
    folder = tmp_path / trainings.FOLDER
    for i, (about, seconds) in enumerate(
        [
            (ABOUT | {"device": "A GPU", "driver": "1"}, 0.1),
            (ABOUT | {"date": "2026-01-01"}, 1.0),
            (ABOUT | {"date": "2026-01-03"}, 2.0),
        ]
    ):
        results.write(folder / f"{i}.json", about, made_rows((seconds,)))
    on_cpu, on_gpu = readme.section("training").split("\n\nA GPU")
    assert "2026-01-03" in on_cpu
    assert "Ours is 7.5 times" in on_cpu
    assert "Ours is 150.0 times" in on_gpu
    assert readme.committed_trainings()[0][1] == made_rows((2.0,))


def test_the_command_measures_keeps_and_shows(run, tmp_path, few_images, monkeypatch):
    monkeypatch.setattr(command, "load_data", lambda directory: replace(few_images, source=f"from {directory}"))
    path = tmp_path / "r.json"
    arguments = ["--training", "--limit", 4, "--rounds", 1, "--data", "there", "--out", path]
    code, out, err = run("bench", *arguments)
    assert (code, err) == (0, "round 1\n")
    about, rows = trainings.read(path)
    assert about["data"] == "from there"
    assert [row["images"] for row in rows] == [[4, 4]] * 2
    assert trainings.table(rows) in out
    assert run("bench", "--training", "--render", path) == (0, out, "")


def test_a_training_in_half_precision_is_refused(run):
    code, _, err = run("bench", "--training", "--dtype", "float16")
    assert code == 2
    assert "trainings are in float32 or bfloat16; got float16" in err


def test_files_of_trainings_and_of_workloads_are_not_mixed_up(tmp_path):
    path = tmp_path / "r.json"
    results.write(path, ABOUT, made_rows())
    with pytest.raises(results.ResultsError, match="has workloads whole_training; this version knows depthwise"):
        results.read(path)


def test_committed_trainings_say_where_they_come_from():
    for path in (results.FOLDER / trainings.FOLDER).glob("*.json"):
        about, _ = trainings.read(path)
        assert about["commit"]
        assert about["dirty"] is False
