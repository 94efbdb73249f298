"""Values that must have a type, such as those of a file that anyone may have written."""

from __future__ import annotations

import math
import reprlib
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

EXPECTED = {
    int: "an integer of at most 64 bits",
    float: "a finite number",
    str: "text",
    bool: "True or False",
    Tensor: "a contiguous tensor on the CPU",
    dict: "a dict",
    list: "a list",
}


def build(hint: Any, value: Any, name: str) -> Any:
    """Return `value` if it is what a type hint says, with a dict of fields turned into a dataclass.

    Args:
        hint: one of EXPECTED, a Literal of strings, a dataclass, or a dict, list or optional value of such.
        value: anything.
        name: what the message calls it.

    Raises:
        ValueError: it is something else, or the dataclass refuses it.
    """
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is UnionType:
        (some,) = set(parts) - {NoneType}
        return None if value is None else build(some, value, name)
    if kind is Literal:
        if not (isinstance(value, str) and value in parts):
            raise ValueError(f"{name} is {reprlib.repr(value)}; expected one of {', '.join(parts)}")
        return value
    if is_dataclass(kind):
        return _build_dataclass(kind, value, name)
    if not _is_a(kind, value):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected {EXPECTED[kind]}")
    if kind is list:
        return [build(parts[0], element, f"{name}[{i}]") for i, element in enumerate(value)]
    if kind is dict:
        return {
            build(parts[0], key, f"a key of {name}"): build(parts[1], each, f"{name}[{reprlib.repr(key)}]")
            for key, each in value.items()
        }
    return value


def _build_dataclass(kind: Any, value: Any, name: str) -> Any:
    hints = get_type_hints(kind)
    build(dict[str, object], value, name)
    if missing := hints.keys() - value.keys():
        raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
    if unknown := value.keys() - hints.keys():
        raise ValueError(f"{name} has an unknown {reprlib.repr(min(unknown))}")
    return kind(**{field: build(part, value[field], f"{name}'s {field}") for field, part in hints.items()})


def _is_a(kind: Any, value: Any) -> bool:
    # True is an int to Python, and an int is a float to type checkers. PyTorch's integers have 64 bits.
    if kind is int:
        return type(value) is int and -(2**63) <= value < 2**63
    if kind is float:
        return _is_a(int, value) or (type(value) is float and math.isfinite(value))
    if kind is Tensor:
        # A contiguous one is no larger than what is stored of it.
        return (
            isinstance(value, Tensor)
            and value.device.type == "cpu"
            and value.layout == torch.strided
            and value.is_contiguous()
        )
    return isinstance(value, kind)
