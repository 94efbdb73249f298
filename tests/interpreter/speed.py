"""The interpreter computes faster: it spends its time on the types of tensors, and in loops over elements."""

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from .replacing import replace

_patched = set()


def install():
    replace(interpreter, "_patch_lang", _once_a_launch)
    replace(interpreter.GridExecutor, "__call__", _launch)
    replace(interpreter, "_get_np_dtype", _cached)
    replace(interpreter, "np_erf_fp32", _by_torch)
    replace(interpreter, "np_erf_fp64", _by_torch)
    replace(interpreter.ReduceOps, "generic_reduce", _reduce_by_halves)
    replace(tl.block_type, "__init__", _known_block_type)
    replace(tl.tensor, "__init__", _known_shape)
    replace(TritonSemantic, "broadcast_impl_value", _unless_alike)


def _once_a_launch(patch_lang):
    # Each call of a device function, tl.sum too, searches all of triton.language for what to patch.
    def patch(function):
        if function in _patched:
            return None
        _patched.add(function)
        return patch_lang(function)

    return patch


def _launch(call):
    def launch(self, *args, **kwargs):
        _patched.clear()
        return call(self, *args, **kwargs)

    return launch


def _cached(get_np_dtype):
    table = {}

    def cached(dtype):
        name = dtype.scalar.name
        if name not in table:
            table[name] = get_np_dtype(dtype)
        return table[name]

    return cached


def _by_torch(_):
    # Triton calls math.erf for each element. In float64, so that it is rounded as rightly as there.
    return lambda values: torch.erf(torch.from_numpy(values.astype(np.float64))).numpy().astype(values.dtype)


# Each operation makes the type of its result anew, with its name and its shape: half of the time.
def _known_block_type(init):
    known = {}

    def from_known(self, element_type, shape):
        key = (element_type.name, *map(int, shape))
        if key not in known:
            init(self, element_type, shape)
            known[key] = {**vars(self), "sizes": key[1:]}
        vars(self).update(known[key])

    return from_known


def _known_shape(init):
    known = {}

    def from_known(self, handle, type):
        if type.name not in known:
            init(self, handle, type)
            known[type.name] = vars(self).copy()
        vars(self).update(known[type.name], handle=handle, type=type)

    return from_known


def _unless_alike(broadcast):
    def unless_alike(self, a, b):
        if a.type.is_block() and b.type.is_block() and a.type.sizes == b.type.sizes:
            return a, b
        return broadcast(self, a, b)

    return unless_alike


def _reduce_by_halves(_):
    # In the place of a Python loop over the elements. A GPU too combines in a tree, of an order of its own.
    def generic_reduce(self, inputs):
        dtypes = [x.dtype for x in inputs]
        shape = inputs[0].handle.data.shape
        arrays = [x.handle.data for x in inputs]
        if self.axis is None:
            arrays, kept = [x.reshape(-1) for x in arrays], (1,) * len(shape)
        else:
            axis = int(self.axis) % len(shape)
            arrays, kept = [np.moveaxis(x, axis, 0) for x in arrays], (*shape[:axis], 1, *shape[axis + 1 :])
        while len(arrays[0]) > 1:
            half = len(arrays[0]) // 2
            sides = [x[:half] for x in arrays] + [x[half:] for x in arrays]
            combined = self.combine_fn.fn(*map(self.to_tensor, sides, dtypes * 2))
            arrays = [x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,))]
        results = [x.reshape(kept) if self.keep_dims else x[0].copy() for x in arrays]
        return [*map(self.to_tensor, results, dtypes)]

    return generic_reduce
