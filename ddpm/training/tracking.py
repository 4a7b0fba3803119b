"""Metrics of a run: metrics.jsonl always; W&B, TensorBoard and trackio with --logger.

Every process calls the Tracker; only the main one writes. W&B never asks for a login: without an
API key the run is kept offline, with a note.
"""

import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from ddpm.config.train import TrackingConfig
from ddpm.errors import foreign_errors, printable
from ddpm.file_io import write_bytes
from ddpm.hub import is_repo_id
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
        """Open metrics.jsonl and the trackers' runs, those of before in a resumed run.

        `settings` is the flat config. Lines of metrics.jsonl after `step` are removed: a resumed
        run writes them again. Raise UserError for a tracker that cannot start.
        """
        self._main = accelerator.is_main_process
        self._path = output_dir / METRICS
        self._trackers: list[GeneralTracker] = []
        if not self._main:
            return
        _truncate_after(self._path, step)
        for logger in config.loggers:
            with foreign_errors(f"--logger {logger} cannot start", "Or leave it out."):
                self._trackers.append(_start_tracker(logger, config, output_dir, settings, step))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and send the same values to the trackers."""
        if self._main:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        for tracker in self._trackers:
            # accelerate 1.12 and earlier do not pass the step on to trackio.
            (tracker.tracker if tracker.name == "trackio" else tracker).log(values, step=step)

    def log_grid(self, step: int, image: Image.Image) -> None:
        """Send a preview grid to the trackers; its file in samples/ is written elsewhere."""
        for tracker in self._trackers:
            if tracker.name == "wandb":
                tracker.log_images({"samples": [image]}, step=step)
            elif tracker.name == "tensorboard":
                pixels = np.atleast_3d(np.asarray(image))[None]
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")
            else:
                import trackio

                tracker.tracker.log({"samples": trackio.Image(image)}, step=step)

    @property
    def addresses(self) -> dict[str, str]:
        """Page of the run, by the name of the tracker, where there is one."""
        urls = {t.name: t.tracker.url for t in self._trackers if t.name != "tensorboard"}
        if is_repo_id(urls.get("trackio") or ""):
            urls["trackio"] = f"https://huggingface.co/spaces/{urls['trackio']}"
        return {name: printable(url) for name, url in urls.items() if url}

    def finish(self) -> None:
        """Close the trackers' runs."""
        for tracker in self._trackers:
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


def _start_tracker(
    logger: str, config: TrackingConfig, output_dir: Path, settings: dict[str, Any], step: int
) -> GeneralTracker:
    """Start a tracker's run, or the one of before, and note in record.json how to find it."""
    name, record = output_dir.resolve().name, read_record(output_dir)
    logs = output_dir / config.logging_dir
    if logger == "tensorboard":
        # One folder per run, as for W&B. TensorBoard hides what was written after `step`.
        tracker = TensorBoardTracker(name, str(logs), purge_step=step + 1)
        settings = {k: v if isinstance(v, (int, float)) else str(v) for k, v in settings.items()}
    elif logger == "wandb":
        logs.mkdir(parents=True, exist_ok=True)
        options = {"id": record.wandb_run_id, "resume": "allow"} if record.wandb_run_id else {}
        options |= {"dir": str(logs), "name": name, **_wandb_mode(logs)}
        tracker = WandBTracker(config.project_name, **options)
    else:
        # trackio finds a run by its name, so that no two runs of a project may share one
        name = record.trackio_run or f"{name}-{secrets.token_hex(3)}"
        tracker = TrackioTracker(config.project_name, name=name, resume="allow")
    tracker.start()
    tracker.store_init_configuration(settings)
    if logger == "wandb":
        write_record(output_dir, wandb_run_id=tracker.tracker.id)
    elif logger == "trackio":
        write_record(output_dir, trackio_run=name)
    return tracker


def _wandb_mode(logs: Path) -> dict[str, str]:
    """Return options for an offline run if there is no API key.

    WANDB_MODE cannot be set for this: wandb has read it by then.
    """
    import wandb

    if "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False):
        return {}
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
