"""What is decided once for each graph that torch.compile traces, by code that it does not trace.

Imported only while tracing, because it imports the compiler.
"""

from __future__ import annotations

import torch

from fastconv.kernels.common.errors import KernelError
from fastconv.operations import backends, fallback, selftest


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def first_that_can(forced: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """As `backends.first_that_can`; `forced` is an argument so that another backend makes another graph."""
    name = backends.first_that_can(device, *dtypes)
    if name not in (None, "reference"):
        # The graph cannot import it.
        backends.implementation(name)
    return name


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def trusts(
    operation: str, norm: str | None, large: bool, maps: torch.dtype, dtype: torch.dtype, device: torch.device
) -> bool:
    """As `selftest.trusts`, but with usual sizes: a graph's own may be symbols."""
    subject = selftest.Subject(operation, norm, large, maps, dtype)
    try:
        return selftest.trusts(subject, device, selftest.usual_sizes(subject)) is not False
    except KernelError as error:
        # Once the graph runs, nothing could take its place.
        fallback.warn_refused(operation, error, device)
        return False
