"""Run a training script as it is, and note from outside when each of its optimizer steps ended.

    accelerate launch benchmarks/probe.py NOTES SCRIPT [the script's own flags]

The script is not changed. torch calls hooks around every optimizer's step; at the first one the
functions named below, as far as the script has imported them, are wrapped with a clock. NOTES gets
a file for each process, a JSON line for each step:

    {"time": seconds of the monotonic clock, "parts": {"forward": seconds, ...},
     "chores": {"preview": seconds, ...}, "memory_mib": the most that the process held}

A chore is what comes once in a while; nothing inside it counts as a part of the step. On a GPU only
every PROBE_STRIDE-th step waits for the device and is noted, and parts are of use only with
PROBE_SYNC=1, where each of them waits: that is for shares, not for speed.
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
CHORES = (
    ("ddpm.training.checkpoint", None, "save_checkpoint", "checkpoint"),
    ("ddpm.training.loop", None, "_preview", "preview"),
    ("ddpm.training.loop", None, "export_model", "export"),
    ("accelerate.accelerator", "Accelerator", "save_state", "checkpoint"),
    ("diffusers.pipelines.ddpm.pipeline_ddpm", "DDPMPipeline", "__call__", "preview"),
    ("diffusers.pipelines.pipeline_utils", "DiffusionPipeline", "save_pretrained", "export"),
)
"""Module, class if it is a method, function, and what it is called here: ours and the example's."""


class Probe:
    """Seconds since the last note, by part and by chore."""

    def __init__(self, path: Path):
        self.file = open(path, "w", encoding="utf-8")  # noqa: SIM115 - open as long as the process
        self.stride = int(os.environ.get("PROBE_STRIDE", "1"))
        self.waits = os.environ.get("PROBE_SYNC") == "1"
        self.parts: dict[str, float] = defaultdict(float)
        self.chores: dict[str, float] = defaultdict(float)
        self.steps, self.inside, self.began = 0, 0, 0.0
        self.write({"pid": os.getpid(), "time": time.monotonic()})

    def write(self, values: dict[str, Any]) -> None:
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def before_step(self, *_: Any) -> None:
        """Wrap what the script has imported by now; start the optimizer's clock."""
        if self.steps == 0:
            for kind, names in ((self.parts, PARTS), (self.chores, CHORES)):
                for module, owner, name, label in names:
                    held = sys.modules.get(module)
                    if held is not None:
                        self.wrap(getattr(held, owner) if owner else held, name, label, kind)
        self.began = self.now()

    def after_step(self, *_: Any) -> None:
        self.parts["optimizer"] += self.now() - self.began
        self.steps += 1
        if self.steps % self.stride and self.steps > 1:
            return
        wait()
        self.write(
            {
                "time": time.monotonic(),
                "parts": self.parts,
                "chores": self.chores,
                "memory_mib": peak_memory_mib(),
            }
        )
        self.parts.clear()
        self.chores.clear()

    def wrap(self, owner: Any, name: str, label: str, kind: dict[str, float]) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return real(*args, **kwargs)
            self.inside += kind is self.chores
            began = self.now()
            try:
                return real(*args, **kwargs)
            finally:
                kind[label] += self.now() - began
                self.inside -= kind is self.chores

        setattr(owner, name, timed)

    def now(self) -> float:
        if self.waits:
            wait()
        return time.monotonic()


def wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory_mib() -> float:
    """Of this program alone: what getrusage says may be that of the process that started it."""
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
    sys.argv = [script, *flags]
    sys.path[0] = str(Path(script).resolve().parent)
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        probe.write({"memory_mib": peak_memory_mib()})


if __name__ == "__main__":
    main()
