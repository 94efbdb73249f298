"""`fastconv bench`: runs workloads, keeps and shows the results, and compares two files of results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastconv import machine
from fastconv.commands.options import nonempty_path
from fastconv.console import console
from fastconv.progress import progress

from . import contenders, plots, results, suite, tables, workloads
from .suite import Row

# How long each direction of a workload is timed.
SECONDS, QUICK_SECONDS = 6.0, 1.5


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
) -> None:
    """Time operations, block, classifier and training step against what PyTorch offers.

    All contenders take turns, and only right results have a speed-up. Results are written after each workload, so
    that Ctrl-C loses one at most.
    """
    try:
        if compare is not None:
            show_comparison(*compare)
            return
        if render is not None:
            show(render)
            return
        place = machine.choose_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
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
