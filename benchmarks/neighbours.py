"""Speed of training on a CPU while other programs compute, by the way in which threads wait.

    python benchmarks/neighbours.py [--size 8] [--neighbours 0 1 3] [--rounds 5] [--seconds 4]

train.py runs with each --cpu_wait_policy, in turn: all but one are suspended. A neighbour is a
process that computes all the time on one thread, in a session of its own. The fair share of a
program with T threads next to N neighbours on C cores is T / (T + N) where T = C: what threads get
that never wait for each other. Each turn has some seconds first in which `auto` reacts.

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

import tyro
from program import LAUNCH, PROBE, Program, killed_at_the_end, machine, spread
from workloads import ROOT, SIZES, write_workload

POLICIES = ("active", "passive", "auto")


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
    with tempfile.TemporaryDirectory(prefix="ddpm-neighbours-") as scratch:
        programs = prepare(size, Path(scratch))
        others = [start_neighbour() for _ in range(max(neighbours))]
        try:
            with killed_at_the_end(*programs):
                for program in programs:
                    program.start()
                    program.suspend()
                for _ in range(rounds):
                    for count in neighbours:
                        send(others[:count], signal.SIGCONT)
                        for program in programs:
                            rate = images_per_second(program, settle, seconds)
                            print(f"  {count} neighbours, {program.name}: {rate:.0f}", flush=True)
                            rates.setdefault((count, program.name), []).append(rate)
                        send(others[:count], signal.SIGSTOP)
        finally:
            send(others, signal.SIGKILL)
    print_table(rates, neighbours)


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


def start_neighbour() -> subprocess.Popen:
    """Start a suspended process that computes. Linux shares cores by session before processes."""
    command = [sys.executable, "-c", "while True: pass"]
    process = subprocess.Popen(command, start_new_session=True)
    process.send_signal(signal.SIGSTOP)
    return process


def send(processes: list[subprocess.Popen], number: signal.Signals) -> None:
    for process in processes:
        process.send_signal(number)


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


def print_table(rates: dict[tuple[int, str], list[float]], neighbours: tuple[int, ...]) -> None:
    """Print a Markdown table: images/s, and the ratio to `active` with the first number."""
    quiet = rates[neighbours[0], "active"]
    print("\n| neighbours | fair share | policy | images/s | of active when quiet |")
    print("|---|---|---|---|---|")
    cores = len(os.sched_getaffinity(0))
    for count, policy in rates:
        rate = rates[count, policy]
        ratio = spread([own / best for own, best in zip(rate, quiet, strict=True)])
        print(
            f"| {count} | {cores / (cores + count):.2f} | {policy} | "
            f"{statistics.median(rate):.0f} | {ratio[0]:.2f} ({ratio[1]:.2f} to {ratio[2]:.2f}) |"
        )


if __name__ == "__main__":
    tyro.cli(main)
