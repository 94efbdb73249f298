"""A training step of a user's model as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastconv.graphs.before import Before
from fastconv.graphs.capturing import WARM_UPS, WARM_UPS_OF_RANKS, CaptureError, capture
from fastconv.graphs.constants import Structure
from fastconv.graphs.waiting import RefuseWaiting

# The kind of device that has graphs.
GRAPHABLE = "cuda"
# Optimizers that make their state in the first step, of zeros but for `NOT_ZERO`. SGD's momentum starts as the
# gradient, which is what zeros lead to unless there is dampening.
START_FROM_ZERO = (
    torch.optim.Adadelta,
    torch.optim.Adam,
    torch.optim.Adamax,
    torch.optim.AdamW,
    torch.optim.Muon,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.SGD,
)
NOT_ZERO = {"mu_product": 1.0}


class GraphedStep:
    """A training step, from the forward to the optimizer, that each call replays as one CUDA graph.

    In an eager step Python launches every kernel. Where the kernels of a small model take less time than that, the
    GPU waits for Python, and a graph makes the step several times as fast. Where kernels take longer than their
    launches, as on large images, it gains little, and it keeps the memory of a whole step for itself.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        step = fastconv.GraphedStep(model, torch.nn.functional.cross_entropy, optimizer, (images, labels))
        for images, labels in batches:
            value = step(images, labels)

    A call computes `loss(model(batch[0]), *batch[1:])`, its gradients, and `optimizer.step()`, as an eager step
    would: the constructor warms up by some steps, but then restores parameters, buffers, the optimizer's state and
    PyTorch's random states. Gradients do not accumulate; `p.grad` is that of the last call, until it is dropped.

    Autocast that is on during construction applies to model and loss. A learning rate that changes has to be a
    tensor on the GPU, as `lr=torch.tensor(1e-3, device="cuda")`, which schedulers change in place. A smaller last
    batch needs an eager step or a GraphedStep of its own.

    A graph repeats kernels, not Python: what hooks and forward decide, count, print or draw from Python's random
    numbers is settled by the construction. Kernels that a hook launches are repeated, so gradients can be clipped:

        def clip(optimizer, args, kwargs):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

        optimizer.register_step_pre_hook(clip)  # and then make the GraphedStep

    A DistributedDataParallel over NCCL is captured with its messages. Make it on a side stream, within `with
    torch.cuda.stream(torch.cuda.Stream())`, and set TORCH_NCCL_ASYNC_ERROR_HANDLING=0 in the environment before
    `init_process_group`, as PyTorch's notes on CUDA graphs ask for. Every rank makes its GraphedStep and calls it.

    Not supported: gradient accumulation, GradScaler, a model on several devices, and optimizers that need a
    closure.

    Args:
        model: all its parameters and buffers are on one GPU.
        loss: a function, or module, of the model's output and the batch's other tensors, that returns a scalar.
        optimizer: with `capturable=True`, if it has that option.
        batch: an example, of one tensor or more on that GPU. Its values do not matter.

    Raises:
        TypeError: the batch is no sequence of tensors, or the loss no scalar that depends on parameters.
        CaptureError: the step cannot be captured. Something is on a CPU; or the optimizer keeps numbers on the
            host, or starts from values that are not known here; or the host waits for a result (`.item()`,
            `nonzero`, `if` on a tensor); or a buffer is replaced rather than changed in place; or CUDA refuses,
            which it also does if the loss of an eager step is still referenced. Model and optimizer are then as
            they were.
    """

    def __init__(
        self, model: nn.Module, loss: Callable[..., Tensor], optimizer: Optimizer, batch: Sequence[Tensor]
    ) -> None:
        if not isinstance(batch, Sequence) or not batch:
            found = "empty" if isinstance(batch, Sequence) else _describe(batch)
            raise TypeError(f"batch is {found}; expected a sequence of tensors, such as (images, labels)")
        for i, x in enumerate(batch):
            if not isinstance(x, Tensor):
                raise TypeError(f"batch[{i}] is {_describe(x)}; expected a tensor")
        structure = Structure(
            {"model": model, **({"loss": loss} if isinstance(loss, nn.Module) else {})}, optimizer
        )
        examples = {x: f"batch[{i}]" for i, x in enumerate(batch)}
        self._device = _common_device({**structure.parameters, **structure.buffers, **examples})
        _check_groups(optimizer, self._device)
        warm_ups = WARM_UPS
        if isinstance(model, nn.parallel.DistributedDataParallel):
            _check_messages(model, self._device)
            warm_ups = WARM_UPS_OF_RANKS
        self._model, self._loss, self._optimizer = model, loss, optimizer
        self._parameters = list(structure.parameters)
        self._batch = [x.detach().clone() for x in batch]
        kind = self._device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        self._constants = structure.constants()
        before = Before(structure.registries, self._parameters, optimizer, self._device)
        try:
            self._rehearse(before)
            self._replay = capture(self._step, self._device, warm_ups=warm_ups)
        except BaseException:
            before.restore()
            raise
        before.restore_values()
        for name, state in before.new_state():
            state.fill_(NOT_ZERO.get(name, 0.0))
        self._constants.append(structure.constants_of_state())

    def __call__(self, *batch: Tensor) -> Tensor:
        """Train on a batch of tensors with the shapes, dtypes and device of the example's.

        Returns:
            The loss, a scalar without a gradient. It is a tensor of the graph, which the next call overwrites. To
            read it makes the host wait for the GPU.

        Raises:
            TypeError: there are more or fewer tensors than in the example, or something else.
            ValueError: a tensor has another shape, dtype or device.
            CaptureError: the graph is out of date. A parameter, buffer, module or state of the optimizer was
                replaced, moved, added, frozen or unfrozen; or a mode (train, eval) or hyperparameter was changed.
        """
        if len(batch) != len(self._batch):
            raise TypeError(f"got {len(batch)} tensors; expected {len(self._batch)}, as in the example batch")
        for i, (given, place) in enumerate(zip(batch, self._batch, strict=True)):
            if not isinstance(given, Tensor):
                raise TypeError(f"batch[{i}] is {_describe(given)}; expected a tensor")
            if (given.shape, given.dtype, given.device) != (place.shape, place.dtype, place.device):
                raise ValueError(
                    f"batch[{i}] is {_describe(given)}; expected {_describe(place)}, as in the example batch: "
                    "drop a smaller last batch, or make a GraphedStep for it"
                )
        for constants in self._constants:
            if change := constants.change():
                raise CaptureError(f"{change} since the step was captured; make a new GraphedStep")
        with torch.no_grad():
            for given, place in zip(batch, self._batch, strict=True):
                place.copy_(given)
        return self._replay()

    def _step(self) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        kind, dtype, enabled = self._autocast
        with torch.enable_grad(), torch.autocast(kind, enabled=False):
            # A cache would keep the weights of an earlier step, rounded.
            with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                loss = self._loss(self._model(self._batch[0]), *self._batch[1:])
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise TypeError(
                    f"the loss is {_describe(loss)}; expected a scalar tensor that depends on parameters to train"
                )
            loss.backward()
            self._optimizer.step()
        return loss.detach()

    def _rehearse(self, before: Before) -> None:
        """Run a step; raise CaptureError for what a graph cannot hold or would not repeat."""
        with RefuseWaiting(self._device):
            self._step()
        for constants in self._constants:
            if change := constants.change():
                raise CaptureError(
                    f"{change} by the step itself; expected changes of tensors in place, as by copy_"
                )
        if before.drew_on_the_host():
            raise CaptureError(
                f"the step draws random numbers on the CPU, which a graph repeats; draw them on {self._device}"
            )
        name = type(self._optimizer).__name__
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if value is not None and not (isinstance(value, Tensor) and value.device == self._device):
                    raise CaptureError(
                        f"{name} keeps {key}, {_describe(value)}; expected tensors on {self._device}, which a "
                        "graph can change"
                    )
        dampening = any(group.get("dampening") for group in self._optimizer.param_groups)
        if before.new_state() and (dampening or type(self._optimizer) not in START_FROM_ZERO):
            raise CaptureError(
                f"{name}{' with dampening' if dampening else ''} makes new state in a step, which starts where "
                "only it knows; expected state that is changed in place: take an eager step before"
            )


def _common_device(tensors: dict[Tensor, str]) -> torch.device:
    """The GPU that all these named tensors are on."""
    devices: dict[torch.device, str] = {}
    for x, name in tensors.items():
        devices.setdefault(x.device, name)
    places = " and ".join(f"{name} is on {device}" for device, name in devices.items())
    if {device.type for device in devices} != {GRAPHABLE}:
        raise CaptureError(
            f"{places}; expected all on one GPU, since a CPU has no graphs: there call forward, backward and "
            "optimizer.step() as they are"
        )
    if len(devices) > 1:
        raise CaptureError(f"{places}; expected all on one GPU")
    return next(iter(devices))


def _check_messages(model: nn.parallel.DistributedDataParallel, device: torch.device) -> None:
    """Refuse messages between processes that a graph cannot hold."""
    name = model.process_group._get_backend(device).name()
    if name != "nccl":
        raise CaptureError(
            f"the gradients of the DistributedDataParallel are averaged by {name}, which takes them through the "
            "CPU; expected a process group over nccl"
        )


def _check_groups(optimizer: Optimizer, device: torch.device) -> None:
    """Refuse hyperparameters with which steps would not be on the GPU alone."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CaptureError(f"{name} calls a closure as often as it decides; expected an optimizer that needs none")
    for i, group in enumerate(optimizer.param_groups):
        if not group.get("capturable", True):
            raise CaptureError(f"{name} counts its steps on the CPU; expected {name}(..., capturable=True)")
        for key, value in group.items():
            if isinstance(value, Tensor) and value.device != device:
                raise CaptureError(
                    f"{key} of the optimizer's group {i} is {_describe(value)}; expected a number, or a tensor on "
                    f"{device}"
                )


def _describe(x: object) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    return f"of type {type(x).__name__}"
