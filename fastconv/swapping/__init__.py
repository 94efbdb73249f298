"""`swap` and `unswap`: whole models on the fused operations, with their own parameters.

A swapped module stays the object it was, with its parameters, hooks and place in the model; only its class
changes, to a subclass with another forward. So optimizers stay valid, state_dict keys the same, isinstance true.

`swap` goes module by module through these steps, a file each:

1. recognition: what the module may be, by its structure (`parts` says what each part is);
2. verification: which of these hypotheses computes the same, on probes (with random numbers of `randomness`);
3. fusion: how the fused operations compute it, as long as its parts stay as they were (`configuration`);
4. installation: the class that does so.

`report` says what became of each.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import nn

from fastconv import modules
from fastconv.swapping.fusion import Chain, Fusion
from fastconv.swapping.installation import Swapped, install, uninstall
from fastconv.swapping.recognition import Refusal, hypotheses, pairs
from fastconv.swapping.report import BY_SIZE, Candidate, SwapReport
from fastconv.swapping.verification import Verifier

__all__ = ["Candidate", "SwapReport", "swap", "unswap"]

FUSED = (modules.Classifier, modules.ConvNextBlock, modules.DepthwiseConvLayerNorm, modules.PointwiseConvGELU)


def swap(
    model: nn.Module, filter_fn: Callable[[nn.Module, str], bool] | None = None, *, recompute: bool = False
) -> SwapReport:
    """Let the fused operations compute the ConvNeXt blocks of a model, in place.

    It recognises by structure, whatever their names: the lecture's block and classifier; ConvNeXt blocks as
    torchvision, timm, Hugging Face and SAM 2 write them; and in an nn.Sequential, depthwise convolution followed
    by a layer norm of channels, and 1x1 convolution followed by GELU. Each is accepted only if on a probe, in
    float64 and with random parameters, it computes the same, gradients included; and the same results on larger
    maps, more images, large numbers, NaN and infinity. A module is swapped as a whole, or not at all.

    No probe shows what a forward does only for still larger maps or batches, in training alone for these, or for
    special inputs: leave such modules out. A drop path must draw from PyTorch's global generator.

    Parameters are shared, names, hooks and modes kept: optimizers and checkpoints stay valid. A swapped model can
    be copied, pickled, compiled, exported and put into DistributedDataParallel. The module's own forward runs
    where PyTorch's operations are faster, as measured on a CPU; while a part of it has hooks; after a part was
    replaced or set otherwise; and where parts or input are of several dtypes. What else a forward reads, as a
    number that the module itself keeps, must not change: unswap it first.

    It may run in several threads at once, on several models, and beside others that train or draw random numbers.

    Args:
        model: is changed; the root may be swapped, too.
        filter_fn: called with each candidate and its path in the model; False leaves it as it is.
        recompute: save only a block's input for the backward, and compute the rest again: less memory, more time.

    Returns:
        What became of each candidate, to be printed.

    Raises:
        TypeError: `model` is no nn.Module, or `filter_fn` no function.
        RuntimeError: `model` is compiled, scripted or on the meta device.

    Warns:
        UserWarning: nothing was swapped.
    """
    _check(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn is {filter_fn!r}; expected a function of a module and its name, or None")
    candidates: list[Candidate] = []
    fusions: list[tuple[nn.Module, Fusion]] = []
    settled: set[nn.Module] = set()
    verifier = Verifier()
    # A new thread has none of the caller's modes, and a backend of its own.
    with ThreadPoolExecutor(max_workers=1) as thread:
        for name, module in model.named_modules():
            if module in settled:
                continue
            row = functools.partial(Candidate, name, type(module).__name__)
            if isinstance(module, FUSED):
                settled.update(module.modules())
                candidates.append(row("fastconv", False, "it is fused already"))
                continue
            if isinstance(module, Swapped):
                fusion = module.fastconv_fusion
                settled.update(fusion.replaced(module).values())
                same = fusion.recompute == recompute
                note = (
                    "before" if same else f"before, with recompute={not recompute}: unswap it first to change that"
                )
                candidates.append(row(fusion.kind, True, note))
                continue
            found = thread.submit(_verified, module, verifier).result()
            if isinstance(found, Refusal):
                candidates.append(row("", False, found.reason))
            elif found is None:
                continue
            elif filter_fn is not None and not filter_fn(module, name):
                candidates.append(row(found.kind, False, "filter_fn left it out"))
            else:
                fusions.append((module, replace(found.watching(module), recompute=recompute)))
                settled.update(found.replaced(module).values())
                on_cpu = next(module.parameters()).device.type == "cpu"
                candidates.append(row(found.kind, True, BY_SIZE if on_cpu and found.by_size else ""))
    install(fusions)
    report = SwapReport(tuple(candidates))
    if not report.swapped:
        warnings.warn(
            f"fastconv.swap found nothing to swap in {type(model).__name__}; the report says what was skipped",
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
    uninstall(model)


def _verified(module: nn.Module, verifier: Verifier) -> Fusion | Refusal | None:
    """The fusion that computes what a module does, or why none does; None if the module is no candidate."""
    verdict = verifier.verify(module, hypotheses(module))
    if verdict is not None or not isinstance(module, nn.Sequential):
        return verdict
    # Its pairs are verified one by one; one that is refused leaves the others.
    verdicts = [(names, verifier.verify(pair, found)) for names, pair, found in pairs(module)]
    chains = [(names, found) for names, found in verdicts if isinstance(found, Chain)]
    refused = [found for _, found in verdicts if isinstance(found, Refusal)]
    if chains:
        pairs_of_names = tuple((*names, found.pairs[0][2]) for names, found in chains)
        return Chain(pairs_of_names, tuple(first for (first, _), found in chains if found.follows_input))
    return refused[0] if refused else None


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
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
