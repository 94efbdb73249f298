"""Each feature on each model of ours, beside the plain one."""

import copy
import itertools

import pytest
import torch
from oracle import assert_accurate

from fastconv.operations import backends, decisions, dispatch

from .features import FEATURES
from .models import IMAGES, PAIRS, pair, trained

# In float32, relative to the norm of the plain model's.
TOLERANCE = 1e-4


# What runs with a compiler and without one; graphs that are traced mostly hold PyTorch's own operations with both.
BACKENDS = "auto", "portable"


def each(half):
    """Every backend, feature and pair of models."""
    cases = [
        (backend, name, models)
        for backend in BACKENDS
        for name, (area, _, computes_in_half) in FEATURES.items()
        for models in PAIRS
        if computes_in_half == half and (backend, area) != ("portable", "tracers")
    ]
    return pytest.mark.parametrize(("backend", "name", "models"), cases)


@pytest.fixture(autouse=True)
def _backend(backend, monkeypatch, nothing_small):
    if backend == "portable":
        monkeypatch.setattr(backends, "_native_refuses", lambda kind, dtype: "for this test")
    monkeypatch.setattr(dispatch, "_CHOSEN", {})
    # Also of maps for which a block's own forward is the faster.
    monkeypatch.setattr(decisions, "swapping_pays", lambda x: True)


def computed(feature, model, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    x = torch.rand(IMAGES).to(dtype)
    return feature.run(model.to(dtype), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("models", PAIRS)
def test_without_any_of_them_all_is_fused(models, monkeypatch):
    """Else the others would compare plain models with plain ones."""
    _, ours = pair(models)
    called, call = [], dispatch._call
    monkeypatch.setattr(dispatch, "_call", lambda name, *rest: called.append(name) or call(name, *rest))
    trained(ours, torch.rand(IMAGES))
    assert called
    assert "reference" not in called


@each(half=False)
def test_it_computes_what_the_plain_model_does(name, models):
    plain, ours = (computed(FEATURES[name], model) for model in pair(models))
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert (ours[key].shape, ours[key].dtype) == (value.shape, value.dtype), key
        if not value.is_meta:
            difference = (ours[key].double() - value.double()).norm()
            assert difference <= TOLERANCE * value.double().norm() + 1e-9, key


@each(half=True)
def test_it_is_as_precise_as_the_plain_model(name, models):
    seeds = itertools.count()

    def sample():
        seed, (plain, ours) = next(seeds), pair(models)
        exact = computed(FEATURES[name], copy.deepcopy(plain), seed, torch.float64)
        mine, other = (computed(FEATURES[name], model, seed) for model in (ours, plain))
        return {key: (mine[key], other[key], exact[key]) for key in exact}

    assert_accurate(sample, torch.bfloat16, samples=4)
