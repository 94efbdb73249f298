"""Swapped models and fused modules in two processes: DistributedDataParallel, FSDP and torch.compile of both."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import CASES, MODELS, PROCESSES, STEPS, batches, train

from fastconv.operations import backends

TESTS = Path(__file__).parents[1]
SECONDS = 120
# In float32, relative to the norm in float64, after some steps.
TOLERANCE = 1e-4
# Where a norm spans a batch, it spans that of each process by itself.
SPANNING = "the classifier", "the lecture's, swapped"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch.distributed has no gloo",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of all processes, which start once for all tests."""
    pytest.importorskip("torchvision", reason="torchvision is not installed: pip install torchvision")
    folder = tmp_path_factory.mktemp("ranks")
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("ranks.py")]
    printed = [folder / f"{rank}.txt" for rank in range(PROCESSES)]
    processes = []
    try:
        for rank, path in enumerate(printed):
            with path.open("w") as file:
                done = subprocess.Popen(
                    [*command, str(rank), folder], env=environment, stdout=file, stderr=subprocess.STDOUT
                )
            processes.append(done)
        codes = [process.wait(SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    texts = [path.read_text() for path in printed]
    assert codes == [0] * PROCESSES, "\n".join(texts)
    # What DDP says without Python's warnings.
    assert not any("reducer.cpp" in text for text in texts), "\n".join(texts)
    return folder


@functools.cache
def trained_alone(name):
    """What the plain model comes to in one process, in float64."""
    plain, _ = MODELS[name]()
    plain.double()
    parts = PROCESSES if name in SPANNING else 1
    steps = [
        list(zip(images.double().chunk(parts), labels.chunk(parts), strict=True)) for images, labels in batches()
    ]
    return train(plain, plain, steps)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_together_is_training_alone(case, folder):
    if reason := backends.can_run(case.backend, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    expected = trained_alone(case.model)
    for rank in range(PROCESSES):
        result = torch.load(folder / f"{CASES.index(case)} of {rank}.pt")
        assert result["warnings"] == []
        assert result["breaks"] == set()
        assert case.is_compiled or result["operations"] >= STEPS, "nothing is fused"
        assert result["found"].keys() == expected.keys()
        for name, value in expected.items():
            difference = (result["found"][name].double() - value).norm()
            assert difference <= TOLERANCE * value.norm(), f"{name} in process {rank}"
