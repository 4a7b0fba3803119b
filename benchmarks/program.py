"""A training run that can be suspended and resumed, timed from outside by probe.py."""

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from workloads import ROOT

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
PROBE = str(ROOT / "benchmarks" / "probe.py")


@dataclass
class Program:
    """A command that runs probe.py, which writes its notes to the folder `notes`.

    images: images of one noted step.
    threads: OMP_NUM_THREADS, or None to leave it unset.
    stride, sync, seed: PROBE_STRIDE, PROBE_SYNC and PROBE_SEED.
    """

    name: str
    command: Sequence[str]
    notes: Path
    images: int
    threads: int | None = None
    processes: int = 1
    stride: int = 1
    sync: bool = False
    seed: int | None = None
    device: str = "cpu"
    periodic: dict[str, list[float]] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    step_seconds: float = 0.0
    process: subprocess.Popen | None = None

    def start(self) -> float:
        """Start it, and return the seconds to the end of its first optimizer step."""
        self.notes.mkdir(parents=True, exist_ok=True)
        for old in self.notes.glob("*.jsonl"):
            old.unlink()
        started = time.monotonic()
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
        if "time" not in first:  # the note that a process writes when it ends
            self.process.wait()
            self.require_alive()
        return first["time"] - started

    def require_alive(self) -> None:
        if self.process.poll() is not None:
            sys.exit(f"{self.name} ended:\n{(self.notes / 'output.txt').read_text()[-3000:]}")

    def environment(self) -> dict[str, str]:
        removed = ("HF_", "OMP_NUM", "WANDB")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(removed)}
        cache = {"HF_HOME": str(self.notes.parent / "hf"), "HF_HUB_OFFLINE": "1"}
        probe = {"PROBE_STRIDE": str(self.stride), "PROBE_SYNC": str(int(self.sync))}
        seed = {} if self.seed is None else {"PROBE_SEED": str(self.seed)}
        threads = {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**kept, **cache, **probe, **seed, **threads, **hidden}

    def read(self, rank: int = 0) -> list[dict[str, Any]]:
        """Return the notes of a process so far, without a line that is half-written."""
        path = self.notes / f"{rank}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def suspend(self) -> None:
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        for pid in self.pids:
            os.kill(pid, number)

    def turn(self, seconds: float) -> list[float]:
        """Run for some seconds, and return the seconds of each step that lay within them."""
        known = len(self.read())
        started = time.monotonic()
        self.signal(signal.SIGCONT)
        while time.monotonic() - started < seconds or len(self.read()) < known + 3:
            time.sleep(min(0.1, seconds))
            self.require_alive()
        self.suspend()
        return self.step_times(self.read()[known:])

    def step_times(self, notes: list[dict[str, Any]]) -> list[float]:
        """Return the seconds of the steps between notes, without periodic work, and add up the
        seconds of parts and periodic work."""
        steps = []
        for before, after in zip(notes[:-1], notes[1:], strict=True):
            steps.append(after["time"] - before["time"] - sum(after["periodic"].values()))
            for name, seconds in after["periodic"].items():
                self.periodic.setdefault(name, []).append(seconds)
            for name, seconds in after["parts"].items():
                self.parts[name] = self.parts.get(name, 0.0) + seconds
            self.step_seconds += steps[-1]
        return steps

    def fractions(self) -> dict[str, float]:
        """Return the fraction of the step's time that each part takes."""
        timed = {name: spent / self.step_seconds for name, spent in sorted(self.parts.items())}
        return {**timed, "other": 1 - sum(timed.values())}

    def peak_memory_mib(self) -> float:
        return max(note.get("memory_mib", 0.0) for note in self.read())

    def kill(self) -> None:
        """Kill the launcher, if it runs, and its workers, which are in sessions of their own."""
        if self.process is None or self.process.poll() is not None:
            return
        workers = psutil.Process(self.process.pid).children(recursive=True)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


@contextlib.contextmanager
def killed_at_the_end(*programs: Program) -> Iterator[None]:
    """Kill the programs when the block ends, also by an error or by SIGTERM."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        for program in programs:
            program.kill()


def spread(values: Sequence[float]) -> list[float]:
    """Return median, lowest and highest."""
    return [statistics.median(values), min(values), max(values)]


def machine(device: str) -> dict[str, Any]:
    """Describe the machine that the results were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "load_before": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
