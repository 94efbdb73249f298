"""The public operations: check arguments, apply autocast, run where `fastconv.operations.dispatch` says.

Each is defined by the function of the same name in `fastconv.reference`: results and gradients also have the
strides that PyTorch's own operations give for the same arguments. Fused kernels compute with plain tensors,
eagerly or under `torch.compile`, and their first derivatives. All else is computed by PyTorch's own operations:
in the backward second derivatives and batches of gradients; and from the start forward mode, `torch.func`, tracers
and, unless a backend is forced, exporters, modes and subclasses of tensors.

With `_unseen` results and gradients lie as suits our operations, of which one hands them to another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from fastconv.kernels.common.rules import accumulator
from fastconv.kernels.common.values import APPROXIMATIONS as APPROXIMATIONS
from fastconv.kernels.common.values import NORMS as NORMS
from fastconv.kernels.common.values import (
    Convolution,
    Norm,
    Value,
    check_approximate,
    check_norm,
    map_tensors,
    spans_images,
)
from fastconv.operations import backends, dispatch, reference
from fastconv.operations.watchers import is_symbolic

if TYPE_CHECKING:
    # Not every build of PyTorch has it.
    from torch.distributed import ProcessGroup

_Function = TypeVar("_Function", bound=Callable[..., Tensor])


def _recorded_by_definition(operation: _Function) -> _Function:
    """An operation that leaves maps that are symbols to its definition: nothing can be checked of them."""

    @functools.wraps(operation)
    def call(x: Any, *args: Any, **kwargs: Any) -> Tensor:
        if is_symbolic(x):
            return getattr(reference, operation.__name__)(x, *args, **kwargs)
        return operation(x, *args, **kwargs)

    return cast(_Function, call)


@_recorded_by_definition
def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    process_group: ProcessGroup | str | None = None,
) -> Tensor:
    """Depthwise convolution with "same" zero padding, then layer norm.

    Output channel c * M + m of the convolution reads input channel c, as with `groups=C` in PyTorch. The norm
    is that of Ba et al., "Layer Normalization", arXiv:1607.06450, with biased variance. The result has the dtype
    of `x`, or under autocast the autocast dtype; it is channels_last with norm "channel" and otherwise contiguous.
    Statistics are float32 or better. A NaN or an infinity in `x` may spread over its map, not only as far as the
    kernel.

    Args:
        x: floating point (N, C, H, W), of any strides.
        weight: (C * M, 1, kh, kw), kh and kw odd, M >= 1.
        bias: (C * M,), or None.
        norm: what each mean and variance is computed over: "tensor", everything, batch included; "sample", the
            channels and pixels of one image; "channel", the channels of one pixel.
        eps: added to the variance.
        norm_weight: (C * M,), of any floating dtype, multiplies the normalised tensor; None is 1.
        norm_bias: (C * M,), of any floating dtype, is added to the product; None is 0.
        process_group: the ranks, of `torch.distributed`, that each have some of the images, or none, over which
            norm "tensor" takes its mean and variance; or the group's name. Gradients are those of the sum of all
            ranks' losses. Every rank has to call the operation, and its backward. Other norms ignore it.

    Returns:
        (N, C * M, H, W)

    Raises:
        TypeError: an argument is not a floating point tensor, or `weight` or `bias` has not the dtype of `x`, and
            autocast is off; or `process_group` is no group that this process is in.
        ValueError: a shape, a device, `norm` or `eps` is wrong.
        BackendUnavailable: the forced backend cannot run it.
    """
    _, channels, _, _ = _check_maps(x)
    _check_tensors(x, weight=weight, bias=bias)
    outputs = _check_depthwise("weight", weight, channels)
    _check_vector("bias", bias, outputs)
    normed = _checked_norm(x, norm, eps, norm_weight, norm_bias, outputs, process_group)
    return _run("depthwise_conv_layer_norm", x, Convolution(weight, bias), normed)


@_recorded_by_definition
def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """1x1 convolution, then GELU (Hendrycks and Gimpel, arXiv:1606.08415).

    The result has the dtype of `x`, or under autocast the autocast dtype. As with PyTorch's convolution it is
    channels_last if `x` or `weight` is, and else contiguous.

    Args:
        x: floating point (N, I, H, W), of any strides.
        weight: (O, I, 1, 1).
        bias: (O,), or None.
        approximate: "none", by the error function; or "tanh".

    Returns:
        (N, O, H, W)

    Raises:
        TypeError, ValueError, BackendUnavailable: as `depthwise_conv_layer_norm`.
    """
    _, channels, _, _ = _check_maps(x)
    _check_tensors(x, weight=weight, bias=bias)
    outputs = _check_pointwise("weight", weight, channels)
    _check_vector("bias", bias, outputs)
    check_approximate(approximate)
    return _run("pointwise_conv_gelu", x, Convolution(weight, bias), approximate)


@_recorded_by_definition
def convnext_block(
    x: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_weight: Tensor,
    pointwise_bias: Tensor | None,
    projection_weight: Tensor,
    projection_bias: Tensor | None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    process_group: ProcessGroup | str | None = None,
    approximate: str = "none",
    _unseen: bool = False,
) -> Tensor:
    """The lecture's block: projection(gelu(pointwise(layer_norm(depthwise(x))))) + x.

    As one operation it need not write the normalised tensor, the widest of the block, at all. The result has
    the dtype of `x`; under autocast, the wider of its dtype and the autocast dtype. It is channels_last with norm
    "channel" or weights that are, and else contiguous, as the first operand of the sum.

    Args:
        x: floating point (N, C, H, W), of any strides.
        depthwise_weight, depthwise_bias, norm, eps, norm_weight, norm_bias, process_group: as
            `depthwise_conv_layer_norm`'s.
        pointwise_weight: (O, C * M, 1, 1), with bias (O,) or None.
        projection_weight: (C, O, 1, 1), with bias (C,) or None.
        approximate: as `pointwise_conv_gelu`'s.

    Returns:
        (N, C, H, W)

    Raises:
        TypeError, ValueError, BackendUnavailable: as `depthwise_conv_layer_norm`.
    """
    _, channels, _, _ = _check_maps(x)
    _check_tensors(
        x,
        depthwise_weight=depthwise_weight,
        depthwise_bias=depthwise_bias,
        pointwise_weight=pointwise_weight,
        pointwise_bias=pointwise_bias,
        projection_weight=projection_weight,
        projection_bias=projection_bias,
    )
    wide = _check_depthwise("depthwise_weight", depthwise_weight, channels)
    _check_vector("depthwise_bias", depthwise_bias, wide)
    normed = _checked_norm(x, norm, eps, norm_weight, norm_bias, wide, process_group)
    hidden = _check_pointwise("pointwise_weight", pointwise_weight, wide)
    _check_vector("pointwise_bias", pointwise_bias, hidden)
    outputs = _check_pointwise("projection_weight", projection_weight, hidden)
    _check_vector("projection_bias", projection_bias, channels)
    if outputs != channels:
        raise ValueError(
            f"projection_weight has {outputs} outputs; "
            f"expected the {channels} channels of x, to which they are added"
        )
    check_approximate(approximate)
    return _run(
        "convnext_block",
        x,
        Convolution(depthwise_weight, depthwise_bias),
        Convolution(pointwise_weight, pointwise_bias),
        Convolution(projection_weight, projection_bias),
        normed,
        approximate,
        # The block works in the dtype of its weights, but adds the result to x as it is.
        autocast_x=False,
        unseen=_unseen,
    )


@_recorded_by_definition
def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    process_group: ProcessGroup | str | None = None,
    _unseen: bool = False,
) -> Tensor:
    """Layer norm of maps (N, C, H, W), with the arguments, errors and format of `depthwise_conv_layer_norm`.

    The result has the shape and dtype of `x`, but under autocast it is float32: PyTorch's autocast does so on
    GPUs, and it keeps the residual stream of the lecture's classifier in float32.
    """
    _, channels, _, _ = _check_maps(x)
    normed = _checked_norm(x, norm, eps, norm_weight, norm_bias, channels, process_group)
    return _run("layer_norm", x, normed, autocast_dtype=torch.float32, unseen=_unseen)


@_recorded_by_definition
def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, _unseen: bool = False) -> Tensor:
    """Convolution of patches that do not overlap: its stride is the size of its kernel.

    The result has the dtype and the format of `pointwise_conv_gelu`'s.

    Args:
        x: floating point (N, I, H, W), of any strides, at least one patch high and wide. What is left over at
            the bottom and the right beyond whole patches is ignored.
        weight: (O, I, kh, kw).
        bias: (O,), or None.

    Returns:
        (N, O, H // kh, W // kw)

    Raises:
        TypeError, ValueError, BackendUnavailable: as `depthwise_conv_layer_norm`.
    """
    _, channels, height, width = _check_maps(x)
    _check_tensors(x, weight=weight, bias=bias)
    if weight.dim() != 4 or weight.shape[1] != channels or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {_shape(weight)}; expected (outputs, {channels}, height, width), "
            f"for the {channels} channels of x"
        )
    _check_vector("bias", bias, weight.shape[0])
    if height < weight.shape[2] or width < weight.shape[3]:
        raise ValueError(
            f"x is {height} x {width} pixels; expected at least one patch of "
            f"{weight.shape[2]} x {weight.shape[3]}: give larger images or a smaller patch"
        )
    return _run("patch_conv", x, Convolution(weight, bias), unseen=_unseen)


def _run(
    operation: str,
    x: Tensor,
    *values: Value,
    autocast_dtype: torch.dtype | None = None,
    autocast_x: bool = True,
    unseen: bool = False,
) -> Tensor:
    """Run an operation; under autocast, as PyTorch's convolutions, in its dtype; norms keep theirs, if wider."""
    dtype = backends.autocast_dtype(x)
    if dtype is None:
        return dispatch.run(operation, x, values, unseen)
    dtype = autocast_dtype or dtype

    def cast(tensor: Tensor) -> Tensor:
        # Autocast leaves float64 alone.
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    def widened(tensor: Tensor) -> Tensor:
        return tensor.to(torch.promote_types(tensor.dtype, dtype))

    cast_values = [map_tensors(widened if isinstance(value, Norm) else cast, value)[0] for value in values]
    with torch.autocast(x.device.type, enabled=False):
        return dispatch.run(operation, cast(x) if autocast_x else x, tuple(cast_values), unseen)


# An eager step on a GPU is bound by the host: attributes that cost a call into PyTorch are read once.


def _check_maps(x: Tensor) -> torch.Size:
    """Return its shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor (N, C, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected floating point: convert it with x.float()")
    shape = x.shape
    if len(shape) != 4:
        raise ValueError(
            f"x has shape {_shape(x)}; expected (N, C, H, W): for one image, add the batch with x[None]"
        )
    _, channels, height, width = shape
    if not (channels and height and width):
        raise ValueError(f"x has shape {_shape(x)}; expected at least one channel and one pixel")
    return shape


def _check_tensors(x: Tensor, **tensors: Tensor | None) -> None:
    """Check that all are tensors on the device of `x`, and, except under autocast, have its dtype."""
    dtype = x.dtype
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check_tensor(name, tensor, x)
        if tensor.dtype != dtype and backends.autocast_dtype(x) is None:
            raise TypeError(f"{name} has dtype {tensor.dtype}, x {dtype}; convert one, or use torch.autocast")


def _check_tensor(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move them to one device")


def _check_vector(name: str, vector: Tensor | None, length: int) -> None:
    if vector is not None and vector.shape != (length,):
        raise ValueError(f"{name} has shape {_shape(vector)}; expected ({length},), one for each output channel")


def _check_depthwise(name: str, weight: Tensor, channels: int) -> int:
    """Return the number of outputs."""
    shape = weight.shape
    outputs, inputs, height, width = shape if len(shape) == 4 else (0, 0, 0, 0)
    if inputs != 1 or outputs == 0 or outputs % channels:
        raise ValueError(
            f"{name} has shape {_shape(weight)}; expected ({channels} * multiplier, 1, height, width), "
            f"for the {channels} channels of x"
        )
    if height % 2 == 0 or width % 2 == 0:
        raise ValueError(
            f'{name} has a kernel of {height} x {width}; expected odd sides, for which "same" padding is symmetric'
        )
    return outputs


def _check_pointwise(name: str, weight: Tensor, inputs: int) -> int:
    """Return the number of outputs."""
    shape = weight.shape
    if len(shape) != 4 or shape != (shape[0], inputs, 1, 1):
        raise ValueError(f"{name} has shape {_shape(weight)}; expected (outputs, {inputs}, 1, 1)")
    return shape[0]


def _checked_norm(
    x: Tensor,
    over: str,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    channels: int,
    process_group: ProcessGroup | str | None,
) -> Norm:
    """The norm, with parameters in the dtype of `x`; or, if one has another, in that in which `x` is summed."""
    check_norm(over, eps)
    dtypes = {x.dtype}
    for name, vector in (("norm_weight", weight), ("norm_bias", bias)):
        if vector is None:
            continue
        _check_tensor(name, vector, x)
        if not vector.is_floating_point():
            raise TypeError(f"{name} has dtype {vector.dtype}; expected floating point: convert it with .float()")
        _check_vector(name, vector, channels)
        dtypes.add(vector.dtype)
    norm = Norm(over, eps, weight, bias, name_of_group(process_group) if spans_images(over) else None)
    return norm if len(dtypes) == 1 else map_tensors(lambda vector: vector.to(accumulator(x)), norm)[0]


def name_of_group(group: ProcessGroup | str | None) -> str | None:
    """The name by which functional collectives, and values that can be copied, know a process group."""
    name = group if group is None or isinstance(group, str) else getattr(group, "group_name", group)
    if name is not None and not isinstance(name, str):
        raise TypeError(
            f"process_group is {group!r}; expected a ProcessGroup of torch.distributed that this process is in, "
            "such as torch.distributed.group.WORLD after init_process_group, or None"
        )
    return name


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
