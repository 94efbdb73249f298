"""Python in a process of its own, for what an import, the environment or a driver decides."""

import os
import socket
import subprocess
import sys


def run_python(*arguments, cwd=None, **environment):
    """Run Python; return the finished process. A variable of the environment that is None is removed."""
    variables = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=variables, check=False, capture_output=True, text=True)


def printed_by(*arguments, **options):
    """What Python prints, which has to succeed."""
    done = run_python(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(count, *arguments, timeout=120, **environment):
    """Run Python in so many processes that find each other as torchrun's do; return what each printed.

    All have to succeed: the first that fails ends the others.
    """
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in range(count):
        variables = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=variables | environment, **pipes))
    try:
        done = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, done, strict=True):
        assert process.returncode == 0, errors
    return done
