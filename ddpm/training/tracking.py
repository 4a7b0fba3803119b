"""What is measured on the way and who is told: metrics.jsonl always, W&B or TensorBoard when asked.

The Tracker is called on every process; only the main one writes. W&B never asks for a login:
without an API key the run is kept offline, which is said once.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image

from ddpm.config.train import TrackingConfig
from ddpm.run_folder import METRICS, read_record, write_bytes, write_record


class Tracker:
    """Scalars and grids of one run, keyed by the optimizer step."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrackingConfig,
        output_dir: Path,
        settings: dict[str, Any],
        step: int,
    ):
        """`settings` is the flat config; lines of metrics.jsonl after `step` are taken back."""
        self._main = accelerator.is_main_process
        self._accelerator = accelerator
        self._path = output_dir / METRICS
        if self._main:
            _keep_until(self._path, step)
        if config.logger == "none":
            return
        logs = output_dir / config.logging_dir
        logs.mkdir(parents=True, exist_ok=True)
        name = output_dir.resolve().name
        if config.logger == "tensorboard":
            # A folder a run, as for W&B; TensorBoard hides what an earlier part wrote after `step`.
            told = {k: v if isinstance(v, (int, float)) else str(v) for k, v in settings.items()}
            accelerator.project_configuration.logging_dir = str(logs)
            accelerator.init_trackers(name, told, {"tensorboard": {"purge_step": step + 1}})
            return
        options = {
            "dir": str(logs),
            "name": name,
            **_wandb_mode(logs, self._main),
            **_same_run(output_dir),
        }
        accelerator.init_trackers(config.project_name, settings, {"wandb": options})
        if self._main:
            run = accelerator.get_tracker("wandb", unwrap=True)
            write_record(output_dir, wandb_run_id=run.id)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and send the same to the tracker."""
        if self._main:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)

    def grid(self, step: int, image: Image.Image) -> None:
        """Send a preview grid to the tracker; the file in samples/ is written elsewhere."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({"samples": [image]}, step=step)
            elif tracker.name == "tensorboard":
                pixels = np.atleast_3d(np.asarray(image))[None]
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def last(self) -> dict[str, float]:
        """The newest line of metrics.jsonl, on the main process; empty when there is none."""
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        return json.loads(lines[-1]) if lines else {}

    @property
    def address(self) -> str | None:
        """Page of the W&B run, None when there is none."""
        for tracker in self._accelerator.trackers:
            if self._main and tracker.name == "wandb":
                return tracker.tracker.url
        return None

    def finish(self) -> None:
        """Close the tracker's run."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


class StepTimer:
    """Seconds spent in steps, over all parts of a run; what comes once in a while is left out."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._since = 0.0
        self._reported = (0, seconds)

    def start(self) -> None:
        self._since = time.perf_counter()

    def stop(self, device: torch.device, wait: bool) -> None:
        """End a step. `wait` lets the device finish what was queued, so that the sum is true."""
        if wait and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - self._since

    def rate(self, steps: int) -> float:
        """Steps a second since the last call; `steps` counts those of this process's life."""
        (steps_then, then), self._reported = self._reported, (steps, self.seconds)
        return (steps - steps_then) / max(self.seconds - then, 1e-9)


class LossMeter:
    """Losses and the first step that was not finite, kept on the device until asked for."""

    def __init__(self, accelerator: Accelerator):
        device = accelerator.device
        self._accelerator = accelerator
        self._sum, self._step_sum = torch.zeros((), device=device), torch.zeros((), device=device)
        self._count = self._step_count = 0
        self._bad = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: torch.Tensor) -> None:
        """The loss of one micro-batch."""
        self._step_sum += loss.detach()
        self._step_count += 1

    def forget(self) -> None:
        """Take back the micro-batches of a step that was skipped."""
        self._step_sum.zero_()
        self._step_count = 0

    def step(self, step: int, grad_norm: torch.Tensor) -> None:
        """Close an optimizer step: remember it if it is the first that was not finite."""
        finite = torch.isfinite(self._step_sum) & torch.isfinite(grad_norm)
        self._bad = torch.where(finite | (self._bad > 0), self._bad, step)
        self._sum += self._step_sum
        self._count += self._step_count
        self.forget()

    def first_bad_step(self) -> int:
        """The first step that was not finite on any process, or 0. Call on every process."""
        bad = self._accelerator.gather(self._bad[None])
        return min((step for step in bad.tolist() if step > 0), default=0)

    def mean_loss(self) -> float:
        """Mean over micro-batches and processes since the last call. Call on every process."""
        mean = self._accelerator.reduce(self._sum / self._count, "mean").item()
        self._sum.zero_()
        self._count = 0
        return mean


def peak_memory_mib(device: torch.device) -> float:
    """The most memory that this process has held so far: on the GPU if it has one, else in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kept / (2**20 if sys.platform == "darwin" else 2**10)


def _wandb_mode(logs: Path, speak: bool) -> dict[str, str]:
    """Offline when no account is known here. Not through WANDB_MODE: wandb has read it by then."""
    import wandb

    if "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False):
        return {}
    if speak:
        print(
            "W&B has no API key here: the run is kept offline. Set WANDB_API_KEY for a live "
            f"one, or send it later: wandb sync {logs}/wandb/offline-run-*"
        )
    return {"mode": "offline"}


def _same_run(output_dir: Path) -> dict[str, str]:
    run_id = read_record(output_dir).wandb_run_id
    return {"id": run_id, "resume": "allow"} if run_id else {}


def _keep_until(path: Path, step: int) -> None:
    """Drop lines after `step`: the steps that a resume does again, and a half-written last line.

    Steps rise, so only the end of the file is looked at.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    while lines and not _is_kept(lines[-1], step):
        lines.pop()
    write_bytes(path, "".join(lines).encode())


def _is_kept(line: str, step: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["step"] <= step
    except ValueError:
        return False
