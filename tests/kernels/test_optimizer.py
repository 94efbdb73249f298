"""The kernels that end a step: the sum of all partial gradients, AdamW beside PyTorch's, and counts of a batch."""

import pytest
import torch
from oracle import assert_accurate
from torch.nn import functional as F

pytest.importorskip("triton")
from fastconv.kernels.optimizer.tiling import (
    Columns,
    Matrices,
    StepReduction,
    adamw_hyperparameters,
    adamw_launch,
    end_evaluation_launch,
)
from fastconv.kernels.toeplitz.tiling import ToeplitzTiling

pytestmark = pytest.mark.usefixtures("device", "poisoned")

# Two sizes of maps, three kernels; one block of rows or of columns, several, and parts of one; single elements.
PARTIALS = [
    Columns(5, 7),
    Matrices(3, 4, (3, 2), (3, 3)),
    Columns(33, 257),
    Matrices(1, 2, (5, 4), (7, 7)),
    Columns(1, 1),
    Matrices(2, 1, (5, 4), (5, 3)),
    Columns(64, 128),
    Matrices(2, 3, (3, 2), (3, 3)),
    Matrices(2, 1, (9, 8), (3, 9)),
    Matrices(1, 1, (1, 1), (1, 1)),
]


class Step:
    """A reduction of PARTIALS and its tensors; the third step of an epoch in batches of 4, here of 3 images."""

    def __init__(self, device, dtype=torch.float32, partials=PARTIALS):
        self.reduction = StepReduction(partials)
        # Between the views it holds NaN.
        self.workspace = torch.empty(self.reduction.size, dtype=dtype)
        self.views = self.reduction.views(self.workspace)
        for view in sum(self.views, ()):
            view.normal_()
        self.losses, self.correct = torch.rand(5, dtype=dtype), torch.arange(5, dtype=torch.int32)
        self.gradients = torch.empty(self.reduction.length, dtype=dtype)
        self.step_losses, self.total_correct = torch.zeros(4, dtype=dtype), torch.tensor([100])
        self.steps = torch.full((6,), 17.0)
        self.device = device

    def __call__(self):
        """Run it on the device, and bring what it writes back."""
        results = self.gradients, self.step_losses, self.total_correct, self.steps
        on_device = [x.to(self.device) for x in results]
        read = self.workspace, self.reduction.table(), self.losses, self.correct, torch.tensor([8])
        launch = self.reduction.launch(parts=5, images=3, batch=4, parameters=6)
        launch(*(x.to(self.device) for x in read), *on_device)
        for result, x in zip(results, on_device, strict=True):
            result.copy_(x)

    def exact(self):
        """The gradients in float64."""
        gradients = []
        for part, (matrices, *biases) in zip(PARTIALS, self.views, strict=True):
            sums = matrices.double().sum(0)
            gradients += [fold(sums, part), biases[0].double().sum(0)] if biases else [sums]
        return torch.cat([gradient.flatten() for gradient in gradients])


def fold(matrices, part):
    """The gradient of taps from that of the Toeplitz matrices [outputs, P, P], by autograd.

    A convolution of maps with one pixel each gives the matrices.
    """
    taps = torch.zeros(part.outputs, 1, *part.kernel, dtype=torch.float64, requires_grad=True)
    pixels = matrices.shape[1]
    maps = torch.eye(pixels, dtype=torch.float64).view(pixels, 1, *part.map)
    y = F.conv2d(maps, taps, padding="same").view(pixels, part.outputs, pixels).transpose(0, 1)
    return torch.autograd.grad(y, taps, matrices)[0]


def test_all_partial_gradients_are_summed(device):
    def sample():
        step = Step(device)
        step()
        exact = step.exact()
        return {"gradients": (step.gradients, exact.float(), exact)}

    assert_accurate(sample, samples=2)


def test_sums_in_float64(device):
    step = Step(device, torch.float64)
    step()
    torch.testing.assert_close(step.gradients, step.exact())


def test_the_step_is_counted(device):
    step = Step(device)
    for _ in range(2):
        step()
    expected = torch.tensor([0, 0, step.losses.double().sum() / 3, 0])
    torch.testing.assert_close(step.step_losses, expected.float())
    assert step.total_correct.tolist() == [100 + 2 * 10]
    assert step.steps.tolist() == [19.0] * 6


def test_a_step_sums_as_the_reduction_of_one_block_does(device):
    # Maps (2, 2, 3, 5), four outputs, 3x3 taps.
    rows, length, blocks = 37, 130, 3
    step = Step(device, partials=[Columns(5, 3), Columns(rows, length), Matrices(blocks, 4, (3, 5), (3, 3))])
    step()
    _, (columns,), (matrices, biases) = step.views
    tiling = ToeplitzTiling(torch.empty(2, 2, 3, 5), torch.empty(4, 1, 3, 3), "tensor")
    expected = torch.empty(length + 4 * 9 + 4, device=device)
    tiling.reduce(rows, length, blocks)(*(x.to(device) for x in (columns, matrices, biases)), expected)
    if device == "cpu":
        assert torch.equal(step.gradients[3:], expected.cpu())
    # A length that the compiler knows changes which threads add what.
    torch.testing.assert_close(step.gradients[3:], expected.cpu(), rtol=1e-5, atol=1e-5)


def test_sums_repeat_bit_for_bit(device):
    step = Step(device)
    step()
    first = step.gradients.clone()
    step()
    assert torch.equal(step.gradients, first)


def test_the_longest_programs_come_first_and_equal_ones_in_the_order_of_parameters():
    reduction = StepReduction([Columns(2, 9), Matrices(1, 2, (2, 2), (1, 1)), Columns(64, 200), Columns(3, 6)])
    starts = [part[0].storage_offset() for part in reduction.views(torch.empty(reduction.size))]
    programs = [starts[i] for i in (2, 2, 0, 3, 1, 1)]
    assert reduction.table()[:, 1].tolist() == programs


# lr, beta1, beta2, eps, weight decay
HYPERPARAMETERS = {
    "PyTorch's": (1e-3, 0.9, 0.999, 1e-8, 0.01),
    "no decay": (0.02, 0.5, 0.9, 1e-4, 0.0),
    "large decay": (0.1, 0.8, 0.99, 1e-8, 5.0),
    "no momentum": (1e-3, 0.0, 0.0, 1e-8, 0.01),
}
# Two programs, the second not full.
LENGTH = 600


def draw_steps(scale, first):
    """Parameters, AdamW's moments after step `first`, and gradients of twenty steps; float64."""
    grads = scale * torch.randn(20, LENGTH, dtype=torch.float64)
    grads[:, ::7] = 0
    started = first > 0
    moments = started * scale * torch.randn(LENGTH).double(), started * scale**2 * torch.rand(LENGTH).double()
    return torch.randn(LENGTH, dtype=torch.float64), *moments, grads


def steps_of_pytorch(dtype, drawn, first, options):
    parameters, exp_avg, exp_avg_sq, grads = (x.to(dtype, copy=True) for x in drawn)
    parameter = torch.nn.Parameter(parameters)
    lr, *betas, eps, weight_decay = options
    optimizer = torch.optim.AdamW([parameter], lr, betas, eps, weight_decay)
    step = torch.tensor(float(first))
    optimizer.state[parameter] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    return parameter.detach(), exp_avg, exp_avg_sq


def steps_of_ours(dtype, drawn, first, options, device, rounded=None):
    parameters, exp_avg, exp_avg_sq, grads = (x.to(device, dtype, copy=True) for x in drawn)
    steps, position = torch.full((3,), float(first), device=device), torch.tensor([5], device=device)
    launch = adamw_launch(LENGTH, 4, rounded is not None)
    hyperparameters = adamw_hyperparameters(*options).to(device)
    for grad in grads:
        steps += 1
        launch(parameters, grad, exp_avg, exp_avg_sq, steps, hyperparameters, rounded, position)
    assert position.tolist() == [5 + 4 * len(grads)]
    return parameters, exp_avg, exp_avg_sq


NAMES = "parameters", "exp_avg", "exp_avg_sq"


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_adamw_is_as_accurate_as_pytorchs(name, scale, device):
    options = HYPERPARAMETERS[name]

    def sample():
        drawn = [x.float() for x in draw_steps(scale, 0)]
        ours = [x.cpu() for x in steps_of_ours(torch.float32, drawn, 0, options, device)]
        other = steps_of_pytorch(torch.float32, drawn, 0, options)
        exact = steps_of_pytorch(torch.float64, drawn, 0, options)
        return dict(zip(NAMES, zip(ours, other, exact, strict=True), strict=True))

    assert_accurate(sample, samples=1)


def test_gradients_whose_squares_overflow_are_as_in_pytorch(device):
    drawn, options = [x.float() for x in draw_steps(1e22, 0)], HYPERPARAMETERS["PyTorch's"]
    ours = steps_of_ours(torch.float32, drawn, 0, options, device)
    for mine, other in zip(ours, steps_of_pytorch(torch.float32, drawn, 0, options), strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=1e-3, atol=0, equal_nan=True)


@pytest.mark.parametrize("first", [0, 1000])
@pytest.mark.parametrize("name", HYPERPARAMETERS)
def test_adamw_in_float64_is_pytorchs(name, first, device):
    drawn, options = draw_steps(1.0, first), HYPERPARAMETERS[name]
    ours = steps_of_ours(torch.float64, drawn, first, options, device)
    for mine, exact in zip(ours, steps_of_pytorch(torch.float64, drawn, first, options), strict=True):
        torch.testing.assert_close(mine.cpu(), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_rounded_copy(dtype, device):
    rounded = torch.empty(LENGTH, dtype=dtype, device=device)
    drawn = draw_steps(1.0, 0)
    parameters, _, _ = steps_of_ours(torch.float32, drawn, 0, HYPERPARAMETERS["PyTorch's"], device, rounded)
    assert torch.equal(rounded, parameters.to(dtype))


def test_outcomes_of_batches_are_entered(device):
    """Two batches of at most 30 images, at the second and third step."""
    losses, correct = torch.rand(5, device=device), torch.arange(5, dtype=torch.int32, device=device)
    step_losses, hits = torch.zeros(4, device=device), torch.tensor([7], device=device)
    position = torch.tensor([30], device=device)
    for images in (30, 3):
        end_evaluation_launch(5, images, 30)(losses, correct, position, step_losses, hits)
    mean = losses.double().sum().item()
    assert step_losses.tolist() == pytest.approx([0, mean / 30, mean / 3, 0], rel=1e-6)
    assert (hits.item(), position.item()) == (27, 63)
