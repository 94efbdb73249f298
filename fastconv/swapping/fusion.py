"""How the modules that `swap` recognises are computed by the fused operations, from the parameters they have.

Each class names the parts of one kind of module; its `forward` takes the place of the module's own. They hold
names and not modules, so that a swapped module can be copied, pickled and moved as before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastconv import modules
from fastconv.kernels.common.layout import with_own_strides
from fastconv.kernels.common.rules import gelu
from fastconv.operations import backends, decisions, functional, layouts, setting
from fastconv.swapping.configuration import Snapshot, is_within


def find(module: nn.Module, path: str) -> Any:
    """The submodule or parameter at a dotted path."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


@dataclass(frozen=True)
class Fusion:
    """What takes the place of a module's forward.

    Args:
        recompute: keep only the input for the backward and compute the rest again there (Chen et al.,
            arXiv:1604.06174).
        seen: the submodules that are not called any more, as they were at the swap.
        follows_input: whether the result is channels_last where the maps are, and else contiguous, as of
            x + branch; if not, it lies as the branch does.
    """

    kind: ClassVar[str]
    # Whether on a CPU the module's own forward is often the faster.
    by_size: ClassVar[bool] = False
    recompute: bool = field(default=False, kw_only=True)
    seen: tuple[Snapshot, ...] = field(default=(), kw_only=True)
    follows_input: bool = field(default=False, kw_only=True)

    @property
    def called(self) -> tuple[str, ...]:
        """The paths of submodules that are called as they are, whatever they compute."""
        return ()

    @property
    def draws(self) -> bool:
        """Whether training takes random numbers if this is the right fusion, as with drop path."""
        return False

    def replaced(self, module: nn.Module) -> dict[str, nn.Module]:
        """The submodules that are not called any more, and that nothing else may fuse, by their paths."""
        raise NotImplementedError

    def images(self, module: nn.Module) -> tuple[int, int, int, int]:
        """The shape (N, C, H, W) of images to try the module on."""
        raise NotImplementedError

    def watching(self, module: nn.Module) -> Fusion:
        """This fusion, which applies as long as the parts of a module stay as they are now."""
        return replace(self, seen=tuple(Snapshot.of(path, part) for path, part in self.replaced(module).items()))

    def applies(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the parts are as they were, and plain, and all are of one dtype, or autocast makes them so."""
        try:
            parts = [snapshot.find(module) for snapshot in self.seen]
        except (AttributeError, KeyError):
            return False
        for part, snapshot in zip(parts, self.seen, strict=True):
            if not snapshot.matches(part):
                return False
        autocast = backends.autocast_dtype(x)
        dtypes = {x.dtype}
        for part in (module, *parts):
            dtypes.update(value.dtype for value in part._parameters.values() if value is not None)
        # Autocast leaves float64 alone.
        return len({autocast if autocast and dtype != torch.float64 else dtype for dtype in dtypes}) == 1

    def pays(self, module: nn.Module, x: Tensor) -> bool:
        """Whether this is faster than the module's own forward in plain PyTorch, as measured on a CPU."""
        return True

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        return self.run(self.compute, module, x)

    def run(self, compute: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, x: Tensor) -> Tensor:
        """What `compute` returns, which is computed again in the backward if it is to be."""
        if not self.recompute or not torch.is_grad_enabled():
            return compute(module, x)
        if torch.compiler.is_compiling():
            return checkpoint(compute, module, x, use_reentrant=False)
        # A GPU's backward runs in a thread of its own, where another backend may be forced.
        contexts = nullcontext(), setting.forced(backends.current())
        return checkpoint(compute, module, x, use_reentrant=False, context_fn=lambda: contexts)


@dataclass(frozen=True)
class Block(Fusion):
    """Computes all of a module; of its submodules only those in `called` still run.

    Args:
        depthwise, pointwise, projection: paths of the modules that hold the parameters; the pointwise ones are
            nn.Linear or 1x1 nn.Conv2d.
    """

    depthwise: str
    pointwise: str
    projection: str

    def replaced(self, module: nn.Module) -> dict[str, nn.Module]:
        parts = module.named_modules(remove_duplicate=False)
        return {path: part for path, part in parts if path and not is_within(path, self.called)}

    def images(self, module: nn.Module) -> tuple[int, int, int, int]:
        return 2, find(module, self.depthwise).in_channels, 3, 4


@dataclass(frozen=True)
class LectureBlock(Block):
    """depthwise, norm without parameters, pointwise, GELU, pointwise, residual: one operation."""

    kind: ClassVar[str] = "lecture's block"
    norm: str

    def compute(self, module: nn.Module, x: Tensor, unseen: bool = False) -> Tensor:
        convolutions = [find(module, path) for path in (self.depthwise, self.pointwise, self.projection)]
        parameters = [parameter for conv in convolutions for parameter in (conv.weight, conv.bias)]
        if not self.follows_input or unseen:
            return functional.convnext_block(x, *parameters, norm=self.norm, _unseen=unseen)
        format = layouts.format_of(x)
        y = functional.convnext_block(layouts.with_gradient(x, format), *parameters, norm=self.norm)
        return layouts.as_pytorch(y, format)


@dataclass(frozen=True)
class LectureClassifier(Fusion):
    """The lecture's classifier, with the operations between its blocks."""

    kind: ClassVar[str] = "lecture's classifier"

    def replaced(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: find(module, name) for name in ("stem", "downsample", "bottleneck")}

    def images(self, module: nn.Module) -> tuple[int, int, int, int]:
        stem = find(module, "stem")
        height, width = stem.kernel_size
        return 2, stem.in_channels, 4 * height, 6 * width

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        return modules.classify(module, x, "tensor")


@dataclass(frozen=True)
class ConvNeXtBlock(Block):
    """x + drop_path(scale * projection(response(gelu(pointwise(norm(depthwise(x))))))).

    ConvNeXt's (Liu et al., arXiv:2201.03545) with a layer scale, and ConvNeXt V2's (Woo et al., arXiv:2301.00808)
    with a response norm.

    Args:
        norm: path of the module that holds the norm's parameters.
        scale: path of the layer scale of C elements, or None.
        drop_path: path of a module that drops whole images in training, or None.
        approximate: of GELU.
        response: path of the module that follows GELU, or None; and whether it takes maps, (N, O, H, W), rather
            than (N, H, W, O).
    """

    kind: ClassVar[str] = "ConvNeXt block"
    by_size: ClassVar[bool] = True
    norm: str
    scale: str | None = None
    drop_path: str | None = None
    approximate: str = "none"
    response: str | None = None
    response_of_maps: bool = False

    @property
    def called(self) -> tuple[str, ...]:
        return tuple(path for path in (self.drop_path, self.response) if path is not None)

    @property
    def draws(self) -> bool:
        return self.drop_path is not None

    def pays(self, module: nn.Module, x: Tensor) -> bool:
        return decisions.swapping_pays(x)

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        # All that follows is fastest where channels lie side by side, and the next block finds them so.
        inputs, x = x, x.contiguous(memory_format=torch.channels_last)
        y = depthwise_norm(find(module, self.depthwise), find(module, self.norm), x)
        pointwise, projection = find(module, self.pointwise), find(module, self.projection)
        weight, bias = _matrix(projection), projection.bias
        dtype = x.dtype
        scale = None if self.scale is None else find(module, self.scale).flatten()
        if scale is not None:
            dtype = torch.promote_types(dtype, scale.dtype)
            if self._scales_weights(y, weight, scale):
                weight, bias, scale = weight * scale[:, None], None if bias is None else bias * scale, None
        y = self._widened(y, _matrix(pointwise), pointwise.bias)
        if self.response is not None:
            response = find(module, self.response)
            y = response(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.response_of_maps else response(y)
        branch = F.linear(y, weight, bias).permute(0, 3, 1, 2)
        branch = branch.to(torch.promote_types(dtype, branch.dtype))
        if scale is not None:
            branch = branch * scale[:, None, None]
        if self.drop_path is not None:
            branch = find(module, self.drop_path)(branch)
        return inputs + branch if self.follows_input else branch + x

    def applies(self, module: nn.Module, x: Tensor) -> bool:
        return super().applies(module, x) and (self.scale is None or find(module, self.scale) is not None)

    def _scales_weights(self, y: Tensor, weight: Tensor, scale: Tensor) -> bool:
        """Whether to multiply the scale into the weights, where these are smaller than the maps."""
        # The compiler fuses a multiplication of maps; and sizes would bind what it compiles to some batches.
        if torch.compiler.is_compiling():
            return False
        # In half precision the gradient of the scale, a sum of terms that cancel, would be poor if computed from
        # that of the weights. Autocast keeps weights in float32, but in float16 a product with 1e-6 vanishes.
        if scale.dtype in (torch.float16, torch.bfloat16) or backends.autocast_dtype(y) == torch.float16:
            return False
        return y.shape[0] * y.shape[2] * y.shape[3] > weight.shape[1]

    def _widened(self, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The pointwise convolution (weight [O, C]) with GELU, of maps (N, C, H, W): (N, H, W, O)."""
        if backends.choose(y.device, y.dtype) == "triton":
            weight = weight[..., None, None]
            return functional.pointwise_conv_gelu(y, weight, bias, approximate=self.approximate).permute(
                0, 2, 3, 1
            )
        return gelu(F.linear(y.permute(0, 2, 3, 1), weight, bias), self.approximate)


@dataclass(frozen=True)
class Chain(Fusion):
    """Pairs of neighbours in an nn.Sequential: depthwise convolution + norm, pointwise convolution + GELU."""

    kind: ClassVar[str] = "pairs in a Sequential"
    by_size: ClassVar[bool] = True
    # Names of the first and the second, and GELU's `approximate`; None if the second is a norm.
    pairs: tuple[tuple[str, str, str | None], ...]
    # The names of the first of those pairs that follow their inputs.
    following: tuple[str, ...] = ()

    def replaced(self, module: nn.Module) -> dict[str, nn.Module]:
        return {name: find(module, name) for first, second, _ in self.pairs for name in (first, second)}

    def images(self, module: nn.Module) -> tuple[int, int, int, int]:
        return 2, find(module, self.pairs[0][0]).in_channels, 3, 4

    def compute(self, module: nn.Module, x: Tensor) -> Tensor:
        pairs = {first: (second, approximate) for first, second, approximate in self.pairs}
        seconds = [second for second, _ in pairs.values()]
        # A module that occurs twice runs twice; named_children would name it once.
        children: dict[str, Any] = module._modules
        for name, child in children.items():
            if name in pairs:
                second, approximate = pairs[name]
                x = self._pair(child, children[second], approximate, name in self.following, x)
            elif name not in seconds:
                x = child(x)
        return x

    def _pair(self, first: Any, second: Any, approximate: str | None, follows: bool, x: Tensor) -> Tensor:
        if approximate is not None:
            return functional.pointwise_conv_gelu(x, first.weight, first.bias, approximate=approximate)
        if backends.leaves_to_pytorch(x) and not decisions.swapping_pays(x):
            return second(first(x))
        y = depthwise_norm(first, second, x)
        return layouts.as_pytorch(y, layouts.of_convolution(x, first.weight)) if follows else y


def _matrix(product: Any) -> Tensor:
    """The weight (outputs, inputs) of an nn.Linear or a pointwise nn.Conv2d."""
    weight: Tensor = product.weight
    return weight if weight.dim() == 2 else with_own_strides(weight).flatten(1)


def depthwise_norm(depthwise: Any, norm: Any, x: Tensor) -> Tensor:
    """Depthwise convolution and norm of each pixel, with the parameters of two modules."""
    return functional.depthwise_conv_layer_norm(
        x,
        depthwise.weight,
        depthwise.bias,
        norm="channel",
        eps=norm.eps,
        norm_weight=norm.weight,
        norm_bias=norm.bias,
    )
