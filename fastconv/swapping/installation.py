"""A swapped module's class: a subclass of its own, with another forward.

The module stays the object it was, so that its parameters, hooks and place in the model need no care.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, nn

from fastconv.operations import backends
from fastconv.operations.watchers import is_composed, is_symbolic
from fastconv.plain import is_plain
from fastconv.swapping.fusion import Fusion, LectureBlock


class Swapped(nn.Module):
    """Mixed into a module's class before it: another forward, and what copies and pickles need to know of it."""

    fastconv_fusion: Fusion
    fastconv_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        return _rebuild, (self.fastconv_original, self.fastconv_fusion), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript compiles source code, and can read only the original's.
        twin = self.fastconv_original.__new__(self.fastconv_original)
        twin.__dict__ = dict(vars(self))
        return twin

    def fastconv_unseen(self, images: Tensor, channels: int) -> Callable[[Tensor], Tensor] | None:
        """A lecture's block for `modules.classify`, as `ConvNextBlock.fastconv_unseen`."""
        fusion = vars(type(self)).get("fastconv_fusion")
        if not isinstance(fusion, LectureBlock) or not is_plain(self, type(self)) or not _can_fuse(self, images):
            return None
        return functools.partial(fusion.run, functools.partial(fusion.compute, unseen=True), self)

    def _get_name(self) -> str:
        return f"{self.fastconv_original.__name__}[fastconv]"


def install(fusions: list[tuple[nn.Module, Fusion]]) -> None:
    """Let each fusion compute its module, in place: all of them, or none if a class refuses to be derived from."""
    classes = [_subclass(type(module), fusion) for module, fusion in fusions]
    for (module, _), swapped in zip(fusions, classes, strict=True):
        module.__class__ = swapped


def uninstall(model: nn.Module) -> None:
    """Give each swapped module its own class back: all of them, or none if the class of one was changed again."""
    swapped: list[Any] = [module for module in model.modules() if isinstance(module, Swapped)]
    for module in swapped:
        if "fastconv_fusion" not in vars(type(module)):
            raise RuntimeError(
                f"a swapped {module.fastconv_original.__name__} is a {type(module).__name__} by now; undo first "
                "what changed its class after the swap, as parametrizations and FSDP do"
            )
    for module in swapped:
        module.__class__ = module.fastconv_original


def _forward(module: Swapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs and len(args) == 1 and _can_fuse(module, args[0]):
        return module.fastconv_fusion.forward(module, args[0])
    return module.fastconv_original.forward(module, *args, **kwargs)


def _can_fuse(module: Swapped, x: Any) -> bool:
    if not isinstance(x, Tensor) or is_symbolic(x) or x.dim() != 4 or x.numel() == 0 or is_composed(x):
        return False
    if backends.leaves_to_pytorch(x):
        # Only CPUs were measured, of the devices without kernels.
        if x.device.type != "cpu":
            return False
        if not module.fastconv_fusion.pays(module, x):
            return False
    return module.fastconv_fusion.applies(module, x)


# By the class and the fusion. A class lives as long as modules of it, as one that a notebook defines again.
_SUBCLASSES: WeakValueDictionary[tuple[type[nn.Module], Fusion], type[Any]] = WeakValueDictionary()
_LOCK = threading.Lock()


def _subclass(original: type[nn.Module], fusion: Fusion) -> type[Any]:
    """One for all modules alike: torch.compile compiles a class once."""
    key = original, fusion
    with _LOCK:
        found = _SUBCLASSES.get(key)
        if found is None:
            found = _SUBCLASSES[key] = _derive(original, fusion)
    return found


def _derive(original: type[nn.Module], fusion: Fusion) -> type[Any]:
    attributes = {
        "fastconv_fusion": fusion,
        "fastconv_original": original,
        # Libraries look modules up by the names of their classes.
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        # torch.export reads the names of arguments from the signature of forward.
        "forward": functools.wraps(original.forward)(lambda self, *args, **kwargs: _forward(self, args, kwargs)),
    }
    return type(original.__name__, (Swapped, original), attributes)


def _rebuild(original: type[nn.Module], fusion: Fusion) -> nn.Module:
    return nn.Module.__new__(_subclass(original, fusion))
