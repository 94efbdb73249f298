"""Swapped models compute what they did: results and the gradient of each parameter, against float64."""

import copy

import pytest
import torch
from networks import NETWORKS, TINY, WHOLE
from oracle import assert_accurate

import fastconv

CUDA = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def networks(*names, among=NETWORKS):
    return pytest.mark.parametrize("network", [pytest.param(among[name], id=name) for name in names or among])


def outputs_and_gradients(model, images):
    """{name: tensor} of the logits and the gradient of each parameter, of a loss that weighs all logits."""
    logits = model(images)
    # Large, as a loss is scaled for float16, in which small gradients are zero.
    weights = torch.linspace(-100, 100, logits.numel(), device=logits.device).view(logits.shape)
    parameters = dict(model.named_parameters())
    # A mask token, or a norm after the features that are asked for, takes no part.
    grads = torch.autograd.grad((logits * weights).sum(), list(parameters.values()), allow_unused=True)
    named = {name: grad for name, grad in zip(parameters, grads, strict=True) if grad is not None}
    assert len(named) > len(parameters) / 2
    return {"logits": logits.detach(), **named}


def assert_same_numbers(
    network, dtype=torch.float32, device="cpu", layout=torch.contiguous_format, samples=2, **options
):
    """The swapped model's errors against float64 are at most twice the original's."""
    model = network.create()
    swapped = copy.deepcopy(model)
    # In the interpreter the kernels would take swap's probes, in float64.
    with fastconv.backend("portable"):
        report = fastconv.swap(swapped, **options)
    assert len(report.swapped) == network.swapped, str(report)
    model, swapped = (module.to(device, dtype) for module in (model, swapped))
    exact_model = copy.deepcopy(model).double()

    def sample():
        images = torch.rand(network.size, device=device).to(dtype)
        with fastconv.backend("reference"):
            exact = outputs_and_gradients(exact_model, images.double())
            # PyTorch's convolutions too are other ones in another layout.
            other = outputs_and_gradients(model, images.contiguous(memory_format=layout))
        mine = outputs_and_gradients(swapped, images.contiguous(memory_format=layout))
        assert mine.keys() == other.keys() == exact.keys()
        return {name: (mine[name], other[name], exact[name]) for name in exact}

    assert_accurate(sample, dtype, samples)


@pytest.fixture
def fused(monkeypatch):
    """Swapped modules run the portable path's code, also where PyTorch's own is the faster."""
    with fastconv.backend("portable"):
        yield


@networks()
def test_fused_numbers_are_the_originals(network, fused):
    assert_same_numbers(network)


@networks("torchvision/ConvNeXt", "timm/convnext_atto", "lecture/pairs", "huggingface/ConvNext")
def test_fused_numbers_are_the_originals_in_channels_last(network, fused):
    assert_same_numbers(network, layout=torch.channels_last)


def strides_seen(model, names, images):
    """The strides of what each of the modules returns, and of the gradients of the images and the parameters."""
    outputs = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, inputs, output: outputs.append(output))
    loss = model(images).square().sum()
    gradients = torch.autograd.grad(loss, images, retain_graph=True)
    loss.backward()
    # Those of dimensions of one element are arbitrary.
    return [
        [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
        for x in [*outputs, *gradients, *(p.grad for p in model.parameters() if p.grad is not None)]
    ]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@networks()
def test_swapped_blocks_return_the_strides_of_the_originals(network, layout, fused):
    model = network.create().to(memory_format=layout)
    swapped = copy.deepcopy(model)
    names = [candidate.name for candidate in fastconv.swap(swapped).candidates if candidate.swapped]
    images = torch.rand(network.size).contiguous(memory_format=layout).requires_grad_()
    assert strides_seen(swapped, names, images) == strides_seen(model, names, images)


@networks("lecture/classifier", "lecture/pairs", "torchvision/ConvNeXt", "timm/convnext_atto")
def test_recomputed_numbers_are_the_originals(network, fused):
    assert_same_numbers(network, recompute=True)


@networks()
def test_auto_takes_the_faster_and_the_numbers_are_the_originals(network):
    assert_same_numbers(network)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@networks("timm/test_convnext", "huggingface/ConvNext")
def test_half_precision(network, dtype, fused):
    assert_same_numbers(network, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@networks("timm/test_convnext", "timm/test_convnext2", "lecture/classifier", "lecture/pairs")
def test_autocast(network, dtype, fused):
    model = network.create()
    swapped = copy.deepcopy(model)
    fastconv.swap(swapped)
    exact_model = copy.deepcopy(model).double()

    def sample():
        images = torch.rand(network.size)
        exact = outputs_and_gradients(exact_model, images.double())
        with torch.autocast("cpu", dtype=dtype):
            other, mine = outputs_and_gradients(model, images), outputs_and_gradients(swapped, images)
        return {name: (mine[name], other[name], exact[name]) for name in exact}

    assert_accurate(sample, dtype, samples=2)


@pytest.mark.interpreted
@networks(among=TINY)
def test_interpreted_kernels_give_the_originals_numbers(network):
    pytest.importorskip("triton")
    with fastconv.backend("triton"):
        assert_same_numbers(network, samples=1)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@networks(among=WHOLE)
def test_whole_networks_on_a_gpu(network, dtype, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fastconv.backend("triton"):
        assert_same_numbers(network, dtype, CUDA, layout)


def test_training_steps_move_the_same_way():
    """Drop path drops the same images, and the optimizer that was made before the swap goes on."""
    network = NETWORKS["timm/test_convnext"]
    model = network.create(drop_path_rate=0.4)
    images, labels = torch.rand(8, 3, 48, 48), torch.randint(5, (8,))
    losses = {}
    for name in ("original", "swapped", "recomputed"):
        trained = copy.deepcopy(model).train()
        optimizer = torch.optim.AdamW(trained.parameters(), 1e-3)
        if name != "original":
            fastconv.swap(trained, recompute=name == "recomputed")
        torch.manual_seed(1)
        losses[name] = []
        for _ in range(4):
            with fastconv.backend("portable"):
                loss = torch.nn.functional.cross_entropy(trained(images), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses[name].append(loss.item())
    assert losses["original"][0] > losses["original"][-1]
    for name in ("swapped", "recomputed"):
        torch.testing.assert_close(losses[name], losses["original"], rtol=1e-4, atol=0)


def saved_bytes(module, x):
    """The size of the tensors that are saved for the backward: each storage once, without parameters."""
    storages = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Kept until the end: the address of what is freed may be taken by the next.
        y = module(x)
    assert y.grad_fn is not None
    return sum(storages.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("backend", ["portable", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_a_block_saves_no_more_than_eager_does(backend, layout):
    if backend == "triton":
        pytest.importorskip("triton")
    block = TINY["timm/test_convnext"].create().stages[0].blocks[0]
    x = torch.rand(2, 8, 5, 4).contiguous(memory_format=layout).requires_grad_()
    eager = saved_bytes(block, x)
    # A layer scale's product with the weights, in the place of maps that eager saves for it.
    scaled = sum(parameter.nbytes for parameter in block.mlp.fc2.parameters())
    with fastconv.backend(backend):
        fastconv.swap(block)
        assert saved_bytes(block, x) <= eager + scaled
        fastconv.unswap(block)
        fastconv.swap(block, recompute=True)
        assert saved_bytes(block, x) == x.nbytes
