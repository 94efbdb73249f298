"""The fused operations as nn.Modules, with the lecture's arguments, defaults and state_dict keys.

They compute from the parameters of their parts only while these are plain convolutions of the kind that is fused;
a part that was replaced, wrapped, hooked or set otherwise is called, as in the lecture's modules. So is each part
where torch.fx or torch.jit.trace records a graph, which is then that of the lecture's modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import symbolic_trace
from torch.nn import functional as F

from fastconv.kernels.common.values import check_approximate, check_norm
from fastconv.operations import functional
from fastconv.operations.watchers import is_composed, is_symbolic
from fastconv.plain import is_plain

if TYPE_CHECKING:
    # Not every build of PyTorch has it.
    from torch.distributed import ProcessGroup


class Scriptable(nn.Module):
    """Mixed into a module before its base: TorchScript, which cannot read our forward, compiles its graph."""

    def __prepare_scriptable__(self) -> nn.Module:
        program = symbolic_trace(self)
        for node in program.graph.nodes:
            # Annotations are strings, which are no types of TorchScript's.
            node.type = None
        program.recompile()
        return program


class Normed(nn.Module):
    """Mixed into a module with a norm before its base: over which process group the norm "tensor" goes.

    Attributes:
        process_group: the group's name, which unlike the group can be copied and pickled; None if every process
            takes the mean and variance of its own images.
    """

    norm: str
    process_group: str | None = None

    def _set_process_group(self, group: ProcessGroup | str | None) -> None:
        self.process_group = functional.name_of_group(group)


class DepthwiseConvLayerNorm(Normed, Scriptable, nn.Conv2d):
    """`nn.Conv2d(C, C * M, kernel_size, padding="same", groups=C)`, then layer norm, as one operation.

    Its parameters are those of `nn.Conv2d`, with the same initial values, and `norm_weight` and `norm_bias`,
    (C * M,), if `affine`.

    Args:
        in_channels: C.
        multiplier: M, convolution outputs for each input channel.
        kernel_size: an odd number of pixels.
        norm: what each mean and variance is computed over: "tensor", "sample" or "channel".
        eps: added to the variance.
        affine: scale and shift each channel after the norm.
        bias: add a bias to the convolution.
        process_group: of `torch.distributed`, whose ranks each have some of the images, or none, over which the
            norm "tensor" takes its mean and variance. Every rank has to call the module, and its backward.

    Shape: (N, C, H, W) -> (N, C * M, H, W), or without N.

    Raises:
        ValueError: an argument is out of range.
        TypeError: `process_group` is no group that this process is in.
    """

    def __init__(
        self,
        in_channels: int,
        multiplier: int = 4,
        kernel_size: int = 7,
        norm: str = "tensor",
        eps: float = 1e-5,
        affine: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        _check_depthwise(in_channels, multiplier, kernel_size, norm, eps)
        super().__init__(
            in_channels,
            in_channels * multiplier,
            kernel_size,
            padding="same",
            groups=in_channels,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.norm = norm
        self.eps = eps
        self._set_process_group(process_group)
        _register_affine(self, self.out_channels if affine else None, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if _is_one_image(x):
            return self.forward(x[None])[0]
        weight, bias = self.weight, self.bias
        channels = x.shape[1] if isinstance(x, Tensor) and x.dim() == 4 else None
        if not is_symbolic(x) and _is_set_depthwise(self, weight, channels):
            return functional.depthwise_conv_layer_norm(x, weight, bias, **_norm_of(self))
        return functional.layer_norm(self._conv_forward(x, weight, bias), **_norm_of(self))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, norm={self.norm}, eps={self.eps}, affine={self.norm_weight is not None}"


class PointwiseConvGELU(Scriptable, nn.Conv2d):
    """`nn.Conv2d(I, O, 1)`, then GELU, as one operation, with the parameters of `nn.Conv2d`.

    Args:
        in_channels: I.
        out_channels: O.
        bias: add a bias to the convolution.
        approximate: "none", GELU by the error function; or "tanh".

    Shape: (N, I, H, W) -> (N, O, H, W), or without N.

    Raises:
        ValueError: an argument is out of range.
        TypeError: there are other arguments, as from adapters that make a convolution of this class.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *others: Any,
        bias: bool = True,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if others:
            raise TypeError(
                f"PointwiseConvGELU got {others} beside in_channels and out_channels; expected other arguments by "
                "name. It is no linear map: to adapt one, as with LoRA, use nn.Conv2d and nn.GELU, or "
                "fastconv.ConvNextBlock, whose parts are plain convolutions"
            )
        _check_positive(in_channels=in_channels, out_channels=out_channels)
        check_approximate(approximate)
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        if _is_one_image(x):
            return self.forward(x[None])[0]
        weight, bias = self.weight, self.bias
        if not is_symbolic(x) and _is_set_pointwise(self, weight):
            return functional.pointwise_conv_gelu(x, weight, bias, approximate=self.approximate)
        return F.gelu(self._conv_forward(x, weight, bias), approximate=self.approximate)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, approximate={self.approximate}"


class ConvNextBlock(Normed, Scriptable):
    """The lecture's block as one operation: depthwise, layer norm, pointwise, GELU, pointwise, residual.

    With the defaults it computes what `fastconv.reference.ConvNextBlock` does, with the same parts and state_dict.
    While all its parts are plain convolutions they are computed at once; else one by one.

    Args:
        in_channels: channels of the input and of the output, C.
        multiplier, kernel_size, norm, eps, affine, process_group: as `DepthwiseConvLayerNorm`'s.

    Shape: (N, C, H, W) -> (N, C, H, W), or without N.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        multiplier: int = 4,
        kernel_size: int = 7,
        norm: str = "tensor",
        eps: float = 1e-5,
        affine: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        _check_depthwise(in_channels, multiplier, kernel_size, norm, eps)
        super().__init__()
        self.norm = norm
        self.eps = eps
        self._set_process_group(process_group)
        wide = multiplier * in_channels
        self.conv1 = nn.Conv2d(
            in_channels, wide, kernel_size, padding="same", groups=in_channels, device=device, dtype=dtype
        )
        self.conv2 = nn.Conv2d(wide, in_channels, 1, device=device, dtype=dtype)
        self.conv3 = nn.Conv2d(in_channels, in_channels, 1, device=device, dtype=dtype)
        _register_affine(self, wide if affine else None, device, dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        if _is_one_image(inputs):
            return self.forward(inputs[None])[0]
        channels = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.dim() == 4 else None
        parameters = None if is_symbolic(inputs) else self._parameters_of_parts(channels)
        if parameters is not None:
            return functional.convnext_block(inputs, *parameters, **_norm_of(self))
        x = functional.layer_norm(self.conv1(inputs), **_norm_of(self))
        return self.conv3(F.gelu(self.conv2(x))) + inputs

    def _parameters_of_parts(self, channels: int | None) -> tuple[Any, ...] | None:
        """Weight and bias of each part, if all are plain convolutions, as they should be for so many channels."""
        conv1, conv2, conv3 = self.conv1, self.conv2, self.conv3
        if not all(map(_is_convolution, (conv1, conv2, conv3))):
            return None
        parameters = *_parameters(conv1), *_parameters(conv2), *_parameters(conv3)
        depthwise, _, pointwise, _, projection, _ = parameters
        is_set = (
            _is_set_depthwise(conv1, depthwise, channels)
            and _is_set_pointwise(conv2, pointwise)
            and _is_set_pointwise(conv3, projection)
            and projection.shape[0] == conv1.groups
        )
        return parameters if is_set else None

    def fastconv_unseen(self, images: Tensor, channels: int) -> Callable[[Tensor], Tensor] | None:
        """The block for `classify`, on maps of so many channels; None if it or a part has to be called."""
        parameters = self._parameters_of_parts(channels) if is_plain(self, ConvNextBlock) else None
        if parameters is None:
            return None
        options = _norm_of(self)
        return lambda x: functional.convnext_block(x, *parameters, **options, _unseen=True)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Where the norm's parameters were, when conv1 was a module of convolution and norm.
        for name in ("norm_weight", "norm_bias"):
            if f"{prefix}conv1.{name}" in state_dict:
                state_dict[f"{prefix}{name}"] = state_dict.pop(f"{prefix}conv1.{name}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"norm={self.norm}, eps={self.eps}, affine={self.norm_weight is not None}"


class Classifier(Normed, Scriptable):
    """The lecture's classifier of fused blocks; the defaults give its 235,434 parameters.

    It computes what `fastconv.reference.Classifier` does, with the same state_dict.

    Args:
        width: channels after the stem; doubled by the downsampling.
        depth: blocks before, and again after, the downsampling.
        patch: side of the stem's patches, in pixels.
        in_channels: channels of an image.
        num_classes: number of logits.
        norm: what each layer norm is computed over. The lecture's "tensor" makes an image's logits depend on the
            images beside it, in training and in evaluation alike; with "sample" they do not.
        process_group: as `DepthwiseConvLayerNorm`'s.

    Shape: (N, in_channels, H, W) -> (N, num_classes), with H and W at least 2 * patch.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        width: int = 32,
        depth: int = 5,
        patch: int = 4,
        in_channels: int = 3,
        num_classes: int = 10,
        norm: str = "tensor",
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        super().__init__()
        _check_positive(width=width, depth=depth, patch=patch, in_channels=in_channels, num_classes=num_classes)
        self.norm = norm
        self._set_process_group(process_group)
        options: dict[str, Any] = {"norm": norm, "process_group": process_group}
        self.stem = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.conv_block_1 = nn.Sequential(*(ConvNextBlock(width, **options) for _ in range(depth)))
        self.downsample = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.conv_block_2 = nn.Sequential(*(ConvNextBlock(2 * width, **options) for _ in range(depth)))
        self.bottleneck = nn.Conv2d(2 * width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        if _is_one_image(x):
            # (num_classes, 1), as from the lecture's.
            return classify(self, x[None], self.norm, self.process_group).t()
        return classify(self, x, self.norm, self.process_group)

    def extra_repr(self) -> str:
        return f"norm={self.norm}"


def classify(model: Any, x: Tensor, norm: str, process_group: str | None = None) -> Tensor:
    """The forward of `Classifier`, with the parts of `model`."""
    logits = _classify_unseen(model, x, norm, process_group)
    if logits is not None:
        return logits
    x = _patch_conv(model.stem, x)
    x = functional.layer_norm(x, norm=norm, process_group=process_group)
    x = model.conv_block_1(x)
    x = functional.layer_norm(x, norm=norm, process_group=process_group)
    x = _patch_conv(model.downsample, x)
    x = model.conv_block_2(x)
    x = _patch_conv(model.bottleneck, x)
    return x.mean((2, 3))


def _classify_unseen(model: Any, images: Tensor, norm: str, process_group: str | None) -> Tensor | None:
    """The same, with maps that lie as suits the next part; None if any but our operations would see them."""
    stem, downsample, bottleneck = model.stem, model.downsample, model.bottleneck
    if not _is_unseen(images) or not all(map(_is_set_patches, (stem, downsample, bottleneck))):
        return None
    first = _unseen_blocks(model.conv_block_1, images, stem.weight.shape[0])
    second = _unseen_blocks(model.conv_block_2, images, downsample.weight.shape[0])
    if first is None or second is None:
        return None
    x = functional.patch_conv(images, *_parameters(stem), _unseen=True)
    x = functional.layer_norm(x, norm=norm, process_group=process_group, _unseen=True)
    for block in first:
        x = block(x)
    x = functional.layer_norm(x, norm=norm, process_group=process_group, _unseen=True)
    x = functional.patch_conv(x, *_parameters(downsample), _unseen=True)
    for block in second:
        x = block(x)
    x = functional.patch_conv(x, *_parameters(bottleneck), _unseen=True)
    return x.mean((2, 3)).contiguous()


def _is_unseen(images: Tensor) -> bool:
    """Whether no tracer sees what is computed from images, and no caller how their gradient lies."""
    if not isinstance(images, Tensor) or images.requires_grad:
        return False
    return not (is_symbolic(images) or is_composed(images))


def _unseen_blocks(part: Any, images: Tensor, channels: int) -> list[Callable[[Tensor], Tensor]] | None:
    """The blocks of an nn.Sequential as functions of maps that nobody else sees; None if somebody does."""
    if not is_plain(part, nn.Sequential):
        return None
    blocks = []
    for block in part._modules.values():
        # Of the class: wrappers, such as torch.compile's, pass on attributes of what they wrap.
        unseen = getattr(type(block), "fastconv_unseen", None)
        computes = None if unseen is None or block._compiled_call_impl else unseen(block, images, channels)
        if computes is None:
            return None
        blocks.append(computes)
    return blocks


def _patch_conv(conv: Any, x: Tensor) -> Tensor:
    if is_symbolic(x) or not _is_set_patches(conv):
        return conv(x)
    return functional.patch_conv(x, *_parameters(conv))


def _is_set_patches(conv: Any) -> bool:
    """Whether it is a plain convolution of patches that do not overlap."""
    if not _is_convolution(conv):
        return False
    weight, _ = _parameters(conv)
    return _settings(conv) == (weight.shape[2:], (0, 0), 1, *_DEFAULTS)


def _is_convolution(part: Any) -> bool:
    """Whether it may be computed from the parameters and settings of an nn.Conv2d."""
    return is_plain(part, nn.Conv2d) and part._parameters.keys() == {"weight", "bias"}


def _is_one_image(x: Any) -> bool:
    """Whether x is (C, H, W), which PyTorch's convolutions take too."""
    return isinstance(x, Tensor) and x.dim() == 3


# As PyTorch does, these read the size of a kernel from the weight, which may have been replaced.


def _is_set_depthwise(conv: Any, weight: Tensor, channels: int | None) -> bool:
    """Whether it is a depthwise convolution of so many channels; None are those of what is not even a map."""
    _, inputs, height, width = weight.shape
    odd = height % 2 == width % 2 == 1
    return inputs == 1 and odd and _settings(conv) == ((1, 1), "same", channels or conv.groups, *_DEFAULTS)


def _is_set_pointwise(conv: Any, weight: Tensor) -> bool:
    return weight.shape[2:] == (1, 1) and _settings(conv) == ((1, 1), (0, 0), 1, *_DEFAULTS)


# How `_settings` ends for most convolutions: no dilation, zeros around the maps, and nothing patched.
_DEFAULTS = (1, 1), "zeros", False


def _settings(conv: Any) -> tuple[Any, ...]:
    patched = "_conv_forward" in conv.__dict__
    return conv.stride, conv.padding, conv.groups, conv.dilation, conv.padding_mode, patched


def _parameters(conv: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias; as attributes of a module they would take the host several times as long."""
    return conv._parameters["weight"], conv._parameters["bias"]


def _norm_of(module: Any) -> dict[str, Any]:
    names = "norm", "eps", "norm_weight", "norm_bias", "process_group"
    return {name: getattr(module, name) for name in names}


def _register_affine(
    module: nn.Module, channels: int | None, device: torch.device | str | None, dtype: torch.dtype | None
) -> None:
    """Give a module the parameters of its norm, or None for both."""
    for name, make in (("norm_weight", torch.ones), ("norm_bias", torch.zeros)):
        values = None if channels is None else nn.Parameter(make(channels, device=device, dtype=dtype))
        module.register_parameter(name, values)


def _check_depthwise(in_channels: int, multiplier: int, kernel_size: int, norm: str, eps: float) -> None:
    _check_positive(in_channels=in_channels, multiplier=multiplier, kernel_size=kernel_size)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size is {kernel_size}; expected an odd number")
    check_norm(norm, eps)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected one integer")
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
