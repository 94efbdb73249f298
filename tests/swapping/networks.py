"""The models that tests swap: the lecture's, and ConvNeXts of torchvision, timm and Hugging Face."""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from fastconv.operations import reference


class Network(NamedTuple):
    """A model by name, the size of its images, and how many of its modules `swap` takes.

    To a name of timm's an option may be added: "convnext_atto, use_grn".
    """

    library: str
    name: str
    size: tuple[int, ...]
    swapped: int
    slow: bool = False

    def __str__(self):
        return f"{self.library}/{self.name}"

    def create(self, **options):
        return randomise(CREATE[self.library](self.name, **options)).eval()


def _of_lecture(name, **options):
    return reference.Classifier(width=8, depth=2) if name == "classifier" else plain_pairs()


def _of_torchvision(name, **options):
    models = pytest.importorskip("torchvision.models", exc_type=ImportError)
    return models.get_model(name, weights=None, num_classes=5, **options)


def _of_timm(name, **options):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    name, *flags = name.split(", ")
    return timm.create_model(name, pretrained=False, num_classes=5, **dict.fromkeys(flags, True), **options)


def _of_huggingface(name, **options):
    transformers = pytest.importorskip("transformers", reason="not installed: pip install transformers")
    sizes = {"hidden_sizes": [8, 12, 16, 24], "depths": [1, 1, 2, 1]}
    if name == "ConvNext":
        config = transformers.ConvNextConfig(**sizes, num_labels=5)
        return Outputs(transformers.ConvNextForImageClassification(config), "logits")
    if name == "ConvNextV2":
        config = transformers.ConvNextV2Config(**sizes, num_labels=5)
        return Outputs(transformers.ConvNextV2ForImageClassification(config), "logits")
    if name == "DINOv3ConvNext":
        return Outputs(
            transformers.DINOv3ConvNextModel(transformers.DINOv3ConvNextConfig(**sizes)), "pooler_output"
        )
    sam2 = pytest.importorskip("transformers.models.sam2_video.modeling_sam2_video")
    config = transformers.Sam2VideoConfig(memory_fuser_embed_dim=16, memory_fuser_intermediate_dim=40)
    return sam2.Sam2VideoMemoryFuser(config)


CREATE = {"lecture": _of_lecture, "torchvision": _of_torchvision, "timm": _of_timm, "huggingface": _of_huggingface}

NETWORKS = {
    str(network): network
    for network in (
        # Blocks, and the classifier's own operations between them.
        Network("lecture", "classifier", (8, 3, 32, 32), 5),
        # The nn.Sequential, whose pairs count as one.
        Network("lecture", "pairs", (8, 3, 9, 7), 1),
        Network("torchvision", "convnext_tiny", (8, 3, 64, 64), 18),
        Network("torchvision", "convnext_small", (2, 3, 64, 64), 36, slow=True),
        Network("torchvision", "convnext_base", (2, 3, 64, 64), 36, slow=True),
        Network("torchvision", "convnext_large", (2, 3, 64, 64), 36, slow=True),
        Network("timm", "convnext_atto", (8, 3, 64, 96), 12),
        Network("timm", "convnext_atto_ols", (2, 3, 64, 64), 12),
        Network("timm", "convnext_tiny", (2, 3, 64, 64), 18, slow=True),
        Network("timm", "convnext_tiny_hnf", (2, 3, 64, 64), 18, slow=True),
        Network("timm", "convnext_large_mlp", (2, 3, 64, 64), 36, slow=True),
        Network("timm", "test_convnext", (8, 3, 64, 64), 9),
        Network("timm", "test_convnext2", (8, 3, 64, 64), 4),
        Network("timm", "convnextv2_atto", (8, 3, 64, 64), 12),
        Network("timm", "convnext_atto, use_grn", (2, 3, 64, 64), 12),
        Network("timm", "edgenext_xx_small", (2, 3, 64, 64), 9),
        # Between blocks of other kinds; its layer scale is a module.
        Network("timm", "coatnext_nano_rw_224", (2, 3, 224, 224), 5, slow=True),
        Network("huggingface", "ConvNext", (8, 3, 64, 64), 5),
        Network("huggingface", "ConvNextV2", (8, 3, 64, 64), 5),
        Network("huggingface", "DINOv3ConvNext", (8, 3, 64, 64), 5),
        Network("huggingface", "SAM 2's memory fuser", (4, 16, 13, 11), 2),
    )
}
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
