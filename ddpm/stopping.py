"""How a run is asked to stop: SIGTERM and SIGINT, agreed on by all processes.

`accelerate launch` of a single process dies of a SIGTERM without passing it on; a run whose
launcher is gone takes that as its SIGTERM, instead of training on unseen.
"""

import os
import signal
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator


class StopRequest:
    """Remembers the first SIGTERM or SIGINT; a second one has its usual effect, at once.

    With several processes the numbers are shared by an all-reduce that is read one step later, when
    it has long arrived: no process waits for it, and all of them stop after the same step.
    """

    def __init__(self, accelerator: Accelerator):
        self._device = accelerator.device
        self._number = 0
        # Only of a launcher: a shell that is closed is no reason to stop.
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None
        self._pending: tuple[torch.Tensor, torch.distributed.Work] | None = None
        self._shared = accelerator.num_processes > 1
        self._usual = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        for number in self._usual:
            signal.signal(number, self._remember)

    def agreed(self) -> signal.Signals | None:
        """The signal that all stop for after this step, or None. Call on every process."""
        if self._launcher not in (None, os.getppid()) and not self._number:
            self._remember(signal.SIGTERM, None)
        if not self._shared:
            return signal.Signals(self._number) if self._number else None
        arrived = 0
        if self._pending is not None:
            number, work = self._pending
            work.wait()
            arrived = int(number.item())
        number = torch.tensor(self._number, device=self._device)
        work = torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, async_op=True)
        self._pending = (number, work)
        return signal.Signals(arrived) if arrived else None

    def release(self) -> None:
        """Give the signals their usual effect back."""
        for number, usual in self._usual.items():
            signal.signal(number, usual)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._number = number
        self.release()
