"""What --dry_run says of memory, against the peak of real runs.

    python benchmarks/memory.py [--cases 8:512 32:64 64:16]

A case is one of benchmarks/training.py's sizes and a batch size. For each, with and without
--gradient_checkpointing, the dry run is asked, and then three steps are trained, with preview,
checkpoint and export. The peak is what the kernel says of the process (VmHWM).
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import tyro

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from training import ROOT, SIZES, make_pictures  # noqa: E402


def main(cases: tuple[str, ...] = ("8:512", "32:64", "64:16")) -> None:
    """Print a table."""
    print("| pixels | batch | checkpointing | predicted MiB | measured MiB | error |")
    print("|---|---|---|---|---|---|")
    for case in cases:
        name, _, batch_size = case.partition(":")
        with tempfile.TemporaryDirectory(prefix="ddpm-memory-") as scratch:
            flags = prepare(name, int(batch_size), Path(scratch))
            for switch in ("--no_gradient_checkpointing", "--gradient_checkpointing"):
                said = run([*flags, switch, "--dry_run"], Path(scratch))[0]
                predicted = float(re.search(r"about ([\d,]+) MiB", said)[1].replace(",", ""))
                again = [*flags, switch, "--overwrite_output_dir"]
                measured = run(again, Path(scratch))[1]
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
    """Flags for a run of a size."""
    size = SIZES[name]
    (scratch / "model").mkdir()
    config = {**size.settings(), "_class_name": "UNet2DModel"}
    (scratch / "model" / "config.json").write_text(json.dumps(config))
    data = (
        f"--train_data_dir={make_pictures(size, scratch / 'pictures')}"
        if size.num_images
        else f"--dataset_name={ROOT / 'data' / 'digits'}"
    )
    return [
        data,
        f"--resolution={size.resolution}",
        "--channels=3",
        f"--train_batch_size={batch_size}",
        f"--model_config_name_or_path={scratch / 'model'}",
        f"--output_dir={scratch / 'run'}",
        "--max_train_steps=3",
        "--eval_batch_size=16",
    ]


def run(flags: list[str], scratch: Path) -> tuple[str, float]:
    """What train.py prints, and its peak memory in MiB."""
    words = [sys.executable, str(HERE / "probe.py"), str(scratch), str(ROOT / "train.py"), *flags]
    done = subprocess.run(words, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    notes = [json.loads(line) for line in (scratch / "0.jsonl").read_text().splitlines()]
    return done.stdout, notes[-1]["memory_mib"]


if __name__ == "__main__":
    tyro.cli(main)
