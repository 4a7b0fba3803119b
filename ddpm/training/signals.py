"""How a run comes to stop: SIGTERM, SIGINT and SIGUSR1, and the horizon, agreed on by all.

`accelerate launch` of a single process dies of a SIGTERM without passing it on; a run whose
launcher is gone takes that as its SIGTERM, instead of training on unseen.
"""

import os
import signal
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator

ASKS_TO_STOP = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


class StopSignals:
    """Remembers the first of these signals; a second one has its usual effect, at once.

    With several processes signal and horizon are shared by an all-reduce that is read one step
    later, when it has long arrived: no process waits for it, and all stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self._number = 0
        # Only of a launcher: a shell that is closed is no reason to stop.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self._main, self._group = accelerator.is_main_process, None
        if accelerator.num_processes > 1:
            # Of its own and on the CPU: to read from a GPU would wait for the step that it is in.
            self._group = torch.distributed.new_group(backend="gloo")
        self._usual = {number: signal.getsignal(number) for number in ASKS_TO_STOP}
        for number in self._usual:
            signal.signal(number, self._remember)

    def agreed(self, horizon: int, wait: bool = False) -> tuple[signal.Signals | None, int]:
        """What all stop for after this step: a signal or None, and the main process's `horizon`.

        Call on every process: before the first step with `wait`, then after every step.
        """
        if self._launcher not in (None, os.getppid()) and not self._number:
            self._remember(signal.SIGTERM, None)
        number = self._number
        if self._group is not None:
            number, horizon = self._exchange(number, horizon, wait)
        return (signal.Signals(number) if number else None), horizon

    def _exchange(self, number: int, horizon: int, wait: bool) -> tuple[int, int]:
        """Send this step's values, and take those that all sent after the step before."""
        before = self._pending
        values = torch.tensor([number, horizon if self._main else 0])
        work = torch.distributed.all_reduce(
            values, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = values, work
        values, work = self._pending if wait else before
        work.wait()
        number, horizon = values.tolist()
        return number, horizon

    def release(self) -> None:
        """Give the signals their usual effect back."""
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self.release()
