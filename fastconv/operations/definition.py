"""The definitions in `reference`, called with values instead of an argument for each tensor."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from fastconv.kernels.common.values import Value
from fastconv.operations import reference

# The names of each operation's arguments.
PARAMETERS = {
    function.__name__: tuple(inspect.signature(function).parameters)
    for function in (
        reference.depthwise_conv_layer_norm,
        reference.pointwise_conv_gelu,
        reference.convnext_block,
        reference.layer_norm,
        reference.patch_conv,
    )
}


def arguments(operation: str, x: Tensor, *values: Value) -> dict[str, Any]:
    """The arguments of the function in `reference`, by name: x, then the fields of each value, in order."""
    flat: list[Any] = [x]
    for value in values:
        flat.extend([value] if isinstance(value, str) else value)
    return dict(zip(PARAMETERS[operation], flat, strict=True))


def call(operation: str, x: Tensor, *values: Value) -> Tensor:
    """The result of an operation as `reference` defines it."""
    result: Tensor = getattr(reference, operation)(**arguments(operation, x, *values))
    return result
