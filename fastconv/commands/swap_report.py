"""`fastconv swap-report`."""

from __future__ import annotations

import json
import warnings
from typing import Annotated

import typer

from fastconv import swapping
from fastconv.commands import zoo
from fastconv.commands.options import JsonOption, usage_errors


def swap_report(
    model: Annotated[
        str, typer.Argument(help="A name of torchvision or timm, for example convnext_tiny, timm/convnext_tiny.")
    ],
    json_output: JsonOption = False,
) -> None:
    """Report which modules of a model fastconv.swap takes, which it leaves, and why; with random weights."""
    with usage_errors():
        network = zoo.create_model(model)
    with warnings.catch_warnings():
        # The report says it, too.
        warnings.simplefilter("ignore")
        report = swapping.swap(network)
    if json_output:
        print(json.dumps([candidate._asdict() for candidate in report.candidates], allow_nan=False))
    else:
        print(report)
