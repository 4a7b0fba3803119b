"""The CPU threads of a process: how many compute, and how they wait for each other."""

import math
import os
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
TASKS = Path("/proc/self/task")
INTERVAL = 1.0
"""Seconds between two readings of how long threads waited for a core."""
CONTENDED, FREE = 0.2, 0.05
"""Time that all threads waited for a core, as a fraction: from the first number on other work
needs the cores too, and below the second no longer."""
NOTE = (
    "Note: other work needs the CPU cores too. While it does, threads sleep instead of spinning "
    "when they wait for each other (--cpu_wait_policy)."
)


def affine_cores() -> int:
    """Return the number of cores that this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def usable_cores() -> int:
    """Return `affine_cores`, or fewer by the quota of a container (1.5 cores count as 2)."""
    return max(1, math.ceil(min(cgroup_quota(), affine_cores())))


def cgroup_quota() -> float:
    """Return the cores that the cgroups of this process may use at most; inf without a limit."""
    limits = [math.inf]
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if "cpu" in controllers.split(",") or not controllers:
            folder = CGROUPS / (controllers and "cpu") / group.lstrip("/")
            limits += [_limit(parent) for parent in (folder, *folder.parents)]
    return min(limits)


def _limit(folder: Path) -> float:
    """Return the cores that one cgroup, of version 2 or 1, may use at most."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        return float(quota) / float(period) if float(quota) > 0 else math.inf
    except (OSError, ValueError):  # ValueError: cpu.max says "max"
        return math.inf


def _set_threads(threads: int, limit: int) -> None:
    """Compute on `threads` threads, or on `limit`, that of a quota, which is printed if lower."""
    if limit < threads and os.environ.get("LOCAL_RANK", "0") == "0":
        plural = "s" if limit > 1 else ""
        cores = f"{cgroup_quota():g} cores: {limit} thread{plural}"
        print(f"Note: this container may use {cores}.", file=sys.stderr)
    torch.set_num_threads(min(threads, limit))


def use_all_cores(processes_here: int) -> None:
    """Divide this machine's cores among its `processes_here` processes as torch threads.

    OMP_NUM_THREADS=1 is the default of `accelerate launch` and therefore ignored; any other number
    is kept.
    """
    if os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = (affine_cores(), usable_cores())
        _set_threads(*(max(1, number // processes_here) for number in cores))


def limit_threads() -> None:
    """Compute on no more threads than usable_cores, unless OMP_NUM_THREADS says how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        _set_threads(torch.get_num_threads(), usable_cores())


def set_wait_policy(policy: str) -> None:
    """Choose how the OpenMP threads of this process wait for each other; no result changes.

    By default threads of libgomp, the OpenMP of torch for Linux, spin for some milliseconds before
    they sleep. That is fastest on idle cores; where other programs compute, a thread that spins
    takes the core from the one that it waits for. `active` keeps that, `passive` makes them sleep
    at once, and `auto` does so while the threads wait for cores. What the environment sets is kept.
    """
    is_set = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    if is_set or torch.get_num_threads() == 1:
        return
    if policy == "passive":
        SleepingThreads()
    elif policy == "auto" and seconds_waited() is not None:
        threading.Thread(target=_watch_cores, daemon=True).start()


def _watch_cores() -> None:
    """Keep SleepingThreads while the threads of this process wait for cores. Never returns."""
    sleeping, says = None, os.environ.get("LOCAL_RANK", "0") == "0"
    waited, now = seconds_waited(), time.monotonic()
    while True:
        time.sleep(INTERVAL)
        waited_before, before = waited, now
        waited, now = seconds_waited(), time.monotonic()
        is_contended = waited - waited_before > (now - before) * (FREE if sleeping else CONTENDED)
        if is_contended and sleeping is None:
            sleeping = SleepingThreads()
            if says:
                print(NOTE, file=sys.stderr)
            says = False
        elif sleeping is not None and not is_contended:
            sleeping.end()
            sleeping = None


def seconds_waited() -> float | None:
    """Return how long the threads of this process were ready to run but had no core, all together;
    None where the system does not count it."""
    nanoseconds = 0
    try:
        for task in os.listdir(TASKS):
            with suppress(ProcessLookupError, FileNotFoundError):  # it has just ended
                nanoseconds += int((TASKS / task / "schedstat").read_text().split()[1])
    except OSError:
        return None
    return nanoseconds / 1e9


class SleepingThreads:
    """Until `end`, OpenMP threads that wait for each other sleep after about a microsecond.

    With more OpenMP threads than cores, libgomp's spin 100 times instead of 300,000 (its manual on
    GOMP_SPINCOUNT). These are such additional threads, which do nothing.
    """

    def __init__(self) -> None:
        self._end = threading.Event()
        threading.Thread(target=self._keep_threads, daemon=True).start()

    def _keep_threads(self) -> None:
        threads, cores = torch.get_num_threads(), affine_cores()
        # A thread has OpenMP threads of its own, from its first parallel operation to its end. It
        # reads their number when it first uses torch, so this changes that of no thread that has
        # used it, as the main thread has in set_wait_policy.
        torch.set_num_threads(cores)
        torch.ones(cores * 2**16).neg_()
        torch.set_num_threads(threads)  # for threads that start later
        self._end.wait()

    def end(self) -> None:
        self._end.set()
