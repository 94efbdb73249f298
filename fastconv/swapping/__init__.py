"""`swap` and `unswap`: whole models on the fused operations, with their own parameters.

A swapped module stays the object it was, with its parameters, hooks and place in the model; only its class
changes, to a subclass with another forward. So optimizers stay valid, state_dict keys the same, isinstance true.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastconv.operations import backends, decisions
from fastconv.swapping.fusion import Fusion
from fastconv.swapping.recognition import ALREADY_FUSED, recognise
from fastconv.swapping.verification import Unsuitable, Verified

BY_SIZE = "where it is faster"
BY_SIZE_MEANS = (
    f"{BY_SIZE}: on a CPU, from {decisions.SEVERAL_IMAGES} images on, maps of one pixel, and plain (NCHW) maps of "
    f"up to {decisions.SLOW_PIXELS} pixels; and in training, plain maps of {decisions.SLOW_ELEMENTS:,} elements "
    "or more. The module's own forward is as fast for others, and runs."
)


class Candidate(NamedTuple):
    """One line of a report: `name` is the module's path in the model; `reason` says why it was skipped."""

    name: str
    module: str
    kind: str
    swapped: bool
    reason: str


class SwapReport(NamedTuple):
    """What `swap` did with each candidate; `print(report)` shows a table."""

    candidates: tuple[Candidate, ...]

    @property
    def swapped(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.swapped)

    @property
    def skipped(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if not candidate.swapped)

    def __str__(self) -> str:
        if not self.candidates:
            return "nothing to swap: no ConvNeXt block, nor such a pair in an nn.Sequential"
        # Here, because whoever swaps a model need not have rich, nor wait for it.
        from rich.console import Console
        from rich.table import Table

        table = Table("module", "class", "kind", "", "note")
        for name, module, kind, swapped, reason in self.candidates:
            table.add_row(name or "(the model)", module, kind, "swapped" if swapped else "skipped", reason)
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        if any(candidate.reason == BY_SIZE for candidate in self.candidates):
            text.write(f"{BY_SIZE_MEANS}\n")
        return f"{text.getvalue()}{len(self.swapped)} swapped, {len(self.skipped)} skipped"


def swap(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None, *, recompute: bool = False
) -> SwapReport:
    """Let the fused operations compute the ConvNeXt blocks of a model, in place.

    Recognised by structure, whatever their names: the lecture's block and classifier; ConvNeXt blocks as
    torchvision, timm, Hugging Face and SAM 2 write them; and in an nn.Sequential, depthwise convolution followed
    by LayerNorm2d, and 1x1 convolution followed by GELU. Each is accepted only if on a probe, in float64 and with
    random parameters, it computes the same, gradients included; a module is swapped as a whole, or not at all.

    Parameters are shared, names, hooks and modes kept: optimizers and checkpoints stay valid. A swapped model can
    be copied, pickled, compiled, exported and put into DistributedDataParallel. The module's own forward runs
    where PyTorch's operations are faster, as measured on a CPU; and while a part of it has hooks, or after a part
    was replaced. What else a forward reads, as a number that the module keeps, must not change: unswap it first.

    Args:
        model: is changed; the root may be swapped, too.
        filter_fn: called with each candidate and its path in the model; False leaves it as it is.
        recompute: save only a block's input for the backward, and compute the rest again: less memory, more time.

    Returns:
        What became of each candidate, to be printed.

    Raises:
        TypeError: `model` is no nn.Module, or `filter_fn` no function.
        RuntimeError: `model` is compiled, scripted, or on the meta device, or gradients are disabled.

    Warns:
        UserWarning: nothing was swapped.
    """
    _check(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is {filter_fn!r}; expected a function of a module and its name, or None")
    candidates: list[Candidate] = []
    changes: list[tuple[nn.Module, Fusion]] = []
    decided: set[nn.Module] = set()
    verified: Verified = {}
    for name, module in model.named_modules():
        if module in decided:
            continue
        row = functools.partial(Candidate, name, type(module).__name__)
        if isinstance(module, ALREADY_FUSED):
            decided.update(module.modules())
            candidates.append(row("fastconv", False, "it is fused already"))
            continue
        if isinstance(module, Swapped):
            same = module.fastconv_fusion.recompute == recompute
            note = "before" if same else f"before, with recompute={not recompute}: unswap it first to change that"
            candidates.append(row(module.fastconv_fusion.kind, True, note))
            decided.update(module.fastconv_fusion.parts(module))
            continue
        try:
            fusion = recognise(module, recompute, verified)
        except Unsuitable as error:
            candidates.append(row("", False, str(error)))
            continue
        if fusion is None:
            continue
        if filter_fn is not None and not filter_fn(module, name):
            candidates.append(row(fusion.kind, False, "filter_fn left it out"))
            continue
        changes.append((module, fusion))
        decided.update(fusion.parts(module))
        on_cpu = next(module.parameters()).device.type == "cpu"
        candidates.append(row(fusion.kind, True, BY_SIZE if on_cpu and fusion.by_size else ""))
    # All, before any is used: a class may refuse to be derived from.
    classes = [_subclass(type(module), fusion) for module, fusion in changes]
    for (module, _), swapped in zip(changes, classes, strict=True):
        module.__class__ = swapped
    report = SwapReport(tuple(candidates))
    if not report.swapped:
        warnings.warn(
            f"fastconv.swap found nothing to swap in {type(model).__name__}; the report tells what was skipped",
            stacklevel=2,
        )
    return report


def unswap(model: nn.Module) -> None:
    """Give the swapped modules of a model their own forward back, in place. Without any it does nothing.

    Raises:
        TypeError: `model` is no nn.Module.
        RuntimeError: the class of a swapped module was changed again, as by parametrizations or FSDP.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    swapped: list[Any] = [module for module in model.modules() if isinstance(module, Swapped)]
    for module in swapped:
        if type(module) is not _subclass(module.fastconv_original, module.fastconv_fusion):
            raise RuntimeError(
                f"a swapped {module.fastconv_original.__name__} is a {type(module).__name__} by now; undo first "
                "what changed its class after the swap, as parametrizations and FSDP do"
            )
    for module in swapped:
        module.__class__ = module.fastconv_original


class Swapped(nn.Module):
    """Mixed into a module's class before it: another forward, and what copies and pickles need to know of it."""

    fastconv_fusion: Fusion
    fastconv_original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        reduced = super().__reduce_ex__(protocol)
        return _rebuild, (self.fastconv_original, self.fastconv_fusion), *reduced[2:]

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript compiles source, of which the original's is what it can read.
        twin = self.fastconv_original.__new__(self.fastconv_original)
        twin.__dict__ = dict(vars(self))
        return twin

    def _get_name(self) -> str:
        return f"{self.fastconv_original.__name__}[fastconv]"


def _forward(module: Swapped, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs and len(args) == 1 and _can_fuse(module, args[0]):
        return module.fastconv_fusion.forward(module, args[0])
    return module.fastconv_original.forward(module, *args, **kwargs)


def _can_fuse(module: Swapped, x: Any) -> bool:
    if torch.jit._trace.is_tracing() or not isinstance(x, Tensor) or x.dim() != 4 or x.numel() == 0:
        return False
    # Under vmap and other transforms of torch.func, which our operations do not know.
    if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if backends.leaves_to_pytorch(x):
        # Of other devices that have no kernels there is no measurement; and an exported program takes any batch.
        if x.device.type != "cpu" or torch.compiler.is_exporting():
            return False
        if not module.fastconv_fusion.pays(module, x):
            return False
    return module.fastconv_fusion.applies(module)


_SUBCLASSES: dict[tuple[type[nn.Module], Fusion], type[Any]] = {}


def _subclass(original: type[nn.Module], fusion: Fusion) -> type[Any]:
    """One for all modules alike: torch.compile compiles a class once."""
    key = original, fusion
    if key not in _SUBCLASSES:
        attributes = {
            "fastconv_fusion": fusion,
            "fastconv_original": original,
            # Libraries look modules up by the names of their classes.
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            # And arguments, as torch.export does, by the signature of forward.
            "forward": functools.wraps(original.forward)(
                lambda self, *args, **kwargs: _forward(self, args, kwargs)
            ),
        }
        _SUBCLASSES[key] = type(original.__name__, (Swapped, original), attributes)
    return _SUBCLASSES[key]


def _rebuild(original: type[nn.Module], fusion: Fusion) -> nn.Module:
    return nn.Module.__new__(_subclass(original, fusion))


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise RuntimeError(
            "fastconv.swap compares gradients, but they are disabled: call it outside torch.no_grad and "
            "torch.inference_mode, and use the model within"
        )
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RuntimeError("the model is scripted; swap the nn.Module from which it was made, then script it")
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise RuntimeError(
                "the model is compiled; swap it first and compile then: fastconv.swap(model); torch.compile(model)"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise RuntimeError(
                f"{name} is on the meta device, without values to try; give the model its weights first, for "
                "example by model.to_empty(device=...) and load_state_dict, then swap it"
            )
