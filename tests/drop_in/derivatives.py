"""Every way of differentiating."""

import copy

import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hvp, jacobian
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)

from .models import block_of, trained
from .table import feature


def parameters_of(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def of_parameters(model, x):
    """The loss as a function of the parameters."""
    return lambda parameters: functional_call(model, parameters, (x,)).square().mean()


def of_a_bias(model, x):
    """The first logits as a function of a block's bias, which is small; and the bias."""
    path = next(name for name, _ in model.named_parameters() if name.endswith("conv3.bias"))
    bias = model.get_parameter(path).detach()
    return lambda bias: functional_call(model, {path: bias}, (x,)).flatten()[:5].square(), bias


@feature("gradient penalties (`create_graph=True`)")
def penalty(model, x):
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    slope.square().sum().backward()
    return {"slope": slope.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


@feature("third derivatives")
def third(model, x):
    y = model(x).square().mean()
    bias = block_of(model).conv1.bias
    for _ in range(3):
        y = torch.autograd.grad(y, bias, create_graph=True)[0].square().sum()
    return {"y": y.detach()}


@feature("`torch.func.grad` with `functional_call`")
def func_grad(model, x):
    return grad(of_parameters(model, x))(parameters_of(model))


@feature("`vjp`")
def func_vjp(model, x):
    y, pull = vjp(model, x)
    return {"y": y, "x": pull(torch.ones_like(y))[0]}


@feature("`jvp`")
def func_jvp(model, x):
    parameters = parameters_of(model)
    y, tangent = jvp(of_parameters(model, x), (parameters,), (parameters,))
    return {"y": y, "tangent": tangent}


@feature("`jacrev`")
def func_jacrev(model, x):
    function, bias = of_a_bias(model, x)
    return {"jacobian": jacrev(function)(bias)}


@feature("`jacfwd`")
def func_jacfwd(model, x):
    function, bias = of_a_bias(model, x)
    return {"jacobian": jacfwd(function)(bias)}


@feature("`hessian`")
def func_hessian(model, x):
    function, bias = of_a_bias(model, x)
    return {"hessian": hessian(lambda bias: function(bias).sum())(bias)}


@feature("gradients of each sample by `vmap`")
def per_sample(model, x):
    def loss(parameters, image):
        return of_parameters(model, image[None])(parameters)

    return vmap(grad(loss), (None, 0))(parameters_of(model), x)


@feature("ensembles by `stack_module_state`")
def ensemble(model, x):
    members = [copy.deepcopy(model) for _ in range(2)]
    with torch.no_grad():
        for parameter in members[1].parameters():
            parameter.mul_(1.1)
    parameters, buffers = stack_module_state(members)
    return {"y": vmap(lambda *state: functional_call(model, state, (x,)))(parameters, buffers).detach()}


@feature("forward mode")
def forward_mode(model, x):
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x))))
        return {"y": y.primal.detach(), "tangent": y.tangent.detach()}


@feature("`is_grads_batched`")
def batched(model, x):
    y = model(x).flatten()[:5]
    bias = block_of(model).conv1.bias
    return {"gradients": torch.autograd.grad(y, bias, torch.eye(5), is_grads_batched=True)[0]}


@feature("`jacobian(vectorize=True)`")
def vectorized(model, x):
    return {"jacobian": jacobian(lambda images: model(images).flatten()[:5], x, vectorize=True)}


@feature("`hvp`")
def hessian_vector(model, x):
    y, product = hvp(lambda images: model(images).square().sum(), x, torch.ones_like(x))
    return {"y": y, "product": product}


@feature("`torch.func.linearize`")
def linearized(model, x):
    y, tangent = linearize(model, x)
    return {"y": y.detach(), "tangent": tangent(torch.ones_like(x)).detach()}


@feature("a graph used twice (`retain_graph=True`)")
def retained(model, x):
    y = model(x).square().sum()
    y.backward(retain_graph=True)
    y.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@feature("`detect_anomaly`")
def anomaly(model, x):
    with torch.autograd.detect_anomaly(check_nan=True):
        return trained(model, x)
