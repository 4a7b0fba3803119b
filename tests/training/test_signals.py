"""The first stop signal is remembered, the second has its usual effect."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from ddpm.training.signals import STOP_SIGNALS, StopSignals

ONE_PROCESS = SimpleNamespace(num_processes=1, is_main_process=True)


@pytest.fixture(autouse=True)
def restored_handlers():
    handlers = {n: signal.getsignal(n) for n in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_no_signal_is_agreed_on_before_one_arrives():
    assert StopSignals(ONE_PROCESS).agree(7) == (None, 7)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_is_remembered(number):
    stop = StopSignals(ONE_PROCESS)
    os.kill(os.getpid(), number)
    assert stop.agree(7) == (number, 7)
    assert stop.agree(8) == (number, 8)


def test_second_interrupt_interrupts():
    stop = StopSignals(ONE_PROCESS)
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.agree(7)[0] is signal.SIGTERM


def test_second_termination_terminates():
    child = os.fork()
    if child == 0:
        stop = StopSignals(ONE_PROCESS)
        os.kill(os.getpid(), signal.SIGTERM)
        if stop.agree(7)[0] is signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM


@pytest.mark.parametrize("is_main", [True, False])
def test_processes_agree_one_step_after_the_signal(monkeypatch, is_main):
    """A process reads signal and horizon from the all-reduce of the step before."""
    others = [[0, 0 if is_main else 100], [signal.SIGTERM, 0 if is_main else 90], [0, 0]]

    def all_reduce(values, operation, group, async_op):
        assert group == "a group of its own" and async_op
        values.copy_(torch.maximum(values, torch.tensor(others.pop(0))))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(torch.distributed, "new_group", lambda **_: "a group of its own")
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    timeout = SimpleNamespace(timeout=timedelta(seconds=1))
    stop = StopSignals(
        SimpleNamespace(num_processes=2, is_main_process=is_main, init_handler=timeout)
    )
    horizons = [100, 90, 80] if is_main else [999, 999, 999]
    assert stop.agree(horizons[0], wait=True) == (None, 100)
    assert stop.agree(horizons[1]) == (None, 100)
    assert stop.agree(horizons[2]) == (signal.SIGTERM, 90)


def test_a_thread_sets_no_handlers():
    """Python allows them in the main thread alone."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def agree():
        stop = StopSignals(ONE_PROCESS)
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before
        result = stop.agree(7)
        stop.release()
        return result

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(agree).result() == (None, 7)
