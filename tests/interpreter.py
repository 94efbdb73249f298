"""Corrections of Triton's interpreter: tests on a CPU see what a GPU computes, and faults that it may hide.

Importing this module makes every later @triton.jit function an interpreted one; `install` does the rest. What a
GPU computes was read in the code that Triton compiles, by its versions 3.5 and 3.9, for NVIDIA's sm_80 and sm_90.
"""

import dataclasses
import os
from typing import NamedTuple

import numpy as np
import torch

# Triton reads it when imported: its own tl.sum and the like are @triton.jit functions too.
os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import TensorHandle

# All that the compiler of this version knows: the interpreter's own list lacks the last two.
PRECISIONS = tuple(name.lower() for name in interpreter._ir.INPUT_PRECISION.__members__)
SEVERAL = -1  # in place of a program's number: more than one


def install():
    """Correct the interpreter of this process, once."""
    if not isinstance(tl.sum, interpreter.InterpretedFunction):
        raise RuntimeError(
            f"triton {triton.__version__} was imported before TRITON_INTERPRET=1 was set; "
            "import tests/interpreter.py before anything that imports triton"
        )
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "memory"):
        return
    builder.memory = None

    _replace(interpreter, "_patch_lang_tensor", _with_index)
    _replace(interpreter, "_patch_lang", _once_a_launch)
    _replace(interpreter, "_get_np_dtype", _cached)
    _replace(interpreter, "np_erf_fp32", _by_torch)
    _replace(interpreter, "np_erf_fp64", _by_torch)
    _set_options()

    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        _replace(builder, name, _in_float32)
    _replace(builder, "cast_impl", _cast)
    _replace(builder, "create_dot", _dot)
    if not hasattr(builder, "get_bf16"):  # triton < 3.9
        builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)

    _replace(interpreter.ReduceOps, "generic_reduce", _reduce_by_halves)
    _replace(interpreter.ReduceOps, "apply_impl", _reduce_bf16_in_steps)
    for name in ("cumsum", "cumprod"):
        _replace(interpreter.ScanOps, name, _scan_bf16_in_steps)

    _replace(interpreter.GridExecutor, "_init_args_hst", _with_memory)
    _replace(interpreter.GridExecutor, "__call__", _launch)
    _replace(builder, "create_masked_load", _checked_load)
    _replace(builder, "create_masked_store", _checked_store)
    _replace(builder, "create_atomic_rmw", _checked_atomic_rmw)
    _replace(builder, "create_atomic_cas", _checked_atomic_cas)
    for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
        if hasattr(builder, name):  # triton >= 3.9
            _replace(builder, name, _atomic)


def _replace(owner, name, correct):
    """Put `correct(original)` in the place of an attribute."""
    if not hasattr(owner, name):
        raise RuntimeError(
            f"triton {triton.__version__} has no {owner.__name__}.{name} to correct; "
            "adapt tests/interpreter.py to this version"
        )
    setattr(owner, name, correct(getattr(owner, name)))


def _with_index(patch_lang_tensor):
    def patch(tensor, *scope):
        patch_lang_tensor(tensor, *scope)
        # int(array) of one element in one dimension, which Triton < 3.7 does here, is an error in NumPy >= 2.4.
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch


_patched = set()


def _once_a_launch(patch_lang):
    # Each call of a device function, tl.sum too, searches all of triton.language for what to patch.
    def patch(function):
        if function in _patched:
            return None
        _patched.add(function)
        return patch_lang(function)

    return patch


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


def _set_options():
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(
        options,
        allowed_dot_input_precisions=PRECISIONS,
        sanitize_overflow=False,  # a GPU does not check either, and it costs more than the rest
    )


def bf16_to_float32(bits):
    """Decode the uint16 in which the interpreter keeps bf16 (and with which, uncorrected, it computes)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values):
    """Round to nearest, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(values), 0x7FFF, rounded).astype(np.uint16)


def _is_bf16(value):
    # A comparison's handle may name the dtype of its operands: the data decide.
    return isinstance(value, TensorHandle) and value.data.dtype == np.uint16 and value.dtype.scalar == tl.bfloat16


def _widen(value):
    return TensorHandle(bf16_to_float32(value.data), tl.float32) if _is_bf16(value) else value


def _narrow(value):
    if value.data.dtype == np.bool_:
        return TensorHandle(value.data, tl.int1)
    return TensorHandle(float32_to_bf16(value.data), tl.bfloat16)


def _in_float32(operation):
    # One operation in float32, rounded, is the operation in bf16: float32 has more than twice the digits.
    def corrected(self, *values):
        if not any(map(_is_bf16, values)):
            return operation(self, *values)
        return _narrow(operation(self, *map(_widen, values)))

    return corrected


def _cast(cast_impl):
    def corrected(self, value, dtype):
        if dtype.scalar == tl.bfloat16:
            return value if _is_bf16(value) else _narrow(TensorHandle(value.data.astype(np.float32), tl.float32))
        return cast_impl(self, _widen(value), dtype)

    return corrected


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


def _reduce_bf16_in_steps(apply_impl):
    # A GPU rounds every partial sum to bf16: tl.sum compiles to add.bf16.
    def corrected(self, inputs):
        if any(x.dtype == tl.bfloat16 for x in inputs):
            return self.generic_reduce(inputs)
        return apply_impl(self, inputs)

    return corrected


def _scan_bf16_in_steps(scan):
    def corrected(self, value):
        return self.generic_scan((value,)) if value.dtype == tl.bfloat16 else scan(self, value)

    return corrected


# The products that Triton's pass F32DotTC sums, in its order: (part of a, part of b), 0 being the largest.
SMALL_PRODUCTS = {
    "TF32x3": ((1, 0), (0, 1)),
    "BF16x3": ((1, 0), (0, 1)),
    "BF16x6": ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1)),
}


def truncate_to_tf32(values):
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def round_to_tf32(values):
    """As cvt.rna does: to nearest, ties away from zero."""
    rounded = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def _parts(values, precision):
    """The float32 values as a sum of narrower ones."""
    if precision == "TF32x3":
        big = round_to_tf32(values)
        return big, truncate_to_tf32(values - big)
    parts = []
    for _ in range(3 if precision == "BF16x6" else 2):
        parts.append(bf16_to_float32(float32_to_bf16(values)))
        values = values - parts[-1]
    return parts


def _float32_dot(a, b, precision):
    if precision == "IEEE":
        return np.matmul(a, b)
    if precision == "TF32":
        # The compiled code has no cvt: the tensor cores themselves ignore the low 13 bits (triton issue 4574).
        return np.matmul(truncate_to_tf32(a), truncate_to_tf32(b))
    a, b = _parts(a, precision), _parts(b, precision)
    small = sum(np.matmul(a[i], b[j]) for i, j in SMALL_PRODUCTS[precision])
    # As the pass does: what is left of an infinity is NaN.
    return np.where(np.isnan(small), np.float32(0), small) + np.matmul(a[0], b[0])


def _dot(create_dot):
    def corrected(self, a, b, accumulator, precision, *rest):
        if a.data.dtype != np.float32:
            return create_dot(self, _widen(a), _widen(b), accumulator, precision, *rest)
        product = _float32_dot(a.data, b.data, precision.name)
        return TensorHandle(product + accumulator.data, accumulator.dtype.scalar)

    return corrected


class Access(NamedTuple):
    """Which program of the grid does what."""

    verb: str
    index: tuple
    grid: tuple

    @property
    def program(self):
        """The program's number; they start at 1."""
        return 1 + int(np.ravel_multi_index(self.index, self.grid))

    def __str__(self):
        return f"program {self.index} {self.verb}"

    def race(self, element, other, done):
        who = "several programs"
        if other != SEVERAL:
            who = f"program {tuple(map(int, np.unravel_index(other - 1, self.grid)))}"
        return f"race: {self} {element}, which {who} {done} in the same launch"


class Region:
    """The storage of one or more tensor arguments, with the programs that loaded and stored each element."""

    def __init__(self, tensors):
        storage = tensors[0][1].untyped_storage()
        self.names = ", ".join(name for name, _ in tensors)
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self.itemsize = min(tensor.element_size() for _, tensor in tensors)
        # The number of the program that did, or 0 for none.
        elements = storage.nbytes() // self.itemsize
        # zeros_like would touch every page of a huge tensor of which few elements are used.
        self.loaded, self.stored = np.zeros(elements, np.int32), np.zeros(elements, np.int32)
        self.is_stored = False

    def elements(self, addresses, size):
        elements = (addresses - np.uint64(self.start)).view(np.int64) // self.itemsize
        if size <= self.itemsize:
            return elements
        return (elements[:, None] + np.arange(size // self.itemsize)).reshape(-1)

    def load(self, elements, access):
        if self.is_stored:  # few are: most arguments are inputs
            self._refuse_others(self.stored, "stored", elements, access)
        before, program = self.loaded[elements], access.program
        self.loaded[elements] = np.where((before == 0) | (before == program), program, SEVERAL)

    def store(self, elements, access):
        self._refuse_others(self.stored, "stored", elements, access)
        self._refuse_others(self.loaded, "loaded", elements, access)
        self.stored[elements] = access.program
        self.is_stored = True

    def _refuse_others(self, programs, done, elements, access):
        before = programs[elements]
        races = (before != 0) & (before != access.program)
        if races.any():
            first = races.argmax()
            raise RuntimeError(access.race(f"element {elements[first]} of {self.names}", before[first], done))


class Memory:
    """What the programs of one launch may touch."""

    def __init__(self, tensors):
        shared = {}
        for name, tensor in tensors:
            if tensor.untyped_storage().nbytes():
                shared.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.regions = [*map(Region, shared.values())]
        self.in_atomic = False

    def check(self, verb, builder, pointers, mask=None):
        """Refuse an access outside of the tensors, or one that may come before or after another program's."""
        addresses = pointers.data
        if mask is not None:
            mask = np.asarray(mask.data, dtype=bool)  # a descriptor's mask is a bare array in Triton < 3.9
            addresses = addresses.reshape(-1) if mask.all() else addresses[np.broadcast_to(mask, addresses.shape)]
        if not addresses.size:
            return
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        access = Access(verb, builder.grid_idx, builder.grid_dim)
        parts = self._split(addresses, size, access)
        if verb == "updates" or self.in_atomic or access.grid == (1, 1, 1):
            return
        for region, inside in parts:
            act = region.load if verb == "loads" else region.store
            act(region.elements(inside, size), access)

    def _split(self, addresses, size, access):
        """The addresses of each region."""
        first, end = int(addresses.min()), int(addresses.max()) + size
        for region in self.regions:
            if region.start <= first and end <= region.end:
                return [(region, addresses)]
        inside = [(addresses >= x.start) & (addresses <= x.end - size) for x in self.regions]
        outside = ~np.any([np.zeros_like(addresses, bool), *inside], axis=0)
        if outside.any():
            first = int(addresses[outside][0])
            distances = [
                (x.start - first, f"before the start of {x.names}") for x in self.regions if first < x.start
            ]
            distances += [
                (first + size - x.end, f"past the end of {x.names}") for x in self.regions if first >= x.start
            ]
            nearest = ", the first {} bytes {}".format(*min(distances)) if distances else ""
            raise IndexError(
                f"{access} {outside.sum()} of {addresses.size} elements outside of every tensor argument{nearest}"
            )
        return [(x, addresses[y]) for x, y in zip(self.regions, inside, strict=True) if y.any()]


def _with_memory(init_args):
    def corrected(self, args, kwargs):
        args, kwargs = init_args(self, args, kwargs)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        tensors = [found for name, value in named for found in _tensors(name, value)]
        interpreter.interpreter_builder.memory = Memory(tensors)
        return args, kwargs

    return corrected


def _tensors(name, value):
    value = getattr(value, "base", value)  # a tensor descriptor's, or that of a reinterpreted tensor
    if isinstance(value, tuple):
        return [found for i, x in enumerate(value) for found in _tensors(f"{name}[{i}]", x)]
    return [(name, value)] if isinstance(value, torch.Tensor) else []


def _launch(call):
    def corrected(self, *args, **kwargs):
        _patched.clear()
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


def _checked_load(create_masked_load):
    def checked(self, pointers, mask, *rest, **kwargs):
        self.memory.check("loads", self, pointers, mask)
        return create_masked_load(self, pointers, mask, *rest, **kwargs)

    return checked


def _checked_store(create_masked_store):
    def checked(self, pointers, value, mask, *rest, **kwargs):
        self.memory.check("stores", self, pointers, mask)
        return create_masked_store(self, pointers, value, mask, *rest, **kwargs)

    return checked


def _checked_atomic_rmw(create_atomic_rmw):
    def checked(self, operation, pointers, value, mask, *rest):
        self.memory.check("updates", self, pointers, mask)
        return create_atomic_rmw(self, operation, pointers, value, mask, *rest)

    return checked


def _checked_atomic_cas(create_atomic_cas):
    def checked(self, pointers, *rest):
        self.memory.check("updates", self, pointers)
        return create_atomic_cas(self, pointers, *rest)

    return checked


def _atomic(operation):
    def checked(self, *args):
        self.memory.in_atomic = True
        try:
            return operation(self, *args)
        finally:
            self.memory.in_atomic = False

    return checked
