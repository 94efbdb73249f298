"""timm's own tests of its ConvNeXts pass on swapped models; they are run from its source distribution."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Those of inference and of default_cfgs download weights.
MODELS = "(test_convnext or convnextv2_atto)"
TESTS = f"{MODELS} and not inference and not default_cfgs and not pretrained"


@pytest.fixture
def timms_tests(tmp_path):
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install timm")
    wanted = f"timm=={importlib.metadata.version('timm')}"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--no-binary",
        "timm",
        "--dest",
        tmp_path,
        wanted,
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the source of {wanted} cannot be downloaded: {done.stderr.strip().splitlines()[-1]}")
    (archive,) = tmp_path.glob("timm-*.tar.gz")
    with tarfile.open(archive) as source:
        source.extractall(tmp_path, filter="data")
    return tmp_path / archive.name.removesuffix(".tar.gz") / "tests" / "test_models.py"


@pytest.mark.slow
def test_timms_own_tests_pass_on_swapped_models(timms_tests):
    options = ["-p", "swapped_timm", "-k", TESTS, "-q", "--rootdir", timms_tests.parent, "-c", os.devnull]
    environment = {
        **os.environ,
        # Fused also where PyTorch's own operations are as fast.
        "FASTCONV_BACKEND": "portable",
        "TRITON_INTERPRET": "0",
        "HF_HUB_OFFLINE": "1",
        # One process, which counts what it swaps.
        "PYTEST_ADDOPTS": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/swapping"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, timms_tests],
        cwd=timms_tests.parent,
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 40
    assert int(re.search(r"swapped blocks: (\d+)", done.stdout)[1]) >= 200
