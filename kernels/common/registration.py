"""Operators: opaque to whoever traces them, and cheap when called eagerly.

torch.compile, torch.export and others that trace see an operator registered with PyTorch: the shapes of its
results, and the operator of its gradient. Called eagerly, that boundary takes longer than the kernels behind it.
There a plan, made once for all inputs of one layout, runs at once; where a gradient is needed, in a
torch.autograd.Function.

The arguments of an operator are spelt once, as the fields of a NamedTuple. PyTorch sees them flat; plans and what
else belongs to an operator take the NamedTuple whole.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from .composition import asks_for_more, composed_gradients, save, saved
from .errors import KernelError
from .placement import on_device_of
from .rules import is_traced

# How many plans an operator keeps: one for each batch size, say.
MOST_PLANS = 512

# A NamedTuple of an operator's arguments.
Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
# A tensor, or a tuple of several.
Results = Any
# Computes the results of an operator from its inputs.
Plan = Callable[[Inputs], Results]
# All that a plan depends on: each tensor's shape, strides and dtype; the other arguments; and what is current.
Key = tuple[Any, ...]

# Types of inputs that need no special handling.
_PLAIN = {Tensor, nn.Parameter, type(None), bool, int, float, str}
_OPERATORS: list[Operator[Any]] = []


class Operator(Generic[Inputs]):
    """A registered operator.

    Args:
        name: with the namespace.
        inputs: a NamedTuple, whose fields are the operator's arguments: names, types and order.
        plan: makes the plan for inputs whose tensors are on the "meta" device.
        fake: for inputs of fake tensors, perhaps of symbolic shapes, returns results of the right layout.
    """

    def __init__(
        self,
        name: str,
        inputs: Callable[..., Inputs],
        plan: Callable[[Inputs], Plan[Inputs]],
        fake: Callable[[Inputs], Results],
    ) -> None:
        self._inputs, self._make_plan = inputs, plan
        self._plans: dict[Key, Plan[Inputs] | KernelError] = {}
        self._lock = threading.Lock()
        flat_fake = _flat(fake, inputs)
        schema = torch.library.infer_schema(flat_fake, mutates_args=())
        self._registered = torch.library.custom_op(name, self._run, mutates_args=(), schema=schema)
        self._registered.register_fake(flat_fake)
        _OPERATORS.append(self)

    def __call__(self, inputs: Inputs, forward: Forward | None = None) -> Results:
        """The results.

        Args:
            inputs: the arguments.
            forward: in a backward, the forward. Its key stands for the layouts of all inputs but the first, the
                gradient.

        Raises:
            KernelError: a kernel cannot run on the GPU.
        """
        if _is_traced(inputs):
            return self._registered(*inputs)
        key = None if forward is None else forward.key
        return self._run_plan((_layout(inputs[0]), key) if key is not None else _key(inputs), inputs)

    def _run(self, *arguments: Any) -> Results:
        return self._run_plan(_key(arguments), self._inputs(*arguments))

    def _run_plan(self, key: Key, inputs: Inputs, needs_grad: tuple[bool, ...] = ()) -> Results:
        """
        Args:
            key: the plan's key; there may be several for one layout, but no two layouts of one key.
            needs_grad: which inputs need a gradient, if any: part of the key.
        """
        with on_device_of(inputs[0]):
            plan = self._plans.get(key) or self._add_plan(key, inputs, needs_grad)
            if isinstance(plan, KernelError):
                raise KernelError(plan.kernel, plan.reason)
            return plan(inputs)

    def _add_plan(self, key: Key, inputs: Inputs, needs_grad: tuple[bool, ...]) -> Plan[Inputs] | KernelError:
        """Make a plan and compile its kernels. An error is kept too: compiling again would not change it."""
        like = self._inputs(*(_without_memory(x) if isinstance(x, Tensor) else x for x in inputs))
        plan: Plan[Inputs] | KernelError
        try:
            plan = self._make_plan(like)
            with torch.no_grad():
                self._rehearse(key, plan, like, needs_grad)
        except KernelError as error:
            plan = error
        with self._lock:
            if len(self._plans) >= MOST_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan
        return plan

    def _rehearse(self, key: Key, plan: Plan[Inputs], inputs: Inputs, needs_grad: tuple[bool, ...]) -> None:
        """Run the plan on tensors without memory: that compiles its kernels, and launches nothing."""
        plan(inputs)


class Forward(NamedTuple):
    """What a backward gets of its forward.

    Args:
        inputs: the arguments.
        kept: intermediate results.
        needs: which of the inputs need a gradient.
        key: the plan's, if one ran.
    """

    inputs: Any
    kept: tuple[Any, ...]
    needs: tuple[bool, ...]
    key: Key | None


class DifferentiableOperator(Operator[Inputs]):
    """A registered operator whose first result can be differentiated.

    A call takes the arguments one by one, and returns only that result. The kernels compute first derivatives;
    where more is asked of a backward, the operations of the definition do.

    Where a gradient is needed a call compiles the kernels of the backward too, before it launches any: a forward
    whose backward cannot run is of no use.

    Args:
        name, inputs, plan, fake: as `Operator`'s.
        definition: takes the inputs, and returns the first result as PyTorch's own operations compute it.
        gradients: called with the forward and the gradient of the first result; returns the gradients of the
            inputs by name. It may leave out inputs without one, and include some that nobody needs, but none of an
            input that is None, which autograd refuses.
        keep: the intermediate results for the backward, of the inputs and all results; the default is all results
            but the first.
    """

    def __init__(
        self,
        name: str,
        inputs: Callable[..., Inputs],
        plan: Callable[[Inputs], Plan[Inputs]],
        fake: Callable[[Inputs], Results],
        definition: Callable[[Inputs], Tensor],
        gradients: Callable[[Forward, Tensor], Mapping[str, Tensor | None]],
        keep: Callable[[Inputs, Results], tuple[Tensor, ...]] = lambda _, results: _others(results),
    ) -> None:
        super().__init__(name, inputs, plan, fake)
        names = tuple(get_type_hints(inputs))
        run_plan = self._run_plan

        def setup_context(ctx: Any, inputs: Sequence[Any], output: Results) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, inputs, keep(self._inputs(*inputs), output))

        def composed(*arguments: Any) -> Tensor:
            return definition(self._inputs(*arguments))

        def forward(ctx: Any, *arguments: Any) -> Tensor:
            needs_grad = ctx.needs_input_grad
            ctx.key = needs_grad, *_key(arguments)
            results = run_plan(ctx.key, self._inputs(*arguments), needs_grad)
            setup_context(ctx, arguments, results)
            return _first(results)

        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            if grad is None:
                return (None,) * len(names)
            arguments, kept = saved(ctx)
            if asks_for_more(grad):
                return composed_gradients(composed, arguments, ctx.needs_input_grad, grad)
            # As `dispatch` does with maps.
            if grad.is_neg():
                grad = grad.resolve_neg()
            key = getattr(ctx, "key", None)
            before = Forward(self._inputs(*arguments), tuple(kept), ctx.needs_input_grad, key)
            return tuple(map(gradients(before, grad).get, names))

        self._keep, self._gradients = keep, gradients
        self._registered.register_autograd(backward, setup_context=setup_context)
        # Its name is that of the node in autograd's graph, and in profiles.
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._function: Any = type(name.partition("::")[2], (torch.autograd.Function,), members)

    def __call__(self, *arguments: Any) -> Tensor:
        if _is_traced(arguments):
            return _first(self._registered(*arguments))
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            return self._function.apply(*arguments)
        return _first(self._run(*arguments))

    def _rehearse(self, key: Key, plan: Plan[Inputs], inputs: Inputs, needs_grad: tuple[bool, ...]) -> None:
        results = plan(inputs)
        if needs_grad:
            before = Forward(inputs, self._keep(inputs, results), needs_grad, key)
            self._gradients(before, torch.empty_like(_first(results)))


def forget_plans() -> None:
    """For tests and tools that change what kernels are compiled for."""
    for operator in _OPERATORS:
        operator._plans.clear()


def _flat(fake: Callable[[Inputs], Results], inputs: Callable[..., Inputs]) -> Callable[..., Results]:
    """`fake` with the fields of `inputs` as its arguments, in a signature from which PyTorch infers the schema."""

    def flat_fake(*arguments: Any) -> Results:
        return fake(inputs(*arguments))

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=annotation)
        for name, annotation in get_type_hints(inputs).items()
    ]
    signature = inspect.Signature(parameters, return_annotation=get_type_hints(fake)["return"])
    flat_fake.__signature__ = signature  # type: ignore[attr-defined]
    return flat_fake


def _first(results: Results) -> Tensor:
    return results[0] if isinstance(results, tuple) else results


def _others(results: Results) -> tuple[Tensor, ...]:
    return results[1:] if isinstance(results, tuple) else ()


def _without_memory(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _layout(x: Tensor) -> Key:
    return x.shape, x.stride(), x.dtype


def _key(inputs: Sequence[Any]) -> Key:
    layouts = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in inputs]
    return inputs[0].get_device(), torch.get_float32_matmul_precision(), *layouts


def _is_traced(inputs: Sequence[Any]) -> bool:
    """Whether others than autograd want to see the operator: a compiler, a mode, a transform, or a subclass."""
    return is_traced() or torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, inputs))
