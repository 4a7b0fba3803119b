"""What a run is made of, and its one optimizer step.

B  images in a micro-batch            images     [B, C, R, R] uint8, then float32 in [-1, 1]
M  micro-batches in a step,           timesteps  [B] int64 in [0, T)
   processes x accumulation           loss       scalar float32
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel

from ddpm.config.train import OptimizationConfig, TrainConfig
from ddpm.data import dataset, order, transforms
from ddpm.device import compile_failure_reason
from ddpm.diffusion.ema import EMA, eval_weights, full_tensor
from ddpm.diffusion.objective import (
    add_noise,
    diffusion_loss,
    min_snr_weights,
    prediction_target,
    sample_noise_and_timesteps,
)
from ddpm.diffusion.power_ema import PowerEMA
from ddpm.diffusion.unet import build_scheduler, build_unet
from ddpm.errors import UserError
from ddpm.sampling import pipeline, proof
from ddpm.training.schedule import UNLIMITED_STEPS, Schedule
from ddpm.training.tracking import LossMeter

STEPS_THAT_PAY = 2_000
"""Steps from which --compile auto compiles on a GPU: a guess, since none was measured."""
HOURS_THAT_PAY = 1
"""The same for a run by the clock, whose number of steps is not known when it starts."""


@dataclass(frozen=True)
class TrainState:
    """All that a step needs. `unet` is what accelerate prepared, `bare_unet` the model inside."""

    accelerator: Accelerator
    config: TrainConfig
    plan: Schedule
    data: dataset.BatchSource
    unet: torch.nn.Module
    bare_unet: UNet2DModel
    scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    tracks: PowerEMA | None

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha-bar_t of the chain, [T] float32 on the device."""
        return self.scheduler.alphas_cumprod.to(self.accelerator.device, torch.float32)

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.unet.parameters())

    @cached_property
    def is_sharded(self) -> bool:
        """Whether FSDP keeps a part of each weight on each process."""
        return any(hasattr(parameter, "full_tensor") for parameter in self.parameters)

    @cached_property
    def has_dropout(self) -> bool:
        return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.unet.modules())


def build_train_state(accelerator: Accelerator, config: TrainConfig) -> TrainState:
    """Data, model, noise, optimizer and average, as they are before step 0. Call on every process.

    Writes nothing but the decoded images in the cache. UserError for data or settings that cannot
    be used.
    """
    # Decoded once, by whichever process comes first
    data = dataset.load_images(
        config.data,
        accelerator.is_local_main_process,
        accelerator.device,
        config.optimization.seed,
    )
    torch.manual_seed(order.derive_seed(config.optimization.seed, "weights"))
    unet = build_unet(config.model, config.data.resolution, data.channels)
    scheduler = build_scheduler(config.diffusion)
    if config.optimization.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    optimizer = build_optimizer(unet, config.optimization)
    prepared, optimizer = accelerator.prepare(unet, optimizer)
    bare_unet = accelerator.unwrap_model(prepared)
    plan = Schedule.make(config, len(data), accelerator.num_processes)
    if should_compile(config.optimization, accelerator.device.type, plan, prepared)[0]:
        # In place, so that names and state dict stay; batches are always full, so shapes too.
        # The first export adds its class and version to the config: a compiled step looks at that,
        # and would be compiled again.
        bare_unet.to_json_string()
        bare_unet.compile(dynamic=False)
    return TrainState(
        accelerator=accelerator,
        config=config,
        plan=plan,
        data=data,
        unet=prepared,
        bare_unet=bare_unet,
        scheduler=scheduler,
        optimizer=optimizer,
        ema=EMA(bare_unet, config.ema) if config.ema.use_ema else None,
        tracks=PowerEMA(bare_unet) if config.ema.post_hoc_ema else None,
    )


def should_compile(
    config: OptimizationConfig, device_type: str, plan: Schedule, unet: torch.nn.Module
) -> tuple[bool, str]:
    """Whether to compile the UNet, and why, as a line for the log. UserError where it cannot be.

    A resumed run decides as it did before, since only its whole length counts.
    """
    asked = config.compile
    if any(hasattr(parameter, "full_tensor") for parameter in unet.parameters()):
        if asked == "on":
            raise UserError("--compile on is not tested with FSDP's sharded weights: leave it out.")
        return False, "Not compiled: FSDP cuts the weights over the processes."
    if asked == "off":
        return False, "Not compiled: --compile off."
    why = "--compile on"
    if asked == "auto":
        if device_type == "cpu":
            return False, "Not compiled: it gains little on a CPU (--compile on does it)."
        if device_type != "cuda":
            return False, f"Not compiled: not tried on {device_type} (--compile on does it)."
        if config.budget and config.budget_seconds < 3600 * HOURS_THAT_PAY:
            return False, f"Not compiled: a budget of {config.budget} is too short to pay for it."
        if plan.total_steps < STEPS_THAT_PAY:
            return False, f"Not compiled: fewer than {STEPS_THAT_PAY:,} steps do not pay for it."
        why = "a run this long pays for the minutes that it takes"
    reason = compile_failure_reason(device_type)
    if reason and asked == "on":
        raise UserError(f"--compile on: {reason} Leave it out.")
    return (False, f"Not compiled: {reason}") if reason else (True, f"Compiled: {why}.")


def emulates_bf16() -> bool:
    """Whether this is an x86 processor without bfloat16 instructions, which torch makes up for."""
    can = torch.cpu.get_capabilities()
    native = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
    return can.get("architecture") == "x86_64" and not any(can.get(name) for name in native)


def build_optimizer(unet: UNet2DModel, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW over all parameters, in its fused form: one kernel for all of them."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def train_step(parts: TrainState, step: int, lr: float, meter: LossMeter) -> torch.Tensor | None:
    """Optimizer step `step` (0 is the first): the gradient norm before clipping, a float32 scalar.

    None when fp16's gradient scaler skipped it: then weights and average are as they were, and the
    same step is to be taken again. Call on every process.
    """
    accelerator, optimization = parts.accelerator, parts.config.optimization
    mine = order.micro_batches(
        accelerator.process_index,
        accelerator.num_processes,
        optimization.gradient_accumulation_steps,
    )

    # Forward and backward over this process's micro-batches
    for micro_batch in mine:
        with _synchronised(parts, last=micro_batch == mine[-1]):
            loss = micro_batch_loss(parts, step, micro_batch)
            accelerator.backward(loss / optimization.gradient_accumulation_steps)
        meter.add(loss)

    # Update the weights and their average
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    grad_norm = accelerator.clip_grad_norm_(parts.parameters, optimization.max_grad_norm)
    parts.optimizer.step()
    parts.optimizer.zero_grad()
    if accelerator.optimizer_step_was_skipped:
        meter.forget()
        return None
    if parts.ema is not None:
        parts.ema.update(step + 1)
    if parts.tracks is not None:
        parts.tracks.update(step + 1)
    return full_tensor(grad_norm)


def micro_batch_loss(parts: TrainState, step: int, micro_batch: int) -> torch.Tensor:
    """The loss of one micro-batch; what it sees is a function of (seed, step, micro_batch)."""
    plan, config, device = parts.plan, parts.config, parts.accelerator.device
    seed, batch_size = config.optimization.seed, config.optimization.train_batch_size
    objective, alphas_cumprod = config.diffusion, parts.alphas_cumprod

    first = step * plan.images_per_step + micro_batch * batch_size
    rows = parts.data.rows(first, batch_size)
    cuts = order.make_generator(seed, "pixels", step, micro_batch)
    pixels = parts.data.batch(rows, cuts, config.data.random_flip)
    clean = transforms.to_model(pixels.to(device, non_blocking=True))

    draws = order.make_generator(seed, "noise", step, micro_batch, device)
    noise, timesteps = sample_noise_and_timesteps(clean.shape, len(alphas_cumprod), draws, device)
    noisy = add_noise(alphas_cumprod, clean, noise, timesteps)
    wanted = prediction_target(objective.prediction_type, alphas_cumprod, clean, noise, timesteps)
    weights = min_snr_weights(
        objective.prediction_type, alphas_cumprod, timesteps, objective.snr_gamma
    )
    if parts.has_dropout:
        torch.manual_seed(order.derive_seed(seed, "dropout", step, micro_batch))
    prediction = parts.unet(noisy, timesteps, return_dict=False)[0]
    return diffusion_loss(prediction, wanted, weights)


def export_model(parts: TrainState, folder: Path, with_proof: bool = False) -> None:
    """Put the pipeline into a folder, at the end with images that prove copies of it.

    Call on every process: FSDP gathers the weights.
    """
    unet = parts.bare_unet
    with eval_weights(unet, parts.ema):
        if parts.is_sharded:
            weights = {name: full_tensor(value) for name, value in unet.state_dict().items()}
            unet = UNet2DModel.from_config(unet.config)
            unet.load_state_dict(weights)
        if parts.accelerator.is_main_process:
            pipeline.export_pipeline(unet, parts.scheduler, folder)
            if with_proof:
                proof.write_proof(folder, unet, parts.scheduler)


def describe_run(parts: TrainState) -> list[str]:
    """What is about to be trained, on what, and for how long; a line each."""
    data, plan, config = parts.data, parts.plan, parts.config
    kind = "gray" if data.channels == 1 else "RGB"
    total, budget = plan.total_steps, config.optimization.budget
    length = (
        f"As many steps of {plan.images_per_step} images as fit into {budget}."
        if total == UNLIMITED_STEPS
        else f"{f'Within {budget} at most ' if budget else ''}{total:,} steps of "
        f"{plan.images_per_step} images: {total * plan.images_per_step / len(data):.1f} epochs."
    )
    lines = [
        f"UNet2DModel of {parts.bare_unet.num_parameters() / 1e6:.2f} M parameters on "
        f"{len(data):,} {kind} images of {data.resolution}x{data.resolution}.",
        f"{length} Run folder: {config.output_dir}",
    ]
    if parts.tracks is not None:
        lines.append(parts.tracks.announcement())
    on_cpu = parts.accelerator.device.type == "cpu"
    if on_cpu and parts.accelerator.mixed_precision == "bf16" and emulates_bf16():
        lines.append(
            "Note: this processor has no bfloat16 instructions and emulates them: "
            "--mixed_precision no is faster here."
        )
    device_type = parts.accelerator.device.type
    lines.append(should_compile(config.optimization, device_type, plan, parts.unet)[1])
    if config.optimization.lr_warmup_steps >= total:
        lines.append(
            f"Note: --lr_warmup_steps {config.optimization.lr_warmup_steps} is not shorter than "
            "the run: the learning rate never reaches its peak. Give fewer, or 0."
        )
    return lines


def format_duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def _synchronised(parts: TrainState, last: bool) -> AbstractContextManager[None]:
    """Gradients are averaged over processes once a step, in its last micro-batch."""
    return nullcontext() if last else parts.accelerator.no_sync(parts.unet)
