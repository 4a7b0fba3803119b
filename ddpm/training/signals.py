"""Stop a run on SIGTERM, SIGINT or SIGUSR1, after the same step on every process.

`accelerate launch` of a single process dies of a SIGTERM without passing it on. So a run whose
launcher is gone acts as if it had received SIGTERM, instead of training on unnoticed.
"""

import os
import signal
import threading
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator

STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
]


def launcher_pid() -> int | None:
    """Return the process id of `accelerate launch`, None for a run that was started without it."""
    return os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None


class StopSignals:
    """Remember the first stop signal; a second one has its usual effect, at once.

    Outside the main thread Python allows no handlers: signals then keep their usual effect.

    Several processes share signal and horizon by an all-reduce whose result they read one step
    later, when it has long arrived: no process waits, and all stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self._number = 0
        self._launcher = launcher_pid()
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self._main, self._group = accelerator.is_main_process, None
        if accelerator.num_processes > 1:
            # A group on the CPU: a read from a GPU would wait for the step that it computes.
            # Its timeout is the shorter one, because NCCL's ends the process without an exception.
            timeout = 0.8 * accelerator.init_handler.timeout
            self._group = torch.distributed.new_group(backend="gloo", timeout=timeout)
        is_main_thread = threading.current_thread() is threading.main_thread()
        numbers = STOP_SIGNALS if is_main_thread else []
        self._handlers = {number: signal.getsignal(number) for number in numbers}
        for number in self._handlers:
            signal.signal(number, self._remember)

    def agree(self, horizon: int, wait: bool = False) -> tuple[signal.Signals | None, int]:
        """Return the signal that all processes stop for, or None, and the main one's `horizon`.

        Call on every process: before the first step with `wait`, then after every step.
        """
        if self._launcher not in (None, os.getppid()) and not self._number:
            self._remember(signal.SIGTERM, None)
        number = self._number
        if self._group is not None:
            number, horizon = self._exchange(number, horizon, wait)
        return (signal.Signals(number) if number else None), horizon

    def _exchange(self, number: int, horizon: int, wait: bool) -> tuple[int, int]:
        """Send this step's values; return the result of the step before, or of this one."""
        previous = self._pending
        values = torch.tensor([number, horizon if self._main else 0])
        work = torch.distributed.all_reduce(
            values, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        self._pending = values, work
        values, work = self._pending if wait else previous
        work.wait()
        number, horizon = values.tolist()
        return number, horizon

    def release(self) -> None:
        """Restore the handlers from before this object."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self.release()
