"""The models that tests swap: the lecture's, and ConvNeXts of torchvision, timm and Hugging Face."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastconv.operations import reference


class Network(NamedTuple):
    """A model by name, the size of its images, how many modules `swap` takes, and options of its constructor."""

    library: str
    name: str
    size: tuple[int, ...]
    swapped: int
    options: Mapping[str, object] = MappingProxyType({})

    def __str__(self):
        return f"{self.library}/{self.name}"

    def create(self, **options):
        return randomise(CREATE[self.library](self.name, **self.options, **options)).eval()


def _of_lecture(name, depth=2):
    return reference.Classifier(width=8, depth=depth) if name == "classifier" else plain_pairs()


def _of_torchvision(name, depths=None, dims=None):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    if depths is None:
        return models.get_model(name, weights=None, num_classes=5)
    blocks = map(models.convnext.CNBlockConfig, dims, [*dims[1:], None], depths)
    return models.ConvNeXt(list(blocks), num_classes=5)


def _of_timm(name, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    return timm.create_model(name.split(",")[0], pretrained=False, num_classes=5, **options)


def _of_huggingface(name, depths=(1, 1, 2, 1), dims=(8, 12, 16, 24)):
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    sizes = {"hidden_sizes": list(dims), "depths": list(depths)}
    if name == "ConvNext":
        config = transformers.ConvNextConfig(**sizes, num_stages=len(dims), num_labels=5)
        return Outputs(transformers.ConvNextForImageClassification(config), "logits")
    if name == "ConvNextV2":
        config = transformers.ConvNextV2Config(**sizes, num_stages=len(dims), num_labels=5)
        return Outputs(transformers.ConvNextV2ForImageClassification(config), "logits")
    if name == "DINOv3ConvNext":
        return Outputs(
            transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**sizes)), "pooler_output"
        )
    sam2 = pytest.importorskip("transformers.models.sam2_video.modeling_sam2_video")
    config = transformers.Sam2VideoConfig(memory_fuser_embed_dim=16, memory_fuser_intermediate_dim=40)
    return sam2.Sam2VideoMemoryFuser(config)


CREATE = {"lecture": _of_lecture, "torchvision": _of_torchvision, "timm": _of_timm, "huggingface": _of_huggingface}

# Networks that differ in sizes alone are cut short, but for one: timm's convnext_atto.
SHORT = {"depths": (1, 1, 2, 1), "dims": (8, 12, 16, 24)}


def by_name(*networks):
    return {str(network): network for network in networks}


NETWORKS = by_name(
    # Blocks, and the classifier's own operations between them.
    Network("lecture", "classifier", (8, 3, 32, 32), 5),
    # The nn.Sequential, whose pairs count as one.
    Network("lecture", "pairs", (8, 3, 9, 7), 1),
    Network("torchvision", "ConvNeXt", (4, 3, 64, 64), 5, SHORT),
    Network("timm", "convnext_atto", (2, 3, 64, 96), 12),
    Network("timm", "convnext_atto_ols", (2, 3, 64, 64), 5, SHORT),
    Network("timm", "convnext_tiny", (2, 3, 64, 64), 5, SHORT),
    Network("timm", "convnext_tiny_hnf", (2, 3, 64, 64), 5, SHORT),
    Network("timm", "convnext_large_mlp", (2, 3, 64, 64), 5, SHORT),
    Network("timm", "test_convnext", (8, 3, 64, 64), 9),
    Network("timm", "test_convnext2", (8, 3, 64, 64), 4),
    Network("timm", "convnextv2_atto", (2, 3, 64, 64), 5, SHORT),
    Network("timm", "convnext_atto, use_grn", (2, 3, 64, 64), 5, {**SHORT, "use_grn": True}),
    Network("timm", "edgenext_xx_small", (2, 3, 64, 64), 9),
    # Between blocks of other kinds; its layer scale is a module.
    Network("timm", "coatnext_nano_rw_224", (2, 3, 64, 64), 5, {"img_size": 64}),
    Network("huggingface", "ConvNext", (8, 3, 64, 64), 5),
    Network("huggingface", "ConvNextV2", (8, 3, 64, 64), 5),
    Network("huggingface", "DINOv3ConvNext", (8, 3, 64, 64), 5),
    Network("huggingface", "SAM 2's memory fuser", (4, 16, 13, 11), 2),
)
TWO_STAGES = {"depths": (1, 1), "dims": (8, 12)}
# A block of each kind, at sizes for Triton's interpreter.
TINY = by_name(
    Network("lecture", "classifier", (2, 3, 16, 16), 3, {"depth": 1}),
    Network("lecture", "pairs", (2, 3, 5, 7), 1),
    Network("timm", "test_convnext", (1, 3, 32, 32), 4, {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 40)}),
    Network("huggingface", "ConvNext", (1, 3, 16, 24), 2, TWO_STAGES),
    Network("huggingface", "ConvNextV2", (1, 3, 16, 24), 2, TWO_STAGES),
    Network("huggingface", "SAM 2's memory fuser", (1, 16, 5, 3), 2),
)
# Whole networks, for a GPU.
WHOLE = by_name(
    Network("lecture", "classifier", (128, 3, 32, 32), 5),
    Network("torchvision", "convnext_tiny", (8, 3, 224, 224), 18),
    Network("torchvision", "convnext_base", (4, 3, 224, 224), 36),
    Network("timm", "convnext_tiny", (8, 3, 224, 224), 18),
    Network("timm", "convnext_tiny_hnf", (4, 3, 288, 288), 18),
    Network("timm", "convnextv2_atto", (8, 3, 224, 224), 12),
    Network("timm", "convnext_large_mlp", (2, 3, 384, 384), 36),
    Network("huggingface", "ConvNext", (8, 3, 224, 224), 5),
)
# Networks whose blocks are not fused, and why not, in the words of the report.
REFUSED = {
    "test_convnext3": "no GELU is among its parts (SiLU",
    "convnext_zepto_rms": "it has norm, a SimpleNorm2d, which the fused block has not",
}


class Outputs(nn.Module):
    """A model that returns an object, as one that returns a tensor of that object."""

    def __init__(self, model, name):
        super().__init__()
        self.model = model
        self.name = name

    def forward(self, x):
        return getattr(self.model(x), self.name)


class LayerNorm2d(nn.LayerNorm):
    """torchvision's, which need not be installed."""

    def forward(self, x):
        return nn.functional.layer_norm(
            x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps
        ).permute(0, 3, 1, 2)


def plain_pairs():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.Conv2d(12, 24, 5, padding=2, groups=12),
        LayerNorm2d(24, eps=1e-6),
        nn.Conv2d(24, 10, 1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 5),
    )


def randomise(model):
    """Replace scales of 1e-6 or 0 and biases of 0, which in a new model would hide what is wrong with a block."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == max(parameter.shape):
                parameter.copy_(torch.rand_like(parameter) + 0.25)
    return model
