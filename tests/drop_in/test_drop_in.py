"""Each feature on each model of ours, beside the plain one."""


import pytest
import torch

from fastconv import accuracy
from fastconv.operations import backends

from .features import FEATURES
from .models import IMAGES, PAIRS, pair

# In float32, relative to the norm of the plain model's.
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, params=["native", "portable"])
def backend(request, monkeypatch, nothing_small):
    """What `auto` takes: kernels in C++, or, as without a compiler, the portable path."""
    if request.param == "native":
        if reason := backends.can_run("native", torch.device("cpu"), torch.float32):
            pytest.skip(reason)
    else:
        monkeypatch.setattr(backends, "_native_refuses", lambda kind, dtype: "for this test")
    dispatch_anew(monkeypatch)


def dispatch_anew(monkeypatch):
    from fastconv.operations import dispatch

    monkeypatch.setattr(dispatch, "_CHOSEN", {})


def computed(feature, model, dtype=torch.float32):
    torch.manual_seed(2)
    x = torch.rand(IMAGES).to(dtype)
    torch.manual_seed(3)
    return feature.run(model.to(dtype), x)


@pytest.mark.parametrize("models", PAIRS)
@pytest.mark.parametrize("name", FEATURES)
def test_it_computes_what_the_plain_model_does(name, models):
    feature = FEATURES[name]
    plain, ours = (computed(feature, model) for model in pair(models))
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert ours[key].shape == value.shape, key
        assert ours[key].dtype == value.dtype, key
    if feature.half:
        exact = computed(feature, pair(models)[0], torch.float64)
        floor = accuracy.FLOOR[torch.bfloat16]
        sample = {key: (ours[key], plain[key], exact[key]) for key in plain}
        for key, error in accuracy.measure(lambda: sample, floor, 1).items():
            assert error.ours <= 2 * error.bound, f"{key}: {error}"
        return
    for key, value in plain.items():
        expected = value.double()
        assert (ours[key].double() - expected).norm() <= TOLERANCE * expected.norm() + 1e-9, key
