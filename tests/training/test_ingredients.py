"""What recipes add to the lecture's steps, against a loop written out by hand in float64."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from synthetic import CPU, RECIPE, Recorder, assert_same_weights, images_of, run
from torch import nn
from torch.nn import functional as F

from fastconv.modules import Classifier
from fastconv.training import checkpoint, loop, planned, prediction, whitening
from fastconv.training.augmentation import Augmentation
from fastconv.training.recipe import INGREDIENTS, RECIPES, Recipe, make_model
from fastconv.training.schedule import rates
from fastconv.training.sets import Batches, epoch_order, make_sets
from fastconv.training.stepper import AutogradStepper, loss_and_accuracy

pytestmark = pytest.mark.usefixtures("report_every_step")

MODERN = replace(
    RECIPE,
    lr=1e-2,
    weight_decay=0.5,
    norm="sample",
    whiten=True,
    crop=2,
    flip=True,
    cutout=3,
    label_smoothing=0.2,
    schedule="linear",
    warmup=0.3,
    decay="weights",
    ema=0.8,
)


def by_slices(image, top, left, mirrored, crop):
    """A crop out of a black frame, by slices."""
    framed = torch.zeros(3, image.shape[1] + 2 * crop, image.shape[2] + 2 * crop, dtype=image.dtype)
    framed[:, crop : crop + image.shape[1], crop : crop + image.shape[2]] = image
    cropped = framed[:, top : top + image.shape[1], left : left + image.shape[2]]
    return cropped.flip(2) if mirrored else cropped


@pytest.mark.parametrize(("crop", "flip"), [(3, True), (1, False), (0, True), (7, True)])
def test_images_are_cropped_out_of_a_frame_and_mirrored(crop, flip):
    pixels = torch.randint(1, 256, (40, 3, 7, 11), dtype=torch.uint8)
    augment = Augmentation(40, replace(RECIPE, crop=crop, flip=flip), CPU)
    augment.start(2)
    chosen = torch.tensor([31, 0, 8, 39, 8])
    found = augment(pixels[chosen], chosen)
    for i, image in zip(chosen.tolist(), found, strict=True):
        (top, left), mirrored = augment._corners[:, i].tolist(), bool(augment._mirrored[i])
        assert torch.equal(image, by_slices(pixels[i], top, left, mirrored, crop))
    # Every place and both sides come up.
    augment = Augmentation(5000, replace(RECIPE, crop=crop, flip=flip), CPU)
    augment.start(0)
    assert [row.unique().tolist() for row in augment._corners] == [list(range(2 * crop + 1))] * 2
    assert augment._mirrored.float().mean().item() == pytest.approx(0.5 if flip else 0.0, abs=0.03)


def blackened(image, centre, cutout):
    """A copy with a black square, by slices; the centre is given as shares of height and width."""
    top, left = (int(share * size) - cutout // 2 for share, size in zip(centre, image.shape[1:], strict=True))
    image = image.clone()
    image[:, max(0, top) : max(0, top + cutout), max(0, left) : max(0, left + cutout)] = 0
    return image


@pytest.mark.parametrize("cutout", [1, 4, 7])
def test_a_square_of_each_image_is_black(cutout):
    pixels = torch.randint(1, 256, (800, 2, 7, 11), dtype=torch.uint8)
    augment = Augmentation(800, replace(RECIPE, cutout=cutout), CPU)
    augment.start(1)
    chosen = torch.randperm(800)
    found = augment(pixels[chosen], chosen)
    for i, image in zip(chosen.tolist(), found, strict=True):
        assert torch.equal(image, blackened(pixels[i], augment._centres[:, i].tolist(), cutout))
    # Squares lie everywhere.
    assert (found == 0).any(0).all()


def test_what_happens_to_an_image_depends_on_seed_and_epoch_only():
    def drawn(seed, *epochs):
        augment = Augmentation(50, replace(RECIPE, crop=4, flip=True, cutout=2, seed=seed), CPU)
        for epoch in epochs:
            augment.start(epoch)
        return torch.cat([augment._corners, augment._mirrored[None], augment._centres])

    assert torch.equal(drawn(3, 0, 1), drawn(3, 1))
    assert not torch.equal(drawn(3, 1), drawn(3, 2))
    assert not torch.equal(drawn(3, 1), drawn(4, 1))


def test_the_learning_rate_rises_and_falls_in_lines():
    recipe = Recipe(epochs=3, lr=0.5, schedule="linear", warmup=0.4)
    found = torch.cat([rates(recipe, epoch, 5) for epoch in range(3)]).tolist()
    # 15 steps: 6 to rise, then 9 to fall.
    expected = [0.5 * i / 7 for i in range(1, 7)] + [0.5 * i / 9 for i in range(9, 0, -1)]
    assert found == pytest.approx(expected, rel=1e-6)
    constant = replace(recipe, schedule="constant", warmup=0.1)
    assert rates(constant, 0, 5).tolist() == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5, 0.5], rel=1e-6)


def test_a_run_with_all_ingredients_is_the_one_by_hand(dataset, tmp_path):
    observer = Recorder()
    recipe = replace(MODERN, train_metrics="running")
    final = run(dataset, tmp_path / "checkpoint.pt", recipe, observer)

    model = loop.prepare(recipe, dataset, CPU, None).model
    parts = [PlainBlock(block) for stage in (model.conv_block_1, model.conv_block_2) for block in stage]
    plain = PlainClassifier(model, parts).double()
    averaged = copy.deepcopy(plain)
    weights = [p for p in plain.parameters() if p.dim() > 1]
    biases = [p for p in plain.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": weights}, {"params": biases, "weight_decay": 0.0}], weight_decay=0.5)
    sets = make_sets(dataset, recipe, CPU)
    images, labels = images_of(sets, "train")
    augmentation = Augmentation(80, recipe, CPU)
    # 15 steps: 4 to rise, 11 to fall.
    learning_rates = iter([0.01 * i / 5 for i in range(1, 5)] + [0.01 * i / 11 for i in range(11, 0, -1)])
    for epoch in range(3):
        augmentation.start(epoch)
        drawn = zip(
            augmentation._corners.T.tolist(),
            augmentation._mirrored.tolist(),
            augmentation._centres.T.tolist(),
            strict=True,
        )
        changed = torch.stack(
            [
                blackened(by_slices(image, *corner, flip, 2), centre, 3)
                for image, (corner, flip, centre) in zip(images, drawn, strict=True)
            ]
        )
        total_loss = total_correct = 0.0
        for chosen in epoch_order(80, 7, epoch).split(16):
            logits = plain(changed[chosen].double() / 255)
            # Each label is worth 0.8, and 0.2 are shared by three classes.
            targets = 0.8 * F.one_hot(labels[chosen], 3) + 0.2 / 3
            loss = -(targets * logits.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            rate = next(learning_rates)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            with torch.no_grad():
                for mean, p in zip(averaged.parameters(), plain.parameters(), strict=True):
                    mean.copy_(0.8 * mean + 0.2 * p)
            total_loss += loss.item() / 5
            total_correct += (logits.argmax(1) == labels[chosen]).sum().item()
        metrics = final.history[epoch]
        assert metrics["train_loss"] == pytest.approx(total_loss, rel=1e-4)
        assert metrics["train_accuracy"] == total_correct / 80
        for name, accuracy, loss in [
            ("validation", metrics["validation_accuracy"], metrics["validation_loss"]),
            *([("test", final.test["test_accuracy"], final.test["test_loss"])] if epoch == 2 else []),
        ]:
            pixels, right = images_of(sets, name)
            with torch.no_grad():
                logits = averaged(pixels.double() / 255)
            batches = zip(logits.split(16), right.split(16), strict=True)
            expected = sum(F.cross_entropy(*batch).item() * len(batch[1]) for batch in batches) / len(right)
            assert loss == pytest.approx(expected, rel=1e-4)
            assert accuracy == (logits.argmax(1) == right).double().mean().item()
    for found, expected in [(final.model, plain), (final.averaged, averaged)]:
        for name, parameter in expected.named_parameters():
            torch.testing.assert_close(found[name].double(), parameter.detach(), rtol=1e-3, atol=1e-4)


class PlainBlock(nn.Module):
    """A block with the norm of an image."""

    def __init__(self, block):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = block.conv1, block.conv2, block.conv3

    def forward(self, x):
        hidden = self.conv1(x)
        hidden = F.layer_norm(hidden, hidden.shape[1:])
        return self.conv3(F.gelu(self.conv2(hidden))) + x


class PlainClassifier(nn.Module):
    def __init__(self, model, blocks):
        super().__init__()
        self.stem = model.stem
        self.conv_block_1 = nn.Sequential(*blocks[: len(blocks) // 2])
        self.downsample = model.downsample
        self.conv_block_2 = nn.Sequential(*blocks[len(blocks) // 2 :])
        self.bottleneck = model.bottleneck

    def forward(self, x):
        x = self.stem(x)
        x = self.conv_block_1(F.layer_norm(x, x.shape[1:]))
        x = self.downsample(F.layer_norm(x, x.shape[1:]))
        return self.bottleneck(self.conv_block_2(x)).mean((2, 3))


def test_stopped_anywhere_it_goes_on_bit_for_bit(dataset, tmp_path, monkeypatch):
    unbroken = run(dataset, tmp_path / "unbroken.pt", MODERN)
    path = tmp_path / "checkpoint.pt"
    for epoch, step in itertools.product((1, 2, 3), (1, 4)):
        with pytest.raises(KeyboardInterrupt):
            stop_at(dataset, path, epoch, step, monkeypatch)
        assert checkpoint.load(path).step == step
    final = run(dataset, path, MODERN, resumed=checkpoint.load(path))
    assert_same_weights(final, unbroken)
    assert all(torch.equal(final.averaged[name], unbroken.averaged[name]) for name in unbroken.averaged)
    assert final.test == unbroken.test


def stop_at(dataset, path, epoch, step, monkeypatch):
    """Run on until a step, save there, and stop."""

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "SAVE_SECONDS", 0.0)
        resumed = checkpoint.load(path) if path.exists() else None
        # The step that is reported is saved after the report.
        run(dataset, path, MODERN, Recorder((epoch, step + 1), stop), resumed)


@pytest.mark.parametrize("name", [*INGREDIENTS, "whiten"])
def test_each_ingredient_is_an_option_that_changes_the_run(name, dataset, tmp_path):
    assert getattr(RECIPES["lecture"], name) == getattr(Recipe(), name)
    plain = replace(RECIPE, epochs=1)
    value = getattr(MODERN, name)
    final = run(dataset, tmp_path / "a.pt", replace(plain, **{name: value}))
    before = run(dataset, tmp_path / "b.pt", plain)
    assert not torch.equal(result_of(final).stem.weight, result_of(before).stem.weight)


def result_of(final):
    return prediction.load_model(final, CPU)


def test_the_averaged_weights_evaluate_and_predict(dataset, tmp_path):
    final = run(dataset, tmp_path / "checkpoint.pt", MODERN)
    model = result_of(checkpoint.load(tmp_path / "checkpoint.pt"))
    assert isinstance(model, Classifier)
    assert model.norm == "sample"
    assert torch.equal(model.stem.weight, final.averaged["stem.weight"])
    assert not torch.equal(model.stem.weight, final.model["stem.weight"])
    sets = make_sets(dataset, MODERN, CPU)
    stepper = AutogradStepper(model, None, MODERN, Batches(sets.images, 16))
    assert loss_and_accuracy(stepper, sets.test) == (final.test["test_loss"], final.test["test_accuracy"])


@pytest.mark.parametrize("name", INGREDIENTS)
def test_no_plan_of_launches_holds_an_ingredient(name, dataset, monkeypatch):
    monkeypatch.setattr(planned.decisions, "classifier", lambda *_: "plan")
    lecture = loop.prepare(RECIPE, dataset, CPU, None)
    assert planned.fits(lecture.stepper)
    state = loop.prepare(replace(RECIPE, **{name: getattr(MODERN, name)}), dataset, CPU, None)
    assert not planned.fits(state.stepper)


def test_the_modern_recipe_has_no_more_parameters_than_the_lectures():
    model = make_model(RECIPES["modern"], [3, 32, 32], 10)
    assert sum(p.numel() for p in model.parameters()) == 235_434
    assert RECIPES["modern"].norm == "sample"


@pytest.mark.parametrize(("patch", "width"), [(4, 32), (4, 50), (2, 32), (1, 3), (2, 5)])
def test_a_whitening_stem_gives_uncorrelated_channels_of_the_same_variance(patch, width, monkeypatch):
    """On smooth images, whose neighbouring pixels are alike."""
    monkeypatch.setattr(whitening, "NOISE", 0.0)
    coarse = torch.rand(300, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    images = F.interpolate(coarse, (12, 16), mode="bilinear") + 0.05 * torch.rand(300, 3, 12, 16)
    images = (200 * images).to(torch.uint8)
    torch.manual_seed(0)
    stem = nn.Conv2d(3, width, patch, stride=patch)
    random = stem.weight.detach().clone()
    whitening.whiten(stem, images)
    outputs = stem(images / 255).detach().double().transpose(0, 1).flatten(1)
    directions = min(width, 3 * patch**2)
    assert outputs.mean(1).abs().max() < 1e-3
    found = outputs.cov(correction=0)
    torch.testing.assert_close(found[:directions, :directions], torch.eye(directions).double(), rtol=0, atol=2e-3)
    # Further channels are random directions of the whitened patches, so their variance is one, too.
    torch.testing.assert_close(found.diagonal(), torch.ones(width).double(), rtol=0, atol=2e-3)
    cosines = F.normalize(random[directions:].flatten(1)).double()[:, :directions]
    torch.testing.assert_close(found[directions:, :directions], cosines, rtol=0, atol=2e-3)


def test_noise_is_not_blown_up():
    """The directions of nearly equal pixels but the first have next to no variance."""
    images = torch.randint(255, (500, 1, 1, 1)) + torch.randint(2, (500, 3, 2, 2))
    images = images.to(torch.uint8)
    stem = nn.Conv2d(3, 12, 2, stride=2)
    whitening.whiten(stem, images)
    variances = stem(images / 255).detach().var((0, 2, 3))
    assert variances[0] == pytest.approx(1 / (1 + whitening.NOISE / 12), rel=0.01)
    assert variances[1:].max() < 1e-3
    # All images alike, as a folder may hold.
    whitening.whiten(stem, torch.zeros(5, 3, 4, 4, dtype=torch.uint8))
    assert stem.weight.isfinite().all()


def test_the_whitening_stem_looks_at_some_of_many_numbers(monkeypatch):
    images = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
    found = []
    for most, given in [(7 * 3 * 8 * 8, images), (10**6, images[:7]), (1, images[:1])]:
        monkeypatch.setattr(whitening, "MOST_NUMBERS", most)
        torch.manual_seed(0)
        stem = nn.Conv2d(3, 4, 2, stride=2)
        whitening.whiten(stem, given)
        found.append(stem.weight.detach())
    assert torch.equal(found[0], found[1])
    assert found[2].isfinite().all()
