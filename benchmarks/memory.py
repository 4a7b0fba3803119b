"""Memory that --dry_run predicts, against the peak of real runs.

    python benchmarks/memory.py [--cases 8:512 32:64 64:16]

A case is a size of workloads.py and a batch size. Each is predicted and then trained for three
steps, with preview, checkpoint and export, with and without --gradient_checkpointing. The peak is
the kernel's VmHWM.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro
from program import PROBE
from workloads import ROOT, SIZES, write_workload


def main(cases: tuple[str, ...] = ("8:512", "32:64", "64:16")) -> None:
    """Print a table."""
    print("| pixels | batch | checkpointing | predicted MiB | measured MiB | error |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        name, _, batch_size = case.partition(":")
        with tempfile.TemporaryDirectory(prefix="ddpm-memory-") as scratch:
            flags = prepare(name, int(batch_size), Path(scratch))
            for switch in ("--no_gradient_checkpointing", "--gradient_checkpointing"):
                output = run([*flags, switch, "--dry_run"], Path(scratch))[0]
                predicted = float(re.search(r"about ([\d,]+) MiB", output)[1].replace(",", ""))
                train = [*flags, switch, "--overwrite_output_dir"]
                measured = run(train, Path(scratch))[1]
                used = "no" if switch.startswith("--no_") else "yes"
                cells = [
                    SIZES[name].resolution,
                    batch_size,
                    used,
                    f"{predicted:,.0f}",
                    f"{measured:,.0f}",
                    f"{predicted / measured - 1:+.1%}",
                ]
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def prepare(name: str, batch_size: int, scratch: Path) -> list[str]:
    """Write the workload of a size, and return the flags of a short run."""
    return [
        *write_workload(SIZES[name], scratch),
        "--channels=3",
        f"--train_batch_size={batch_size}",
        f"--output_dir={scratch / 'run'}",
        "--max_train_steps=3",
        "--eval_batch_size=16",
    ]


def run(flags: list[str], scratch: Path) -> tuple[str, float]:
    """Run train.py, and return its output and its peak memory in MiB."""
    command = [sys.executable, PROBE, str(scratch), str(ROOT / "train.py"), *flags]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    notes = [json.loads(line) for line in (scratch / "0.jsonl").read_text().splitlines()]
    return done.stdout, notes[-1]["memory_mib"]


if __name__ == "__main__":
    tyro.cli(main)
