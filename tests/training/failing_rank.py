"""train.py in which rank 1 fails once, before its fourth step: FAULT is kill, stop or raise.

With machine, the process fails whatever its rank, and its launcher is killed first.
The file MARKER is written just before, and a process that finds it does not fail.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

top = Path(__file__).parents[2]
sys.path.insert(0, str(top))

from ddpm.training import loop  # noqa: E402

train_step, calls = loop.train_step, []


def failing_step(*args):
    """train_step, or the fault."""
    calls.append(1)
    marker, fault = Path(os.environ["MARKER"]), os.environ["FAULT"]
    fails = os.environ["RANK"] == "1" or fault == "machine"
    if fails and len(calls) == 4 and not marker.exists():
        marker.touch()
        if fault == "raise":
            raise ValueError("a bug")
        if fault == "machine":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    return train_step(*args)


loop.train_step = failing_step
runpy.run_path(str(top / "train.py"), run_name="__main__")
