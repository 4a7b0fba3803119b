"""The first signal is remembered, the second has its usual effect."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm.stopping import StopRequest

ROOT = Path(__file__).parent.parent
ONE_PROCESS = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_agreed_before_a_signal():
    assert StopRequest(ONE_PROCESS).agreed() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_remembered(number):
    stop = StopRequest(ONE_PROCESS)
    os.kill(os.getpid(), number)
    assert stop.agreed() is number
    assert stop.agreed() is number  # asking does not take it back


def test_second_interrupt_interrupts():
    stop = StopRequest(ONE_PROCESS)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.agreed() is signal.SIGTERM


def test_second_termination_terminates():
    script = """
import os, signal
from types import SimpleNamespace
from ddpm.stopping import StopRequest
stop = StopRequest(SimpleNamespace(device="cpu", num_processes=1))
os.kill(os.getpid(), signal.SIGTERM)
print("alive", stop.agreed().name, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still alive")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "alive SIGTERM\n", ended.stderr
    assert ended.returncode == -signal.SIGTERM


def test_processes_agree_one_step_after_the_signal(monkeypatch):
    """A process without the signal learns of it through the all-reduce of the step before."""
    heard_elsewhere = [0, signal.SIGTERM, 0]

    def all_reduce(number, operation, async_op):
        number.fill_(max(int(number), heard_elsewhere.pop(0)))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    stop = StopRequest(SimpleNamespace(device=torch.device("cpu"), num_processes=2))
    assert [stop.agreed() for _ in range(3)] == [None, None, signal.SIGTERM]
