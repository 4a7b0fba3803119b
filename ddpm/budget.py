"""A run by the clock: how many steps fit into a budget of time, with all that must still be done.

The horizon is estimated anew after each step from the speed of the last ones, so the learning rate,
a function of step and horizon, comes to its end when the time does. The chores at the end (the last
checkpoint, preview and export) are given the time that the slowest of their kind took so far.
"""

import os
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

WINDOW = 50
"""Steps over which the speed is measured: old enough to be steady, new enough to be true."""
SETTLE = 3
"""First steps of a process that are not measured: memory and kernels are being got ready."""
LEAVING = 3.0
"""Seconds kept for closing trackers, the record, and the interpreter's way out."""


def seconds_since_launch() -> float:
    """How long ago this command was started: its launcher, when there is one, else this process."""
    process = psutil.Process()
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        process = process.parent() or process
    return time.time() - process.create_time()


class Budget:
    """Where the end is. Without `seconds` it is `limit`, a number of steps known from the start.

    `spent` is what earlier parts of the run took. Only the main process's estimate counts: the
    others are told, so all stop after the same step.
    """

    def __init__(
        self,
        seconds: float | None,
        limit: int,
        spent: float = 0.0,
        seconds_per_step: float | None = None,
    ):
        """`seconds_per_step` is that of the run's earlier parts: it counts until there is news."""
        self.seconds, self.limit = seconds, limit
        self._began = time.monotonic() - spent
        self._earlier = seconds_per_step
        self._steps: deque[float] = deque(maxlen=WINDOW)
        self._settling = SETTLE
        self._last: float | None = None
        self._chores: dict[str, float] = {}

    @property
    def lateness(self) -> float:
        """Seconds by which the budget is exceeded; 0 when it is not, or there is none."""
        return max(0.0, self.spent - self.seconds) if self.seconds is not None else 0.0

    @property
    def spent(self) -> float:
        """Seconds since the launch, with those of the run's earlier parts."""
        return time.monotonic() - self._began

    def step_done(self) -> None:
        """Measure the step that has just ended; chores between steps are not part of it."""
        now = time.monotonic()
        if self._last is not None:
            if self._settling:
                self._settling -= 1
            else:
                self._steps.append(now - self._last)
        self._last = now

    @contextmanager
    def chore(self, name: str) -> Iterator[None]:
        """Measure work that comes once in a while, and once more at the end."""
        began = time.monotonic()
        yield
        now = time.monotonic()
        self._chores[name] = max(self._chores.get(name, 0.0), now - began)
        if self._last is not None:
            self._last += now - began

    def horizon(self, step: int, due_at_end: dict[str, float]) -> int:
        """How many steps the run will have, after `step` of them; `limit` at most, `step` at least.

        `due_at_end` names the chores of the end, each with how many steps' time to keep for it as
        long as none of its kind has been measured.
        """
        each = sum(self._steps) / len(self._steps) if self._steps else self._earlier
        if self.seconds is None:
            return self.limit
        if each is None:  # nothing is known yet, but that the time is up
            return step if self.spent + LEAVING >= self.seconds else self.limit
        reserve = LEAVING + sum(
            1.2 * self._chores[name] if name in self._chores else steps * each
            for name, steps in due_at_end.items()
        )
        # Half a step more than the mean: a step that has begun is finished.
        left = self.seconds - self.spent - reserve - 0.5 * each
        return min(self.limit, step + max(0, int(left / each)))
