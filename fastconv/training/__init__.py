"""The lecture's training: data, recipe, loop, checkpoints, and what a run shows."""
