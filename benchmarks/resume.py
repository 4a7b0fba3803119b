"""How long a resume takes to its first step, at step 10 and at step 1,000,000 of a run.

    python benchmarks/resume.py [--repeats 5]

Both runs hold the same weights; the later one also has the metrics of a million steps, a line for
each ten. They are started in turn (A B A B ...), and the time from launch to the first step that is
written to metrics.jsonl is taken; medians and their ratio are printed.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
EARLY, LATE = 10, 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="ddpm-resume-") as name:
        early, late = Path(name) / "early", Path(name) / "late"
        run(early, EARLY).wait()
        shutil.copytree(early, late)
        age(late)
        seconds: dict[Path, list[float]] = {early: [], late: []}
        for _ in range(repeats):
            for folder, step in ((early, EARLY), (late, LATE)):
                seconds[folder].append(first_step(folder, step, Path(name) / "again"))
    for folder, step in ((early, EARLY), (late, LATE)):
        values = sorted(seconds[folder])
        print(
            f"resume at step {step:>9,}: median {statistics.median(values):.2f} s "
            f"({values[0]:.2f} to {values[-1]:.2f}, {repeats} times)"
        )
    ratio = statistics.median(seconds[late]) / statistics.median(seconds[early])
    print(f"ratio {ratio:.2f}")


def run(folder: Path, steps: int) -> subprocess.Popen:
    words = [
        sys.executable,
        "train.py",
        f"--output_dir={folder}",
        f"--max_train_steps={steps}",
        "--logging_steps=1",
        "--save_images_epochs=0",
        "--save_model_epochs=0",
        "--resume_from_checkpoint=latest",
    ]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    )


def age(folder: Path) -> None:
    """Make a run of ten steps one of a million: state, metrics, and the name of the checkpoint."""
    checkpoint = folder / f"checkpoint-{EARLY}"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": LATE}))
    checkpoint.rename(folder / f"checkpoint-{LATE}")
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, LATE + 1, 10):
            file.write(json.dumps({**line, "step": step}) + "\n")


def first_step(folder: Path, step: int, again: Path) -> float:
    shutil.copytree(folder, again)
    size = (again / "metrics.jsonl").stat().st_size
    began = time.perf_counter()
    process = run(again, step + 50)
    while (again / "metrics.jsonl").stat().st_size <= size:
        time.sleep(0.005)
        if process.poll() is not None:
            sys.exit("the run ended before its first step")
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    shutil.rmtree(again)
    return seconds


if __name__ == "__main__":
    main()
