"""The parts of a training run, and one optimizer step with them.

B  images in a micro-batch            images     [B, C, R, R] uint8, then float32 in [-1, 1]
M  micro-batches in a step,           timesteps  [B] int64 in [0, T)
   processes x accumulation           labels     [B] int64 in [0, K]; K is the null class
K  classes                            loss       scalar float32
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from diffusers import DDPMScheduler, UNet2DModel

from ddpm import run_folder
from ddpm.accelerator import from_main, is_sharded
from ddpm.config.train import ModelConfig, OptimizationConfig, TrainConfig
from ddpm.data import dataset, order, transforms
from ddpm.device import compile_failure_reason
from ddpm.diffusion.class_labels import drop_labels, null_label
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
from ddpm.training.pretrained import Pretrained
from ddpm.training.schedule import UNLIMITED_STEPS, Schedule
from ddpm.training.tracking import LossMeter

MIN_COMPILED_STEPS, MIN_COMPILED_HOURS = 2_000, 1
"""Length from which --compile auto compiles on a GPU, in steps or by --budget: a guess."""


@dataclass(frozen=True)
class TrainState:
    """Everything a step needs. `unet` is prepared by accelerate, `bare_unet` the model inside."""

    accelerator: Accelerator
    config: TrainConfig
    schedule: Schedule
    data: dataset.BatchSource
    unet: torch.nn.Module
    bare_unet: UNet2DModel
    scheduler: DDPMScheduler
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    power_ema: PowerEMA | None
    pretrained: Pretrained | None

    @cached_property
    def alphas_cumprod(self) -> torch.Tensor:
        """alpha-bar_t of the noise schedule, [T] float32 on the device."""
        return self.scheduler.alphas_cumprod.to(self.accelerator.device, torch.float32)

    @cached_property
    def parameters(self) -> list[torch.nn.Parameter]:
        return list(self.unet.parameters())

    @cached_property
    def has_dropout(self) -> bool:
        return any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in self.unet.modules())


def build_train_state(
    accelerator: Accelerator, config: TrainConfig, pretrained: Pretrained | None = None
) -> TrainState:
    """Build the data, model, optimizer and averages as they are before step 0.

    Call on every process. Weights and noise schedule are those of `pretrained`, the model that the
    config names. Writes nothing but the decoded images in the cache. Raises UserError for data or
    settings that cannot be used.
    """
    assert (pretrained is None) == (config.model.pretrained_model_name_or_path is None)
    optimization = config.optimization
    lanes = order.Lanes.of(
        accelerator.process_index,
        accelerator.num_processes,
        optimization.gradient_accumulation_steps,
        optimization.train_batch_size,
    )
    data = dataset.load_images(
        config.data, True, accelerator.device, optimization.seed, lanes=lanes
    )
    torch.manual_seed(order.derive_seed(optimization.seed, "weights"))
    if pretrained is not None:
        unet, scheduler = pretrained.build_unet(config, data), pretrained.scheduler
    else:
        num_classes = None if data.class_names is None else len(data.class_names)
        model = _recorded_architecture(accelerator, config)
        unet = build_unet(model, config.data.resolution, data.channels, num_classes)
        scheduler = build_scheduler(config.diffusion)
    if optimization.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    prepared, optimizer = accelerator.prepare(unet, build_optimizer(unet, optimization))
    bare_unet = accelerator.unwrap_model(prepared)
    schedule = Schedule.make(config, len(data), accelerator.num_processes)
    if should_compile(accelerator, optimization, schedule)[0]:
        # The first export adds class and version to the model's config, on which a compiled step
        # depends: without them in place now it would be compiled again.
        bare_unet.to_json_string()
        # In place, so that the names in the state dict stay. Batches are full, so shapes are fixed.
        bare_unet.compile(**{"dynamic": False, **dynamo_options()})
    return TrainState(
        accelerator=accelerator,
        config=config,
        schedule=schedule,
        data=data,
        unet=prepared,
        bare_unet=bare_unet,
        scheduler=scheduler,
        optimizer=optimizer,
        ema=EMA(bare_unet, config.ema) if config.ema.use_ema else None,
        power_ema=PowerEMA(bare_unet) if config.ema.post_hoc_ema else None,
        pretrained=pretrained,
    )


def _recorded_architecture(accelerator: Accelerator, config: TrainConfig) -> ModelConfig:
    """Return the settings of the UNet, for a run with a checkpoint as the run folder has them.

    So a run keeps its UNet when a preset, or the config that it was given, changes.
    """
    run = Path(config.output_dir)
    recorded = (run / run_folder.UNET_CONFIG).is_file() and bool(run_folder.checkpoints(run))
    recorded = from_main(accelerator, recorded)
    if not recorded or config.overwrite_output_dir:
        return config.model
    return replace(config.model, model_config_name_or_path=str(run))


def should_compile(
    accelerator: Accelerator, config: OptimizationConfig, schedule: Schedule
) -> tuple[bool, str]:
    """Return whether to compile the UNet, and why, as a line for the log.

    A resumed run decides as before, since only its length as a whole counts. Raises UserError for
    --compile on where it is impossible.
    """
    required, device_type = config.compile == "on", accelerator.device.type
    dynamo = dynamo_options()
    if is_sharded(accelerator):
        if required:
            raise UserError("--compile on is not tested with FSDP's sharded weights: leave it out.")
        return False, "Not compiled: FSDP splits the weights over the processes."
    if config.compile == "off":
        return False, "Not compiled: --compile off."
    if not required and not dynamo:
        if device_type == "cpu":
            return False, "Not compiled: it gains little on a CPU (--compile on does it)."
        if device_type != "cuda":
            return False, f"Not compiled: not tested on {device_type} (--compile on does it)."
        if config.budget and config.budget_seconds < 3600 * MIN_COMPILED_HOURS:
            return False, f"Not compiled: a budget of {config.budget} is too short to pay for it."
        if schedule.total_steps < MIN_COMPILED_STEPS:
            return (
                False,
                f"Not compiled: fewer than {MIN_COMPILED_STEPS:,} steps do not pay for it.",
            )
    failure = compile_failure_reason(device_type, **dynamo)
    if failure and required:
        raise UserError(f"--compile on: {failure} Leave it out.")
    if failure:
        return False, f"Not compiled: {failure}"
    why = "--compile on" if required else "a run this long pays for the minutes that it takes"
    if dynamo:
        why = f"the accelerate config chooses the dynamo backend {dynamo['backend']}"
    return True, f"Compiled: {why}."


def dynamo_options() -> dict[str, Any]:
    """Return the arguments of torch.compile in the accelerate config, empty without a backend."""
    plugin = TorchDynamoPlugin()
    return {} if plugin.backend == DynamoBackend.NO else plugin.to_kwargs()


def emulates_bf16() -> bool:
    """Return whether this is an x86 processor without bfloat16 instructions."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not know
    native = ("avx512_bf16", "amx_bf16", "avx_ne_convert")
    is_x86 = capabilities.get("architecture") == "x86_64"
    return is_x86 and not any(capabilities.get(name) for name in native)


def build_optimizer(unet: torch.nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters, fused: one kernel for all of them."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )


def train_step(state: TrainState, step: int, lr: float, meter: LossMeter) -> torch.Tensor | None:
    """Take optimizer step `step`, from 0, and return the gradient norm before clipping, a scalar.

    None means that fp16's gradient scaler skipped it: weights and averages are unchanged, and the
    same step must be taken again. Call on every process.
    """
    accelerator, optimization = state.accelerator, state.config.optimization
    accumulation = optimization.gradient_accumulation_steps
    micro_batches = order.micro_batches(
        accelerator.process_index, accelerator.num_processes, accumulation
    )

    # Forward and backward over this process's micro-batches; the last one averages the gradients
    for micro_batch in micro_batches:
        is_last = micro_batch == micro_batches[-1]
        with nullcontext() if is_last else accelerator.no_sync(state.unet):
            loss = micro_batch_loss(state, step, micro_batch)
            accelerator.backward(loss / accumulation)
        meter.add(loss)

    # Update the weights and their averages
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    grad_norm = accelerator.clip_grad_norm_(state.parameters, optimization.max_grad_norm)
    state.optimizer.step()
    state.optimizer.zero_grad()
    if accelerator.optimizer_step_was_skipped:
        meter.discard_step()
        return None
    if state.ema is not None:
        state.ema.update(step + 1)
    if state.power_ema is not None:
        state.power_ema.update(step + 1)
    return full_tensor(grad_norm)


def micro_batch_loss(state: TrainState, step: int, micro_batch: int) -> torch.Tensor:
    """Return the loss of a micro-batch, whose draws are functions of (seed, step, micro_batch)."""
    config, device, alphas_cumprod = state.config, state.accelerator.device, state.alphas_cumprod
    seed, batch_size = config.optimization.seed, config.optimization.train_batch_size
    prediction_type = config.diffusion.prediction_type

    # Images and labels
    first = step * state.schedule.images_per_step + micro_batch * batch_size
    rows = state.data.rows(first, batch_size)
    generator = order.make_generator(seed, "pixels", step, micro_batch)
    pixels, labels = state.data.batch(rows, generator, config.data)
    images = transforms.to_model(pixels.to(device, non_blocking=True))
    if labels is not None:
        generator = order.make_generator(seed, "labels", step, micro_batch)
        null, probability = null_label(state.bare_unet), config.diffusion.class_dropout_prob
        labels = transforms.upload(drop_labels(labels, null, probability, generator), device)

    # Noise and target
    generator = order.make_generator(seed, "noise", step, micro_batch, device)
    noise, timesteps = sample_noise_and_timesteps(
        images.shape, alphas_cumprod, generator, config.diffusion.logit_normal
    )
    noisy = add_noise(alphas_cumprod, images, noise, timesteps)
    target = prediction_target(prediction_type, alphas_cumprod, images, noise, timesteps)
    weights = min_snr_weights(
        prediction_type, alphas_cumprod, timesteps, config.diffusion.snr_gamma
    )

    # Prediction and loss
    if state.has_dropout:
        torch.manual_seed(order.derive_seed(seed, "dropout", step, micro_batch))
    prediction = state.unet(noisy, timesteps, class_labels=labels, return_dict=False)[0]
    return diffusion_loss(prediction, target, weights)


def export_model(state: TrainState, folder: Path, with_proof: bool = False) -> None:
    """Write the pipeline into `folder`, with the images that prove a copy of it if asked.

    Call on every process: FSDP gathers the weights, on the main process.
    """
    main, unet = state.accelerator.is_main_process, state.bare_unet
    with eval_weights(unet, state.ema):
        if is_sharded(state.accelerator):
            weights = state.accelerator.get_state_dict(state.unet)
            if main:
                unet = UNet2DModel.from_config(unet.config)
                unet.load_state_dict(weights)
        if main:
            pipeline.export_pipeline(unet, state.scheduler, folder, state.data.class_names)
            if with_proof:
                proof.write_proof(folder, unet, state.scheduler)


def describe_run(state: TrainState) -> list[str]:
    """Return lines on what will be trained, on what, and for how long."""
    data, schedule, accelerator = state.data, state.schedule, state.accelerator
    optimization, images_per_step = state.config.optimization, schedule.images_per_step
    total, budget = schedule.total_steps, optimization.budget
    height, width = data.size
    if total == UNLIMITED_STEPS:
        length = f"As many steps of {images_per_step} images as fit into {budget}."
    else:
        limit = f"Within {budget} at most " if budget else ""
        epochs = total * images_per_step / len(data)
        length = f"{limit}{total:,} steps of {images_per_step} images: {epochs:.1f} epochs."
    lines = [
        f"UNet2DModel of {state.bare_unet.num_parameters() / 1e6:.2f} M parameters on "
        f"{len(data):,} {data.facts.colors} images of {width}x{height}"
        + ("." if data.class_names is None else f" of {len(data.class_names)} classes."),
        f"{length} Run folder: {state.config.output_dir}",
        *data.notes,
    ]
    if state.pretrained is not None:
        lines += state.pretrained.describe(data)
    if state.power_ema is not None:
        lines.append(state.power_ema.announcement())
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu and accelerator.mixed_precision == "bf16" and emulates_bf16():
        lines.append(
            "Note: this processor has no bfloat16 instructions and emulates them: "
            "--mixed_precision no is faster here."
        )
    lines.append(should_compile(accelerator, optimization, schedule)[1])
    if optimization.lr_warmup_steps >= total:
        lines.append(
            f"Note: --lr_warmup_steps {optimization.lr_warmup_steps} is not shorter than the run: "
            "the learning rate never reaches its peak. Give fewer, or 0."
        )
    return lines


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
