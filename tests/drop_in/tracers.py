"""Everybody who looks at the operations that a model is made of."""

import io
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from .models import trained
from .table import feature


def twice(x):
    """Another batch than the one that was traced."""
    return torch.cat([x, 0.5 * x])


@feature("`torch.compile(fullgraph=True)`")
def compiled(model, x):
    torch.compiler.reset()
    module = torch.compile(model, fullgraph=True, backend="aot_eager")
    return {"y": module(x).detach()} | trained(module, x)


@feature("`torch.compile` of `torch.func.grad`")
def compiled_transform(model, x):
    torch.compiler.reset()
    slope = torch.func.grad(lambda images: model(images).square().sum())
    return {"x": torch.compile(slope, backend="aot_eager")(x)}


@feature("`torch.fx.symbolic_trace`")
def symbolic(model, x):
    return trained(torch.fx.symbolic_trace(model), x)


@feature("torchvision's feature extractor")
def extracted(model, x):
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    names = dict(model.named_children())
    found = extraction.create_feature_extractor(model.eval(), {name: name for name in names})(twice(x))
    return {name: y.detach() for name, y in found.items()}


@feature("`torch.jit.trace` for any batch")
def jit_traced(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x), file)
        file.seek(0)
        return {"y": torch.jit.load(file)(twice(x)).detach()}


@feature("`torch.jit.script`")
def scripted(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return {"y": torch.jit.script(model)(twice(x)).detach()}


@feature("`torch.export` with a dynamic batch")
def exported(model, x):
    program = export(model.eval(), (x,), dynamic_shapes=({0: Dim("batch", min=1, max=512)},))
    return {"y": program.module()(twice(x)).detach()}


@feature("`torch.onnx.export`")
def onnx(model, x):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model.eval(), (x,), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = runtime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return {"y": torch.from_numpy(y)}


@feature("`make_fx`")
def made_graph(model, x):
    return {"y": make_fx(model)(x)(x).detach()}


@feature("`FakeTensorMode`")
def fake(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = model(mode.from_tensor(x))
    return {"shape": torch.tensor(y.shape), "strides": torch.tensor(y.stride())}


@feature("`FlopCounterMode`")
def flops(model, x):
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return {"flops": torch.tensor(counter.get_total_flops())}


@feature("torchinfo")
def summary(model, x):
    torchinfo = pytest.importorskip("torchinfo")
    found = torchinfo.summary(model, input_data=x, verbose=0)
    return {"numbers": torch.tensor([found.total_mult_adds, found.total_params, found.total_output_bytes])}
