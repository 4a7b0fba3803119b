"""The first signal is remembered, the second has its usual effect."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddpm.training.signals import ASKS_TO_STOP, StopSignals

ROOT = Path(__file__).parents[2]
ONE_PROCESS = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.fixture(autouse=True)
def usual_handlers():
    before = {n: signal.getsignal(n) for n in ASKS_TO_STOP}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_agreed_before_a_signal():
    assert StopSignals(ONE_PROCESS).agreed(7) == (None, 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_is_remembered(number):
    stop = StopSignals(ONE_PROCESS)
    os.kill(os.getpid(), number)
    assert stop.agreed(7) == (number, 7)
    assert stop.agreed(8) == (number, 8)  # asking does not take it back


def test_second_interrupt_interrupts():
    stop = StopSignals(ONE_PROCESS)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.agreed(7)[0] is signal.SIGTERM


def test_second_termination_terminates():
    script = """
import os, signal
from types import SimpleNamespace
from ddpm.training.signals import StopSignals
stop = StopSignals(SimpleNamespace(num_processes=1, is_main_process=True))
os.kill(os.getpid(), signal.SIGTERM)
print("alive", stop.agreed(7)[0].name, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still alive")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "alive SIGTERM\n", ended.stderr
    assert ended.returncode == -signal.SIGTERM


@pytest.mark.parametrize("is_main", [True, False])
def test_processes_agree_one_step_after_the_signal(monkeypatch, is_main):
    """A process learns of signal and horizon through the all-reduce of the step before."""
    elsewhere = [[0, 0 if is_main else 100], [signal.SIGTERM, 0 if is_main else 90], [0, 0]]

    def all_reduce(values, operation, group, async_op):
        assert group == "a group of its own" and async_op
        values.copy_(torch.maximum(values, torch.tensor(elsewhere.pop(0))))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(torch.distributed, "new_group", lambda backend: "a group of its own")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    stop = StopSignals(SimpleNamespace(num_processes=2, is_main_process=is_main))
    mine = [100, 90, 80] if is_main else [999, 999, 999]
    assert stop.agreed(mine[0], wait=True) == (None, 100)
    assert stop.agreed(mine[1]) == (None, 100)
    assert stop.agreed(mine[2]) == (signal.SIGTERM, 90)
