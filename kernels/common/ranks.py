"""What the ranks of a process group exchange for a norm that spans the images of all of them.

In the forward the moments of each rank's part, merged as those of the parts of one tensor are (Chan, Golub and
LeVeque: see `statistics.py`); in the backward the two sums of its gradient. Each is one all-reduce. All
implementations but the definition exchange the same numbers in float64, so ranks may run different ones: those
of a small part, say. An empty part takes part with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastconv.operations.reference import all_reduce


def place_in(group: str) -> tuple[int, int]:
    """This process's rank in a group of that name, and how many ranks there are.

    Raises:
        ValueError: there is no such group.
    """
    if torch.compiler.is_compiling():
        # Not at the top: it imports the compiler.
        from . import tracing

        return tracing.look_up(group)
    return look_up(group)


def look_up(group: str) -> tuple[int, int]:
    """As `place_in`, for code that torch.compile does not trace."""
    # Not at the top: not every build of PyTorch has it.
    from torch.distributed import distributed_c10d

    try:
        found: Any = distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type, attr-defined]
    except RuntimeError as error:
        raise ValueError(
            f"there is no process group {group!r} in this process; call fastconv.set_process_group again, after "
            "init_process_group, or with None"
        ) from error
    return found.rank(), found.size()


def gather_moments(moments: Tensor, group: str) -> Tensor:
    """The moments of all ranks, float64 [3, ranks], from those of this one: count, mean and M2, [3].

    A sum to which each rank adds its own column and zeros: an all-reduce takes fewer hops than a gather, and zeros
    are exact.
    """
    rank, ranks = place_in(group)
    return all_reduce(F.pad(moments.double()[:, None], (rank, ranks - 1 - rank)), group)


def merge_moments(moments: Tensor, group: str) -> Tensor:
    """The moments of all ranks together, float64 [3], from those of this one."""
    counts, means, squares = gather_moments(moments, group)
    count = counts.sum()
    # Means are summed as differences from one of them, not that of an empty part: equal ones stay as they are.
    pivot = means.gather(0, counts.argmax(keepdim=True))
    mean = pivot + (counts * (means - pivot)).sum() / count
    deviations = squares + counts * (means - mean).square()
    return torch.stack([count, mean.squeeze(), deviations.sum()])


def merge_sums(total: Tensor, product: Tensor, group: str) -> Tensor:
    """The sums over all ranks of the gradient of the normalised tensor, and of its product with that: float64 [2].

    Args:
        total, product: those of this rank, scalars.
    """
    return all_reduce(torch.stack([total, product]).double(), group)
