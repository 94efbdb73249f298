"""Verdicts of the self-test, kept in the user's cache folder: a JSON file for each machine and version."""

from __future__ import annotations

import hashlib
import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastconv import machine
from fastconv.files import cache_folder, write_atomically


class Verdict(NamedTuple):
    """Whether kernels are right, and if not, why not."""

    right: bool
    reason: str


def load(backend: str, device: torch.device) -> dict[str, Verdict]:
    """The verdicts on a backend's kernels on a device like this one, by subject; none if the file is broken."""
    try:
        kept: Any = json.loads(_path(backend, device).read_text(encoding="utf-8"))
        return {
            subject: Verdict(bool(found["right"]), str(found["reason"]))
            for subject, found in kept["verdicts"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def save(backend: str, device: torch.device, subject: str, verdict: Verdict) -> None:
    """Add a verdict. Without a folder to write to, the next process tests again."""
    verdicts = {**load(backend, device), subject: verdict}
    content = {
        "machine": _machine(backend, device),
        "verdicts": {name: found._asdict() for name, found in verdicts.items()},
    }
    with suppress(OSError):
        path = _path(backend, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Others may write at the same time. The last one wins, and what it lost is tested again.
        write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode()))


def _path(backend: str, device: torch.device) -> Path:
    key = json.dumps(_machine(backend, device), sort_keys=True)
    return cache_folder() / "selftest" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _machine(backend: str, device: torch.device) -> dict[str, str]:
    """Everything that may make kernels right on one machine and wrong on another."""
    versions = machine.versions()
    decides = {
        **{name: versions[name] for name in ("fastconv", "torch", "triton")},
        "kernels": _digest(),
        "gpu": machine.gpu_name(device),
        "architecture": machine.architecture(device),
    }
    if backend == "native":
        # Not by `import fastconv`.
        from fastconv.kernels.cpu import library

        decides["library"] = library.describe().key
    return decides


def _digest() -> str:
    """A digest of the kernels' sources, which may change while the version stays."""
    folder = Path(*importlib.import_module("fastconv.kernels").__path__)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
