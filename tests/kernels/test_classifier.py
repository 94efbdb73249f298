"""Planned steps of the classifier against float64: interpreted on a CPU, and again on a GPU."""

import copy

import pytest
import torch
from oracle import assert_accurate
from torch.nn import functional as F

import fastconv

pytest.importorskip("triton")

from fastconv.kernels import decisions
from fastconv.kernels.classifier.plan import Batches, EvaluationPlan, TrainingPlan
from fastconv.kernels.classifier.state import State

pytestmark = pytest.mark.usefixtures("device", "poisoned")

# An epoch is two batches, of which the last has fewer images.
BATCH, TAIL = 3, 2


def make_model(width, depth, dtype=torch.float64, device="cpu"):
    """Both convolutions of patches leave pixels over: maps are of 9x7, 4x3 and 2x1 pixels."""
    model = fastconv.reference.Classifier(width, depth, patch=2, in_channels=2, num_classes=5)
    return model.to(device, dtype)


def make_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)


def make_batches(device="cpu"):
    images, labels = torch.randint(256, (6, 2, 9, 7), dtype=torch.uint8), torch.randint(5, (6,))
    order, position = torch.randint(6, (BATCH + TAIL,)), torch.zeros(1, dtype=torch.int64)
    return Batches(*[x.to(device) for x in (images, labels, order, position)])


def batch_by_pytorch(model, batches, first, images):
    """A batch's mean loss, and its number of correct answers."""
    chosen = batches.order[first : first + images]
    logits = model(batches.images[chosen].to(model.stem.weight) / 255)
    labels = batches.labels[chosen]
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).sum()


def epoch_by_pytorch(model, optimizer, batches):
    """The losses of an epoch's steps, and its number of correct answers."""
    losses, total = [], 0
    for first, images in ((0, BATCH), (BATCH, TAIL)):
        loss, correct = batch_by_pytorch(model, batches, first, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        total += correct
    return torch.stack(losses), total


class Run:
    """Planned training."""

    def __init__(self, model, optimizer, batches, dtype):
        device = batches.images.device
        self.batches, self.state = batches, State(model, optimizer, dtype)
        self.losses = torch.full((2,), torch.nan, dtype=self.state.parameters.dtype, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.step, self.last_step = [
            TrainingPlan(self.state, batches, self.losses, self.correct, images, BATCH) for images in (BATCH, TAIL)
        ]

    def epoch(self):
        """As `epoch_by_pytorch`."""
        self.batches.position.zero_()
        self.correct.zero_()
        self.step()
        self.last_step()
        return self.losses, self.correct


@pytest.mark.parametrize(
    ("dtype", "depth", "samples"), [(torch.float32, 2, 1), (torch.bfloat16, 1, 3)], ids=["float32", "bfloat16"]
)
def test_gradients_of_a_step(dtype, depth, samples, device):
    def sample():
        batches = make_batches()
        # Its parameters in float64 are those that kernels read.
        exact = make_model(3, depth, dtype).double()
        other, ours = copy.deepcopy(exact).to(dtype), copy.deepcopy(exact).to(device, torch.float32)
        for model in (exact, other):
            batch_by_pytorch(model, batches, 0, BATCH)[0].backward()
        run = Run(ours, make_optimizer(ours), Batches(*[x.to(device) for x in batches]), dtype)
        run.step()
        grads = run.state.views(run.state.gradients)
        return {
            name: (grads[name].to("cpu", dtype), p.grad, q.grad)
            for (name, p), q in zip(other.named_parameters(), exact.parameters(), strict=True)
        }

    assert_accurate(sample, dtype, samples)


# For GPUs Triton does not compile products of float64 that were bytes in memory.
@pytest.mark.interpreted
def test_an_epoch_is_pytorchs_and_its_state_goes_both_ways(device):
    batches = make_batches(device)
    other = make_model(1, 2, device=device)
    optimizer = make_optimizer(other)
    for _ in range(2):
        # In the second epoch the plans go on where PyTorch stopped.
        ours = copy.deepcopy(other)
        our_optimizer = make_optimizer(ours)
        our_optimizer.load_state_dict(optimizer.state_dict())
        run = Run(ours, our_optimizer, batches, torch.float64)

        expected = epoch_by_pytorch(other, optimizer, batches)
        torch.testing.assert_close(run.epoch(), expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(ours.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-12)
        states = our_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
        torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12, check_device=False)
        assert list(states[0]) == list(states[1])


@pytest.mark.interpreted
def test_evaluation(device):
    model, batches = make_model(3, 2, device=device), make_batches(device)
    losses = torch.zeros(2, dtype=torch.float64, device=device)
    correct = torch.zeros(1, dtype=torch.int64, device=device)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    expected_losses, expected_correct = [], 0
    for first, images in ((0, BATCH), (BATCH, TAIL)):
        EvaluationPlan(weights, batches, losses, correct, images, BATCH)()
        loss, hits = batch_by_pytorch(model, batches, first, images)
        expected_losses.append(loss.item())
        expected_correct += hits.item()
    assert losses.tolist() == pytest.approx(expected_losses, rel=1e-9)
    assert correct.item() == expected_correct


def test_a_step_repeats_bit_for_bit(device):
    model, batches = make_model(1, 1, torch.float32, device), make_batches(device)
    results = []
    for _ in range(2):
        ours = copy.deepcopy(model)
        run = Run(ours, make_optimizer(ours), batches, torch.bfloat16)
        batches.position.zero_()
        run.step()
        results.append((run.losses[0], run.state.gradients, run.state.parameters, run.state.rounded))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_parameters_are_rounded_again_on_request():
    model = make_model(3, 1, torch.float32)
    state = State(model, make_optimizer(model), torch.bfloat16)
    weight = state.weights["stem.weight"]
    assert torch.equal(weight, model.stem.weight.bfloat16())
    model.load_state_dict(make_model(3, 1, torch.float32).state_dict())
    state.round()
    assert torch.equal(weight, model.stem.weight.bfloat16())


def test_launches_of_the_lectures_step():
    """Without memory nothing can be launched, but all is there."""
    model = fastconv.Classifier().to("meta")
    state = State(model, make_optimizer(model), torch.bfloat16)
    sizes = (50000, 3, 32, 32), (50000,), (40000,), (1,)
    images, *rest = (torch.empty(size, dtype=torch.int64, device="meta") for size in sizes)
    batches = Batches(images.byte(), *rest)
    losses, correct = torch.empty(313, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    assert len(TrainingPlan(state, batches, losses, correct, 128, 128).calls) == 51
    assert len(EvaluationPlan(state.weights, batches, losses, correct, 128, 128).calls) == 26


def test_an_optimizer_that_is_not_the_kernels_adamw_is_refused():
    model = make_model(1, 1)
    some = torch.optim.AdamW(list(model.parameters())[1:])
    with pytest.raises(ValueError, match="17 parameters in 1 groups; expected the classifier's 18 in one"):
        State(model, some, torch.float64)
    with pytest.raises(ValueError, match="amsgrad=True; expected False"):
        State(model, torch.optim.AdamW(model.parameters(), amsgrad=True), torch.float64)


@pytest.mark.parametrize(
    ("norm", "width", "pixels", "form"),
    [
        ("tensor", 64, 256, "plan"),
        ("sample", 32, 64, "parts"),
        ("tensor", 65, 64, "parts"),
        ("tensor", 32, 257, "parts"),
    ],
)
def test_which_classifiers_are_planned(norm, width, pixels, form):
    assert decisions.classifier(norm, width, pixels) == form
