"""What happens after a kernel of a test failed on a GPU."""

import os
import sys

import pytest
import torch


def stop_after_fault(request):
    """End this process if a kernel of this test failed: CUDA repeats the error at each later call, in any test.

    pytest-xdist reports the test as the one that crashed its worker, and goes on with another worker.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        fault = f"after {request.node.nodeid}: {str(error).splitlines()[0]}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(fault, returncode=1)
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print(fault, file=sys.stderr, flush=True)
        os._exit(1)
