"""Tests the kernels of a backend once, at their first use, on a machine on which nobody has proved them.

Each operation is compared with the reference, by the rule of `fastconv.accuracy`; `verdicts.py` keeps the
verdict for other processes. FASTCONV_SELFTEST=0 turns it off.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastconv import accuracy, machine
from fastconv.accuracy import Error
from fastconv.kernels.common.errors import KernelError
from fastconv.kernels.common.values import Convolution, Norm, Value, map_tensors, span, tensors_in
from fastconv.operations import backends, definition, fallback, setting, verdicts
from fastconv.operations.verdicts import Verdict

# Architectures on which all tests of the kernels have passed, as "sm_90" or "gfx942".
PROVED: frozenset[str] = frozenset()

# Elements of the widest tensor; the exact results are computed on the CPU.
MOST_ELEMENTS = 2**18
MOST_IMAGES = 8
# Where fewer values share a mean and a variance, gradients cancel, and their errors are a matter of chance.
FEWEST_NORMED = 16
SAMPLES = 2
# Below the floor every error is right. In float32 it depends on `torch.get_float32_matmul_precision`, which
# kernels obey.
FLOAT32_FLOORS = {"highest": accuracy.FLOOR[torch.float32], "high": accuracy.TF32_FLOOR, "medium": 1e-2}

_LOCK = threading.Lock()
_TRUSTED: dict[tuple[str, torch.device, Subject], bool] = {}


class Subject(NamedTuple):
    """What one test covers: an operation with one norm and one GELU, its dtypes, and small or large maps.

    The widths from which other kernels run are not told apart.

    Args:
        norm: what the operation's norm is computed over; None if it has no norm.
        large: whether the maps take the convolution for large maps.
        maps: the dtype of the maps.
        dtype: the dtype of the parameters, in which the operation computes.
        approximate: GELU's; None if the operation has none.
    """

    operation: str
    norm: str | None
    large: bool
    maps: torch.dtype
    dtype: torch.dtype
    approximate: str | None = None

    def __str__(self) -> str:
        words = [self.operation, self.norm, _name(self.dtype)]
        if self.maps != self.dtype:
            words.append(f"maps in {_name(self.maps)}")
        if self.large:
            words.append("large maps")
        if self.approximate not in (None, "none"):
            words.append(f"GELU {self.approximate}")
        return ", ".join(word for word in words if word is not None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Sizes(NamedTuple):
    """The arguments with which an operation is tested.

    Args:
        maps: the shape of x.
        values: the other arguments; only the shapes of their tensors count.
        channels_last: whether x has that memory format.
    """

    maps: tuple[int, ...]
    values: tuple[Value, ...]
    channels_last: bool = False


def trusts(backend: str, subject: Subject, device: torch.device, sizes: Sizes) -> bool | None:
    """Whether `auto` may run a backend's kernels of `subject`; None if that cannot be found out now.

    Raises:
        KernelError: a kernel cannot be compiled or loaded.
        BackendUnavailable: FASTCONV_SELFTEST is neither 0 nor 1.
    """
    key = backend, device, subject
    if key not in _TRUSTED:
        if _is_bad_moment(device):
            return None
        with _LOCK:
            if key not in _TRUSTED:
                _TRUSTED[key] = _decide(backend, subject, device, sizes)
    return _TRUSTED[key]


def status(device: torch.device) -> str:
    """Whether the kernels on `device` are "proved", "tested at first use" or, if that is off, "not tested"."""
    if machine.architecture(device) in PROVED:
        return "proved"
    return "tested at first use" if _is_on() else "not tested"


def describe(backend: str, device: torch.device) -> dict[str, Any]:
    """What `fastconv info` reports about a backend's kernels, as JSON; "wrong" gives the reasons."""
    found = verdicts.load(backend, device)
    return {
        "backend": backend,
        "architecture": machine.architecture(device),
        "status": status(device),
        "right": [subject for subject, verdict in found.items() if verdict.right],
        "wrong": {subject: verdict.reason for subject, verdict in found.items() if not verdict.right},
    }


def _is_on() -> bool:
    setting = os.environ.get("FASTCONV_SELFTEST") or "1"
    if setting not in ("0", "1"):
        raise backends.BackendUnavailable(
            f"FASTCONV_SELFTEST is {setting!r}; expected 0, for no self-test of the kernels, or 1"
        )
    return setting == "1"


def _is_bad_moment(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # A backward would wait for the test's, which waits for the same thread of PyTorch.
    return torch.cuda.is_current_stream_capturing() or torch._C._current_graph_task_id() != -1


def _decide(backend: str, subject: Subject, device: torch.device, sizes: Sizes) -> bool:
    if status(device) != "tested at first use":
        return True
    verdict = verdicts.load(backend, device).get(str(subject))
    if verdict is None:
        try:
            verdict = _judge(backend, subject, device, sizes)
        except (MemoryError, RuntimeError) as error:
            if not machine.is_out_of_memory(error):
                raise
            # That says nothing about the kernels.
            return True
        verdicts.save(backend, device, str(subject), verdict)
    if not verdict.right:
        fallback.warn_wrong(backend, str(subject), verdict.reason, device)
    return verdict.right


def _judge(backend: str, subject: Subject, device: torch.device, sizes: Sizes) -> Verdict:
    # Before the thread, which would wait for an import that goes on in this one.
    kernels = backends.implementation(backend)

    # PyTorch keeps for each thread whether there is autocast, no_grad, a default device, a hook on what is saved
    # for a backward, and other modes. A new thread has none of the caller's.
    def worst() -> tuple[str, Error]:
        # Forced, the backend leaves nothing to another that is faster for sizes as small as these.
        with setting.forced(backend):
            return _worst(getattr(kernels, subject.operation), subject, device, sizes)

    with ThreadPoolExecutor(max_workers=1) as thread:
        test = thread.submit(worst)
        try:
            name, error = test.result()
        except KernelError:
            raise
        except Exception as raised:
            if machine.is_out_of_memory(raised):
                raise
            return Verdict(False, f"{type(raised).__name__}: {' '.join(str(raised).split())}")
    return Verdict(error.right, "" if error.right else f"{name}: {error}")


def _worst(
    operation: Callable[..., Tensor], subject: Subject, device: torch.device, sizes: Sizes
) -> tuple[str, Error]:
    """The tensor whose error is closest to its bound, or farthest beyond."""
    generator = torch.Generator().manual_seed(0)
    floor = accuracy.FLOOR[subject.dtype]
    if subject.dtype == torch.float32:
        floor = FLOAT32_FLOORS[torch.get_float32_matmul_precision()]

    def sample() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        return _compare(operation, subject, device, sizes, generator)

    return accuracy.worst(accuracy.judge(sample, floor, SAMPLES))


def _compare(
    operation: Callable[..., Tensor],
    subject: Subject,
    device: torch.device,
    sizes: Sizes,
    generator: torch.Generator,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """{name: (ours, PyTorch's, exact)} of the output, without gradients and with them, and of each gradient."""
    drawn = [_draw(sizes.maps, generator, is_maps=True).to(subject.maps)]
    for parameter in tensors_in(*sizes.values):
        drawn.append(_draw(parameter.shape, generator, is_maps=False).to(subject.dtype))
    exact_inputs, inputs = [x.double() for x in drawn], [x.to(device) for x in drawn]

    def results(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        def call(x: Tensor, *parameters: Tensor) -> Tensor:
            remaining = iter(parameters)
            return function(x, *map_tensors(lambda _: next(remaining), *sizes.values))

        with torch.no_grad():
            alone = call(*tensors)
        grad = _draw(tuple(alone.shape), torch.Generator().manual_seed(1), is_maps=True).to(subject.dtype)
        return [alone, *accuracy.outputs_and_grads(call, tensors, grad.to(device=alone.device))]

    define = functools.partial(definition.call, subject.operation)
    exact, pytorch = results(define, exact_inputs), results(define, inputs)
    if sizes.channels_last:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    found = results(operation, inputs)
    arguments = definition.arguments(subject.operation, inputs[0], *sizes.values)
    names = [name for name, argument in arguments.items() if isinstance(argument, Tensor)]
    return {
        name: (ours.cpu(), other.cpu(), right)
        for name, ours, other, right in zip(
            ["output without gradients", "output", *names], found, pytorch, exact, strict=True
        )
    }


def _draw(shape: tuple[int, ...], generator: torch.Generator, is_maps: bool) -> Tensor:
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    # Weights keep the variance of what they are multiplied with.
    return x if is_maps else x / math.sqrt(math.prod(shape[1:]))


def sizes_of(subject: Subject, x: Tensor, values: tuple[Value, ...]) -> Sizes:
    """The sizes of a call, whose kernels are compiled anyway, but with few images and pixels."""
    channels, height, width = map(int, x.shape[1:])
    first = values[0]
    wide = first.weight.shape[0] if isinstance(first, Convolution) else channels
    widest = max(channels, wide)
    # Enough that large maps stay large.
    pixels = max(1024, MOST_ELEMENTS // widest)
    width = min(width, pixels)
    height = min(height, max(1, pixels // width))
    images = max(1, min(MOST_IMAGES, MOST_ELEMENTS // (widest * height * width)))
    normed = images, wide, height, width
    if subject.norm is not None and math.prod(normed[dim] for dim in span(subject.norm)) < FEWEST_NORMED:
        return usual_sizes(subject)
    channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    # The test is this process's own.
    alone = tuple(value._replace(group=None) if isinstance(value, Norm) else value for value in values)
    return Sizes((images, channels, height, width), alone, channels_last)


def _convolution(outputs: int, inputs: int, side: int) -> Convolution:
    weight, bias = torch.empty(outputs, inputs, side, side, device="meta"), torch.empty(outputs, device="meta")
    return Convolution(weight, bias)


# The lecture's, made here because a caller's modes would see tensors that are made later.
_DEPTHWISE, _POINTWISE, _PROJECTION = _convolution(128, 1, 7), _convolution(32, 128, 1), _convolution(32, 32, 1)
_WIDENING, _PATCHES = _convolution(128, 32, 1), _convolution(128, 32, 2)


def usual_sizes(subject: Subject) -> Sizes:
    """The sizes of the lecture's first block, for where there is no call; large maps have more pixels."""
    side = 20 if subject.large else 8
    norm, approximate = Norm(subject.norm or "tensor", 1e-5, None, None), subject.approximate or "none"
    values: dict[str, tuple[Value, ...]] = {
        "convnext_block": (_DEPTHWISE, _POINTWISE, _PROJECTION, norm, approximate),
        "depthwise_conv_layer_norm": (_DEPTHWISE, norm),
        "layer_norm": (norm,),
        "patch_conv": (_PATCHES,),
        "pointwise_conv_gelu": (_WIDENING, approximate),
    }
    return Sizes((MOST_IMAGES, 32, side, side), values[subject.operation])
