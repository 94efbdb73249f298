"""`fastconv sweep`."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from fastconv.commands.options import (
    BackendOption,
    DataOption,
    GraphOption,
    JsonOption,
    TensorBoardOption,
    choose,
    is_typed,
    load_data,
    out_option,
    recipe_options,
    resume_command,
    usage_errors,
)
from fastconv.console import console
from fastconv.files import WriteError, remove_partial
from fastconv.training import checkpoint, folder, graphed, ranks, runs
from fastconv.training.checkpoint import CheckpointError
from fastconv.training.comparison import files, reading, tables
from fastconv.training.comparison.rows import compare
from fastconv.training.data import Dataset
from fastconv.training.recipe import Recipe
from fastconv.training.summary import multiplications
from fastconv.training.sweep import axes, plan
from fastconv.training.sweep.display import Display
from fastconv.training.sweep.plan import Plan
from fastconv.training.sweep.supervisor import Supervisor
from fastconv.training.sweep.worker import Settings

STEM = "sweep"
RECIPE = [field.name for field in fields(Recipe)]
# Those that say what the runs are.
OPTIONS = ("recipe", *RECIPE)
# What a command that goes on with a sweep repeats.
RESUMED = {
    "data_directory": "--data",
    "devices": "--device",
    "backend": "--backend",
    "graph": "--graph",
    "tensorboard": "--tensorboard",
    "json_output": "--json",
}


@recipe_options(*RECIPE, lists=True)
def sweep(
    context: typer.Context,
    data_directory: DataOption = None,
    out: Annotated[Path | None, out_option("Where to save the sweep.", "sweep")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="The defaults of the other options: lecture, modern.  \\[default: lecture]",
            rich_help_panel="Recipe",
            metavar="LIST",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, max=axes.LARGEST, help="So many seeds, 0 and up, instead of --seed.", rich_help_panel="Recipe"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the sweep saved in --out.")] = False,
    json_output: JsonOption = False,
    devices: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="LIST",
            help="Does a run at a time on each of these: auto (a GPU if there is one), cpu, cuda:0, cuda:1, mps. "
            "With cpu,cpu two share the threads.",
            rich_help_panel="Machine",
        ),
    ] = "auto",
    backend: BackendOption = "auto",
    graph: GraphOption = "auto",
    tensorboard: TensorBoardOption = False,
    **options: Any,
) -> None:
    """Train with each combination of options, which are lists such as [bold]--width 32,64 --seeds 3[/bold].

    Each run is one of fastconv train, in a folder of its own in the sweep's. A run that fails does not stop the
    others. At the end their comparison is shown and saved as sweep.md, sweep.csv, sweep.png and sweep-curves.png.
    Ctrl-C, SIGTERM and a closed terminal save all runs: [bold]fastconv sweep --out DIR --resume[/bold] goes on
    from there, and tries again what has failed.
    """
    if ranks.are_launched():
        raise typer.BadParameter(
            "several processes were started, which fastconv train shares its batches among; start one, which may "
            "do a run on each device: --device cuda:0,cuda:1"
        )
    shown = console(stderr=json_output)
    runs.check_packages(tensorboard)
    if not resume:
        resumed = None
        if out is not None:
            check_new(out)
        with usage_errors():
            recipes = plan.named(axes.combinations(typed_axes(context)))
    elif out is None:
        raise typer.BadParameter("--resume goes on with the sweep in a directory; name it with --out DIR")
    else:
        resumed = plan.load(out)
        check_nothing_typed(context)
        recipes = resumed.runs
    places = [choose(device.strip(), backend) for device in devices.split(",")]
    dataset = load_data(data_directory, resumed)
    shown.print(f"Data: {dataset.source}", soft_wrap=True)
    if resumed is not None:
        resumed.check_data(dataset)
    with usage_errors():
        check_all(recipes, dataset, places, graph)

    # Nothing has been written so far.
    out = folder.make(out, STEM)
    with folder.locked(out):
        if resumed is None:
            check_new(out)
            Plan(plan.FORMAT, dataset.directory, dataset.checksum, recipes).save(out)
        for name in (folder.PLAN, *files.names(STEM)):
            remove_partial(out / name)
        done = [name for name, each in recipes.items() if is_done(out / name, each)]
        already = f", {len(done)} of them done" if done else ""
        shown.print(f"{len(recipes)} run{'s' * (len(recipes) > 1)} in {out}{already}", soft_wrap=True)
        display = Display(shown, out, work(recipes, dataset), done, json_output)
        workers = [
            Settings(
                device=str(place),
                backend=backend,
                graph=graph,
                tensorboard=tensorboard,
                threads=max(1, torch.get_num_threads() // places.count(place)),
                data_directory=dataset.directory,
                data_checksum=dataset.checksum,
            )
            for place in places
        ]
        left = {name: each for name, each in recipes.items() if name not in done}
        again = resume_command(context, "sweep", out, RESUMED)
        try:
            with display.bars:
                stopped = Supervisor(out, left, workers, display).run()
            show_results(shown, out, recipes, display.failures)
        except KeyboardInterrupt as error:
            shown.print(f"\nstopped at once; go on with:\n  {again}", soft_wrap=True)
            raise typer.Exit(128 + signal.SIGINT) from error
        except WriteError:
            shown.print(f"\ngo on with:\n  {again}", soft_wrap=True)
            raise
        if stopped:
            shown.print(f"interrupted; go on with:\n  {again}", soft_wrap=True)
            raise typer.Exit(128 + stopped)
        if display.failures:
            shown.print(f"{len(display.failures)} failed; try them again with:\n  {again}", soft_wrap=True)
            raise typer.Exit(1)


def check_new(out: Path) -> None:
    """Raise FolderError if a new sweep in `out` would replace a file, or be hidden by a run."""
    if (out / folder.PLAN).exists():
        raise folder.FolderError(f"{out} holds a sweep; go on with it by --resume, or give another --out")
    if (out / folder.CHECKPOINT).exists():
        raise folder.FolderError(f"{out} holds a run; give another --out")
    files.check_new(out, files.names(STEM))


def typed_axes(context: typer.Context) -> dict[str, list[Any]]:
    """Return the values of the options that were typed.

    Raises:
        ValueError: they are not of the option's type, or seeds were given twice.
    """
    typed = {name: axes.values(name, context.params[name]) for name in OPTIONS if is_typed(context, name)}
    if is_typed(context, "seeds"):
        if "seed" in typed:
            raise ValueError("got both --seed and --seeds; give one of them")
        typed["seed"] = list(range(context.params["seeds"]))
    return typed


def check_nothing_typed(context: typer.Context) -> None:
    for name in (*OPTIONS, "seeds"):
        if is_typed(context, name):
            option = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"the sweep has its runs, with which it goes on; leave {option} out")


def check_all(
    recipes: Mapping[str, Recipe], dataset: Dataset, places: Sequence[torch.device], graph: graphed.Graph
) -> None:
    """Raise ValueError if a run cannot be done on a device; the message names it."""
    for place in dict.fromkeys(places):
        graphed.check(graph, place)
        for name, recipe in recipes.items():
            with axes.naming(name if len(recipes) > 1 else ""):
                runs.check(recipe, dataset, place)


def is_done(run: Path, recipe: Recipe) -> bool:
    """Whether a run has nothing left to do. One that was killed may lack what is written last."""
    try:
        found = checkpoint.load(run / folder.CHECKPOINT)
    except CheckpointError:
        return False
    is_finished = found.recipe == recipe and found.test is not None
    return is_finished and all((run / name).exists() for name in folder.FILES)


def work(recipes: Mapping[str, Recipe], dataset: Dataset) -> dict[str, float]:
    """Return what runs cost beside each other: multiplications of all images in all epochs."""
    image_size, classes = tuple(dataset.train.images.shape[1:]), len(dataset.classes)
    # A fifth of the images is for validation.
    images = len(dataset.train) * 4 // 5
    return {
        name: recipe.epochs * min(images, recipe.limit or images) * multiplications(recipe, image_size, classes)
        for name, recipe in recipes.items()
    }


def show_results(shown: Console, out: Path, recipes: Mapping[str, Recipe], failures: Mapping[str, str]) -> None:
    """Show the comparison of the runs that have begun, and write it."""
    found = []
    for name, recipe in recipes.items():
        # A checkpoint that cannot be used, or is of another run, is a failure that was reported.
        with suppress(CheckpointError):
            run = reading.read(out / name / folder.CHECKPOINT)
            found += [run] if run.recipe == recipe else []
    if not found:
        return
    rows = compare(found)
    shown.print()
    tables.show(rows, shown)
    failed = "".join(f"\n{name} failed: {reason}\n" for name, reason in failures.items())
    shown.print(f"Saved {', '.join(files.write(rows, out, STEM, failed))} in {out}", soft_wrap=True)
