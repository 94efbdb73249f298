import pytest
import torch
from synthetic import make_set

from fastconv.training import loop
from fastconv.training.data import Dataset


@pytest.fixture(scope="module")
def dataset():
    generator = torch.Generator().manual_seed(0)
    # 100 training images: 80 to train on, five batches; 75 of them make a last batch of 11.
    return Dataset(make_set(100, generator), make_set(33, generator), ("red", "green", "blue"), "synthetic")


@pytest.fixture
def report_every_step(monkeypatch):
    monkeypatch.setattr(loop, "REPORT_SECONDS", -1.0)
