"""Corrections of Triton's interpreter: tests on a CPU see what a GPU computes, and faults that it may hide.

Importing this package makes every later @triton.jit function an interpreted one; `install` does the rest. What a
GPU computes was read in the code that Triton compiles, by its versions 3.5 and 3.9, for NVIDIA's sm_80 and sm_90.
"""

import functools
import os

# Triton reads it when imported: its own tl.sum and the like are @triton.jit functions too.
os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from . import bfloat16, memory, products, running, speed


@functools.cache
def install():
    """Correct the interpreter of this process."""
    if not isinstance(tl.sum, InterpretedFunction):
        raise RuntimeError(
            f"triton {triton.__version__} was imported before TRITON_INTERPRET=1 was set; "
            "import tests/interpreter before anything that imports triton"
        )
    for part in (running, speed, bfloat16, products, memory):
        part.install()
