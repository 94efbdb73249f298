"""Captures what a function launches in a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 3
# DistributedDataParallel measures its first ten steps, by events of which a capture could hold none.
WARM_UPS_OF_RANKS = 11


class CaptureError(RuntimeError):
    """Something cannot be in a CUDA graph, or a graph is no longer what the model and its optimizer need."""


def capture(
    function: Callable[[], T], device: torch.device, *, warm_ups: int = WARM_UPS, pool: Any = None
) -> Callable[[], T]:
    """Call a function to warm up, then capture what it launches in a CUDA graph.

    Args:
        function: reads and writes tensors that stay in place. It is called `warm_ups` + 1 times, on a side stream;
            the last call only records.
        device: the GPU.
        pool: of `torch.cuda.graph_pool_handle()`, for graphs that share memory because they never run at once.

    Returns:
        A function that replays the graph, and returns what the recorded call returned, its tensors overwritten.

    Raises:
        CaptureError: CUDA refuses, or the recorded call raises an exception. Warm-ups raise their own.
    """
    for _ in range(warm_ups):
        with on_side_stream(device):
            function()
    with torch.cuda.device(device):
        stream = _side_stream(torch.cuda.current_device())
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        random_state = generator.clone_state()
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            with (
                # After a failure `torch.cuda.graph` leaves its stream the current one; this restores ours.
                torch.cuda.stream(stream),
                # Other threads, such as a loader's that pins memory, may go on using CUDA.
                torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
            ):
                try:
                    result = function()
                except Exception as error:
                    # The end of the capture raises another one, which says less.
                    cause = error
                    raise
        except Exception as error:
            # The generator's own state may still be that of a capture, in which it refuses to draw.
            generator.graphsafe_set_state(random_state)
            cause = cause or error
            reason = str(cause).partition("\n")[0]
            raise CaptureError(
                f"CUDA cannot capture the step in a graph ({type(cause).__name__}: {reason}); expected no "
                "waiting for the GPU, no copies to or from the CPU, and no loss of an eager step still referenced"
            ) from cause
        finally:
            # With its own traceback it would be a cycle that keeps the tensors of the step.
            del cause

    def replay() -> T:
        graph.replay()
        return result

    return replay


@contextmanager
def on_side_stream(device: torch.device) -> Iterator[None]:
    """Launch on the stream of captures, as a warm-up has to: libraries keep a workspace for each stream."""
    with torch.cuda.device(device):
        stream = _side_stream(torch.cuda.current_device())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """The stream of a GPU's captures: graphs share memory only if they are captured on the same one."""
    return torch.cuda.Stream(device)
