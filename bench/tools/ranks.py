"""What training in several processes does on this machine: how close it is to one process, and what it sends.

    python -m bench.tools.ranks --data DIR

trains the lecture's classifier for 50 steps in 1, 2, 3 and 4 processes over gloo, and once in one from weights
that are moved to neighbouring floats. It prints for each how far losses and final weights are from those of one
process, the bound by which `fastconv check` judges losses, and the all-reduces of a step: how many, and of which
shape. The processes share the machine's cores, so their times say nothing of several machines.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import profile

from fastconv.checking.divergence import FLOOR, MARGIN, largest_difference, move_to_neighbours
from fastconv.training import data, loop, ranks
from fastconv.training.recipe import RECIPES, Recipe

STEPS = 50
SEVERAL = (2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipe", default="lecture", choices=RECIPES)
    parser.add_argument("--result", type=Path, help="train in this process, as one of several, and save what came")
    parser.add_argument("--neighbour", action="store_true")
    arguments = parser.parse_args()
    if arguments.result:
        train(arguments.data, RECIPES[arguments.recipe], arguments.result, arguments.neighbour)
    else:
        compare(arguments.data, arguments.recipe)


def compare(directory: Path | None, recipe: str) -> None:
    with tempfile.TemporaryDirectory() as folder:

        def run(processes: int, *options: str) -> Any:
            path = Path(folder) / "result.pt"
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            command = [sys.executable, *launcher, "-m", "bench.tools.ranks", "--recipe", recipe, "--result", path]
            command += ["--data", directory] if directory else []
            subprocess.run([*map(str, command), *options], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
            return torch.load(path)

        one = run(1)
        neighbour = run(1, "--neighbour")
        print(f"{'processes':>12} {'losses':>10} {'weights':>10} {'ms a step':>10}  messages of a step")
        show("neighbour", neighbour, one)
        loss_bound = max(FLOOR, MARGIN * largest_difference(neighbour["losses"], one["losses"]))
        print(f"{'bound':>12} {loss_bound:10.1e} {MARGIN * distance(neighbour, one):10.1e}")
        for processes in SEVERAL:
            show(str(processes), run(processes), one)


def distance(found: Any, one: Any) -> float:
    """Of the weights, relative to how far those of one process went in all steps."""
    return ((found["weights"] - one["weights"]).norm() / (one["weights"] - one["first"]).norm()).item()


def show(name: str, found: Any, one: Any) -> None:
    losses = largest_difference(found["losses"], one["losses"])
    numbers = f"{losses:10.1e} {distance(found, one):10.1e} {found['milliseconds']:10.1f}"
    print(f"{name:>12} {numbers}  {found['messages']}")


def train(directory: Path | None, recipe: Recipe, result: Path, neighbour: bool) -> None:
    """Do the first steps of a training, and save what came of them, in the first process."""
    mine, device = ranks.start("cpu")
    state = loop.prepare(recipe, data.load(directory), device, None, mine)
    if neighbour:
        torch.manual_seed(0)
        move_to_neighbours(state.model)
    first = weights(state.model)
    sizes = state.rest_of_epoch()[: STEPS + 1]
    started = time.perf_counter()
    for size in sizes[:STEPS]:
        state.train(size)
    milliseconds = (time.perf_counter() - started) / STEPS * 1e3
    state.gather()
    found = {
        "losses": state.losses[:STEPS].double(),
        "first": first,
        "weights": weights(state.model),
        "milliseconds": milliseconds,
    }
    # One more, of which only the messages count.
    with profile(record_shapes=True) as profiled:
        state.train(sizes[STEPS])
    if mine.is_first:
        sent = [str(event.input_shapes[0]) for event in profiled.events() if event.name == "gloo:all_reduce"]
        messages = ", ".join(f"{count} of {shape}" for shape, count in Counter(sent).items())
        torch.save(found | {"messages": messages}, result)
    mine.end()


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().double()


if __name__ == "__main__":
    main()
