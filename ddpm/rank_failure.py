"""When one process of a launch fails, all of them end, with one sentence that names its rank.

A collective of torch.distributed fails where a process has ended, and after a timeout where one
hangs. The process that notices it, or has an error of its own, calls the roll in the store of the
launcher, which outlives all of them. A thread of each process answers, whatever the process itself
waits for. Who does not answer was killed, or hangs.
"""

import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed

from ddpm.errors import Interrupted, first_line, printable, sentence

POLL_SECONDS = 1.0
"""How often a process reads whether another one has failed."""
ROLL_CALL_SECONDS = 10.0
"""How long a process waits for the answers of the others: less than the 30 s after which a launcher
kills what it has asked to end."""
GO_ON = "All processes have ended; run the same command again to go on."


def is_lost_connection(error: BaseException) -> bool:
    """Return whether a collective failed because of another process; gloo has no type for it."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


@contextmanager
def end_together() -> Iterator[None]:
    """End all processes of the launch where one fails inside. Call on every process.

    The lowest rank that is left prints the sentence. With one process nothing is done.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        yield
        return
    roll, is_over = Roll(), threading.Event()
    threading.Thread(target=roll.watch, args=(is_over,), daemon=True).start()
    try:
        yield
    except (Interrupted, BrokenPipeError):
        raise
    except Exception as error:
        roll.end(error)
    finally:
        is_over.set()


class Roll:
    """The answers of the processes of one launch, in the store of its launcher."""

    def __init__(self) -> None:
        self._rank, self._size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        # A restarted launch may find the store of before, with its answers
        launch = [secrets.token_hex(8)]
        torch.distributed.broadcast_object_list(launch)
        # A connection of its own: another thread may wait in the one of the process group
        store = torch.distributed.group.WORLD.get_group_store().clone()
        self._store = torch.distributed.PrefixStore(launch[0], store)
        self._store.set(f"host {self._rank}", socket.gethostname())
        self._lock = threading.Lock()

    def watch(self, is_over: threading.Event) -> None:
        """End this process once another one has failed."""
        try:
            while not is_over.wait(POLL_SECONDS):
                if self._store.check(["failed"]):
                    self.end(None)
        except torch.distributed.DistError:
            return  # the launcher of rank 0 has ended, and with it the process group

    def end(self, error: Exception | None) -> NoReturn:
        """Answer with the process's own error or, after None or a lost connection, without one.

        The lowest rank that answers prints who has failed. Ends the process, without the cleanup of
        the interpreter, which would wait for the collectives.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher sends it to all others
        with self._lock:  # kept: of two threads the second one has nothing to add
            reason = ""
            if error is not None and not is_lost_connection(error):
                reason = sentence(error) or f"{type(error).__name__}: {first_line(error)}."
                if sentence(error) is None:
                    traceback.print_exception(error)
            try:
                self._call(reason)
            except torch.distributed.DistError:
                _print(reason or f"The launcher of rank 0 has ended. {GO_ON}")
            sys.stdout.flush()
            os._exit(getattr(error, "exit_code", 1))

    def _call(self, reason: str) -> None:
        self._store.set(f"answer {self._rank}", reason)
        self._store.set("failed", "")
        keys, deadline = self._keys("answer"), time.monotonic() + ROLL_CALL_SECONDS
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        answers = [self._store.get(k).decode() if self._store.check([k]) else None for k in keys]
        if self._rank == min(rank for rank, answer in enumerate(answers) if answer is not None):
            hosts = [host.decode() for host in self._store.multi_get(self._keys("host"))]
            _print(describe_failure(answers, hosts))
            self._store.set("printed", "")
        while not self._store.check(["printed"]) and time.monotonic() < deadline + 1:
            time.sleep(0.1)

    def _keys(self, name: str) -> list[str]:
        return [f"{name} {rank}" for rank in range(self._size)]


def describe_failure(answers: list[str | None], hosts: list[str]) -> str:
    """Return the sentence about a failure.

    `answers` has by rank the reason of a process that failed, "" for one that did not, and None for
    one that does not answer. An error that all processes have is no failure of one of them.
    """
    failed = [rank for rank, answer in enumerate(answers) if answer]
    absent = [rank for rank, answer in enumerate(answers) if answer is None]
    if len(failed) == len(answers):
        return answers[0]
    names = [f"rank {rank} of {len(answers)} on {hosts[rank]}" for rank in failed[:1] or absent]
    subject = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    subject = subject[:1].upper() + subject[1:]
    if failed:
        return f"{subject}: {answers[failed[0]]}"
    if absent:
        return f"{subject} was killed or hangs. {GO_ON}"
    return f"The processes lost the connection to each other. {GO_ON}"


def _print(text: str) -> None:
    print(f"error: {printable(text)}", file=sys.stderr, flush=True)
