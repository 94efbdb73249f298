"""Small data sets."""

from __future__ import annotations

from pathlib import Path

import layouts
import pytest
from torchvision import datasets

from fastconv.training import cifar10


@pytest.fixture
def binary_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cifar10, "_BINARY_RECORDS", layouts.RECORDS)
    folder = tmp_path / "cifar-10-batches-bin"
    layouts.write_binary_version(folder)
    return folder


@pytest.fixture
def python_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Python version, whose checksums are taken for the official ones."""
    folder = tmp_path / "original" / "cifar-10-batches-py"
    checksums = layouts.write_python_version(folder)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", checksums[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", checksums[5:])
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    layouts.write_image_folder(tmp_path)
    return tmp_path
