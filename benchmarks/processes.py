"""Speed of two CPU processes against one at the same global batch, and waits between ranks.

    python benchmarks/processes.py [--size 8] [--turns 5] [--seconds 4] [--steps 200]

Both runs see the same images in the same order: 1 process with 2 micro-batches, 2 processes with
one each. They take turns as in training.py. Then 2 processes take 200 steps with previews,
checkpoints, exports and TensorBoard. The result lists the steps much longer than the median, the
periodic work in them, and the rest of the longest: a rank that waits for another shows there.
"""

import statistics
import tempfile
import time
from pathlib import Path

import tyro
from memory import prepare
from program import LAUNCH, PROBE, Program, killed_at_the_end, spread
from workloads import ROOT, SIZES

LONG = 2.0
"""A step that takes this many times the median is listed."""


def main(size: str = "8", turns: int = 5, seconds: float = 4.0, steps: int = 200) -> None:
    """Print the ratio, and the long steps of each rank."""
    batch_size = max(1, SIZES[size].batch_size // 2)
    with tempfile.TemporaryDirectory(prefix="ddpm-processes-") as scratch:
        flags = [
            *prepare(size, batch_size, Path(scratch)),
            "--max_train_steps=1000000",
            "--checkpointing_steps=50",
            "--checkpoints_total_limit=2",
            "--logger=tensorboard",
            "--save_images_epochs=1",
            "--save_model_epochs=1",
        ]
        one, two = (launched(count, flags, Path(scratch), 2 * batch_size) for count in (1, 2))
        ratio = scaling(one, two, turns, seconds)
        print(
            f"2 processes against 1 with 2 micro-batches, {2 * batch_size} images a step: "
            f"{ratio[0]:.2f} times the speed ({ratio[1]:.2f} to {ratio[2]:.2f})."
        )
        two.command = [*two.command, "--overwrite_output_dir"]
        for rank, line in enumerate(long_steps(two, steps)):
            print(f"rank {rank}: {line}")


def launched(count: int, flags: list[str], scratch: Path, images: int) -> Program:
    """Return train.py on `count` processes, together with the work of one with 2 micro-batches."""
    notes = scratch / f"processes-{count}"
    command = [
        *LAUNCH,
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
        "--num_processes",
        str(count),
        PROBE,
        str(notes),
        str(ROOT / "train.py"),
        *flags,
        f"--output_dir={scratch / f'run-{count}'}",
        f"--gradient_accumulation_steps={2 // count}",
    ]
    return Program(f"{count} processes", command, notes, images, processes=count)


def scaling(one: Program, two: Program, turns: int, seconds: float) -> list[float]:
    """Return the speed of two as a multiple of one: median, lowest and highest of the rounds."""
    with killed_at_the_end(one, two):
        for program in (one, two):
            program.start()
            program.suspend()
        pairs = [
            (statistics.fmean(one.turn(seconds)), statistics.fmean(two.turn(seconds)))
            for _ in range(turns)
        ]
    return spread([alone / together for alone, together in pairs])


def long_steps(program: Program, steps: int) -> list[str]:
    """Run it alone, and describe for each rank the median step and the steps far longer."""
    with killed_at_the_end(program):
        program.start()
        while len(program.read()) < steps + 3:
            program.require_alive()
            time.sleep(0.2)
        ranks = [program.read(rank) for rank in range(program.processes)]
    return [_describe(notes[2 : steps + 3]) for notes in ranks]


def _describe(notes: list[dict]) -> str:
    times = [
        after["time"] - before["time"] for before, after in zip(notes, notes[1:], strict=False)
    ]
    median = statistics.median(times)
    periodic = [note["periodic"] for note in notes[1:]]
    long = [(t, p) for t, p in zip(times, periodic, strict=True) if t > LONG * median]
    explained = [t for t, p in long if p]
    by_kind = {
        kind: f"{statistics.median([p[kind] for p in periodic if kind in p]):.3f} s x "
        f"{sum(kind in p for p in periodic)}"
        for kind in sorted({kind for p in periodic for kind in p})
    }
    rest = [t - sum(p.values()) for t, p in long]
    return (
        f"{len(times)} steps, median {median:.3f} s; {len(long)} above {LONG:g} times that, "
        f"{len(explained)} of them with periodic work ({by_kind}); the longest without it: "
        f"{max(rest, default=median):.3f} s."
    )


if __name__ == "__main__":
    tyro.cli(main)
