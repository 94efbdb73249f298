"""Python in a process of its own, for what an import, the environment or a driver decides."""

import os
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
