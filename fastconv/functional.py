"""The public operations: check the arguments, apply autocast, run the chosen backend.

Each is defined by the function of the same name in `fastconv.reference`. They can be differentiated once, in
reverse; for second derivatives, forward mode, `torch.func` and `vmap` use `fastconv.backend("reference")`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastconv import backends

NORMS = ("tensor", "sample", "channel")
APPROXIMATIONS = ("none", "tanh")


def depthwise_conv_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Depthwise convolution with "same" zero padding, then layer norm.

    Output channel c * M + m of the convolution reads input channel c, as with `groups=C` in PyTorch. The norm
    is that of Ba et al., "Layer Normalization", arXiv:1607.06450, with biased variance. The result has the
    dtype and the memory format of `x`; under autocast it has the autocast dtype. Statistics are float32 or
    better. A NaN or an infinity in `x` may spread over its map, not only as far as the kernel.

    Args:
        x: floating point (N, C, H, W), of any strides.
        weight: (C * M, 1, kh, kw), kh and kw odd, M >= 1.
        bias: (C * M,), or None.
        norm: what one mean and variance span: "tensor", everything, batch included; "sample", the channels
            and pixels of one image; "channel", the channels of one pixel.
        eps: added to the variance.
        norm_weight: (C * M,), multiplies the normalised tensor; None is 1.
        norm_bias: (C * M,), is added then; None is 0.

    Returns:
        (N, C * M, H, W)

    Raises:
        TypeError: an argument is not a floating point tensor, or dtypes differ outside autocast.
        ValueError: a shape, a device, `norm` or `eps` is wrong.
        BackendUnavailable: the forced backend cannot run it.
    """
    _check_maps(x)
    _check_depthwise(x, weight, bias)
    _check_norm(x, weight.shape[0], norm, eps, norm_weight, norm_bias)
    return _run(
        "depthwise_conv_layer_norm",
        x,
        weight,
        bias,
        norm=norm,
        eps=eps,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
    )


def pointwise_conv_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, approximate: str = "none"
) -> Tensor:
    """1x1 convolution, then GELU (Hendrycks and Gimpel, arXiv:1606.08415).

    The result has the dtype and the memory format of `x`; under autocast it has the autocast dtype.

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
    _check_maps(x)
    _check_pointwise("weight", x, weight, x.shape[1])
    _check_vector("bias", x, bias, weight.shape[0])
    _check_gelu(approximate)
    return _run("pointwise_conv_gelu", x, weight, bias, approximate=approximate)


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
    approximate: str = "none",
) -> Tensor:
    """The lecture's block: x + projection(gelu(pointwise(layer_norm(depthwise(x))))).

    As one operation it need not write the normalised tensor, the widest of the block, at all. The result has
    the memory format of `x`, and its dtype; under autocast, the wider of its dtype and the autocast dtype.

    Args:
        x: floating point (N, C, H, W), of any strides.
        depthwise_weight, depthwise_bias, norm, eps, norm_weight, norm_bias: as `depthwise_conv_layer_norm`'s.
        pointwise_weight: (O, C * M, 1, 1), with bias (O,) or None.
        projection_weight: (C, O, 1, 1), with bias (C,) or None.
        approximate: as `pointwise_conv_gelu`'s.

    Returns:
        (N, C, H, W)

    Raises:
        TypeError, ValueError, BackendUnavailable: as `depthwise_conv_layer_norm`.
    """
    _check_maps(x)
    _check_depthwise(x, depthwise_weight, depthwise_bias, prefix="depthwise_")
    _check_norm(x, depthwise_weight.shape[0], norm, eps, norm_weight, norm_bias)
    _check_pointwise("pointwise_weight", x, pointwise_weight, depthwise_weight.shape[0])
    _check_vector("pointwise_bias", x, pointwise_bias, pointwise_weight.shape[0])
    _check_pointwise("projection_weight", x, projection_weight, pointwise_weight.shape[0])
    _check_vector("projection_bias", x, projection_bias, x.shape[1])
    if projection_weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"projection_weight has {projection_weight.shape[0]} outputs; "
            f"expected the {x.shape[1]} channels of x, to which they are added"
        )
    _check_gelu(approximate)
    return _run(
        "convnext_block",
        x,
        depthwise_weight,
        depthwise_bias,
        pointwise_weight,
        pointwise_bias,
        projection_weight,
        projection_bias,
        norm=norm,
        eps=eps,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        approximate=approximate,
        # The block works in the dtype of its weights, but adds the result to x as it is.
        autocast_x=False,
    )


def layer_norm(
    x: Tensor,
    *,
    norm: str = "tensor",
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
) -> Tensor:
    """Layer norm of maps (N, C, H, W), with the arguments and errors of `depthwise_conv_layer_norm`.

    The result has the shape, dtype and memory format of `x`, but under autocast it is float32: PyTorch's
    autocast does so on GPUs, and it keeps the residual stream of the lecture's classifier in float32.
    """
    _check_maps(x)
    _check_norm(x, x.shape[1], norm, eps, norm_weight, norm_bias)
    return _run(
        "layer_norm",
        x,
        norm=norm,
        eps=eps,
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        autocast_dtype=torch.float32,
    )


def patch_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolution of patches that do not overlap: its stride is the size of its kernel.

    The result is in the memory format that suits the next operation best, whatever that of `x`.

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
    _check_maps(x)
    _check_tensor("weight", weight, x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {_shape(weight)}; expected (outputs, {x.shape[1]}, height, width), "
            f"for the {x.shape[1]} channels of x"
        )
    _check_vector("bias", x, bias, weight.shape[0])
    if x.shape[2] < weight.shape[2] or x.shape[3] < weight.shape[3]:
        raise ValueError(
            f"x is {x.shape[2]} x {x.shape[3]} pixels; expected at least one patch of "
            f"{weight.shape[2]} x {weight.shape[3]}: give larger images or a smaller patch"
        )
    return _run("patch_conv", x, weight, bias)


def _run(
    operation: str,
    x: Tensor,
    *parameters: Tensor | None,
    autocast_dtype: torch.dtype | None = None,
    autocast_x: bool = True,
    **options: Any,
) -> Tensor:
    """Run an operation on the chosen backend; under autocast, as PyTorch's convolutions, in its dtype."""
    run: Callable[..., Tensor] = getattr(backends.select(operation, x), operation)
    device = x.device.type
    if not _autocasts(x):
        return run(x, *parameters, **options)
    dtype = autocast_dtype or torch.get_autocast_dtype(device)

    def cast(value: Any) -> Any:
        # Autocast leaves float64 alone.
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype != torch.float64 else value

    with torch.autocast(device, enabled=False):
        return run(
            cast(x) if autocast_x else x,
            *(cast(parameter) for parameter in parameters),
            **{name: cast(value) for name, value in options.items()},
        )


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    # The meta device has none, and to ask is an error there.
    return device != "meta" and torch.is_autocast_enabled(device)


def _check_maps(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; expected a tensor (N, C, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected floating point: convert it with x.float()")
    if x.dim() != 4:
        raise ValueError(
            f"x has shape {_shape(x)}; expected (N, C, H, W): for one image, add the batch with x[None]"
        )
    if 0 in x.shape[1:]:
        raise ValueError(f"x has shape {_shape(x)}; expected at least one channel and one pixel")


def _check_tensor(name: str, tensor: Tensor, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}; move them to one device")
    if tensor.dtype != x.dtype and not _autocasts(x):
        raise TypeError(f"{name} has dtype {tensor.dtype}, x {x.dtype}; convert one, or use torch.autocast")


def _check_vector(name: str, x: Tensor, vector: Tensor | None, length: int) -> None:
    if vector is None:
        return
    _check_tensor(name, vector, x)
    if vector.shape != (length,):
        raise ValueError(f"{name} has shape {_shape(vector)}; expected ({length},), one for each output channel")


def _check_depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    name, channels = f"{prefix}weight", x.shape[1]
    _check_tensor(name, weight, x)
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[0] == 0 or weight.shape[0] % channels:
        raise ValueError(
            f"{name} has shape {_shape(weight)}; expected ({channels} * multiplier, 1, height, width), "
            f"for the {channels} channels of x"
        )
    if weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(
            f"{name} has a kernel of {weight.shape[2]} x {weight.shape[3]}; expected odd sides, "
            'for which "same" padding is symmetric'
        )
    _check_vector(f"{prefix}bias", x, bias, weight.shape[0])


def _check_pointwise(name: str, x: Tensor, weight: Tensor, inputs: int) -> None:
    _check_tensor(name, weight, x)
    if weight.dim() != 4 or weight.shape[1:] != (inputs, 1, 1):
        raise ValueError(f"{name} has shape {_shape(weight)}; expected (outputs, {inputs}, 1, 1)")


def _check_norm(
    x: Tensor, channels: int, norm: str, eps: float, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected at least 0")
    _check_vector("norm_weight", x, norm_weight, channels)
    _check_vector("norm_bias", x, norm_bias, channels)


def _check_gelu(approximate: str) -> None:
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"approximate is {approximate!r}; expected one of {', '.join(APPROXIMATIONS)}")


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
