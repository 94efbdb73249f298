"""Contiguous maps become maps whose images lie side by side, and back, by tiles."""

import pytest
import torch

from fastconv.kernels.cpu import chunks, library


@pytest.fixture(autouse=True)
def _three_slots(monkeypatch):
    library.load()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(chunks, "SLOT_ELEMENTS", 16)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "shape", [(2, 1, 1, 2), (3, 2, 1, 2), (64, 4, 2, 2), (65, 3, 7, 1), (7, 5, 11, 3), (130, 16, 3, 3)], ids=str
)
def test_there_and_back(shape):
    x = torch.randn(shape)
    maps = chunks.batch_last(x)
    assert maps.is_contiguous()
    assert torch.equal(maps, x.permute(1, 2, 3, 0))
    y = chunks.new_maps(x, shape[1])
    with chunks.written_batch_last(y) as written:
        written.copy_(maps)
    assert y.is_contiguous()
    assert torch.equal(y, x)
