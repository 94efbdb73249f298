"""placeholder until merged"""

from collections.abc import Callable
from typing import Any

import torch


class CaptureError(RuntimeError):
    pass


def capture(function: Callable[[], None], stream: Any, pool: Any) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph
