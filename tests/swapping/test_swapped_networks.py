"""Swapped models compute what they did: results and the gradient of each parameter, against float64."""

import copy
import functools

import pytest
import torch
from networks import NETWORKS
from oracle import assert_accurate

import fastconv

# One of each kind of block, at sizes for the interpreter.
SMALL = {
    "lecture/classifier": (2, 3, 16, 16),
    "lecture/pairs": (2, 3, 5, 7),
    "timm/test_convnext": (2, 3, 32, 32),
    "timm/test_convnext2": (2, 3, 32, 32),
    "huggingface/ConvNext": (2, 3, 32, 32),
    "huggingface/ConvNextV2": (2, 3, 32, 32),
    "huggingface/SAM 2's memory fuser": (2, 16, 5, 3),
}
FULL = {
    "lecture/classifier": (128, 3, 32, 32),
    "torchvision/convnext_tiny": (8, 3, 224, 224),
    "torchvision/convnext_base": (4, 3, 224, 224),
    "timm/convnext_tiny": (8, 3, 224, 224),
    "timm/convnext_tiny_hnf": (4, 3, 288, 288),
    "timm/convnextv2_atto": (8, 3, 224, 224),
    "timm/convnext_large_mlp": (2, 3, 384, 384),
    "huggingface/ConvNext": (8, 3, 224, 224),
}
CUDA = "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def networks(names):
    return pytest.mark.parametrize(
        "network",
        [
            pytest.param(NETWORKS[name], marks=[pytest.mark.slow] if NETWORKS[name].slow else [], id=name)
            for name in names
        ],
    )


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


# A large network takes half a minute; tests of one network follow each other.
@functools.lru_cache(maxsize=1)
def original_and_swapped(network, **options):
    model = network.create()
    swapped = copy.deepcopy(model)
    report = fastconv.swap(swapped, **options)
    assert len(report.swapped) == network.swapped, str(report)
    return model, swapped


def assert_same_numbers(
    network, size, dtype=torch.float32, device="cpu", layout=torch.contiguous_format, **options
):
    """The swapped model's errors against float64 are at most twice the original's."""
    pair = original_and_swapped(network, **options)
    model, swapped = (copy.deepcopy(module).to(device, dtype) for module in pair)
    exact_model = copy.deepcopy(model).double()

    def sample():
        images = torch.rand(size, device=device).to(dtype)
        with fastconv.backend("reference"):
            exact = outputs_and_gradients(exact_model, images.double())
            # PyTorch's convolutions too are other ones in another layout.
            other = outputs_and_gradients(model, images.contiguous(memory_format=layout))
        mine = outputs_and_gradients(swapped, images.contiguous(memory_format=layout))
        assert mine.keys() == other.keys() == exact.keys()
        return {name: (mine[name], other[name], exact[name]) for name in exact}

    assert_accurate(sample, dtype, samples=2)


@pytest.fixture
def fused(monkeypatch):
    """Swapped modules run the portable path's code, also where PyTorch's own is the faster."""
    with fastconv.backend("portable"):
        yield


@networks(NETWORKS)
def test_fused_numbers_are_the_originals(network, fused):
    assert_same_numbers(network, network.size)


@networks(["torchvision/convnext_tiny", "timm/convnext_atto", "lecture/pairs", "huggingface/ConvNext"])
def test_fused_numbers_are_the_originals_in_channels_last(network, fused):
    assert_same_numbers(network, network.size, layout=torch.channels_last)


@networks(["lecture/classifier", "lecture/pairs", "torchvision/convnext_tiny", "timm/convnext_atto"])
def test_recomputed_numbers_are_the_originals(network, fused):
    assert_same_numbers(network, network.size, recompute=True)


@networks(name for name in NETWORKS if not NETWORKS[name].slow)
def test_auto_takes_the_faster_and_the_numbers_are_the_originals(network):
    assert_same_numbers(network, network.size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@networks(["timm/test_convnext", "huggingface/ConvNext"])
def test_half_precision(network, dtype, fused):
    assert_same_numbers(network, network.size, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@networks(["timm/test_convnext", "timm/test_convnext2", "lecture/classifier", "lecture/pairs"])
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
@pytest.mark.slow
@networks(SMALL)
def test_interpreted_kernels_give_the_originals_numbers(network):
    pytest.importorskip("triton")
    with fastconv.backend("triton"):
        assert_same_numbers(network, SMALL[str(network)])


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@networks(FULL)
def test_full_sizes_on_a_gpu(network, dtype, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with fastconv.backend("triton"):
        assert_same_numbers(network, FULL[str(network)], dtype, CUDA, layout)


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
    block = NETWORKS["timm/test_convnext"].create().stages[0].blocks[0]
    x = torch.rand(2, 24, 9, 8).contiguous(memory_format=layout).requires_grad_()
    eager = saved_bytes(block, x)
    # A layer scale's product with the weights, in the place of maps that eager saves for it.
    scaled = sum(parameter.nbytes for parameter in block.mlp.fc2.parameters())
    with fastconv.backend(backend):
        fastconv.swap(block)
        assert saved_bytes(block, x) <= eager + scaled
        fastconv.unswap(block)
        fastconv.swap(block, recompute=True)
        assert saved_bytes(block, x) == x.nbytes
