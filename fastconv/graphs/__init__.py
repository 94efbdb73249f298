"""CUDA graphs: `GraphedStep`, a whole training step of a user's model, and `capture`, for functions of our own.

`step` uses the other files in this order: it notes what was there (`before`), runs a step to find what a graph
cannot hold (`waiting`), captures it (`capturing`), and checks at each call that it still fits (`constants`).
"""

from fastconv.graphs.capturing import WARM_UPS_OF_RANKS, CaptureError, capture, on_side_stream
from fastconv.graphs.step import GraphedStep

__all__ = ["WARM_UPS_OF_RANKS", "CaptureError", "GraphedStep", "capture", "on_side_stream"]
