"""What decides what a module computes, beside the values of its parameters.

`signature` compares two modules, to verify only one of those that are alike; `Snapshot` compares a submodule with
what it was at the swap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from fastconv.plain import is_plain

# Every module keeps these: its parts, its hooks, and whether it is training.
OF_ANY_MODULE = frozenset(vars(nn.Module()))


class Opaque(NamedTuple):
    """Stands for an object that equals only itself."""

    identity: int


def configuration(part: nn.Module) -> dict[str, Any]:
    """All that a module keeps beside parameters, buffers, submodules and hooks, by name, to be compared."""
    return {key: _comparable(value) for key, value in vars(part).items() if key not in OF_ANY_MODULE}


def _comparable(value: Any) -> Any:
    """Numbers, strings, None, and sequences of these as they are, with tuples for lists; else an Opaque."""
    if isinstance(value, list | tuple):
        elements = tuple(map(_comparable, value))
        return Opaque(id(value)) if any(isinstance(element, Opaque) for element in elements) else elements
    return value if value is None or isinstance(value, int | float | str) else Opaque(id(value))


def is_within(path: str, parents: Sequence[str]) -> bool:
    """Whether a dotted path is one of `parents`, or leads through one."""
    return f"{path}.".startswith(tuple(f"{parent}." for parent in parents))


def signature(module: nn.Module, called: Sequence[str]) -> tuple[Any, ...]:
    """Equal for modules that compute the same from equal parameters.

    Args:
        called: paths of submodules that a fusion calls as they are, as drop path: of the numbers that they keep
            it only matters whether they are positive.
    """
    # What occurs twice goes by the name under which it occurs first.
    first: dict[int, str] = {}
    parts = []
    for path, part in module.named_modules(remove_duplicate=False):
        kept = configuration(part)
        if is_within(path, called):
            kept = {key: value > 0 if isinstance(value, float) else value for key, value in kept.items()}
        for key, value in part._parameters.items():
            kept[key] = value is None or (value.shape, first.setdefault(id(value), f"{path}.{key}"))
        kept |= {key: id(buffer) for key, buffer in part._buffers.items()}
        kept |= {key: child is None for key, child in part._modules.items()}
        parts.append((path, first.setdefault(id(part), path), type(part), *kept.items()))
    return tuple(parts)


class Snapshot(NamedTuple):
    """A submodule as it was at the swap: its path, class, configuration, children, and shapes of parameters."""

    path: tuple[str, ...]
    kind: type[nn.Module]
    settings: tuple[tuple[str, Any], ...]
    children: tuple[str, ...]
    shapes: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, path: str, part: nn.Module) -> Snapshot:
        # The identity of an object does not outlive a copy of the module.
        settings = [(key, value) for key, value in configuration(part).items() if not isinstance(value, Opaque)]
        return cls(tuple(path.split(".")), type(part), tuple(settings), tuple(part._modules), _shapes(part))

    def find(self, module: nn.Module) -> nn.Module:
        """The submodule at the path; faster than get_submodule, since each forward calls it for each part.

        Raises:
            KeyError: there is none.
        """
        part: Any = module
        for name in self.path:
            part = part._modules[name]
        return part

    def matches(self, part: nn.Module) -> bool:
        """Whether a submodule is still the same, set as it was, and plain."""
        if not is_plain(part, self.kind) or tuple(part._modules) != self.children or _shapes(part) != self.shapes:
            return False
        kept = part.__dict__
        for key, value in self.settings:
            now = kept.get(key)
            # What is of another type may be a tensor, and what equals that is a tensor, too.
            if (type(now) is not type(value) or now != value) and _comparable(now) != value:
                return False
        return True


def _shapes(part: nn.Module) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(None if value is None else tuple(value.shape) for value in part._parameters.values())
