"""A run by the clock, on a clock of the test's own."""

import os
import subprocess
import sys
import time

import pytest

from ddpm.training import schedule
from ddpm.training.schedule import (
    LEAVING,
    SETTLE,
    UNLIMITED_STEPS,
    TimeBudget,
    seconds_since_launch,
)


class Clock:
    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(schedule, "time", clock)
    return clock


def run(made, clock, seconds_a_step, at_the_end, chores=(), step=0):
    """Steps until the horizon is reached; the end's chores take what they take. -> (steps, end)"""
    horizon = made.horizon(step, at_the_end)
    while step < horizon:
        clock.now += seconds_a_step(step)
        step += 1
        made.step_done()
        for every, name, seconds in chores:
            if step % every == 0:
                with made.chore(name):
                    clock.now += seconds
        horizon = made.horizon(step, at_the_end)
    return step, clock.now


def test_a_run_ends_within_its_time_and_uses_it(clock):
    made = TimeBudget(600.0, UNLIMITED_STEPS)
    chores = ((100, "preview", 20.0), (50, "checkpoint", 4.0))
    at_the_end = {"preview": 5.0, "checkpoint": 5.0}
    _, now = run(made, clock, lambda step: 0.5, at_the_end, chores)
    needed = now - 1000.0 + 20.0 + 4.0  # the last preview and checkpoint
    assert 600.0 - LEAVING - 12.0 < needed <= 600.0


@pytest.mark.parametrize("speed", [(0.2, 0.6), (0.6, 0.2)], ids=["slower", "faster"])
def test_a_run_that_changes_its_speed_still_ends_in_time(clock, speed):
    _, now = run(TimeBudget(300.0, UNLIMITED_STEPS), clock, lambda s: speed[clock.now > 1150.0], {})
    assert 290.0 < now - 1000.0 <= 300.0


def test_the_first_slow_steps_are_not_measured(clock):
    """Compiling and warming up take a minute; the horizon is that of the steps after it."""
    made = TimeBudget(200.0, UNLIMITED_STEPS)
    for seconds in [30.0] * (SETTLE + 1):
        clock.now += seconds
        made.step_done()
        assert made.horizon(1, {}) == UNLIMITED_STEPS
    clock.now += 1.0
    made.step_done()
    left = 200.0 - 30.0 * (SETTLE + 1) - 1.0 - LEAVING - 0.5
    assert made.horizon(5, {}) == 5 + int(left)


def test_chores_that_were_never_measured_are_given_steps(clock):
    made = TimeBudget(100.0, UNLIMITED_STEPS, seconds_per_step=1.0)
    assert made.horizon(0, {}) - made.horizon(0, {"preview": 25.0}) == 25


def test_earlier_parts_count(clock):
    """A part that begins with everything spent takes no step: its rate would be that of a start."""
    made = TimeBudget(100.0, UNLIMITED_STEPS, spent=99.0, seconds_per_step=0.5)
    assert made.horizon(180, {"checkpoint": 1.0}) == 180
    longer = TimeBudget(200.0, UNLIMITED_STEPS, spent=99.0, seconds_per_step=0.5)
    assert longer.horizon(180, {}) == 180 + int((101.0 - LEAVING - 0.25) / 0.5)


def test_a_number_of_steps_is_the_most(clock):
    assert TimeBudget(None, 77).horizon(5, {}) == 77
    assert TimeBudget(1e6, 77, seconds_per_step=0.1).horizon(5, {}) == 77


def test_the_launch_is_that_of_the_launcher():
    """A process started by accelerate counts from its parent's start."""
    script = "import time; time.sleep(1); import subprocess, sys; subprocess.run(sys.argv[1:])"
    asks = "from ddpm.training.schedule import seconds_since_launch as s; print(s())"
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    words = [sys.executable, "-c", script, sys.executable, "-c", asks]
    began = time.time()
    said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
    assert 1.0 < float(said) <= time.time() - began + 0.1
    alone = seconds_since_launch()
    assert alone > 0


def test_a_budget_that_the_start_has_used_up_takes_one_step(clock):
    made = TimeBudget(40.0, UNLIMITED_STEPS, spent=38.0)
    assert made.horizon(1, {}) == 1 and made.lateness == 0.0
    clock.now += 5.0
    assert made.lateness == pytest.approx(3.0)
    assert TimeBudget(None, 7, spent=38.0).lateness == 0.0


def test_a_chore_is_not_taken_for_a_slow_step(clock):
    made = TimeBudget(1000.0, UNLIMITED_STEPS)
    for step in range(10):
        clock.now += 1.0
        made.step_done()
        if step == 7:
            with made.chore("preview"):
                clock.now += 100.0
    assert made.horizon(10, {}) == 10 + int(1000.0 - 110.0 - LEAVING - 0.5)
