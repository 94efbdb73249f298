"""Models of torchvision and timm by name, with random weights."""

from __future__ import annotations

import difflib
import importlib.util
import inspect

from torch import nn

from fastconv.extras import import_extra

LIBRARIES = ("torchvision", "timm")


def create_model(name: str) -> nn.Module:
    """Create a classifier of torchvision, or of timm if that has none of this name or it begins with "timm/".

    Raises:
        ValueError: neither has it; the message names some that are like it.
        MissingPackage: it is to come from timm, which is not installed.
    """
    known: list[str] = []
    library, _, model = name.rpartition("/")
    if library not in ("", *LIBRARIES):
        raise ValueError(f"{name} is of {library!r}; expected a name of {' or '.join(LIBRARIES)}")
    if library != "timm" and importlib.util.find_spec("torchvision"):
        models = import_extra("torchvision.models")
        if model in models.list_models():
            # Detectors would download a classifier to build upon.
            builder = models.get_model_builder(model)
            without = {"weights_backbone"} & inspect.signature(builder).parameters.keys()
            return builder(weights=None, **dict.fromkeys(without))
        known += models.list_models()
    if library == "timm" or (not library and importlib.util.find_spec("timm")):
        timm = import_extra("timm")
        # Also with the tag of pretrained weights, as in convnext_tiny.fb_in1k.
        if timm.is_model(model):
            return timm.create_model(model, pretrained=False)
        known += timm.list_models()
    close = ", ".join(difflib.get_close_matches(model, sorted(set(known))))
    suggestion = f"; did you mean: {close}" if close else "; expected a name such as convnext_tiny"
    missing = "" if importlib.util.find_spec("timm") else "; for timm's models: pip install timm"
    raise ValueError(f"there is no model {name!r}{suggestion}{missing}")
