"""Seconds from launch to the first step of a resumed run, at step 10 and at step 1,000,000.

    python benchmarks/resume.py [--repeats 5]

Both runs have the same weights; the later one also has the metrics of a million steps, a line for
each ten. They are started in turn, and timed until a new step is in metrics.jsonl. The result is
the medians and their ratio.
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

from workloads import ROOT

EARLY, LATE = 10, 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory(prefix="ddpm-resume-") as name:
        early, late = Path(name) / "early", Path(name) / "late"
        run(early, EARLY).wait()
        shutil.copytree(early, late)
        make_late(late)
        seconds: dict[Path, list[float]] = {early: [], late: []}
        for _ in range(repeats):
            for folder, step in ((early, EARLY), (late, LATE)):
                seconds[folder].append(first_step(folder, step, Path(name) / "copy"))
    for folder, step in ((early, EARLY), (late, LATE)):
        values = sorted(seconds[folder])
        print(
            f"resume at step {step:>9,}: median {statistics.median(values):.2f} s "
            f"({values[0]:.2f} to {values[-1]:.2f}, {repeats} times)"
        )
    ratio = statistics.median(seconds[late]) / statistics.median(seconds[early])
    print(f"ratio {ratio:.2f}")


def run(folder: Path, steps: int) -> subprocess.Popen:
    command = [
        sys.executable,
        "train.py",
        f"--output_dir={folder}",
        f"--max_train_steps={steps}",
        "--logging_steps=1",
        "--save_images_epochs=0",
        "--save_model_epochs=0",
        "--resume_from_checkpoint=latest",
    ]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=environment)


def make_late(folder: Path) -> None:
    """Turn a run of ten steps into one of a million: state, metrics, name of the checkpoint."""
    checkpoint = folder / f"checkpoint-{EARLY}"
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**state, "step": LATE}))
    checkpoint.rename(folder / f"checkpoint-{LATE}")
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(10, LATE + 1, 10):
            file.write(json.dumps({**line, "step": step}) + "\n")


def first_step(folder: Path, step: int, copy: Path) -> float:
    """Resume a copy of the run, and return the seconds to its first step."""
    shutil.copytree(folder, copy)
    size = (copy / "metrics.jsonl").stat().st_size
    started = time.perf_counter()
    process = run(copy, step + 50)
    while (copy / "metrics.jsonl").stat().st_size <= size:
        time.sleep(0.005)
        if process.poll() is not None:
            sys.exit("the run ended before its first step")
    seconds = time.perf_counter() - started
    process.kill()
    process.wait()
    shutil.rmtree(copy)
    return seconds


if __name__ == "__main__":
    main()
