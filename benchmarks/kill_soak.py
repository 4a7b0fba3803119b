"""Kill a training run with SIGKILL at random moments until it is done, and compare the bits.

    python benchmarks/kill_soak.py --kills 100 [--processes 2] [--seed 0] [--json FILE]

One run is left alone. Others of the same settings are killed: a third of the times as soon as a
half-written file is seen, else at any moment from the start of the process on. The same command
starts them again, until each is finished; a new one begins as long as kills are left. At the end
weights, averages, optimizer and pipeline must have the bytes of the run that was left alone, and
metrics.jsonl the same losses. The exit code is 0 only then.
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

ROOT = Path(__file__).parent.parent
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
    dice, tally, began = random.Random(options.seed), Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ddpm-kill-soak-") as name:
        scratch = Path(name)
        (scratch / "unet").mkdir()
        (scratch / "unet" / "config.json").write_text(json.dumps(UNET))
        straight = scratch / "straight"
        start(straight, scratch, options.processes).wait()
        if not finished(straight):
            sys.exit(f"the run that was left alone failed:\n{(scratch / 'said').read_text()}")
        while tally.kills < options.kills:
            tally.runs += 1
            folder = scratch / f"killed-{tally.runs}"
            torment(folder, scratch, options, dice, tally)
            compare(straight, folder, tally)
            print(
                f"{tally.kills} kills, {tally.runs} runs, {tally.differing_bytes} bytes differ",
                flush=True,
            )
    tally.seconds = round(time.monotonic() - began, 1)
    print(json.dumps(asdict(tally), indent=2))
    if options.json:
        options.json.write_text(json.dumps(asdict(tally), indent=2) + "\n")
    sys.exit(1 if tally.differing_bytes else 0)


def torment(
    folder: Path, scratch: Path, options: argparse.Namespace, dice: random.Random, tally: Tally
) -> None:
    """Start a run again and again, killing it, until it is finished or the kills are used up."""
    while not finished(folder):
        life = start(folder, scratch, options.processes)
        if tally.kills < options.kills and kill(life, folder, dice, tally):
            tally.kills += 1
            tally.restarts += 1
        elif life.wait() != 0:
            sys.exit(f"a run failed by itself:\n{(scratch / 'said').read_text()}")


def start(folder: Path, scratch: Path, processes: int) -> subprocess.Popen:
    words = [sys.executable]
    if processes > 1:
        words += [
            "-m",
            "accelerate.commands.accelerate_cli",
            "launch",
            "--config_file",
            str(ROOT / "accelerate_config.yaml"),
            f"--num_processes={processes}",
            "--main_process_port=0",
        ]
    words += [
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
    with open(scratch / "said", "w") as said:
        return subprocess.Popen(
            words,
            cwd=ROOT,
            stdout=said,
            stderr=said,
            start_new_session=True,
            env={**os.environ, "HF_HOME": str(scratch / "home"), "OMP_WAIT_POLICY": "PASSIVE"},
        )


def kill(life: subprocess.Popen, folder: Path, dice: random.Random, tally: Tally) -> bool:
    """SIGKILL to every process of a run; False when it had ended by itself."""
    writes = dice.random() < 1 / 3
    before = len(lines(folder))
    startup = dice.random() < 0.1
    deadline = time.monotonic() + dice.uniform(0.5, 8.0) if startup else None
    while life.poll() is None:
        if deadline and time.monotonic() > deadline:
            break
        if not startup and len(lines(folder)) != before:
            # It steps. Now wait for a half-written file, or for no reason at all.
            until = time.monotonic() + dice.uniform(0.0, 1.2)
            while (
                life.poll() is None
                and time.monotonic() < until
                and not (writes and half_written(folder))
            ):
                time.sleep(0.0005 if writes else 0.01)
            break
        time.sleep(0.01)
    if life.poll() is not None:
        return False
    os.killpg(life.pid, signal.SIGKILL)
    life.wait()
    left = half_written(folder)
    tally.while_writing += bool(left)
    tally.before_the_first_step += len(lines(folder)) == before
    for name in left:
        kind = "checkpoint" if "checkpoint" in name else name
        tally.leftovers[kind] = tally.leftovers.get(kind, 0) + 1
    return True


def half_written(folder: Path) -> list[str]:
    """Names of what is being written beside its place, in the run folder and in samples/."""
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
    told = [
        [
            [line[name] for name in ("step", "loss", "lr", "grad_norm")]
            for line in map(json.loads, lines(folder))
        ]
        for folder in (straight, killed)
    ]
    if told[0] != told[1]:
        print(f"metrics.jsonl of {killed.name} tells of other losses")
        tally.differing_bytes += 1


if __name__ == "__main__":
    main()
