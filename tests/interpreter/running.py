"""What runs in one version of Triton or NumPy runs in each, and errors are those of the kernel."""

import dataclasses

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from .replacing import replace


def install():
    replace(interpreter, "_patch_lang_tensor", _with_index)
    replace(interpreter.GridExecutor, "__call__", _launch)
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options,
        sanitize_overflow=False,  # a GPU does not check either, and it costs more than the rest
    )
    builder = interpreter.InterpreterBuilder
    if not hasattr(builder, "get_bf16"):  # triton < 3.9
        builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)


def _with_index(patch_lang_tensor):
    def patch(tensor, *scope):
        patch_lang_tensor(tensor, *scope)
        # int(array) of one element in one dimension, which Triton < 3.7 does here, is an error in NumPy >= 2.4.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch


def _launch(call):
    def corrected(self, *args, **kwargs):
        try:
            with np.errstate(all="ignore"):  # infinities and NaN are no news to a GPU
                return call(self, *args, **kwargs)
        except InterpreterError as error:
            # One around the other for each device function; the test wants what happened.
            cause = error
            while isinstance(cause, InterpreterError) and cause.__cause__:
                cause = cause.__cause__
            raise cause from None

    return corrected
