"""--dry_run: what a run would be, measured on a few of its own steps. It writes no run."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ddpm import datareport
from ddpm.config import TrainConfig, dump, flatten
from ddpm.plan import NO_LIMIT, learning_rate, require_same_settings
from ddpm.stepping import Parts, assemble, minutes, opening, take_step
from ddpm.tracking import Meter, peak_memory_mib
from ddpm.watching import Watch

UNMEASURED, MEASURED = 2, 8
"""Steps that are taken: first to get memory and kernels ready, then against the clock."""


def rehearse(accelerator: Accelerator, config: TrainConfig) -> None:
    """Print settings, data, size, speed, memory, and how long the run would take.

    Call on every process. Raises what training would raise: UserError for data or settings that
    cannot be used, and for a folder that holds a run with other settings.
    """
    say = accelerator.print
    say(dump(config))
    if not config.overwrite_output_dir:
        say(require_same_settings(Path(config.output_dir), flatten(config)), end="")
    parts = assemble(accelerator, config)
    Watch.open(parts)  # refuses what could not be measured
    say("\n" + "\n".join([*datareport.lines(parts.data_facts), *opening(parts)]))
    each = _seconds_a_step(parts)
    rate = parts.plan.images_per_step / each
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parts.parameters)
    copies = 4 if parts.ema is not None else 3
    copies += 0 if parts.tracks is None else len(parts.tracks.averages)
    say(f"{rate:,.0f} images/s, {each:.3f} s a step, over {MEASURED} steps.")
    say(f"Memory of this process at its peak: {peak_memory_mib(accelerator.device):,.0f} MiB.")
    say(f"A checkpoint takes about {weights * copies / 2**20:,.0f} MiB on disk.")
    if parts.plan.total_steps != NO_LIMIT:
        say(f"All {parts.plan.total_steps:,} steps: about {minutes(parts.plan.total_steps * each)}"
            " (h:mm:ss), without previews and saving.")  # fmt: skip
    else:
        say(f"--budget {config.optimization.budget} ends the run.")
    say("A dry run: no run was begun. Leave out --dry_run to train.")


def _seconds_a_step(parts: Parts) -> float:
    device = parts.accelerator.device
    meter, began = Meter(parts.accelerator), 0.0
    parts.unet.train()
    for step in range(UNMEASURED + MEASURED):
        if step == UNMEASURED:
            began = _now(device)
        lr = learning_rate(parts.config.optimization, step, parts.plan.total_steps)
        take_step(parts, step, lr, meter)
    return (_now(device) - began) / MEASURED


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
