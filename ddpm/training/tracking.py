"""Metrics of a run: metrics.jsonl always, W&B or TensorBoard when asked for.

Every process calls the Tracker; only the main one writes. W&B never asks for a login: without an
API key the run is kept offline, with a note.
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
from ddpm.errors import printable
from ddpm.file_io import write_bytes
from ddpm.run_folder import METRICS, parse_metrics_line
from ddpm.run_record import read_record, write_record


class Tracker:
    """Scalars and image grids of one run, by optimizer step."""

    def __init__(
        self,
        accelerator: Accelerator,
        config: TrackingConfig,
        output_dir: Path,
        settings: dict[str, Any],
        step: int,
    ):
        """Open metrics.jsonl and the tracker's run.

        `settings` is the flat config. Lines of metrics.jsonl after `step` are removed: a resumed
        run writes them again.
        """
        self._main = accelerator.is_main_process
        self._accelerator = accelerator
        self._path = output_dir / METRICS
        if self._main:
            _truncate_after(self._path, step)
        if config.logger == "none":
            return
        logs = output_dir / config.logging_dir
        logs.mkdir(parents=True, exist_ok=True)
        name = output_dir.resolve().name
        if config.logger == "tensorboard":
            # One folder per run, as for W&B. TensorBoard hides what was written after `step`.
            hparams = {k: v if isinstance(v, (int, float)) else str(v) for k, v in settings.items()}
            accelerator.project_configuration.logging_dir = str(logs)
            accelerator.init_trackers(name, hparams, {"tensorboard": {"purge_step": step + 1}})
            return
        options = {"dir": str(logs), "name": name, **_wandb_mode(logs, self._main)}
        run_id = read_record(output_dir).wandb_run_id
        if run_id:
            options |= {"id": run_id, "resume": "allow"}
        accelerator.init_trackers(config.project_name, settings, {"wandb": options})
        if self._main:
            run = accelerator.get_tracker("wandb", unwrap=True)
            write_record(output_dir, wandb_run_id=run.id)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and send the same values to the tracker."""
        if self._main:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        self._accelerator.log(values, step=step)

    def log_grid(self, step: int, image: Image.Image) -> None:
        """Send a preview grid to the tracker; its file in samples/ is written elsewhere."""
        for tracker in self._accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({"samples": [image]}, step=step)
            elif tracker.name == "tensorboard":
                pixels = np.atleast_3d(np.asarray(image))[None]
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    @property
    def url(self) -> str | None:
        """Page of the W&B run, None if there is none."""
        for tracker in self._accelerator.trackers:
            if self._main and tracker.name == "wandb":
                return tracker.tracker.url and printable(tracker.tracker.url)
        return None

    def finish(self) -> None:
        """Close the tracker's run."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


class StepTimer:
    """Seconds spent in steps, over all parts of a run, without periodic work."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._start = 0.0
        self._reported = (0, seconds)

    def start(self) -> None:
        """Begin a step."""
        self._start = time.perf_counter()

    def stop(self, device: torch.device, wait: bool) -> None:
        """End a step. With `wait` the device first finishes what is queued on it."""
        if wait and device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.perf_counter() - self._start

    def rate(self, steps: int) -> float:
        """Return steps per second since the last call; `steps` counts those of this process."""
        (last_steps, last_seconds), self._reported = self._reported, (steps, self.seconds)
        return (steps - last_steps) / max(self.seconds - last_seconds, 1e-9)


class LossMeter:
    """Mean loss, and the first step that was not finite, accumulated on the device."""

    def __init__(self, accelerator: Accelerator):
        device = accelerator.device
        self._accelerator = accelerator
        self._sum, self._step_sum = torch.zeros((), device=device), torch.zeros((), device=device)
        self._count = self._step_count = 0
        self._bad = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, loss: torch.Tensor) -> None:
        """Add the loss of one micro-batch, a scalar."""
        self._step_sum += loss.detach()
        self._step_count += 1

    def discard_step(self) -> None:
        """Discard the micro-batches of the current step, which was skipped."""
        self._step_sum.zero_()
        self._step_count = 0

    def end_step(self, step: int, grad_norm: torch.Tensor) -> None:
        """Close optimizer step `step` and remember it if it is the first that was not finite."""
        finite = torch.isfinite(self._step_sum) & torch.isfinite(grad_norm)
        self._bad = torch.where(finite | (self._bad > 0), self._bad, step)
        self._sum += self._step_sum
        self._count += self._step_count
        self.discard_step()

    def first_bad_step(self) -> int:
        """Return the first step that was not finite on any process, or 0. Call on every process."""
        bad = self._accelerator.gather(self._bad[None])
        return min((step for step in bad.tolist() if step > 0), default=0)

    def mean_loss(self) -> float:
        """Return the mean over micro-batches and processes since the last call.

        Call on every process.
        """
        mean = self._accelerator.reduce(self._sum / self._count, "mean").item()
        self._sum.zero_()
        self._count = 0
        return mean


def peak_memory_mib(device: torch.device) -> float:
    """Return this process's peak memory so far, in MiB: of the GPU if it has one, else of RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _wandb_mode(logs: Path, verbose: bool) -> dict[str, str]:
    """Return options for an offline run if there is no API key.

    WANDB_MODE cannot be set for this: wandb has read it by then.
    """
    import wandb

    if "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False):
        return {}
    if verbose:
        print(
            "W&B has no API key here: the run is kept offline. Set WANDB_API_KEY for a live "
            f"one, or send it later: wandb sync {logs}/wandb/offline-run-*"
        )
    return {"mode": "offline"}


def _truncate_after(path: Path, step: int) -> None:
    """Drop lines after `step`, which a resumed run writes again, and a half-written last line."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    while lines and not _is_kept(lines[-1], step):  # steps only rise
        lines.pop()
    write_bytes(path, b"".join(lines))


def _is_kept(line: bytes, step: int) -> bool:
    entry = parse_metrics_line(line)
    return entry is not None and line.endswith(b"\n") and entry["step"] <= step
