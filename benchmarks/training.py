"""The training loop against its limit, and against diffusers' unconditional example.

    python benchmarks/training.py [--peer train_unconditional.py] [--sizes 8 32 64]
        [--mixed_precision bf16] [--device cuda] [--turns 6] [--seconds 4]

Four programs train the same UNet on the same images in the same batches: train.py as the README
launches it, benchmarks/bare.py (the limit), the example with as many threads as ours, and the
example as its own README launches it. Previews, checkpoints, exports and TensorBoard are on in all
but the bare one. The example's file is not changed: benchmarks/probe.py starts all four, and reads
the end of each step from torch's own hooks around the optimizer.

They take turns. All but one are stopped with SIGSTOP; each runs for some seconds and is stopped
again, round after round, so that what else the machine does meets all of them. Only steps that lie
wholly within a turn count, without the chores in them (preview, checkpoint, export), which have a
table of their own. A ratio is that of one round's means; the median of the rounds is told, with the
lowest and highest. Start-up is measured without any of the others, also in turn.

--device cuda takes the presets of 32, 64 and 128 pixels, and adds model FLOPs utilisation.
"""

import contextlib
import hashlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro
from diffusers import UNet2DModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(HERE)]

from tables import tables  # noqa: E402

from ddpm.diffusion.unet import preset_config  # noqa: E402

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121}
"""Dense bf16 of NVIDIA's data sheets, by a word in the device's name."""


@dataclass(frozen=True)
class Size:
    """A model, its batch, and how many pictures of its size are made; 0 takes the digits."""

    resolution: int
    batch_size: int
    block_out_channels: tuple[int, ...] | None = None
    attention_head_dim: int = 64
    num_images: int = 1024

    def settings(self) -> dict[str, Any]:
        """The UNet2DModel's config: one layer a level and attention in the middle, or a preset."""
        if self.block_out_channels is None:
            return preset_config(self.resolution, 3)
        levels = len(self.block_out_channels)
        return {
            "sample_size": self.resolution,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": self.block_out_channels,
            "attention_head_dim": self.attention_head_dim,
            "norm_num_groups": min(32, self.block_out_channels[0]),
            "down_block_types": ("DownBlock2D",) * levels,
            "up_block_types": ("UpBlock2D",) * levels,
        }


SIZES = {
    "toy": Size(8, 4, (8, 16), 8, 16),
    "8": Size(8, 64, (32, 64), 32, 0),
    "32": Size(32, 32, (32, 64, 64)),
    "64": Size(64, 8, (32, 64, 64, 64)),
    "preset-32": Size(32, 128, num_images=8192),
    "preset-64": Size(64, 64, num_images=4096),
    "preset-128": Size(128, 16, num_images=2048),
}


@dataclass
class Program:
    """A training run that can be stopped and let on. `images` is how many one noted step has."""

    name: str
    command: Sequence[str]
    notes: Path
    images: int
    threads: int | None = None
    processes: int = 1
    stride: int = 1
    sync: bool = False
    device: str = "cpu"
    chores: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    shown: float = 0.0

    def start(self) -> float:
        """Seconds from the command to the end of its first optimizer step."""
        self.notes.mkdir(parents=True, exist_ok=True)
        for old in self.notes.glob("*.jsonl"):
            old.unlink()
        began = time.monotonic()
        with open(self.notes / "output.txt", "wb") as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=ROOT,
                env=self.environment(),
                start_new_session=True,
                stdout=output,
                stderr=output,
            )
        while len(self.read()) < 2:
            self.require_alive()
            time.sleep(0.02)
        self.pids = [
            json.loads(path.read_text().partition("\n")[0])["pid"]
            for path in sorted(self.notes.glob("*.jsonl"))
        ]
        first = self.read()[1]
        if "time" not in first:  # what a process notes at its end
            self.process.wait()
            self.require_alive()
        return first["time"] - began

    def require_alive(self) -> None:
        if self.process.poll() is not None:
            sys.exit(f"{self.name} ended:\n{(self.notes / 'output.txt').read_text()[-3000:]}")

    def environment(self) -> dict[str, str]:
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "OMP_NUM", "WANDB"))
        }
        cache = {"HF_HOME": str(self.notes.parent / "hf"), "HF_HUB_OFFLINE": "1"}
        probe = {"PROBE_STRIDE": str(self.stride), "PROBE_SYNC": str(int(self.sync))}
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**kept, **cache, **probe, **threads, **hidden}

    def read(self, rank: int = 0) -> list[dict[str, Any]]:
        """What a process has noted so far; a line that is being written is left out."""
        path = self.notes / f"{rank}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def stop(self, number: signal.Signals = signal.SIGSTOP) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def turn(self, seconds: float) -> list[float]:
        """Let it run alone: seconds of each step that lay wholly within, without chores."""
        known = len(self.read())
        began = time.monotonic()
        self.stop(signal.SIGCONT)
        while time.monotonic() - began < seconds or len(self.read()) < known + 3:
            time.sleep(min(0.1, seconds))
            self.require_alive()
        self.stop()
        return self.take(self.read()[known:])

    def take(self, marks: list[dict[str, Any]]) -> list[float]:
        """Seconds of the steps between these marks; their parts and chores are added up."""
        steps = []
        for before, after in zip(marks[:-1], marks[1:], strict=True):
            steps.append(after["time"] - before["time"] - sum(after["chores"].values()))
            for name, spent in after["chores"].items():
                self.chores.setdefault(name, []).append(spent)
            for name, spent in after["parts"].items():
                self.parts[name] = self.parts.get(name, 0.0) + spent
            self.shown += steps[-1]
        return steps

    def shares(self) -> dict[str, float]:
        """Part of the step's time by what was done in it."""
        known = {name: spent / self.shown for name, spent in sorted(self.parts.items())}
        return {**known, "other": 1 - sum(known.values())}

    def peak_memory_mib(self) -> float:
        return max(mark.get("memory_mib", 0.0) for mark in self.read())

    def end(self) -> None:
        """Kill the launcher and its workers, to which torchrun gives sessions of their own."""
        workers = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


def main(
    peer: Path | None = None,
    sizes: tuple[str, ...] = (),
    mixed_precision: Literal["no", "bf16"] = "no",
    turns: int = 6,
    seconds: float = 4.0,
    starts: int = 3,
    device: Literal["cpu", "cuda"] = "cpu",
    peak_tflops: float | None = None,
    compile: Literal["on", "off"] = "off",
    output: Path = Path("benchmark-training"),
) -> None:
    """Measure, print, and write OUTPUT.json and OUTPUT.md.

    `starts` is how often start-up is timed, at the first size. `compile` is train.py's, which with
    "on" runs twice, compiled and not.
    """
    sizes = sizes or (
        ("8", "32", "64") if device == "cpu" else ("preset-32", "preset-64", "preset-128")
    )
    if peak_tflops is None and device == "cuda":
        name = torch.cuda.get_device_name()
        peak_tflops = next((v for word, v in PEAK_TFLOPS.items() if word in name), None)
    found: dict[str, Any] = {
        "machine": machine(device),
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "precision": mixed_precision,
        "peer_sha256": hashlib.sha256(peer.read_bytes()).hexdigest() if peer else None,
        "sizes": {},
    }
    for name in sizes:
        with tempfile.TemporaryDirectory(prefix="ddpm-benchmark-") as scratch:
            programs = prepare(SIZES[name], Path(scratch), peer, mixed_precision, device, compile)
            result = compare(programs, turns, seconds, starts if name == sizes[0] else 0)
        flops = training_flops(SIZES[name].settings(), SIZES[name].batch_size)
        result |= {
            "model": asdict(SIZES[name]),
            "gflop_an_image": flops / SIZES[name].batch_size / 1e9,
        }
        if peak_tflops and mixed_precision == "bf16":
            result["mfu"] = {
                n: rate * result["gflop_an_image"] / 1e3 / peak_tflops
                for n, rate in result["images_per_s"].items()
            }
        found["sizes"][name] = result
        output.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        output.with_suffix(".md").write_text(tables(found))
    print(tables(found))


def prepare(
    size: Size, scratch: Path, peer: Path | None, precision: str, device: str, compile: str
) -> list[Program]:
    """The programs of one size, with its data and the config of its UNet on disk."""
    config = scratch / "model"
    config.mkdir()
    (config / "config.json").write_text(
        json.dumps({**size.settings(), "_class_name": "UNet2DModel"})
    )
    if size.num_images:
        data = f"--train_data_dir={make_pictures(size, scratch / 'pictures')}"
    else:
        data = f"--dataset_name={ROOT / 'data' / 'digits'}"
    flags = [
        data,
        f"--resolution={size.resolution}",
        f"--train_batch_size={size.batch_size}",
        f"--model_config_name_or_path={config}",
        "--center_crop",
        "--random_flip",
        f"--mixed_precision={precision}",
        "--eval_batch_size=16",
        "--ddpm_num_inference_steps=25",
        "--checkpointing_steps=50",
        "--checkpoints_total_limit=2",
        "--save_images_epochs=1",
        "--save_model_epochs=1",
        "--logger=tensorboard",
        "--num_epochs=1000000",
    ]
    stride = 1 if device == "cpu" else 10
    cores = len(os.sched_getaffinity(0))
    probe, images = str(HERE / "probe.py"), size.batch_size * stride
    launch = [
        *LAUNCH,
        "--num_processes=1",
        "--num_machines=1",
        "--dynamo_backend=no",
        f"--mixed_precision={precision}",
    ]

    def program(name: str, words: list[str], threads: int | None) -> Program:
        notes = scratch / name.replace(" ", "-")
        return Program(
            name,
            [*launch, probe, str(notes), *words],
            notes,
            images,
            threads,
            stride=stride,
            device=device,
        )

    out = f"--output_dir={scratch}"
    ours = [str(ROOT / "train.py"), *flags, "--channels=3"]
    bare = [
        str(HERE / "bare.py"),
        str(config),
        str(size.batch_size),
        f"--mixed_precision={precision}",
        f"--device={device}",
    ]
    programs = [
        program("ours", [*ours, f"--compile={compile}", f"{out}/out-ours"], None),
        program("bare", bare, cores),
    ]
    if compile == "on":
        plain = [*ours, "--compile=off", f"{out}/out-plain"]
        programs.append(program("ours not compiled", plain, None))
    if peer:
        theirs = [str(peer.resolve()), *flags, "--use_ema"]
        programs.append(program("example", [*theirs, f"{out}/out-example"], cores))
        if device == "cpu":
            as_told = [*theirs, f"{out}/out-as-told"]
            programs.append(program("example as launched", as_told, None))
    return programs


def make_pictures(size: Size, folder: Path) -> Path:
    """PNGs of the model's size: soft noise, which compresses about as photographs do."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    side = size.resolution
    for index in range(size.num_images):
        coarse = noise.integers(0, 256, (max(side // 4, 2), max(side // 4, 2), 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side)).save(folder / f"{index:05d}.png")
    return folder


def compare(programs: list[Program], turns: int, seconds: float, starts: int) -> dict[str, Any]:
    """Start-up, then turns, of programs that do the same work."""
    first: dict[str, list[float]] = {program.name: [] for program in programs}
    for index in range(starts + 1):
        for program in programs:
            took = program.start()
            if index:  # the first start fills the caches of all
                first[program.name].append(took)
            program.stop() if index == starts else program.end()
    means: dict[str, list[float]] = {program.name: [] for program in programs}
    try:
        for _ in range(turns):
            for program in programs:
                steps = program.turn(seconds)
                means[program.name].append(statistics.fmean(steps) / program.images)
        return {
            "images_per_s": {n: 1 / statistics.median(each) for n, each in means.items()},
            "ratios": {
                n: spread([b / a for a, b in zip(means["ours"], each, strict=True)])
                for n, each in means.items()
                if n != "ours"
            },
            "seconds_to_first_step": {n: spread(v) for n, v in first.items() if v},
            "peak_memory_mib": {p.name: round(p.peak_memory_mib()) for p in programs},
            "shares": {p.name: p.shares() for p in programs},
            "chores": {
                p.name: {n: [len(v), statistics.median(v)] for n, v in p.chores.items()}
                for p in programs
            },
        }
    finally:
        for program in programs:
            program.end()


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest and highest."""
    return [statistics.median(values), min(values), max(values)]


def training_flops(settings: dict[str, Any], batch_size: int) -> int:
    """Floating-point operations of a forward and a backward pass; a multiply-add counts as two."""
    with torch.device("meta"):
        unet = UNet2DModel.from_config(settings)
        images = torch.zeros(batch_size, 3, settings["sample_size"], settings["sample_size"])
        return count_flops(unet, images, torch.zeros(batch_size, dtype=torch.int64))


def count_flops(module: torch.nn.Module, *inputs: torch.Tensor) -> int:
    """What torch counts for a module, forward and backward, on tensors of any device."""
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs)
        (output if isinstance(output, torch.Tensor) else output.sample).sum().backward()
    return counter.get_total_flops()


def machine(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


if __name__ == "__main__":
    tyro.cli(main)
