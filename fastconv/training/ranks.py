"""The processes of a run: this one alone, or those that torchrun started, each with its part of every batch."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, distributed, nn

from fastconv import machine
from fastconv.graphs import on_side_stream

T = TypeVar("T")

# By which the processes know what others have said before they ended.
_STORE: Any = None


class RankLost(RuntimeError):
    """Another process of the run has ended, or cannot be reached. The message is one line."""


class LaunchError(Exception):
    """The environment of several processes is not what a launcher sets. The message is one line."""


class RankFailed(Exception):
    """Another process of the run has failed, and says why."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of its run; without arguments it is alone.

    Every method but `part` has to be called by all of them, in the same order.

    Args:
        rank: the number of this process, from 0.
        count: how many there are.
        on_machine: how many there are on this machine.
        backend: what takes messages from device to device, if there are several: "gloo" or "nccl".
    """

    rank: int = 0
    count: int = 1
    on_machine: int = 1
    backend: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this process prints, saves and draws."""
        return self.rank == 0

    @property
    def group(self) -> str | None:
        """The name of the process group, if there are several."""
        return None if self.count == 1 else distributed.group.WORLD.group_name  # type: ignore[union-attr]

    def part(self, size: int) -> slice:
        """Which of so many images are this process's: some of each batch, whose parts differ by at most one."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(x)
        return x

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """The largest of each number that a process gives."""
        if self.count == 1:
            return numbers
        # On the CPU, where no device has to be waited for.
        found = torch.tensor(numbers)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        return tuple(found.tolist())

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it.

        Raises:
            RankFailed: it raised an exception there.
        """
        if self.count == 1:
            return make()
        box: list[Any] = [False, None]
        try:
            if self.is_first:
                box = [True, make()]
        finally:
            distributed.broadcast_object_list(box, device=torch.device("cpu"))
        made, value = box
        if not made:
            raise RankFailed("another rank failed")
        return value

    def in_turn(self, make: Callable[[], T]) -> T:
        """What `make` returns, which the first process of each machine has called before the others do."""
        is_local_first = os.environ.get("LOCAL_RANK", "0") == "0"
        made = make() if is_local_first else None
        self.largest(0)
        return make() if made is None else made

    def check_alike(self, **values: object) -> None:
        """Raise ValueError, in every process, if one has another value than the first."""
        if self.count == 1:
            return
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, values)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other[name] != value:
                    raise ValueError(
                        f"rank {rank} has another {name} than rank 0: {other[name]}, expected {value}; "
                        "start every rank alike"
                    )

    def parallel(self, model: nn.Module, example: Tensor) -> nn.Module:
        """A model that averages its gradients over all processes in the backward.

        Args:
            model: has the same weights in all.
            example: of its input. Its values do not matter.
        """
        if self.count == 1:
            return model
        device = example.device
        # From the second forward on gradients lie in the order in which they came in the first backward, and sums
        # are rounded in that order: a backward before all steps makes those of a resumed run as they were.
        with on_side_stream(device) if device.type == "cuda" else nullcontext():
            parallel = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
            )
            parallel(example).sum().backward()
        model.zero_grad()
        return parallel

    def end(self) -> None:
        """Part from the other processes."""
        global _STORE
        if self.count > 1:
            _STORE = None
            distributed.destroy_process_group()


ALONE = Ranks()


def start(device: str) -> tuple[Ranks, torch.device]:
    """Join the other processes, if torchrun or another launcher has set its variables of the environment.

    Args:
        device: "auto", "cpu", "cuda" and the like: every process takes another GPU of its machine, as far as there
            are.

    Raises:
        ValueError: there is no such device, or several processes cannot train there.
    """
    global _STORE
    count, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if count > 1 and rank >= count:
        raise LaunchError(f"RANK is {rank}, of {count} processes; expected less than WORLD_SIZE")
    place = machine.choose_device(device)
    if count == 1:
        return ALONE, place
    if not distributed.is_available():
        raise ValueError(f"there are {count} processes, and this PyTorch has no torch.distributed; start one")
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"{count} processes train on CPUs or GPUs, not on {place}; give --device cpu")
    local, on_machine = _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", count)
    backend = "gloo"
    if place.type == "cuda":
        if device not in ("auto", "cuda"):
            raise ValueError(f"device is {device}, for {count} processes; expected cuda, of which each takes one")
        gpus = torch.cuda.device_count()
        place = torch.device("cuda", local % gpus)
        torch.cuda.set_device(place)
        # NCCL refuses a GPU that two processes share.
        if on_machine <= gpus:
            backend = "nccl"
            # As PyTorch's notes on CUDA graphs ask for. A process that waits for one that has ended is ended by
            # torchrun.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    # Not at the top: not every build of PyTorch has it.
    from torch.distributed.rendezvous import rendezvous

    with _default_signals():
        try:
            _STORE, _, _ = next(rendezvous("env://", rank, count))
        except ValueError as error:
            reason = f"{count} processes cannot find each other ({error})"
            raise LaunchError(f"{reason}; start them with torchrun, which sets what they need") from error
        distributed.init_process_group(f"cpu:gloo,cuda:{backend}", store=_STORE, rank=rank, world_size=count)
    return Ranks(rank, count, on_machine, backend), place


@contextmanager
def _default_signals() -> Iterator[None]:
    """Let signals end this process, which waits for others where no handler of Python's can run."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if main}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def are_launched() -> bool:
    """Whether a launcher has started several processes."""
    return _number("WORLD_SIZE", 1) > 1


def are_joined() -> bool:
    """Whether this process is one of several that have joined."""
    return _STORE is not None


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return not are_launched() or _number("RANK", 0) == 0


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise LaunchError(f"{variable} is {text!r}; expected a number, as torchrun sets it")
    return int(text)


def is_lost(error: BaseException) -> bool:
    """Whether an error says that a message to or from another process failed."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error).lower()


def lost(error: BaseException) -> str:
    """The line that says so."""
    # Without the place in gloo's sources, and what may have been the cause.
    reason = re.sub(r"^\[[^]]*\] *", "", str(error).partition("\n")[0]).partition(". ")[0]
    return f"another rank has ended, or cannot be reached ({reason})"


def leave(code: int) -> NoReturn:
    """End this process, whether others still wait for it or not."""
    if are_joined():
        # An orderly end may wait for them, or abort in a thread of gloo's.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def say(text: str, lost: bool = False) -> None:
    """Print an error, unless another process has said the same.

    Args:
        lost: the error is that another process has ended: it is no news if that, or any other, has said why.
    """
    others = ""
    if _STORE is not None:
        try:
            before = _STORE.add("errors", 1) > 1
            if (before and lost) or _STORE.add(f"error {text}", 1) > 1:
                return
        except (RuntimeError, distributed.DistError):
            # The process that keeps it may be gone.
            pass
        others = "" if is_first() else f"rank {_number('RANK', 0)}: "
    print(f"fastconv: {others}{text}", file=sys.stderr)
