"""Kill a training run with SIGKILL at random moments until it is finished, and compare the bits.

    python benchmarks/kill_soak.py --kills 100 [--processes 2] [--seed 0] [--json FILE]

One run is not disturbed. Others with the same settings are killed: a third of the time as soon as a
half-written file exists, else at any moment since the start of the process. The same command starts
them again until each is finished; new runs start while kills are left. At the end weights, EMA,
optimizer and pipeline must have the bytes of the undisturbed run, and metrics.jsonl the same
losses. The exit code is 0 only then.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from program import LAUNCH
from workloads import ROOT

STEPS = 240
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": [16, 32],
    "norm_num_groups": 4,
    "attention_head_dim": 16,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


@dataclass
class Tally:
    kills: int = 0
    while_writing: int = 0
    before_the_first_step: int = 0
    restarts: int = 0
    runs: int = 0
    compared_bytes: int = 0
    differing_bytes: int = 0
    seconds: float = 0.0
    leftovers: dict[str, int] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the tally to this file")
    options = parser.parse_args()
    rng, tally, started = random.Random(options.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddpm-kill-soak-") as name:
        scratch = Path(name)
        (scratch / "unet").mkdir()
        (scratch / "unet" / "config.json").write_text(json.dumps(UNET))
        straight = scratch / "straight"
        start(straight, scratch, options.processes).wait()
        if not finished(straight):
            sys.exit(f"the undisturbed run failed:\n{(scratch / 'output').read_text()}")
        while tally.kills < options.kills:
            tally.runs += 1
            folder = scratch / f"killed-{tally.runs}"
            kill_until_finished(folder, scratch, options, rng, tally)
            compare(straight, folder, tally)
            print(
                f"{tally.kills} kills, {tally.runs} runs, {tally.differing_bytes} bytes differ",
                flush=True,
            )
    tally.seconds = round(time.monotonic() - started, 1)
    print(json.dumps(asdict(tally), indent=2))
    if options.json:
        options.json.write_text(json.dumps(asdict(tally), indent=2) + "\n")
    sys.exit(1 if tally.differing_bytes else 0)


def kill_until_finished(
    folder: Path, scratch: Path, options: argparse.Namespace, rng: random.Random, tally: Tally
) -> None:
    """Start and kill a run until it is finished, or finishes because no kills are left."""
    while not finished(folder):
        process = start(folder, scratch, options.processes)
        if tally.kills < options.kills and kill(process, folder, rng, tally):
            tally.kills += 1
            tally.restarts += 1
        elif process.wait() != 0:
            sys.exit(f"a run failed:\n{(scratch / 'output').read_text()}")


def start(folder: Path, scratch: Path, processes: int) -> subprocess.Popen:
    command = [sys.executable]
    if processes > 1:
        config = ["--config_file", str(ROOT / "accelerate_config.yaml")]
        command = [*LAUNCH, *config, f"--num_processes={processes}", "--main_process_port=0"]
    command += [
        "train.py",
        "--dataset_name=./data/digits",
        "--resolution=8",
        f"--output_dir={folder}",
        f"--model_config_name_or_path={scratch / 'unet'}",
        f"--max_train_steps={STEPS}",
        "--train_batch_size=32",
        "--learning_rate=1e-3",
        "--lr_warmup_steps=10",
        "--dropout=0.1",
        "--prediction_type=v_prediction",
        "--snr_gamma=5",
        "--checkpointing_steps=5",
        "--checkpoints_total_limit=2",
        "--logging_steps=1",
        "--save_images_epochs=1",
        "--save_model_epochs=1",
        "--eval_batch_size=2",
        "--ddpm_num_inference_steps=2",
    ]
    with open(scratch / "output", "w") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "HF_HOME": str(scratch / "home"), "OMP_WAIT_POLICY": "PASSIVE"},
        )


def kill(process: subprocess.Popen, folder: Path, rng: random.Random, tally: Tally) -> bool:
    """Send SIGKILL to every process of a run; return False if it ended before that."""
    while_writing = rng.random() < 1 / 3
    before = len(lines(folder))
    startup = rng.random() < 0.1
    deadline = time.monotonic() + rng.uniform(0.5, 8.0) if startup else None
    while process.poll() is None:
        if deadline and time.monotonic() > deadline:
            break
        if not startup and len(lines(folder)) != before:
            # It trains: wait for a half-written file, or for any time
            until = time.monotonic() + rng.uniform(0.0, 1.2)
            while (
                process.poll() is None
                and time.monotonic() < until
                and not (while_writing and half_written(folder))
            ):
                time.sleep(0.0005 if while_writing else 0.01)
            break
        time.sleep(0.01)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    partial = half_written(folder)
    tally.while_writing += bool(partial)
    tally.before_the_first_step += len(lines(folder)) == before
    for name in partial:
        kind = "checkpoint" if "checkpoint" in name else name
        tally.leftovers[kind] = tally.leftovers.get(kind, 0) + 1
    return True


def half_written(folder: Path) -> list[str]:
    """Return the names of temporary files and folders in the run folder and in samples/."""
    return [p.name for where in (folder, folder / "samples") for p in where.glob(".*.partial")]


def lines(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def finished(folder: Path) -> bool:
    path = folder / "record.json"
    return path.exists() and json.loads(path.read_text()).get("finished", False)


def compare(straight: Path, killed: Path, tally: Tally) -> None:
    last = f"checkpoint-{STEPS}"
    names = [
        *(f"{last}/{name}" for name in ("model.safetensors", "optimizer.bin", "ema.safetensors")),
        "unet/diffusion_pytorch_model.safetensors",
        f"samples/step-{STEPS:06d}.png",
    ]
    for name in names:
        one, other = (straight / name).read_bytes(), (killed / name).read_bytes()
        tally.compared_bytes += len(one)
        tally.differing_bytes += abs(len(one) - len(other))
        tally.differing_bytes += sum(a != b for a, b in zip(one, other, strict=False))
    metrics = [
        [
            [line[name] for name in ("step", "loss", "lr", "grad_norm")]
            for line in map(json.loads, lines(folder))
        ]
        for folder in (straight, killed)
    ]
    if metrics[0] != metrics[1]:
        print(f"metrics.jsonl of {killed.name} has different losses")
        tally.differing_bytes += 1


if __name__ == "__main__":
    main()
