"""`fastconv train`."""

from __future__ import annotations

import json
import os
import shlex
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastconv import machine
from fastconv.commands.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    JsonOption,
    choose,
    recipe_options,
    usage_errors,
)
from fastconv.extras import import_extra
from fastconv.files import write_atomically
from fastconv.operations import backends
from fastconv.training import checkpoint, curves, data, loop
from fastconv.training.display import Display, model_summary
from fastconv.training.recipe import Recipe, check_patch
from fastconv.training.state import NonFiniteLoss

CHECKPOINT = "checkpoint.pt"
# The exit code of a program that Ctrl-C stopped.
INTERRUPTED = 130
RESUMED_FLAGS = [("deterministic", "--deterministic"), ("json_output", "--json")]


@recipe_options(*(field.name for field in fields(Recipe)))
def train(
    context: typer.Context,
    data_directory: DataOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where to save the run.  \\[default: runs/<date>-<time>]", show_default=False),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run saved in --out.")] = False,
    json_output: JsonOption = False,
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Refuse operations that do not repeat bit for bit. On a CPU all repeat.",
            rich_help_panel="Machine",
        ),
    ] = False,
    **options: Any,
) -> None:
    """Train the classifier by the lecture's recipe; with no options, on CIFAR-10, for five epochs.

    Saves config.json, metrics.jsonl, curves.png and checkpoint.pt. Ctrl-C saves too, and so does a run that is
    killed, every half minute: [bold]fastconv train --out DIR --resume[/bold] goes on from there.
    """
    console = Console(stderr=json_output)
    for package in ("torchinfo", "matplotlib"):
        import_extra(package)
    if resume and out is None:
        raise typer.BadParameter("--resume goes on with the run in a directory; name it with --out DIR")
    out = out or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out is {out}, a file; give a directory")
    path = out / CHECKPOINT
    resumed = checkpoint.load(path) if resume else None
    if resumed is None and path.exists():
        raise typer.BadParameter(f"{out} holds a run; go on with it by --resume, or give another --out")
    with usage_errors():
        recipe = Recipe(**options) if resumed is None else resumed_recipe(context, resumed)
    place = choose(device, backend)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    dataset = data.load(data_directory)
    console.print(f"Data: {dataset.source}", highlight=False, soft_wrap=True)
    image_size = dataset.train.images.shape[1:]
    with usage_errors():
        check_patch(recipe, image_size)
    layers = model_summary(recipe, image_size, len(dataset.classes), depth=2)
    console.print(layers, highlight=False, markup=False, soft_wrap=True)
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": asdict(recipe),
        "device": str(place),
        "backend": backends.current(),
        "data": dataset.source,
        "versions": machine.versions(),
    }
    text = json.dumps(config, indent=2) + "\n"
    write_atomically(out / "config.json", lambda file: file.write(text.encode()))

    display = Display(console, recipe.epochs, out / "metrics.jsonl", json_output)
    try:
        with display.bar:
            final = loop.train(recipe, dataset, place, path, display, resumed)
    except (loop.Interrupted, KeyboardInterrupt) as error:
        console.print(f"\n{str(error) or 'stopped at once'}", soft_wrap=True)
        if path.exists():
            console.print(f"go on with:\n  {resume_command(context, out)}", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from error
    except NonFiniteLoss as error:
        console.print(
            f"\n{error}; {path} is from before that. For a smaller --lr start a new run in another --out.",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(1) from error
    display.write_metrics(final.history)
    write_atomically(out / "curves.png", lambda file: curves.plot(final.history, file))
    display.finished(final, out)


def resumed_recipe(context: typer.Context, resumed: checkpoint.Checkpoint) -> Recipe:
    """Return the recipe of a checkpoint, with the number of epochs that was typed.

    Raises:
        ValueError: another option was typed that contradicts it, or the epochs are done.
    """
    try:
        recipe = Recipe(**resumed.recipe)
    except TypeError as error:
        raise checkpoint.CheckpointError(f"the checkpoint's recipe cannot be used: {error}") from error
    for name, trained_with in asdict(recipe).items():
        given = context.params[name]
        if is_typed(context, name) and name != "epochs" and given != trained_with:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"the run was started with {option} {trained_with}; got {given}: leave {option} out")
    if not is_typed(context, "epochs"):
        return recipe
    if context.params["epochs"] < resumed.epoch:
        raise ValueError(f"the run has done {resumed.epoch} epochs; got --epochs {context.params['epochs']}")
    return replace(recipe, epochs=context.params["epochs"])


def is_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def resume_command(context: typer.Context, out: Path) -> str:
    words = ["fastconv", "train", "--out", str(out), "--resume"]
    for name, option in [("data_directory", "--data"), ("device", "--device"), ("backend", "--backend")]:
        if is_typed(context, name):
            words += [option, str(context.params[name])]
    words += [option for name, option in RESUMED_FLAGS if context.params[name]]
    return shlex.join(words)
