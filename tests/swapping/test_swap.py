"""fastconv.swap and unswap: what they take, refuse, keep and report; numbers are in test_swapped_networks.py."""

import copy
import functools
import gc
import io
import json
import pickle
import random
import re
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
import torch
from networks import NETWORKS, REFUSED, LayerNorm2d, plain_pairs, randomise
from torch import nn
from torch.nn import functional as F

import fastconv
from fastconv.operations import backends, decisions, reference
from fastconv.swapping import fusion, verification


class Block(nn.Module):
    """A ConvNeXt block as one writes it in a notebook, with what may differ."""

    def __init__(
        self, channels=6, conv=None, norm=None, activation=None, wide=24, scale=True, drop=None, residual=True
    ):
        super().__init__()
        self.spatial = conv or nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.normalise = norm or nn.LayerNorm(channels, eps=1e-6)
        self.widen = nn.Linear(channels, wide)
        self.activate = activation or nn.GELU()
        self.narrow = nn.Linear(wide, channels)
        self.scale = nn.Parameter(torch.rand(channels)) if scale else None
        self.stochastic = drop or nn.Identity()
        self.residual = residual

    def forward(self, x):
        y = self.normalise(self.spatial(x).permute(0, 2, 3, 1))
        y = self.narrow(self.activate(self.widen(y)))
        if self.scale is not None:
            y = self.scale * y
        y = self.stochastic(y.permute(0, 3, 1, 2))
        return x + y if self.residual else y


class DropImages(nn.Module):
    def forward(self, x):
        kept = torch.rand(x.shape[0], 1, 1, 1) < 0.5 if self.training else 1
        return x * kept


def conv(channels=6, size=7, padding=3, **options):
    return nn.Conv2d(channels, channels, size, padding=padding, groups=channels, **options)


class ScaledPath(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.weight * x


class DoubledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Tanh3(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(0.7978845608 * (x + 0.044715 * x**3)))


TAKEN = {
    "plain": {},
    "no layer scale": {"scale": False},
    "drop path": {"drop": DropImages()},
    "kernel 3": {"conv": conv(size=3, padding=1)},
    "kernel 5x11": {"conv": conv(size=(5, 11), padding=(2, 5))},
    "padding same": {"conv": conv(padding="same")},
    "no bias": {"conv": conv(bias=False)},
    "norm without weights": {"norm": nn.LayerNorm(6, elementwise_affine=False)},
    "norm without a bias": {"norm": nn.LayerNorm(6, bias=False)},
    "GELU by tanh": {"activation": nn.GELU(approximate="tanh")},
    "somebody's GELU by tanh": {"activation": Tanh3()},
    "not four times as wide": {"wide": 14},
}
REFUSED_BLOCKS = {
    "stride": ({"conv": conv(stride=2)}, r"stride \(2, 2\); expected \(1, 1\)"),
    "dilation": ({"conv": conv(padding=6, dilation=2)}, r"dilation \(2, 2\); expected \(1, 1\)"),
    "padding mode": ({"conv": conv(padding_mode="reflect")}, "padding_mode reflect; expected zeros"),
    "no padding": ({"conv": conv(padding=0)}, r"padding \(0, 0\); expected \(3, 3\)"),
    "even kernel": ({"conv": conv(size=6, padding="same")}, r"kernel of \(6, 6\); expected odd sides"),
    "ReLU": ({"activation": nn.ReLU()}, r"no GELU is among its parts \(ReLU\)"),
    "batch norm": ({"norm": nn.BatchNorm1d(6)}, "it has normalise, a BatchNorm1d"),
    "group norm": (
        {"norm": nn.GroupNorm(2, 6)},
        "does not compute what its parts suggest|its forward does not take maps",
    ),
    "no residual": ({"residual": False}, "does not compute what its parts suggest: on a probe"),
    "a convolution of its own": ({"conv": DoubledConv(6, 6, 7, padding=3, groups=6)}, "DoubledConv has a forward"),
    "a scale more": ({"drop": ScaledPath()}, "it has stochastic, a ScaledPath, which the fused block has not"),
    "dropout": ({"drop": nn.Dropout(0.1)}, "stochastic, a Dropout with p=0.1"),
}


@pytest.fixture
def fused():
    """Swapped modules run the portable path's code, also where PyTorch's own is the faster."""
    with fastconv.backend("portable"):
        yield


@pytest.fixture
def calls(monkeypatch):
    """The kinds of fusions that ran."""
    ran = []
    for kind in (fusion.LectureBlock, fusion.LectureClassifier, fusion.ConvNeXtBlock, fusion.Chain):

        def compute(self, module, x, original=kind.compute, **options):
            ran.append(self.kind)
            return original(self, module, x, **options)

        monkeypatch.setattr(kind, "compute", compute)
    return ran


def swap_quietly(model, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastconv.swap(model, *args, **options)


@pytest.mark.parametrize("name", TAKEN)
def test_blocks_are_recognised_by_structure(name, fused, calls):
    block = Block(**TAKEN[name])
    x = torch.rand(3, 6, 9, 8)
    torch.manual_seed(1)
    before = block(x)
    (candidate,) = fastconv.swap(block).candidates
    assert candidate == ("", "Block", "ConvNeXt block", True, "where it is faster")
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    # The probe ran it before.
    assert calls[-1] == "ConvNeXt block"


@pytest.mark.parametrize("name", REFUSED_BLOCKS)
def test_what_a_block_computes_decides(name):
    options, reason = REFUSED_BLOCKS[name]
    model = nn.Sequential(Block(**options), Block())
    report = fastconv.swap(model)
    (skipped,) = report.skipped
    assert skipped.name == "0"
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(skipped.reason)
    assert [candidate.name for candidate in report.swapped] == ["1"]
    assert type(model[0]) is Block
    assert type(model[1]) is not Block


@pytest.mark.parametrize("name", REFUSED)
def test_a_network_of_other_blocks_is_refused_with_the_reason(name):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    model = timm.create_model(name, pretrained=False)
    with pytest.warns(UserWarning, match="fastconv.swap found nothing to swap in ConvNeXt"):
        report = fastconv.swap(model)
    assert len(report.candidates) >= 4
    assert all(REFUSED[name] in candidate.reason for candidate in report.candidates)


def test_a_notebooks_copy_of_the_lecture(fused, calls):
    class ConvNextBlock(nn.Module):
        def __init__(self, in_channels):
            super().__init__()
            self.conv1 = nn.Conv2d(in_channels, 4 * in_channels, 7, padding="same", groups=in_channels)
            self.conv2 = nn.Conv2d(4 * in_channels, in_channels, 1)
            self.conv3 = nn.Conv2d(in_channels, in_channels, 1)

        def forward(self, inputs):
            x = F.layer_norm(self.conv1(inputs), (inputs.shape[0], 24, *inputs.shape[2:]))
            return self.conv3(F.gelu(self.conv2(x))) + inputs

    model = nn.ModuleDict({"mine": ConvNextBlock(6), "twice": reference.ConvNextBlock(5)})
    x = torch.rand(3, 6, 8, 8)
    before = model["mine"](x)
    report = fastconv.swap(model)
    assert [(candidate.name, candidate.kind) for candidate in report.swapped] == [
        ("mine", "lecture's block"),
        ("twice", "lecture's block"),
    ]
    calls.clear()
    torch.testing.assert_close(model["mine"](x), before, rtol=1e-4, atol=1e-5)
    assert calls == ["lecture's block"]


def test_what_looks_like_the_lectures_but_computes_another_thing_is_refused():
    class Other(reference.ConvNextBlock):
        def forward(self, inputs):
            return 1.001 * super().forward(inputs)

    with pytest.warns(UserWarning, match="nothing to swap"):
        report = fastconv.swap(Other(4))
    assert "on a probe its results or gradients differ" in report.skipped[0].reason


def test_pairs_in_a_sequential(fused, calls):
    model = plain_pairs()
    x = torch.rand(2, 3, 9, 8)
    before = model(x)
    (candidate,) = fastconv.swap(model).candidates
    assert (candidate.name, candidate.kind, candidate.swapped) == ("", "pairs in a Sequential", True)
    calls.clear()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert calls == ["pairs in a Sequential"]
    with pytest.warns(UserWarning, match="nothing to swap"):
        assert fastconv.swap(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())).candidates == ()


def test_state_dict_optimizer_and_identity_are_kept(fused):
    model = randomise(reference.Classifier(width=8, depth=1))
    keys, parameters, modules = list(model.state_dict()), list(model.parameters()), list(model.modules())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fastconv.swap(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert isinstance(model, reference.Classifier)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    # The norm that follows the stem takes out what adds to all its channels alike; nothing else stays.
    assert sum(moved) >= len(moved) - 1


def test_unswap_gives_the_original_back():
    model = nn.Sequential(Block(), nn.Sequential(Block(scale=False)))
    fastconv.swap(model)
    assert all(type(block) is not Block for block in (model[0], model[1][0]))
    fastconv.unswap(model)
    fastconv.unswap(model)
    assert type(model[0]) is type(model[1][0]) is Block


def test_swapping_twice_changes_nothing_more():
    model = nn.Sequential(Block(), Block())
    fastconv.swap(model)
    classes = [type(module) for module in model]
    report = fastconv.swap(model)
    assert [type(module) for module in model] == classes
    assert [candidate.reason for candidate in report.swapped] == ["before", "before"]


def test_our_own_modules_are_left_as_they_are():
    model = nn.Sequential(fastconv.ConvNextBlock(4), fastconv.Classifier(width=4), Block())
    report = fastconv.swap(model)
    assert [candidate.reason for candidate in report.skipped] == ["it is fused already"] * 2
    assert [candidate.name for candidate in report.swapped] == ["2"]


def test_filter_fn_chooses_by_module_and_name():
    model = nn.Sequential(Block(), Block(scale=False), Block())
    seen = []

    def choose(module, name):
        seen.append(name)
        return module.scale is None

    report = fastconv.swap(model, choose)
    assert seen == ["0", "1", "2"]
    assert [candidate.name for candidate in report.swapped] == ["1"]
    assert {candidate.reason for candidate in report.skipped} == {"filter_fn left it out"}


def test_of_blocks_that_are_alike_one_is_tried(monkeypatch):
    tried = []

    def probe(*args, original=verification._probe):
        tried.append(args)
        return original(*args)

    monkeypatch.setattr(verification, "_probe", probe)
    alike, other = [Block(drop=DropImages()) for _ in range(4)], Block(drop=DropImages(), residual=False)
    for block, rate in zip([*alike, other], (0.0, 0.2, 0.7, 0.9, 0.9), strict=True):
        block.stochastic.rate = rate
    report = fastconv.swap(nn.Sequential(*alike, Block(wide=12), other))
    assert [candidate.swapped for candidate in report.candidates] == [True] * 5 + [False]
    # Drop path is called as it is, whatever its rate; but a rate of 0 turns it off.
    assert len(tried) == 4


class TwiceActivated(Block):
    """With one activation, which is applied again if `last`."""

    def __init__(self, last):
        super().__init__()
        del self.widen, self.activate, self.narrow
        activation = nn.GELU()
        self.mix = nn.Sequential(nn.Linear(6, 24), activation, nn.Linear(24, 6), *([activation] if last else []))

    def forward(self, x):
        y = self.mix(self.normalise(self.spatial(x).permute(0, 2, 3, 1)))
        return x + (self.scale * y).permute(0, 3, 1, 2)


class DropWithin(Block):
    """With dropout of channels where the fused block has none."""

    def __init__(self, p):
        super().__init__()
        self.dropout = DropChannels(p)

    def forward(self, x):
        y = self.activate(self.widen(self.normalise(self.spatial(x).permute(0, 2, 3, 1))))
        y = self.dropout(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + (self.scale * self.narrow(y)).permute(0, 3, 1, 2)


class DropChannels(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return F.dropout2d(x, self.p, self.training)


@pytest.mark.parametrize(
    ("taken", "refused"),
    [(TwiceActivated(False), TwiceActivated(True)), (DropWithin(0.0), DropWithin(0.2))],
    ids=["a module that occurs twice", "dropout of no rate"],
)
def test_blocks_that_only_seem_alike_are_tried_each(taken, refused):
    report = fastconv.swap(nn.Sequential(taken, refused))
    assert [candidate.swapped for candidate in report.candidates] == [True, False]


class ScaledByAModule(Block):
    def __init__(self):
        super().__init__(scale=False)
        self.layer_scale = ScaleOfChannels()

    def forward(self, x):
        return x + self.layer_scale(super().forward(x) - x)


class ScaleOfChannels(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return self.gamma[:, None, None] * x


def test_a_layer_scale_may_be_a_module(fused, calls):
    block = ScaledByAModule()
    x = torch.rand(2, 6, 5, 4)
    before = block(x)
    assert len(fastconv.swap(block).swapped) == 1
    calls.clear()
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    assert calls == ["ConvNeXt block"]


class Skipping(Block):
    def forward(self, x):
        return x if self.training and torch.rand(1).item() < 0.01 else super().forward(x)


class RootScaled(Block):
    def forward(self, x):
        return x + (super().forward(x) - x) * self.scale.sqrt()[:, None, None]


def with_buffer(block):
    block.register_buffer("mask", torch.ones(6))
    return block


def with_lock(block):
    block.lock = threading.Lock()
    return block


def with_weight_norm(block):
    nn.utils.weight_norm(block.widen)
    return block


def patched(block):
    block.widen.forward = functools.partial(F.linear, weight=torch.zeros(24, 6))
    return block


CANNOT_BE_FUSED = {
    "it skips itself at random": (lambda: Skipping(), "takes random numbers beside those of its drop path"),
    "NaN on the probe": (lambda: RootScaled(), "differ from a ConvNeXt block's altogether"),
    "a buffer": (lambda: with_buffer(Block()), "it has the buffer mask; expected none"),
    "no copy": (lambda: with_lock(Block()), "it cannot be copied for a probe: cannot pickle"),
    "weight_norm": (
        lambda: with_weight_norm(Block()),
        "Linear has the parameters bias, weight_g, weight_v; expected",
    ),
    "a patched part": (lambda: patched(Block()), "forward of a Linear was replaced"),
    "a traced graph": (lambda: torch.fx.symbolic_trace(Block()), "a graph of torch.fx; swap the module that was"),
    "two dimensions of dropout": (lambda: Block(drop=nn.Dropout2d(0.1)), r"a Dropout2d with p=0.1"),
    "GELU is a function": (lambda: Block(activation=nn.Identity()), "expected it as a module, such as nn.GELU"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", CANNOT_BE_FUSED)
def test_what_cannot_be_fused_is_skipped_and_the_rest_swapped(name):
    create, reason = CANNOT_BE_FUSED[name]
    report = fastconv.swap(nn.ModuleList([create(), Block()]))
    (skipped,) = report.skipped
    assert re.search(reason, skipped.reason), skipped.reason
    assert [candidate.name for candidate in report.swapped] == ["1"]


class Adapted(nn.Linear):
    """An adapter: libraries replace an nn.Linear by it to train fewer parameters."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.added = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return super().forward(x) + self.added


def adapt(block):
    block.widen = Adapted(block.widen)


def exchange(block):
    block.activate = nn.ReLU()


def patch(block):
    block.narrow.forward = lambda y: 2 * F.linear(y, block.narrow.weight, block.narrow.bias)


def drop(block):
    block.nothing.p = 0.5
    block.train()


def hook(block):
    block.spatial.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def dilate(block):
    block.spatial = conv(padding=6, dilation=2)


def approximate(block):
    block.activate = nn.GELU(approximate="tanh")


def subclass(block):
    block.widen.weight = nn.Parameter(block.widen.weight.detach().as_subclass(Weights))


class Weights(torch.Tensor):
    """Parameters as in quantized layers: a type of their own, with few operations."""


def unscale(block):
    block.scale = None


@pytest.mark.parametrize("change", [adapt, exchange, patch, drop, hook, dilate, approximate, subclass, unscale])
def test_a_part_that_changes_after_the_swap_brings_the_own_forward_back(change, fused, calls):
    class Dropping(Block):
        def __init__(self):
            super().__init__()
            # Before the module that drops paths, whose place it must not take.
            self.dropout = self.nothing = nn.Dropout(0.0)
            self.stochastic = self._modules.pop("stochastic")

        def forward(self, x):
            return self.nothing(super().forward(x))

    block = Dropping()
    twin = copy.deepcopy(block)
    fastconv.swap(block)
    for each in (block, twin):
        torch.manual_seed(2)
        change(each)
    x = torch.rand(3, 6, 5, 4)
    calls.clear()
    torch.manual_seed(1)
    y = block(x)
    torch.manual_seed(1)
    assert torch.equal(y, twin(x))
    assert calls == []


def test_small_layer_scales_do_not_vanish_under_autocast_in_float16(fused, calls):
    def gradient(block):
        block.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            y = block(x)
        # Scaled as by a GradScaler.
        (2.0**16 * y.float()).backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
        return block.spatial.weight.grad

    block, x = Block(), torch.rand(4, 6, 9, 8)
    with torch.no_grad():
        block.scale.fill_(1e-6)
    expected = gradient(block)
    fastconv.swap(block)
    calls.clear()
    difference = gradient(block) - expected
    assert calls == ["ConvNeXt block"]
    assert difference.norm() < 0.02 * expected.norm()


def test_hooks_of_all_modules_run_for_parts(fused, calls):
    block, seen = Block(), []
    fastconv.swap(block)
    calls.clear()
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)):
        block(torch.rand(2, 6, 5, 4))
    assert block.widen in seen
    assert calls == []


def test_hooks_on_what_holds_parts_run(fused, calls):
    block = TwiceActivated(False)
    block.mix.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.rand(2, 6, 5, 4)
    expected = block(x)
    fastconv.swap(block)
    calls.clear()
    assert torch.equal(block(x), expected)
    assert calls == []


def test_recognition_leaves_no_trace():
    calls, norm = [], nn.BatchNorm2d(6, affine=False)
    model = nn.Sequential(nn.Conv2d(6, 6, 1), norm, nn.Conv2d(6, 6, 1), nn.Dropout(0.5), Block())
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    fastconv.swap(model)
    assert norm.num_batches_tracked == 0
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []


def test_a_module_that_occurs_twice_in_a_sequential_runs_twice(fused, calls):
    activation = nn.GELU()
    model = nn.Sequential(
        nn.Conv2d(6, 8, 1), activation, nn.Conv2d(8, 6, 3), activation, nn.Conv2d(6, 4, 1), activation
    )
    x = torch.rand(2, 6, 5, 4)
    expected = model(x)
    fastconv.swap(model)
    calls.clear()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert calls == ["pairs in a Sequential"]


def test_a_sequential_can_be_cut_and_changed_after_the_swap(fused):
    model = nn.Sequential(nn.Conv2d(6, 6, 3), nn.Conv2d(6, 8, 1), nn.GELU(), nn.ReLU())
    twin = copy.deepcopy(model)
    fastconv.swap(model)
    x = torch.rand(2, 6, 5, 4)
    assert torch.equal(model[:2](x), twin[:2](x))
    assert torch.equal(model[2:](x), twin[2:](x))
    for each in (model, twin):
        each.insert(2, nn.BatchNorm2d(8))
    assert torch.equal(model(x), twin(x))


def test_of_a_sequential_with_an_unsuitable_pair_the_others_are_swapped():
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, groups=6), nn.InstanceNorm2d(6, affine=True), nn.Conv2d(6, 4, 1), nn.GELU()
    )
    (candidate,) = fastconv.swap(model).candidates
    assert candidate.swapped
    assert list(model.fastconv_fusion.replaced(model)) == ["2", "3"]
    with pytest.warns(UserWarning, match="nothing to swap"):
        (candidate,) = fastconv.swap(nn.Sequential(*list(model)[:2])).candidates
    assert "padding (0, 0)" in candidate.reason


def test_transforms_of_torch_func_run_the_own_forward():
    block = Block()
    x = torch.rand(4, 2, 6, 3, 3)
    expected = torch.vmap(block)(x)
    fastconv.swap(block)
    assert torch.equal(torch.vmap(block)(x), expected)


def test_unswap_does_not_undo_what_came_after_the_swap():
    model = nn.Sequential(Block(), Block())
    fastconv.swap(model)
    nn.utils.parametrize.register_parametrization(model[1], "scale", nn.Identity())
    with pytest.raises(RuntimeError, match="a swapped Block is a ParametrizedBlock by now; undo first"):
        fastconv.unswap(model)
    nn.utils.parametrize.remove_parametrizations(model[1], "scale")
    fastconv.unswap(model)
    assert [type(block) for block in model] == [Block, Block]


def test_a_class_that_refuses_to_be_derived_from_leaves_all_as_it_was():
    class Final(Block):
        def __init_subclass__(cls, **options):
            raise TypeError("no subclasses")

    model = nn.Sequential(Block(), Final())
    with pytest.raises(TypeError, match="no subclasses"):
        fastconv.swap(model)
    assert [type(block) for block in model] == [Block, Final]


def test_a_swap_with_another_option_says_how_to_change_it():
    block = Block()
    fastconv.swap(block)
    (candidate,) = fastconv.swap(block, recompute=True).candidates
    assert candidate.reason == "before, with recompute=False: unswap it first to change that"


def test_a_filter_that_is_no_function_is_an_error():
    with pytest.raises(TypeError, match="filter_fn is 'stages'; expected a function of a module and its name"):
        fastconv.swap(Block(), "stages")


def test_a_filter_that_raises_leaves_the_model_as_it_was():
    model = nn.Sequential(Block(), Block())

    def choose(module, name):
        if name == "1":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        fastconv.swap(model, choose)
    assert [type(module) for module in model] == [Block, Block]


def test_a_block_that_occurs_twice_is_swapped_once(fused):
    block = Block()
    model = nn.Sequential(block, nn.Identity(), block)
    x = torch.rand(2, 6, 5, 5)
    before = model(x)
    assert len(fastconv.swap(model).candidates) == 1
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept_and_random_numbers_untouched(training):
    model = Block(drop=DropImages()).train(training)
    state = torch.get_rng_state()
    fastconv.swap(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train(not training)
    assert model.stochastic.training != training


def test_hooks_of_the_block_run_and_hooks_of_a_part_bring_its_own_forward_back(fused, calls):
    block, seen = Block(), []
    block.register_forward_hook(lambda module, args, output: seen.append("block"))
    fastconv.swap(block)
    x = torch.rand(2, 6, 5, 5)
    calls.clear()
    before = block(x)
    assert (seen, calls) == (["block"], ["ConvNeXt block"])
    handle = block.widen.register_forward_hook(lambda module, args, output: seen.append("part"))
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    assert (seen, calls) == (["block", "part", "block"], ["ConvNeXt block"])
    handle.remove()
    block(x)
    assert calls == ["ConvNeXt block"] * 2


def test_parametrized_and_pruned_parts_are_refused():
    block = Block()
    nn.utils.parametrizations.weight_norm(block.widen)
    with pytest.warns(UserWarning, match="nothing to swap"):
        report = fastconv.swap(block)
    assert not report.swapped


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_copies_stay_swapped_and_have_their_own_parameters(duplicate, fused, calls):
    model = NETWORKS["lecture/classifier"].create()
    fastconv.swap(model)
    twin = duplicate(model)
    assert type(twin) is type(model)
    x = torch.rand(4, 3, 32, 32)
    calls.clear()
    assert torch.equal(twin(x), model(x))
    assert set(calls) == {"lecture's classifier", "lecture's block"}
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert not torch.equal(twin(x), model(x))


def test_a_whole_model_can_be_saved_and_loaded(tmp_path, fused):
    model = NETWORKS["lecture/classifier"].create()
    fastconv.swap(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))


def test_distributed_data_parallel(tmp_path, fused, calls):
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    block = Block()
    twin = copy.deepcopy(block)
    fastconv.swap(block)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(block)
        x = torch.rand(3, 6, 9, 9)
        calls.clear()
        model(x).square().sum().backward()
        assert calls == ["ConvNeXt block"]
        twin(x).square().sum().backward()
        for parameter, own in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, own.grad, rtol=1e-3, atol=1e-4)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_compiled_without_breaks(fused, calls):
    for name, size in (("lecture/pairs", (2, 3, 9, 8)), ("block", (2, 6, 9, 8))):
        model = Block() if name == "block" else NETWORKS[name].create()
        x = torch.rand(size)
        before = model(x)
        swap_quietly(model)
        compiled = torch.compile(model, fullgraph=True)
        calls.clear()
        torch.testing.assert_close(compiled(x), before, rtol=1e-4, atol=1e-5)
        assert len(calls) == 1
        gradients = torch.autograd.grad(compiled(x).sum(), list(model.parameters()))
        fastconv.unswap(model)
        expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
        for ours, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("export", ["torch.export", "trace", "script", "fx"])
def test_exported(export):
    model = Block().eval()
    x = torch.rand(3, 6, 9, 8)
    before = model(x)
    fastconv.swap(model)
    if export == "torch.export":
        dynamic_shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
        program = torch.export.export(model, (x,), dynamic_shapes=dynamic_shapes).module()
        assert program(torch.rand(7, 6, 9, 8)).shape == (7, 6, 9, 8)
    elif export == "trace":
        program = torch.jit.trace(model, x)
    elif export == "script":
        program = torch.jit.script(model)
        stream = io.BytesIO()
        torch.jit.save(program, stream)
        stream.seek(0)
        program = torch.jit.load(stream)
    else:
        program = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(program(x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreted
def test_kernels_are_exported_for_any_batch(calls):
    pytest.importorskip("triton")
    model, x = Block().eval(), torch.rand(3, 6, 2, 2)
    fastconv.swap(model)
    calls.clear()
    with fastconv.backend("triton"):
        # With more than 24 pixels, the layer scale would go into the weights.
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        assert calls == ["ConvNeXt block"]
        x = torch.rand(9, 6, 2, 2)
        fastconv.unswap(model)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_blocks_own_forward_runs_where_it_is_as_fast(calls, monkeypatch):
    model = Block()
    fastconv.swap(model)
    calls.clear()
    pixels, plain = torch.rand(decisions.SEVERAL_IMAGES, 6, 1, 1), torch.rand(2, 6, 9, 8)
    large = torch.rand(3, 6, 64, 64)
    model(pixels)
    assert len(calls) == 1
    model(plain)
    model(large.contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        model(large)
    assert len(calls) == 1
    model(large)
    assert len(calls) == 2
    # A forced backend runs.
    with fastconv.backend("portable"):
        model(plain)
    assert len(calls) == 3


def test_recompute_keeps_only_the_input(fused):
    x = torch.rand(4, 6, 16, 16, requires_grad=True)
    saved = []
    model = Block()
    fastconv.swap(model, recompute=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = model(x)
    assert sum(saved) <= x.numel()
    (grad,) = torch.autograd.grad(y.sum(), x)
    fastconv.unswap(model)
    torch.testing.assert_close(grad, torch.autograd.grad(model(x).sum(), x)[0], rtol=1e-4, atol=1e-5)


def test_the_report_as_a_table():
    model = nn.Sequential(Block(), Block(activation=nn.ReLU()), reference.ConvNextBlock(4))
    text = str(fastconv.swap(model))
    lines = text.splitlines()
    (block,) = [line for line in lines if "ConvNeXt block" in line]
    assert "swapped" in block
    assert "where it is faster" in block
    (relu,) = [line for line in lines if "ReLU" in line]
    assert "skipped" in relu
    assert "maps of one pixel" in text
    assert lines[-1] == "2 swapped, 1 skipped"


def test_swap_report_of_a_model_by_name(run):
    pytest.importorskip("torchvision", exc_type=ImportError)
    code, out, err = run("swap-report", "convnext_tiny")
    assert (code, err) == (0, "")
    assert "18 swapped, 0 skipped" in out
    code, out, _ = run("swap-report", "resnet18", "--json")
    assert (code, json.loads(out)) == (0, [])
    code, out, err = run("swap-report", "convnxt_tiny")
    assert code == 2
    assert "there is no model 'convnxt_tiny'; did you mean: " in err
    assert "convnext_tiny" in err
    code, out, err = run("swap-report", "keras/convnext_tiny")
    assert code == 2
    assert "is of 'keras'; expected a name of torchvision or timm" in err


def test_swap_report_of_timms(run):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    code, out, _ = run("swap-report", "timm/test_convnext", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [row["swapped"] for row in rows] == [True] * 9
    assert rows[0]["name"] == "stages.0.blocks.0"


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda: torch.rand(3), TypeError, "model is a Tensor; expected an nn.Module"),
        (lambda: torch.compile(Block()), RuntimeError, "compiled; swap it first and compile then"),
        (lambda: nn.Sequential(torch.compile(Block())), RuntimeError, "compiled; swap it first"),
        (lambda: torch.jit.script(nn.GELU()), RuntimeError, "scripted; swap the nn.Module from which it was made"),
        (lambda: Block().to("meta"), RuntimeError, r"scale is on the meta device.*to_empty"),
    ],
    ids=["a tensor", "compiled", "compiled part", "scripted", "meta"],
)
def test_what_cannot_be_swapped_says_what_to_do(prepare, error, message):
    with pytest.raises(error, match=message):
        fastconv.swap(prepare())


def test_a_block_that_compiles_itself_is_refused():
    model = Block()
    model.compile()
    with pytest.raises(RuntimeError, match="compiled; swap it first"):
        fastconv.swap(model)


def test_unknown_options_raise():
    with pytest.raises(TypeError, match="unexpected keyword argument 'kernels'"):
        fastconv.swap(Block(), kernels="all")
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        fastconv.unswap(3)


def test_bad_input_to_a_swapped_block_is_an_error_as_before(fused):
    block = Block()
    fastconv.swap(block)
    with pytest.raises(ValueError, match="for the 5 channels of x"):
        block(torch.rand(2, 5, 8, 8))
    with pytest.raises(TypeError):
        block()


def test_frozen_parameters_get_no_gradient(fused):
    block = Block()
    block.spatial.requires_grad_(False)
    fastconv.swap(block)
    assert not block.spatial.weight.requires_grad
    block(torch.rand(2, 6, 8, 8)).sum().backward()
    assert block.spatial.weight.grad is None
    assert block.widen.weight.grad is not None


def test_norms_of_their_own_class_are_taken_by_what_they_compute(fused):
    class ChannelsFirst(LayerNorm2d):
        """Applied to maps, not to pixels."""

    class FirstBlock(Block):
        def forward(self, x):
            y = self.normalise(self.spatial(x)).permute(0, 2, 3, 1)
            y = self.scale * self.narrow(self.activate(self.widen(y)))
            return x + y.permute(0, 3, 1, 2)

    block = FirstBlock(norm=ChannelsFirst(6, eps=1e-6))
    x = torch.rand(2, 6, 5, 7)
    before = block(x)
    assert fastconv.swap(block).swapped
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)


class Pixelwise(LayerNorm2d):
    """Normalises channels, which its name does not say."""


class LayerNorm2dOfRows(nn.LayerNorm):
    """Normalises rows, whatever its name says."""


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (Pixelwise(6), None),
        (nn.LayerNorm(6), r"its forward does not take maps \(2, 6, 3, 4\)"),
        (LayerNorm2dOfRows(4), "does not compute what its parts suggest"),
        (nn.GroupNorm(2, 6), "does not compute what its parts suggest"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_norm_in_a_sequential_is_taken_if_it_is_over_channels(norm, reason, fused):
    model = nn.Sequential(conv(), norm)
    x = torch.rand(2, 6, 5, 4)
    before = model(x) if reason is None else None
    (candidate,) = swap_quietly(model).candidates
    assert candidate.swapped == (reason is None)
    if reason is None:
        torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    else:
        assert re.search(reason, candidate.reason), candidate.reason


class Renamed(Block):
    """A block whose children have misleading names: GELU that of drop path, and drop path that of nothing."""

    def __init__(self, drop):
        super().__init__()
        self.thing = drop
        self.drop_path = self.activate
        del self.activate, self.stochastic

    def forward(self, x):
        y = self.narrow(self.drop_path(self.widen(self.normalise(self.spatial(x).permute(0, 2, 3, 1)))))
        return x + self.thing((self.scale * y).permute(0, 3, 1, 2))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_drop_path_is_what_drops_paths_whatever_its_name(fused, calls):
    block = Renamed(DropImages())
    x = torch.rand(8, 6, 5, 4)
    torch.manual_seed(1)
    before = block(x)
    fastconv.swap(block)
    assert block.fastconv_fusion.drop_path == "thing"
    calls.clear()
    torch.manual_seed(1)
    torch.testing.assert_close(block(x), before, rtol=1e-4, atol=1e-5)
    assert calls == ["ConvNeXt block"]
    report = swap_quietly(Block(drop=Twice()))
    assert "does not compute what its parts suggest" in report.skipped[0].reason


class DropAtRate(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1, 1, 1) >= self.rate) if self.training and self.rate else x


def test_a_drop_path_is_called_only_where_it_was_seen_to_drop(fused, calls):
    dropping, idle = Block(drop=DropAtRate(0.5)), Block(drop=DropAtRate(0.0))
    fastconv.swap(nn.ModuleList([dropping, idle]))
    assert [block.fastconv_fusion.drop_path for block in (dropping, idle)] == ["stochastic", None]
    x = torch.rand(8, 6, 5, 4)
    for block, expected in ((dropping, ["ConvNeXt block"]), (idle, [])):
        block.stochastic.rate = 0.9
        calls.clear()
        block(x)
        assert calls == expected


class Beyond(Block):
    """Computes something else than a ConvNeXt block where a small probe of small numbers does not see it."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x, super().forward(x))


def of_more_images(x, y):
    return y if len(x) <= 4 else y - y.mean(0, keepdim=True)


BEYOND = {
    "larger maps": (lambda x, y: y if x[0, 0].numel() < 64 else 2 * y, "on larger maps its results"),
    "more images": (of_more_images, "on more images its results"),
    "NaN": (lambda x, y: y.nan_to_num(), "on maps with NaN and infinity its results"),
    "large numbers": (lambda x, y: y.clamp(-6e4, 6e4), "on large numbers its results"),
    "a large branch": (lambda x, y: x + (y - x).clamp(-6e4, 6e4), "with large parameters its results"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_equals_a_block_only_on_small_probes_is_refused(name):
    change, reason = BEYOND[name]
    (candidate,) = swap_quietly(Beyond(change)).candidates
    assert not candidate.swapped
    assert reason in candidate.reason


class Clipped(nn.Module):
    def __init__(self, least, most):
        super().__init__()
        self.least, self.most = least, most

    def forward(self, x):
        return F.gelu(x.clamp(self.least, self.most))


@pytest.mark.parametrize("ends", [(-10, 10), (-1e9, 6e4), (-3, 1e9)])
def test_a_clipped_gelu_is_no_gelu(ends):
    (candidate,) = swap_quietly(Block(activation=Clipped(*ends))).candidates
    assert "no GELU is among its parts (Clipped)" in candidate.reason


def half(block):
    return block.to(torch.bfloat16)


def with_norm_in_float32(block):
    half(block).normalise.float()


def with_scale_in_float32(block):
    half(block).scale.data = block.scale.data.float()


def with_scale_in_float64(block):
    block.scale.data = block.scale.data.double()


@pytest.mark.parametrize("change", [with_norm_in_float32, with_scale_in_float32, with_scale_in_float64])
def test_parts_of_several_dtypes_run_the_own_forward(change, fused, calls):
    block = Block()
    change(block)
    twin = copy.deepcopy(block)
    assert fastconv.swap(block).swapped
    x = torch.rand(9, 6, 2, 2).to(block.spatial.weight.dtype)
    calls.clear()
    assert torch.equal(block(x), twin(x))
    assert calls == []
    if change is with_norm_in_float32:
        with torch.autocast("cpu"):
            block(x)
        assert calls == ["ConvNeXt block"]


def keep(draw):
    """A module that drops whole images, by what `draw` returns for a number of images."""

    class Drop(nn.Module):
        def forward(self, x):
            return x * torch.as_tensor(draw(len(x))).to(x).view(-1, 1, 1, 1) if self.training else x

    return Drop()


DRAWS = {
    "random": lambda n: [random.random() < 0.5 for _ in range(n)],
    "numpy": lambda n: numpy.random.rand(n) < 0.5,
    "own generator": lambda n: torch.rand(n, generator=torch.Generator()) < 0.5,
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_that_a_recomputation_would_not_repeat_are_refused(name):
    block = Block(drop=keep(DRAWS[name]))
    states = random.getstate(), pickle.dumps(numpy.random.get_state())
    (candidate,) = swap_quietly(block, recompute=True).candidates
    assert "draws random numbers from" in candidate.reason
    assert (random.getstate(), pickle.dumps(numpy.random.get_state())) == states


@pytest.mark.parametrize(
    "draw",
    [
        lambda n: torch.rand(n) < 0.5,
        lambda n: torch.rand_like(torch.zeros(n)) < 0.5,
        lambda n: torch.empty(n).bernoulli_(0.5),
        lambda n: torch.randint(2, (n,)),
        lambda n: F.dropout(torch.ones(n), 0.5, training=True),
    ],
)
def test_drop_path_may_draw_in_any_of_pytorchs_ways(draw, fused, calls):
    block = Block(drop=keep(draw))
    twin, x = copy.deepcopy(block), torch.rand(9, 6, 2, 2)
    state = torch.get_rng_state()
    assert fastconv.swap(block, recompute=True).swapped
    assert torch.equal(torch.get_rng_state(), state)
    found = []
    for each in block, twin:
        torch.manual_seed(3)
        calls.clear()
        found.append(torch.autograd.grad(each(x).sum(), list(each.parameters())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "mode",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu"),
        torch.no_grad,
        torch.inference_mode,
        torch.autograd.detect_anomaly,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.mean(), lambda x: x),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_what_is_swapped_does_not_depend_on_the_callers_modes(mode):
    models = [Block(drop=DropImages()), NETWORKS["lecture/classifier"].create(), plain_pairs()]
    expected = [fastconv.swap(copy.deepcopy(model)) for model in models]
    with mode():
        assert [fastconv.swap(model) for model in models] == expected


def test_what_is_swapped_does_not_depend_on_defaults_of_the_process():
    models = [Block(drop=DropImages()), NETWORKS["lecture/classifier"].create(), plain_pairs()]
    expected = [fastconv.swap(copy.deepcopy(model)) for model in models]
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True)
    try:
        assert [fastconv.swap(model) for model in models] == expected
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
        torch.use_deterministic_algorithms(False)


def test_swapping_in_threads_disturbs_nobody():
    stop = threading.Event()

    def draw(count=None):
        """Numbers of each global generator, a number of times or until all are swapped."""
        torch.manual_seed(5)
        random.seed(5)
        numpy.random.seed(5)
        drawn = []
        while not stop.is_set() if count is None else len(drawn) < count:
            drawn.append((torch.rand(()).item(), random.random(), numpy.random.rand(), backends.current()))
            stop.wait(1e-3)
        return drawn

    models = [nn.Sequential(Block(drop=DropImages()), reference.ConvNextBlock(4)) for _ in range(8)]
    with ThreadPoolExecutor(9) as threads:
        drawing = threads.submit(draw)
        reports = list(threads.map(fastconv.swap, models))
        stop.set()
        drawn = drawing.result()
    stop.clear()
    assert [len(report.swapped) for report in reports] == [2] * 8
    assert len(drawn) > 5
    assert drawn == draw(len(drawn))
    assert backends.current() == "auto"


def test_a_class_that_is_swapped_does_not_stay():
    class Defined(Block):
        """As a notebook's cell defines it, again and again."""

    block = Defined()
    fastconv.swap(block)
    classes = [weakref.ref(Defined), weakref.ref(type(block))]
    twin = copy.deepcopy(block)
    assert type(twin) is type(block)
    del block, twin, Defined
    # First the subclass, and with it what kept the class.
    gc.collect()
    gc.collect()
    assert [kept() for kept in classes] == [None, None]


def test_a_recomputation_in_another_thread_takes_the_forwards_backend(monkeypatch):
    """As in the backward of a GPU."""
    block, x = Block(), torch.rand(9, 6, 2, 2)
    fastconv.swap(block, recompute=True)
    seen = []

    def compute(self, module, x, original=fusion.ConvNeXtBlock.compute):
        seen.append(backends.current())
        return original(self, module, x)

    monkeypatch.setattr(fusion.ConvNeXtBlock, "compute", compute)
    with fastconv.backend("portable"):
        y = block(x).sum()
    with ThreadPoolExecutor(1) as thread:
        for _ in range(2):
            thread.submit(y.backward, retain_graph=True).result()
    assert seen == ["portable"] * 3


def test_hooks_of_all_modules_see_no_probe():
    seen = []
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)):
        assert fastconv.swap(Block()).swapped
    assert seen == []


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.block.append(nn.Tanh()),
        lambda block: setattr(block.block[0].weight, "data", torch.rand(16, 1, 9, 9)),
    ],
    ids=["a child more", "a weight of another shape"],
)
def test_a_container_or_weight_that_changed_runs_the_own_forward(change):
    block = pytest.importorskip("torchvision.models.convnext").CNBlock(16, 1.0, 0.0)
    plain = copy.deepcopy(block)
    fastconv.swap(block)
    x = torch.rand(9, 16, 2, 2)
    results = []
    for each in block, plain:
        change(each)
        torch.manual_seed(0)
        try:
            results.append(each(x))
        except RuntimeError as error:
            # Maps that the larger taps make smaller cannot be added to x.
            results.append(str(error))
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        assert torch.equal(*results)
