"""`fastconv check`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fastconv.checking import display, runner
from fastconv.checking.cases import all_cases
from fastconv.commands.options import BackendOption, DeviceOption, JsonOption, choose
from fastconv.console import console
from fastconv.files import writing
from fastconv.progress import progress


def check(
    device: DeviceOption = "auto",
    backend: BackendOption = "auto",
    json_output: JsonOption = False,
    out: Annotated[
        Path | None, typer.Option(help="Write each result to this file at once, as a line of JSON.")
    ] = None,
) -> None:
    """Report whether all results are right on this machine; the exit code is 0 if they are, else 1.

    Every operation and module, forward and each gradient, is compared with float64, and PyTorch's own with it: an
    error is right up to twice PyTorch's. Then the fused and the reference classifier are trained for 50 steps,
    and on a GPU the fused one with and without CUDA graphs.
    [bold]TRITON_INTERPRET=1 fastconv check --backend triton[/bold] checks the kernels on a CPU, in minutes.
    """
    place = choose(device, backend)
    shown = console(stderr=json_output)
    cases = all_cases()
    with (
        nullcontext() if out is None else writing(out) as kept,
        progress(shown, runner.steps(cases)) as advanced,
    ):
        report = runner.run(place, cases, advanced, kept)
    display.show(report, shown)
    if json_output:
        print(json.dumps(report.as_json(), allow_nan=False))
    raise typer.Exit(0 if report.right else 1)
