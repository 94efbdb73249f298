"""A worker of a sweep whose runs are what their recipes' texts say; it imports in a moment."""

import os
import signal
import time
from types import SimpleNamespace


def work(pipe, settings):
    def report(kind, **facts):
        pipe.send(SimpleNamespace(kind=kind, **{"part": 0.0, "text": "", **facts}))

    if settings.fault == "refuses":
        report("failed", text="no such backend")
        return
    if settings.fault == "crashes":
        os._exit(3)
    while True:
        report("ready")
        if (task := pipe.recv()) is None:
            return
        (_, run) = task
        if run == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if run == "never ends":
            time.sleep(60)
        report("progress", part=0.5)
        if run == "fails":
            report("failed", text="why")
            return
        report("finished")
