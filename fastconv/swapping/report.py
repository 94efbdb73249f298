"""What `swap` reports: one line for each candidate."""

from __future__ import annotations

import io
from typing import NamedTuple

from fastconv.operations import decisions

BY_SIZE = "where it is faster"
BY_SIZE_MEANS = (
    f"{BY_SIZE}: on a CPU, from {decisions.SEVERAL_IMAGES} images on, maps of one pixel, and plain (NCHW) maps of "
    f"up to {decisions.SLOW_PIXELS} pixels; and in training, plain maps of {decisions.SLOW_ELEMENTS:,} elements "
    "or more. The module's own forward is as fast for others, and runs."
)


class Candidate(NamedTuple):
    """One line of a report: `name` is the module's path in the model; `reason` says why it was skipped."""

    name: str
    module: str
    kind: str
    swapped: bool
    reason: str


class SwapReport(NamedTuple):
    """What `swap` did with each candidate; `print(report)` shows a table."""

    candidates: tuple[Candidate, ...]

    @property
    def swapped(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if candidate.swapped)

    @property
    def skipped(self) -> tuple[Candidate, ...]:
        return tuple(candidate for candidate in self.candidates if not candidate.swapped)

    def __str__(self) -> str:
        if not self.candidates:
            return "nothing to swap: no ConvNeXt block, nor such a pair in an nn.Sequential"
        # Imported here: swapping a model needs no rich, and should not wait for it.
        from rich.table import Table

        from fastconv.console import console

        table = Table("module", "class", "kind", "", "note")
        for name, module, kind, swapped, reason in self.candidates:
            table.add_row(name or "(the model)", module, kind, "swapped" if swapped else "skipped", reason)
        text = io.StringIO()
        console(file=text, width=120).print(table)
        if any(candidate.reason == BY_SIZE for candidate in self.candidates):
            text.write(f"{BY_SIZE_MEANS}\n")
        return f"{text.getvalue()}{len(self.swapped)} swapped, {len(self.skipped)} skipped"
