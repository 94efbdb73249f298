"""The file that holds what a sweep is, from which it goes on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fastconv.files import write_atomically
from fastconv.training import labels, typed
from fastconv.training.data import DataError, Dataset
from fastconv.training.folder import FolderError
from fastconv.training.recipe import Recipe

PLAN = "sweep.json"
FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep.

    Args:
        format: FORMAT.
        data_directory: the folder of the data set, as an absolute path; None for the downloaded CIFAR-10.
        data_checksum: of the data set, by `Dataset.checksum`.
        runs: recipes, by the names of their folders, in the order in which they are done.
    """

    format: int
    data_directory: str | None
    data_checksum: str
    runs: dict[str, Recipe]

    def check_data(self, dataset: Dataset) -> None:
        """Raise DataError if that is not the data of the sweep."""
        if dataset.checksum != self.data_checksum:
            raise DataError(
                f"{dataset.source}: the sweep has trained on other pixels or labels; give with --data what it was "
                f"trained on, then in {self.data_directory or 'the downloaded CIFAR-10'}"
            )

    def save(self, folder: Path) -> None:
        """Write sweep.json.

        Raises:
            WriteError: it cannot be written.
        """
        text = json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"
        write_atomically(folder / PLAN, lambda file: file.write(text.encode()))


def named(recipes: Sequence[Recipe]) -> dict[str, Recipe]:
    """Return recipes, no two of them equal, by the names of their folders."""
    return dict(zip(map(labels.file_name, labels.differences(recipes)), recipes, strict=True))


def load(folder: Path) -> Plan:
    """Read the plan of the sweep in a folder.

    Raises:
        FolderError: there is none, or it cannot be used.
    """
    path = folder / PLAN
    # Opening a pipe would wait for a writer.
    if not path.is_file():
        raise FolderError(f"{path} is not a file; give with --out the folder of a sweep")
    try:
        plan: Plan = typed.build(Plan, json.loads(path.read_bytes()), "the sweep")
        if plan.format != FORMAT:
            raise ValueError(f"it has format {plan.format}, and this fastconv reads {FORMAT}")
        # The names become folders, so that they may not be anything.
        if not plan.runs or list(plan.runs) != list(named(list(plan.runs.values()))):
            raise ValueError("its runs are not named by the options in which they differ")
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}; check the file") from error
    # Text with many brackets is a RecursionError.
    except (ValueError, RecursionError) as error:
        raise FolderError(f"{path} cannot be used: {error}; start a new sweep in another --out") from error
    return plan
