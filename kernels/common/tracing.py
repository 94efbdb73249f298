"""What is looked up once for each graph that torch.compile traces, by code that it does not trace.

Imported only while tracing, because it imports the compiler.
"""

from __future__ import annotations

import torch

from . import ranks


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def look_up(group: str) -> tuple[int, int]:
    """As `ranks.look_up`."""
    return ranks.look_up(group)
