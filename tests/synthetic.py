"""Short trainings on synthetic images, and an observer that remembers them."""

import torch
from torch.nn import functional as F

from fastconv.training import loop
from fastconv.training.data import ImageSet
from fastconv.training.recipe import Recipe

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=3, batch_size=16, width=4, depth=1, patch=2, seed=7)


def make_set(count, generator):
    labels = torch.randint(3, (count,), generator=generator)
    noise = torch.randint(0, 156, (count, 3, 8, 8), generator=generator)
    # Each class is brighter in one channel, so that there is something to learn.
    bright = 100 * F.one_hot(labels, 3)[:, :, None, None]
    return ImageSet((noise + bright).to(torch.uint8), labels)


class Recorder(loop.Observer):
    """An observer that remembers, and can act at a given step."""

    def __init__(self, at=None, action=None):
        self.steps, self.histories, self.evaluations, self.notes = [], [], [], []
        self.at, self.action = at, action

    def start(self, checkpoint):
        assert self.at is None or checkpoint.epoch < self.at[0]

    def step(self, epoch, step, steps, loss, images_per_second):
        self.steps.append((epoch, step, steps, loss))
        assert images_per_second > 0
        if (epoch, step) == self.at:
            self.action()

    def evaluation(self, epoch, done, images):
        self.evaluations.append((epoch, done, images))
        if (epoch, "evaluation") == self.at:
            self.action()

    def epoch(self, history):
        self.histories.append([dict(metrics) for metrics in history])

    def note(self, text):
        self.notes.append(text)


def run(dataset, path, recipe=RECIPE, observer=None, resumed=None, graph="auto"):
    return loop.train(recipe, dataset, CPU, path, observer or Recorder(), resumed, graph)


def assert_same_weights(a, b):
    assert a.model.keys() == b.model.keys()
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)


def images_of(sets, name):
    chosen = getattr(sets, name)
    return sets.images.images[chosen.start : chosen.stop], sets.images.labels[chosen.start : chosen.stop]
