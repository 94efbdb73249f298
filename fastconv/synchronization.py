"""Models whose norms span the images of many processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fastconv.kernels.common.values import spans_images
from fastconv.modules import Normed
from fastconv.operations.functional import name_of_group
from fastconv.swapping.fusion import LectureBlock, LectureClassifier
from fastconv.swapping.installation import Swapped

if TYPE_CHECKING:
    # Not every build of PyTorch has it.
    from torch.distributed import ProcessGroup


def set_process_group(model: nn.Module, process_group: ProcessGroup | str | None) -> list[str]:
    """Let each norm "tensor" of a model's fused modules span the images that all ranks of a process group have.

    Each rank then computes what one process would with the whole batch, gradients included: those of the sum of
    all ranks' losses. Parts of a batch may be of any sizes and, unless the model is compiled, empty. Each such
    norm takes one small all-reduce in the forward and one in the backward, so every rank has to call both, also in
    evaluation. Other norms span one image at most: they need none, and take none.

        model = fastconv.Classifier()
        fastconv.set_process_group(model, torch.distributed.group.WORLD)
        model = torch.nn.parallel.DistributedDataParallel(model)

    Args:
        model: is changed.
        process_group: the group, or its name; None undoes it. `torch.distributed.group.WORLD` is None before
            `init_process_group`.

    Returns:
        The names of the modules in the model whose norm spans the group.

    Raises:
        TypeError: `model` is no nn.Module, or `process_group` no group that this process is in.
        ValueError: a swapped module of the model has a norm that spans the batch, which keeps to its own process.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    name = name_of_group(process_group)
    modules = dict(model.named_modules())
    if name is not None:
        _check_swapped(modules)
    normed = {path: module for path, module in modules.items() if isinstance(module, Normed)}
    for module in normed.values():
        module.process_group = name
    return [path for path, module in normed.items() if name is not None and spans_images(module.norm)]


def _check_swapped(modules: dict[str, nn.Module]) -> None:
    for path, module in modules.items():
        if isinstance(module, Swapped) and isinstance(module.fastconv_fusion, (LectureBlock, LectureClassifier)):
            raise ValueError(
                f"{path or 'the model'} is a swapped {module.fastconv_original.__name__}, whose norm keeps to its "
                "own process; build a fastconv.Classifier or fastconv.ConvNextBlock and load its state_dict"
            )
