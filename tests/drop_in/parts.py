"""Parts of a block that are hooked, wrapped, replaced or set otherwise."""

import copy
import io
import pickle
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .models import block_of, trained
from .table import feature


def changed(name):
    """A feature that changes a block, after which the model is trained."""

    def enter(change):
        def run(model, x):
            change(block_of(model))
            return trained(model, x)

        run.__module__ = change.__module__
        feature(name)(run)
        return change

    return enter


@feature("forward hooks")
def forward_hook(model, x):
    seen = []
    block_of(model).conv2.register_forward_hook(lambda part, args, y: seen.append(y.detach()) or 2 * y)
    return trained(model, x) | {"seen": seen[0]}


@feature("forward pre-hooks")
def forward_pre_hook(model, x):
    seen = []
    block_of(model).conv3.register_forward_pre_hook(lambda part, args: seen.append(args[0].detach()))
    return trained(model, x) | {"seen": seen[0]}


@feature("full backward hooks")
def backward_hook(model, x):
    seen = []
    block_of(model).conv1.register_full_backward_hook(lambda part, before, after: seen.extend((*before, *after)))
    return trained(model, x) | dict(zip(("before", "after"), seen, strict=True))


@feature("gradient hooks on parameters")
def gradient_hook(model, x):
    block_of(model).conv2.weight.register_hook(lambda grad: 3 * grad)
    return trained(model, x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


@changed("parametrizations")
def parametrized(block):
    parametrize.register_parametrization(block.conv1, "weight", Halved())


@changed("weight norm")
def weight_normed(block):
    parametrizations.weight_norm(block.conv2)


@changed("weight norm by hooks")
def weight_normed_by_hooks(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(block.conv3)


@changed("spectral norm")
def spectral_normed(block):
    torch.manual_seed(0)
    parametrizations.spectral_norm(block.conv3)


@changed("pruning")
def pruned(block):
    prune.l1_unstructured(block.conv2, "weight", 0.5)


class Adapter(nn.Module):
    """LoRA for a convolution as peft makes it: a product of two convolutions, of which only these are trained."""

    def __init__(self, conv):
        super().__init__()
        self.base_layer = conv.requires_grad_(False)
        self.lora_A = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.lora_B = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@changed("LoRA adapters")
def adapted(block):
    torch.manual_seed(0)
    block.conv2 = Adapter(block.conv2)


class Quantized(nn.Module):
    """A convolution with weights of 8 bits."""

    def __init__(self, conv):
        super().__init__()
        self.conv = copy.deepcopy(conv).requires_grad_(False)
        self.scale = conv.weight.detach().abs().max() / 127
        self.register_buffer("quantized", (conv.weight.detach() / self.scale).round().to(torch.int8))

    def forward(self, x):
        return self.conv._conv_forward(x, self.quantized * self.scale, self.conv.bias)


@changed("quantized parts")
def quantized(block):
    block.conv2 = Quantized(block.conv2)


@changed("dropout before a part")
def wrapped(block):
    block.conv3 = nn.Sequential(nn.Dropout(0.0), block.conv3)


@changed("a part without bias")
def without_bias(block):
    block.conv2.bias = None


@changed("a smaller kernel")
def smaller_kernel(block):
    torch.manual_seed(0)
    old = block.conv1
    block.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, groups=old.groups)


@changed("dilation")
def dilated(block):
    block.conv1.dilation, block.conv1.padding = (2, 2), (6, 6)


@feature("a stem of other strides")
def strided(model, x):
    torch.manual_seed(0)
    model.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    return trained(model, x)


@feature("`Identity` as the last part")
def removed(model, x):
    name = "bottleneck" if hasattr(model, "bottleneck") else "pointwise"
    setattr(model, name, nn.Identity())
    return trained(model, x)


@feature("frozen parameters")
def frozen(model, x):
    block_of(model).requires_grad_(False)
    return trained(model, x)


@feature("moving averages (`AveragedModel`)")
def averaged(model, x):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        average.update_parameters(model)
    return trained(average, x)


@feature("`copy.deepcopy`")
def copied(model, x):
    return trained(copy.deepcopy(model), x)


@feature("`pickle`")
def pickled(model, x):
    return trained(pickle.loads(pickle.dumps(model)), x)


@feature("`load_state_dict`")
def saved(model, x):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(torch.load(file))
    return trained(model, x)


@feature("tied parameters")
def tied(model, x):
    block = block_of(model)
    block.conv3.bias = model.stem.bias
    return trained(model, x)


@feature("hooks that take gradients while they come")
def optimizer_in_backward(model, x):
    def step(parameter):
        with torch.no_grad():
            parameter.sub_(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    model(x).square().mean().backward()
    return {name: p.detach() for name, p in model.named_parameters()}


@feature("parameters as views of one vector")
def vector(model, x):
    values = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(1.1 * values.detach(), model.parameters())
    return trained(model, x)


@feature("`share_memory`")
def shared(model, x):
    return trained(model.share_memory(), x)


@feature("backward pre-hooks")
def backward_pre_hook(model, x):
    block_of(model).conv2.register_full_backward_pre_hook(lambda part, grads: tuple(2 * grad for grad in grads))
    return trained(model, x)


@feature("hooks of a whole block")
def block_hook(model, x):
    block_of(model).register_forward_hook(lambda part, args, y: y.view(len(y), -1).mul(2).view(y.shape))
    return trained(model, x)


@feature("a forward that is patched for all convolutions")
def patched(model, x):
    forward = nn.Conv2d.forward
    nn.Conv2d.forward = lambda conv, maps: 2 * forward(conv, maps)
    try:
        return trained(model, x)
    finally:
        nn.Conv2d.forward = forward
