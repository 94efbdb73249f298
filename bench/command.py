"""`fastconv bench`: runs workloads, keeps and shows the results, and compares two files of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from fastconv import machine
from fastconv.commands.options import load_data, nonempty_path
from fastconv.console import console
from fastconv.extras import import_extra
from fastconv.progress import progress
from fastconv.training.recipe import Precision, Recipe

from . import contenders, plots, results, suite, tables, trainings, workloads
from .suite import Row

# How long each direction of a workload is timed.
SECONDS, QUICK_SECONDS = 6.0, 1.5
# What runs of whole trainings by default, their panel of options, and our precision in each dtype.
TRAINING_ROUNDS, TRAINING_LIMIT = 5, 1280
WITH_TRAINING = "With --training"
TRAINING_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "bfloat16": "bf16"}


def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="Only the most important, in two minutes on two cores.")
    ] = False,
    only: Annotated[
        str,
        typer.Option(metavar="TEXT", help="Only workloads whose name contains this, such as block or batch 128."),
    ] = "",
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda|cuda:N", help="Where to run.")] = "auto",
    dtype: Annotated[
        Literal["float32", "tf32", "float16", "bfloat16"],
        typer.Option(help="The tensors' dtype; tf32 is float32 with products and convolutions in tf32."),
    ] = "float32",
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="How long to time each direction of a workload.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=nonempty_path,
            metavar="PATH",
            help="Write the results here.",
            show_default="bench/results/<device>-<torch>-<date>.json",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Run nothing; print what moved beyond the noise from one file to another."),
    ] = None,
    render: Annotated[
        Path | None, typer.Option(help="Run nothing; print the tables of a file, and draw its pictures beside it.")
    ] = None,
    training: Annotated[
        bool,
        typer.Option(
            "--training",
            help="Instead, time the lecture's own program and fastconv train end to end.",
        ),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train and validate on the first so many images; times are scaled up.",
            rich_help_panel=WITH_TRAINING,
            show_default=f"{TRAINING_LIMIT} on a CPU, all on a GPU",
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Turns of both.", rich_help_panel=WITH_TRAINING)
    ] = TRAINING_ROUNDS,
    data_directory: Annotated[
        Path | None,
        typer.Option(
            "--data",
            parser=nonempty_path,
            metavar="PATH",
            help="A folder that fastconv train --data takes. Without it CIFAR-10 is downloaded once.",
            rich_help_panel=WITH_TRAINING,
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time operations, block, classifier and training step against what PyTorch offers.

    All contenders take turns, and only right results have a speed-up. Results are written as they come: Ctrl-C
    loses one workload or round.
    """
    try:
        if compare is not None:
            show_comparison(*compare)
            return
        if render is not None:
            (show_training if training else show)(render)
            return
        place = machine.choose_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if training:
        bench_training(place, dtype, limit, rounds, data_directory, out)
        return
    chosen = [w for w in (workloads.quick() if quick else workloads.full()) if only in str(w)]
    if not chosen:
        names = "\n".join(map(str, workloads.quick() if quick else workloads.full()))
        raise typer.BadParameter(f"no workload's name holds {only!r}; there are\n{names}", param_hint="--only")
    about = results.provenance(place)
    path = out or results.default_path(about)
    ways = contenders.choose(place, quick)
    budget = seconds if seconds is not None else QUICK_SECONDS if quick else SECONDS
    rows: list[Row] = []
    with progress(console(stderr=True), suite.steps(chosen), otherwise_lines=True) as advanced:
        for found in suite.run(chosen, ways, place, dtype, budget, advanced):
            rows += found
            results.write(path, about, rows)
    show(path)


def bench_training(
    place: torch.device, dtype: str, limit: int | None, rounds: int, data_directory: Path | None, out: Path | None
) -> None:
    if dtype not in TRAINING_PRECISIONS:
        expected = " or ".join(TRAINING_PRECISIONS)
        raise typer.BadParameter(f"trainings are in {expected}; got {dtype}", param_hint="--dtype")
    # torchvision belongs to an extra.
    import_extra("torchvision")
    from . import end_to_end

    if limit is None and place.type != "cuda":
        limit = TRAINING_LIMIT
    recipe = Recipe(precision=TRAINING_PRECISIONS[dtype], limit=limit)
    dataset = load_data(data_directory)
    about = {**results.provenance(place), "data": dataset.source}
    path = out or results.default_path(about, trainings.FOLDER)
    rows: list[Row] = []
    with progress(console(stderr=True), rounds, otherwise_lines=True) as advanced:
        for found in end_to_end.measure(dataset, place, recipe, rounds, advanced):
            rows += found
            results.write(path, about, rows)
    show_training(path)


def show_training(path: Path) -> None:
    about, rows = trainings.read(path)
    print(f"{tables.machine(about)}:\n\n{trainings.table(rows)}\n\n{path}")


def show(path: Path) -> None:
    about, rows = results.read(path)
    print(tables.every_row(about, rows))
    for written in [path, *plots.write_all(rows, path)]:
        print(written)
    wrong = [row for row in rows if not row.get("right", True)]
    if wrong:
        print(f"WRONG: {len(wrong)} results; `fastconv check` reports more")
        raise typer.Exit(1)


def show_comparison(before: Path, after: Path) -> None:
    (old, old_rows), (new, new_rows) = results.read(before), results.read(after)
    for about in (old, new):
        print(tables.machine(about))
    if old["device"] != new["device"]:
        print("These are different devices: what moved need not be the code's doing.")
    print()
    print(tables.moved(*results.compare(old_rows, new_rows)))
