"""The lecture's training: data, recipe, loop, checkpoints, and what a run shows."""

from fastconv.training.loop import train as train
from fastconv.training.recipe import Recipe as Recipe
