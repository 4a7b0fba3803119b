"""--dry_run: what a run would be, measured on a few of its own steps. It writes no run."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator

from ddpm import datareport, memory
from ddpm.config import TrainConfig, dump, flatten
from ddpm.errors import UserError
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
    for line in _memory(parts):
        say(line)
    each = _seconds_a_step(parts)
    rate = parts.plan.images_per_step / each
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parts.parameters)
    copies = 4 if parts.ema is not None else 3
    copies += 0 if parts.tracks is None else len(parts.tracks.averages)
    say(f"{rate:,.0f} images/s, {each:.3f} s a step, over {MEASURED} steps.")
    say(f"Their peak memory: {peak_memory_mib(accelerator.device):,.0f} MiB.")
    say(f"A checkpoint takes about {weights * copies / 2**20:,.0f} MiB on disk.")
    if parts.plan.total_steps != NO_LIMIT:
        say(f"All {parts.plan.total_steps:,} steps: about {minutes(parts.plan.total_steps * each)}"
            " (h:mm:ss), without previews, evaluation and saving.")  # fmt: skip
    else:
        say(f"--budget {config.optimization.budget} ends the run.")
    say("A dry run: no run was begun. Leave out --dry_run to train.")


def _memory(parts: Parts) -> list[str]:
    """What a step will take, from small ones. UserError when that is more than there is."""
    asked = parts.config.optimization.train_batch_size
    if parts.is_sharded:
        return ["With FSDP's sharded weights no peak of memory is predicted."]
    line = memory.measure(parts)
    room = memory.room(parts.accelerator.device)
    largest = line.largest(room)
    if line.at(asked) > room:
        advice = f"Give {largest} at most" if largest else "Give a smaller --resolution or model"
        raise UserError(
            f"--train_batch_size {asked} needs about {line.at(asked):,.0f} MiB, and {room:,.0f} "
            f"are there. {advice}, with --gradient_accumulation_steps for the same batch a step; "
            "or try --gradient_checkpointing."
        )
    return [
        f"Memory of this process at its peak, predicted: about {line.at(asked):,.0f} MiB, of which "
        f"{line.per_image:,.1f} MiB an image.",
        f"The largest --train_batch_size for the {room:,.0f} MiB there are: about {largest:,}.",
    ]


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
