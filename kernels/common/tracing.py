"""What is looked up once for each graph that torch.compile traces, by code that it does not trace.

Imported only while tracing, because it imports the compiler.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import distributed_c10d


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def place_in(group: str) -> tuple[int, int]:
    """As `ranks.place_in`."""
    found: Any = distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    return found.rank(), found.size()
