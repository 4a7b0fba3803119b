"""Run a training script unchanged, and note when each of its optimizer steps ends.

    accelerate launch benchmarks/probe.py NOTES SCRIPT [flags of the script]

torch calls hooks around every optimizer step. At the first one, the functions named below are
wrapped with a timer if the script has imported them. NOTES gets a file for each process, a JSON
line a step:

    {"time": seconds of the monotonic clock, "parts": {"forward": seconds, ...},
     "periodic": {"preview": seconds, ...}, "memory_mib": peak of the process}

Nothing inside periodic work counts as a part of the step. On a GPU only every PROBE_STRIDE-th step
waits for the device and is noted. Parts are meaningful there only with PROBE_SYNC=1, where each of
them waits for the device: use that for fractions of a step, not for its speed. PROBE_SEED seeds
torch, for a script that does not.
"""

import functools
import json
import os
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

PARTS = (
    ("diffusers.models.unets.unet_2d", "UNet2DModel", "__call__", "forward"),
    ("torch", "Tensor", "backward", "backward"),
    ("accelerate.accelerator", "Accelerator", "clip_grad_norm_", "clip"),
    ("ddpm.diffusion.ema", "EMA", "update", "EMA"),
    ("diffusers.training_utils", "EMAModel", "step", "EMA"),
    ("ddpm.data.dataset", "ImageDataset", "batch", "data"),
    ("torch.utils.data.dataloader", "_BaseDataLoaderIter", "__next__", "data"),
)
PERIODIC = (
    ("ddpm.training.checkpoint", None, "save_checkpoint", "checkpoint"),
    ("ddpm.training.loop", None, "write_preview", "preview"),
    ("ddpm.training.loop", None, "export_model", "export"),
    ("accelerate.accelerator", "Accelerator", "save_state", "checkpoint"),
    ("diffusers.pipelines.ddpm.pipeline_ddpm", "DDPMPipeline", "__call__", "preview"),
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline", "save_pretrained", "export"),
)
"""Module, class of a method or None, function, and label: those of train.py and of the example."""


class Probe:
    """Seconds since the last note, by part of the step and by periodic work."""

    def __init__(self, path: Path):
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
        self.stride = int(os.environ.get("PROBE_STRIDE", "1"))
        self.sync = os.environ.get("PROBE_SYNC") == "1"
        self.parts: dict[str, float] = defaultdict(float)
        self.periodic: dict[str, float] = defaultdict(float)
        self.steps, self.depth, self.started = 0, 0, 0.0
        self.write({"pid": os.getpid(), "time": time.monotonic()})

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def before_step(self, *_: Any) -> None:
        """Wrap the functions that the script has imported by now; start timing the optimizer."""
        if self.steps == 0:
            for seconds, functions in ((self.parts, PARTS), (self.periodic, PERIODIC)):
                for name, owner, function, label in functions:
                    module = sys.modules.get(name)
                    if module is not None:
                        scope = getattr(module, owner) if owner else module
                        self.wrap(scope, function, label, seconds)
        self.started = self.now()

    def after_step(self, *_: Any) -> None:
        self.parts["optimizer"] += self.now() - self.started
        self.steps += 1
        if self.steps % self.stride and self.steps > 1:
            return
        wait()
        self.write(
            {
                "time": time.monotonic(),
                "parts": self.parts,
                "periodic": self.periodic,
                "memory_mib": peak_memory_mib(),
            }
        )
        self.parts.clear()
        self.periodic.clear()

    def wrap(self, scope: Any, name: str, label: str, seconds: dict[str, float]) -> None:
        function = getattr(scope, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return function(*args, **kwargs)
            self.depth += seconds is self.periodic
            started = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[label] += self.now() - started
                self.depth -= seconds is self.periodic

        setattr(scope, name, timed)

    def now(self) -> float:
        if self.sync:
            wait()
        return time.monotonic()


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_mib() -> float:
    """Return the peak of this program; that of getrusage may be of the process that started it."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**10
    raise SystemExit("no VmHWM in /proc/self/status")


def main() -> None:
    notes, script, *flags = sys.argv[1:]
    probe = Probe(Path(notes) / f"{os.environ.get('RANK', '0')}.jsonl")
    register_optimizer_step_pre_hook(probe.before_step)
    register_optimizer_step_post_hook(probe.after_step)
    if "PROBE_SEED" in os.environ:
        torch.manual_seed(int(os.environ["PROBE_SEED"]))
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        probe.write({"memory_mib": peak_memory_mib()})


if __name__ == "__main__":
    main()
