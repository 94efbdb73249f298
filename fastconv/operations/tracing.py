"""What is decided once for each graph that torch.compile traces, by code that it does not trace.

Imported only while tracing, because it imports the compiler.
"""

from __future__ import annotations

from typing import Any

import torch

from fastconv.kernels.common import rules
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
def trusts(backend: str, device: torch.device, *fields: Any) -> bool:
    """As `selftest.trusts`, of a Subject's fields, but with usual sizes: a graph's own may be symbols."""
    subject = selftest.Subject(*fields)
    try:
        return selftest.trusts(backend, subject, device, selftest.usual_sizes(subject)) is not False
    except KernelError as error:
        # Once the graph runs, it cannot fall back.
        fallback.warn_refused(subject.operation, error, device)
        return False


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_transformed() -> bool:
    """As `rules.is_transformed`: a graph is used only under the transforms under which it was traced."""
    return rules.is_transformed()
