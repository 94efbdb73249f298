"""The README's tables and pictures, from committed results, and the table of features, from tests.

    python -m bench.tools.readme

rewrites what stands between pairs of marks: headline and picture at the top, the features that work, the tables
and pictures of speed on a CPU and on a GPU, the tables of whole trainings, and those of accuracy.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from .. import plots, results, tables, trainings
from ..suite import Row
from ..workloads import TrainingStep
from . import accuracies

README = Path(__file__).resolve().parents[2] / "README.md"
MACHINES = ("CPU", "GPU")
# The columns of the tables of accuracy, by the names of their files.
ACCURACIES = {
    "homework": ["parameters", "mult-adds", "seconds", "validation, %", "test, %", "seeds"],
    "modern": ["seconds", "training, %", "validation, %", "test, %", "seeds"],
    "ablation": ["training, %", "validation, %", "test, %", "seeds"],
}
BEGINS = {
    name: f"<!-- python -m bench.tools.readme, {name}: begin -->\n"
    for name in ("top", "features", *MACHINES, "training", *ACCURACIES)
}
END = "<!-- end -->\n"
# The picture at the top: whose, and which.
TOP = ("CPU", "speedups")
# What the tables show: the batch of the lecture, at its first stage.
SHOWN = {"images": 128, "channels": 32, "side": 8}


def committed(machine: str) -> Path:
    """The results that the README shows: the newest on a "CPU", or on a "GPU"."""
    found = {}
    for path in results.FOLDER.glob("*.json"):
        about, rows = results.read(path)
        steps = any(row["level"] == TrainingStep.level for row in shown(rows))
        if steps and (about["driver"] is None) == (machine == "CPU"):
            found[path] = about["date"]
    if not found:
        raise results.ResultsError(f"there are no results of a {machine} in {results.FOLDER}; run fastconv bench")
    return max(found, key=found.__getitem__)


def committed_trainings() -> list[tuple[dict[str, Any], list[Row]]]:
    """The whole trainings that the README shows: the newest on a CPU and on a GPU, as far as there are any."""
    found = sorted(
        (trainings.read(path) for path in (results.FOLDER / trainings.FOLDER).glob("*.json")),
        key=lambda result: result[0]["date"],
    )
    newest = {about["driver"] is None: (about, rows) for about, rows in found}
    return [newest[on_cpu] for on_cpu in (True, False) if on_cpu in newest]


def shown(rows: list[Row]) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in SHOWN.items())]


def picture(machine: str, suffix: str) -> str:
    return f"![{plots.PICTURES[suffix].title}](bench/results/{committed(machine).stem}-{suffix}.png)"


def section(name: str) -> str:
    """What stands between the marks of one of BEGINS."""
    if name == "top":
        headlines = [trainings.headline(about, rows) for about, rows in committed_trainings()]
        return "\n\n".join([*headlines, picture(*TOP)]) + "\n"
    if name == "features":
        return features() + "\n"
    if name == "training":
        found = [(tables.machine(about), trainings.table(rows)) for about, rows in committed_trainings()]
        return "\n\n".join(f"{machine}:\n\n{table}" for machine, table in found) + "\n"
    if name in ACCURACIES:
        path = results.FOLDER / "accuracies" / f"{name}.csv"
        # Its five epochs are no match for the ten of the ablation.
        return accuracies.show(path, ACCURACIES[name], with_lecture=name != "ablation") + "\n"
    path = committed(name)
    about, rows = results.read(path)
    # Results of a GPU go on with other dtypes.
    chosen = [row for row in shown(rows) if row["dtype"] == rows[0]["dtype"]]
    pictures = [picture(name, suffix) for suffix in plots.PICTURES if (name, suffix) != TOP]
    return "\n\n".join([f"{tables.machine(about)}:", tables.speedups(chosen), *pictures]) + "\n"


def features() -> str:
    """The table of the features that tests/drop_in/ tries, which are no part of any package."""
    tests = str(README.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    table: str = importlib.import_module("drop_in.features").table()
    return table


def rewritten(text: str) -> str:
    """The README with its sections rewritten."""
    for name, mark in BEGINS.items():
        before, begin, rest = text.partition(mark)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise results.ResultsError(f"{README.name} lacks the lines {mark.strip()} and {END.strip()}")
        text = f"{before}{mark}\n{section(name)}\n{END}{after}"
    return text


def main() -> None:
    for machine in MACHINES:
        path = committed(machine)
        plots.write_all(results.read(path)[1], path)
    README.write_text(rewritten(README.read_text()))


if __name__ == "__main__":
    main()
