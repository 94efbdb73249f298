"""Bounds and races: an access outside of the tensors, or one whose order among programs is open, is an error."""

from typing import NamedTuple

import numpy as np
import torch
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from .replacing import replace

SEVERAL = -1  # in place of a program's number: more than one


def install():
    InterpreterBuilder.memory = None
    replace(interpreter.GridExecutor, "_init_args_hst", _with_memory)
    replace(InterpreterBuilder, "create_masked_load", _checked_load)
    replace(InterpreterBuilder, "create_masked_store", _checked_store)
    replace(InterpreterBuilder, "create_atomic_rmw", _checked_atomic_rmw)
    replace(InterpreterBuilder, "create_atomic_cas", _checked_atomic_cas)
    for name in ("create_atomic_load", "create_atomic_store", "create_atomic_poll"):
        if hasattr(InterpreterBuilder, name):  # triton >= 3.9
            replace(InterpreterBuilder, name, _atomic)


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
