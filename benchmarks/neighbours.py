"""Speed of training on a CPU while other programs compute, by the way in which threads wait.

    python benchmarks/neighbours.py [--size 8] [--neighbours 0 1 3] [--rounds 5] [--seconds 4]

train.py runs with each --cpu_wait_policy, in turn: all but one are suspended. A neighbour is a
process that computes all the time on one thread, in a session of its own. The fair share is the
part of all cores that as many threads get which never wait for each other, also in turn: Linux
divides cores by session first. Each turn has some seconds first in which `auto` reacts.

For a container, start it in one: docker run --cpus 1.5 ..., with --neighbours 0.
"""

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tyro
from program import LAUNCH, PROBE, Program, killed_at_the_end, machine, spread
from workloads import ROOT, SIZES, write_workload

POLICIES = ("active", "passive", "auto")
CORES = len(os.sched_getaffinity(0))
LOOPS = """
import os, sys
for _ in range(int(sys.argv[1]) - 1):
    if os.fork() == 0:
        break
while True:
    pass
"""


def main(
    size: str = "8",
    neighbours: tuple[int, ...] = (0, 1, 3),
    rounds: int = 5,
    seconds: float = 4.0,
    settle: float = 3.0,
) -> None:
    """Print images/s for each number of neighbours and policy, and each as a part of `active` when
    quiet. `settle` is the seconds of a turn before those that count."""
    print(machine("cpu"), flush=True)
    rates: dict[tuple[int, str], list[float]] = {}
    shares: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="ddpm-neighbours-") as scratch:
        programs = prepare(size, Path(scratch))
        others = [start_loops(1) for _ in range(max(neighbours))]
        reference = start_loops(CORES)
        try:
            with killed_at_the_end(*programs):
                for program in programs:
                    program.start()
                    program.suspend()
                for _ in range(rounds):
                    for count in neighbours:
                        send(others[:count], signal.SIGCONT)
                        shares.setdefault(count, []).append(share_of_cores(reference, seconds))
                        for program in programs:
                            rate = images_per_second(program, settle, seconds)
                            print(f"  {count} neighbours, {program.name}: {rate:.0f}", flush=True)
                            rates.setdefault((count, program.name), []).append(rate)
                        send(others[:count], signal.SIGSTOP)
        finally:
            send([*others, reference], signal.SIGKILL)
    print_table(rates, shares, neighbours)


def prepare(size: str, scratch: Path) -> list[Program]:
    """Return train.py with each policy, on the same work."""
    batch_size = SIZES[size].batch_size
    flags = [
        *write_workload(SIZES[size], scratch),
        f"--train_batch_size={batch_size}",
        "--max_train_steps=1000000",
        "--save_images_epochs=0",
        "--save_model_epochs=0",
    ]
    launch = [*LAUNCH, "--num_processes=1", "--num_machines=1", "--dynamo_backend=no"]
    return [
        Program(
            policy,
            [
                *(*launch, "--mixed_precision=no", PROBE, str(scratch / policy)),
                *(str(ROOT / "train.py"), *flags),
                *(f"--cpu_wait_policy={policy}", f"--output_dir={scratch / f'run-{policy}'}"),
            ],
            scratch / policy,
            batch_size,
        )
        for policy in POLICIES
    ]


def start_loops(count: int) -> subprocess.Popen:
    """Start a suspended session of processes that compute."""
    command = [sys.executable, "-c", LOOPS, str(count)]
    process = subprocess.Popen(command, start_new_session=True)
    while len(psutil.Process(process.pid).children()) < count - 1:
        time.sleep(0.01)
    send([process], signal.SIGSTOP)
    return process


def send(sessions: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in sessions:
        os.killpg(process.pid, number)


def share_of_cores(reference: subprocess.Popen, seconds: float) -> float:
    """Run it for some seconds, and return the part of all cores that it got."""

    def cpu_seconds() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(own.user + own.system for own in times)

    root = psutil.Process(reference.pid)
    processes = [root, *root.children()]
    before, started = cpu_seconds(), time.monotonic()
    send([reference], signal.SIGCONT)
    time.sleep(seconds)
    send([reference], signal.SIGSTOP)
    return (cpu_seconds() - before) / (time.monotonic() - started) / CORES


def images_per_second(program: Program, settle: float, seconds: float) -> float:
    """Run for `settle` and `seconds`; return the speed in the latter. Threads that starve may
    finish no step."""
    program.signal(signal.SIGCONT)
    time.sleep(settle)
    before, started = program.read(), time.monotonic()
    time.sleep(seconds)
    after, elapsed = program.read(), time.monotonic() - started
    program.require_alive()
    program.suspend()
    steps = len(after) - len(before)
    if steps > 1:
        elapsed = after[-1]["time"] - before[-1]["time"]
    return steps * program.images / elapsed


def print_table(
    rates: dict[tuple[int, str], list[float]],
    shares: dict[int, list[float]],
    neighbours: tuple[int, ...],
) -> None:
    """Print a Markdown table: images/s, also as a part of `active` with the first number."""
    quiet = statistics.median(rates[neighbours[0], "active"])
    print("\n| neighbours | fair share | policy | images/s | of active when quiet |")
    print("|---|---|---|---|---|")
    for (count, policy), own in rates.items():
        median, lowest, highest = spread([rate / quiet for rate in own])
        print(
            f"| {count} | {statistics.median(shares[count]):.2f} | {policy} | "
            f"{statistics.median(own):.0f} | {median:.2f} ({lowest:.2f} to {highest:.2f}) |"
        )


if __name__ == "__main__":
    tyro.cli(main)
