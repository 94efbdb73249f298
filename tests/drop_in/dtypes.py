"""Dtypes and default devices."""

import torch

from .models import trained
from .table import feature


def is_norm(name):
    return "norm" in name


def halved(model, x, dtype):
    """Trained in half precision, but for the norms' parameters."""
    if x.dtype == torch.float64:
        return trained(model, x)
    for name, parameter in model.named_parameters():
        if not is_norm(name):
            parameter.data = parameter.data.to(dtype)
    return trained(model, x.to(dtype))


def autocast(model, x, dtype):
    with torch.autocast(x.device.type, dtype, enabled=x.dtype != torch.float64):
        return trained(model, x)


@feature("bfloat16 with norms in float32", half=True)
def bfloat16(model, x):
    return halved(model, x, torch.bfloat16)


@feature("float16 with norms in float32", half=True)
def float16(model, x):
    return halved(model, x, torch.float16)


@feature("autocast to bfloat16", half=True)
def autocast_to_bfloat16(model, x):
    return autocast(model, x, torch.bfloat16)


@feature("autocast to float16", half=True)
def autocast_to_float16(model, x):
    return autocast(model, x, torch.float16)


@feature("float64")
def float64(model, x):
    return trained(model.double(), x.double())


@feature("`set_default_dtype`")
def default_dtype(model, x):
    torch.set_default_dtype(torch.float64)
    try:
        return trained(model, x)
    finally:
        torch.set_default_dtype(torch.float32)


@feature("`set_default_device`")
def default_device(model, x):
    torch.set_default_device("meta")
    try:
        y = model(x)
        (y * y).sum().backward()
    finally:
        torch.set_default_device(None)
    return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters()}


@feature("the meta device")
def meta(model, x):
    y = model.to("meta")(x.to("meta"))
    return {"shape": torch.tensor(y.shape), "strides": torch.tensor(y.stride())}
