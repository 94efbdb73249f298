"""Batches are cut out of the images in the order that is asked for, and pixels scaled."""

import numpy as np
import pytest
import torch

from fastconv.training.data import ImageSet
from fastconv.training.sets import Batches, epoch_order, random_order


def image_set(count):
    pixels = torch.arange(count * 3 * 4 * 5) % 256
    return ImageSet(pixels.to(torch.uint8).view(count, 3, 4, 5), torch.arange(count) + 100)


def taken(batches, order, position=0):
    return [batches.next(size) for size in batches.start(torch.tensor(order, dtype=torch.int64), position)]


@pytest.mark.parametrize("batch_size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize(("order", "position"), [([9, 0, 3, 3, 7], 0), (list(range(9, -1, -1)), 5), ([], 0)])
def test_batches_follow_the_order(batch_size, order, position):
    images = image_set(10)
    found = taken(Batches(images, batch_size), order, position)
    visited = order[position:]
    sizes = [len(labels) for _, labels in found]
    assert sizes == [min(batch_size, len(visited) - start) for start in range(0, len(visited), batch_size)]
    assert [int(label) for _, labels in found for label in labels] == [100 + index for index in visited]
    for pixels, labels in found:
        assert pixels.dtype == torch.float32
        expected = images.images[labels - 100].numpy().astype(np.float32) / np.float32(255)
        assert np.array_equal(pixels.numpy(), expected)


def test_another_order_begins_anew():
    batches = Batches(image_set(10), 4)
    taken(batches, list(range(10)))
    assert [labels.tolist() for _, labels in taken(batches, [5, 1])] == [[105, 101]]


def test_every_byte_is_scaled_exactly():
    images = ImageSet(torch.arange(256).to(torch.uint8).view(1, 1, 16, 16), torch.zeros(1).long())
    ((pixels, _),) = taken(Batches(images, 1), [0])
    assert pixels.flatten().tolist() == [float(np.float32(level) / np.float32(255)) for level in range(256)]


def test_batches_stay_on_the_device():
    # The meta device stands for an accelerator: it has no pixels, so a detour over the CPU would raise.
    batches = Batches(image_set(5).to("meta"), 2)
    for size in batches.start(torch.arange(5)):
        pixels, labels = batches.next(size)
        assert (pixels.device.type, labels.device.type) == ("meta", "meta")


def test_orders_are_permutations_that_their_names_decide():
    order = random_order(103, "a")
    assert torch.equal(order.sort().values, torch.arange(103))
    assert torch.equal(order, random_order(103, "a"))
    assert not torch.equal(order, random_order(103, "b"))


def test_the_order_differs_between_epochs_and_seeds():
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(9) for epoch in range(9)}
    assert len(orders) == 81
