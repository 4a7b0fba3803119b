"""Two CPU processes against one at the same global batch, and whether a rank waits for another.

    python benchmarks/processes.py [--size 8] [--turns 5] [--seconds 4] [--steps 200]

Both runs see the same images in the same order: 1 process with 2 micro-batches, 2 processes with
one each. They take turns as in benchmarks/training.py. Then 2 processes take 200 steps with
previews, checkpoints, exports and TensorBoard on. Told are the steps much longer than the median,
the chores in them, and what is left of the longest: a rank that waits for another shows there.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from memory import prepare  # noqa: E402
from training import LAUNCH, ROOT, SIZES, Program, spread  # noqa: E402

LONG = 2.0
"""A step that takes this many times the median is a spike."""


def main(size: str = "8", turns: int = 5, seconds: float = 4.0, steps: int = 200) -> None:
    """Print the ratio, and the spikes."""
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
        for rank, lines in enumerate(spikes(two, steps)):
            print(f"rank {rank}: {lines}")


def launched(count: int, flags: list[str], scratch: Path, images: int) -> Program:
    """train.py on `count` processes, which together do what one does with 2 micro-batches."""
    notes = scratch / f"processes-{count}"
    words = [
        *LAUNCH,
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
        "--num_processes",
        str(count),
        str(HERE / "probe.py"),
        str(notes),
        str(ROOT / "train.py"),
        *flags,
        f"--output_dir={scratch / f'run-{count}'}",
        f"--gradient_accumulation_steps={2 // count}",
    ]
    return Program(f"{count} processes", words, notes, images, processes=count)


def scaling(one: Program, two: Program, turns: int, seconds: float) -> list[float]:
    """Speed of two processes as a multiple of one's: median, lowest and highest of the rounds."""
    for program in (one, two):
        program.start()
        program.stop()
    try:
        pairs = [
            (statistics.fmean(one.turn(seconds)), statistics.fmean(two.turn(seconds)))
            for _ in range(turns)
        ]
    finally:
        one.end()
        two.end()
    return spread([alone / together for alone, together in pairs])


def spikes(program: Program, steps: int) -> list[str]:
    """Let it run undisturbed: for each rank its median step, and the steps that took far longer."""
    program.start()
    try:
        while len(program.read()) < steps + 3:
            program.require_alive()
            time.sleep(0.2)
        ranks = [program.read(rank) for rank in range(program.processes)]
    finally:
        program.end()
    return [_told(marks[2 : steps + 3]) for marks in ranks]


def _told(marks: list[dict]) -> str:
    taken = [
        after["time"] - before["time"] for before, after in zip(marks, marks[1:], strict=False)
    ]
    middle = statistics.median(taken)
    chores = [mark["chores"] for mark in marks[1:]]
    long = [(t, c) for t, c in zip(taken, chores, strict=True) if t > LONG * middle]
    inside = [t for t, c in long if c]
    by_kind = {
        kind: f"{statistics.median([c[kind] for c in chores if kind in c]):.3f} s x "
        f"{sum(kind in c for c in chores)}"
        for kind in sorted({kind for c in chores for kind in c})
    }
    left = [t - sum(c.values()) for t, c in long]
    return (
        f"{len(taken)} steps, median {middle:.3f} s; {len(long)} above {LONG:g} times that, "
        f"{len(inside)} of them with a chore ({by_kind}); the longest without its chores: "
        f"{max(left, default=middle):.3f} s."
    )


if __name__ == "__main__":
    tyro.cli(main)
