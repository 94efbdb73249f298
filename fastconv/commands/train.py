"""`fastconv train`."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastconv.commands.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    GraphOption,
    JsonOption,
    RecipeOption,
    TensorBoardOption,
    chosen_recipe,
    is_typed,
    load_data,
    out_option,
    recipe_options,
    resume_command,
    usage_errors,
)
from fastconv.console import console
from fastconv.files import WriteError
from fastconv.graphs import CaptureError
from fastconv.operations import backends
from fastconv.training import checkpoint, folder, graphed, labels, loop, ranks, runs
from fastconv.training.display import Display
from fastconv.training.recipe import Recipe
from fastconv.training.schedule import has_schedule
from fastconv.training.stepper import NonFinite
from fastconv.training.summary import model_summary

# What a command that goes on with a run repeats.
RESUMED = {
    "data_directory": "--data",
    "device": "--device",
    "backend": "--backend",
    "graph": "--graph",
    "deterministic": "--deterministic",
    "tensorboard": "--tensorboard",
    "json_output": "--json",
}


@recipe_options(*(field.name for field in fields(Recipe)))
def train(
    context: typer.Context,
    data_directory: DataOption = None,
    out: Annotated[Path | None, out_option("Where to save the run.")] = None,
    recipe: RecipeOption = "lecture",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run saved in --out.")] = False,
    json_output: JsonOption = False,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    graph: GraphOption = "auto",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Refuse operations that do not repeat bit for bit. On a CPU all repeat.",
            rich_help_panel="Machine",
        ),
    ] = False,
    tensorboard: TensorBoardOption = False,
    **options: Any,
) -> None:
    """Train the classifier, by the lecture's recipe or another; with no options, on CIFAR-10, for five epochs.

    Saves checkpoint.pt, config.json, metrics.jsonl and curves.png. Ctrl-C, SIGTERM and a closed terminal save too,
    and so does a run that is killed, every half minute: [bold]fastconv train --out DIR --resume[/bold] goes on
    from there.

    Several processes, as [bold]torchrun --nproc-per-node 4 -m fastconv train[/bold] starts them, share each
    batch, and train what one would.
    """
    shown = console(stderr=json_output, quiet=not ranks.is_first())
    runs.check_packages(tensorboard)
    if resume and out is None:
        raise typer.BadParameter("--resume goes on with the run in a directory; name it with --out DIR")
    with usage_errors():
        mine, place = ranks.start(device)
        backends.force(backend, place)

    def saved_run() -> checkpoint.Checkpoint | None:
        if resume:
            assert out is not None
            return checkpoint.load(out / folder.CHECKPOINT)
        if out is not None:
            folder.check_new(out)
        return None

    resumed = mine.share(saved_run)
    with usage_errors():
        chosen = chosen_recipe(context, recipe, options) if resumed is None else resumed_recipe(context, resumed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    dataset = mine.in_turn(lambda: load_data(data_directory, resumed))
    shown.print(f"Data: {dataset.source}", soft_wrap=True)
    image_size, classes = dataset.train.images.shape[1:], len(dataset.classes)
    with usage_errors():
        runs.check(chosen, dataset, place, mine.count)
        graphed.check(graph, place)
        machine = {"PyTorch": torch.__version__, "backend": backends.current()}
        mine.check_alike(**asdict(chosen), **machine, data=dataset.checksum)
    if resumed is not None and (changed := runs.go_on_as_before(resumed.environment, place, mine)):
        shown.print(changed, soft_wrap=True)
    state = loop.prepare(chosen, dataset, place, resumed, mine)
    shown.print(model_summary(chosen, image_size, classes, depth=2), soft_wrap=True)

    # Nothing has been written so far.
    out = mine.share(lambda: folder.make(out))
    path = out / folder.CHECKPOINT
    display = Display(shown, chosen, out, json_output and mine.is_first)
    launcher = f"torchrun --nproc-per-node {mine.on_machine} -m " if mine.count > 1 else ""
    how_to_resume = f"go on with:\n  {launcher}{resume_command(context, 'train', out, RESUMED)}"
    try:
        with display.bar:
            runs.go_on(state, out, resumed, display, graph, tensorboard)
    except (loop.Interrupted, KeyboardInterrupt) as error:
        shown.print(f"\n{str(error) or 'stopped at once'}", soft_wrap=True)
        if path.exists():
            shown.print(how_to_resume, soft_wrap=True)
        if isinstance(error, loop.Interrupted):
            # All processes were.
            mine.end()
        number = error.signal if isinstance(error, loop.Interrupted) else signal.SIGINT
        raise typer.Exit(128 + number) from error
    except (WriteError, CaptureError):
        if path.exists():
            shown.print(f"\n{how_to_resume}", soft_wrap=True)
        raise
    except NonFinite as error:
        shown.print(
            f"\n{error}; {path} is from before that. For a smaller --lr start a new run in another --out.",
            style="red",
            soft_wrap=True,
        )
        mine.end()
        raise typer.Exit(1) from error
    except RuntimeError as error:
        if mine.count == 1 or not ranks.is_lost(error):
            raise
        line = " ".join(how_to_resume.split())
        raise ranks.RankLost(f"{ranks.lost(error)}; {line}") from error
    mine.end()


def resumed_recipe(context: typer.Context, resumed: checkpoint.Checkpoint) -> Recipe:
    """Return the recipe of a checkpoint, with the number of epochs that was typed.

    Raises:
        ValueError: another option was typed that contradicts it, or more epochs are done or begun.
    """
    recipe = resumed.recipe
    if is_typed(context, "recipe"):
        raise ValueError("the run has its recipe, which it goes on with; leave --recipe out")
    for name, trained_with in asdict(recipe).items():
        given = context.params[name]
        if is_typed(context, name) and name != "epochs" and given != trained_with:
            option = "--" + name.replace("_", "-")
            before, now = labels.shown(trained_with), labels.shown(given)
            raise ValueError(f"the run was started with {option} {before}; got {now}: leave {option} out")
    if not is_typed(context, "epochs"):
        return recipe
    epochs, begun = context.params["epochs"], resumed.epoch + (resumed.step > 0)
    if epochs < begun:
        steps = f" and {resumed.step} steps of the next" if resumed.step else ""
        raise ValueError(
            f"the run has done {resumed.epoch} epochs{steps}; got --epochs {epochs}: give at least {begun}"
        )
    if epochs != recipe.epochs and has_schedule(recipe):
        raise ValueError(
            f"the run's learning rate has a schedule of {recipe.epochs} epochs; got --epochs {epochs}: "
            "leave --epochs out, or start a new run"
        )
    return replace(recipe, epochs=epochs)
