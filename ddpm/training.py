"""The loop. Its headings tell the run: what happens, in which order.

One clock counts optimizer steps; learning rate, EMA, intervals, file names and the position in the
data are arithmetic on it. Work that comes once in a while stands after the step, in blocks of the
same form, and every process takes its share of it.
"""

import math
import shlex
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from tqdm.auto import tqdm

from ddpm import (
    checkpoint,
    diffusion,
    generation,
    images,
    model,
    order,
    pictures,
    pipeline,
    runfolder,
    samplers,
)
from ddpm.config import OptimizationConfig, TrainConfig, flatten
from ddpm.ema import EMA, evaluating
from ddpm.errors import Interrupted, UserError
from ddpm.plan import Plan, due, learning_rates, require_same_settings
from ddpm.stopping import StopRequest
from ddpm.tracking import Clock, Meter, Tracker

MAX_SKIPPED = 50
"""Steps in a row that fp16's gradient scaler may skip before the run is given up."""


def train(accelerator: Accelerator, config: TrainConfig) -> None:
    """Train, or go on training, until OUTPUT_DIR holds the finished pipeline and its record.

    Call on every process. Raises UserError for what a person can put right, Interrupted after a
    SIGTERM or SIGINT once the state is saved.
    """
    output_dir, device = Path(config.output_dir), accelerator.device
    main, say = accelerator.is_main_process, accelerator.print

    # Settings of an earlier run in this folder
    if not config.overwrite_output_dir:
        say(require_same_settings(output_dir, flatten(config)), end="")

    # Data: decoded once, by whichever process comes first
    data, data_facts = images.load(config.data, show_progress=accelerator.is_local_main_process)

    # Model, noise, optimizer, schedule
    torch.manual_seed(order.seed_of(config.optimization.seed, "weights"))
    unet = model.build_unet(config.model, config.data.resolution, data.channels)
    scheduler = model.build_scheduler(config.diffusion)
    alphas_cumprod = scheduler.alphas_cumprod.to(device, torch.float32)
    optimizer = build_optimizer(unet, config.optimization)
    plan = Plan.make(config, len(data), accelerator.num_processes)
    schedule = learning_rates(optimizer, config.optimization, plan.total_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    bare_unet = accelerator.unwrap_model(unet)
    ema = EMA(bare_unet, config.ema) if config.ema.use_ema else None
    start = checkpoint.State(
        step=0,
        micro_batches=plan.micro_batches,
        pixels_sha256=data_facts["pixels_sha256"],
        seconds=0.0,
        num_parameters=bare_unet.num_parameters(),
    )

    # The folder: emptied when that was asked for, and only now that everything else is in order
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
        if config.overwrite_output_dir:
            runfolder.remove_run(output_dir)
    accelerator.wait_for_everyone()

    # Resume
    folder = checkpoint.find(config.checkpoint.resume_from_checkpoint, output_dir)
    state = start
    if folder is not None:
        found = checkpoint.read_state(folder)
        checkpoint.require_same_run(found, start, folder)
        if found.step >= plan.total_steps and _finished(output_dir):
            say(f"{output_dir} is finished: {found.step:,} steps of {plan.total_steps:,} are done.")
            say(next_command(output_dir))
            return
        state = checkpoint.load(accelerator, ema, folder)
        say(f"Going on from {folder}.")
    if main:
        runfolder.write_json(output_dir / runfolder.TRAIN_CONFIG, flatten(config))
        runfolder.write_record(
            output_dir,
            finished=False,
            dataset=data_facts,
            model={"parameters": bare_unet.num_parameters(), "channels": data.channels},
            environment=runfolder.environment(
                torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                accelerator.num_processes,
                accelerator.mixed_precision,
            ),
        )
    tracker = Tracker(accelerator, config.tracking, output_dir, flatten(config), state.step)
    say(_opening(config, plan, data, bare_unet))

    # The loop
    clock, meter, stop = Clock(state.seconds), Meter(accelerator), StopRequest(accelerator)
    optimization, objective = config.optimization, config.diffusion
    seed, batch_size = optimization.seed, optimization.train_batch_size
    accumulation = optimization.gradient_accumulation_steps
    mine = order.micro_batches(accelerator.process_index, accelerator.num_processes, accumulation)
    parameters = list(unet.parameters())
    has_dropout = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in unet.modules())
    step, skipped = state.step, 0
    # disable=None: no bar where the output is no terminal
    bar = tqdm(total=plan.total_steps, initial=step, desc="Training", unit=" steps",
               disable=None if main else True)  # fmt: skip
    unet.train()
    while step < plan.total_steps:
        clock.start()
        lr = optimization.learning_rate * schedule(step)

        # Forward and backward over this process's micro-batches of the step
        for micro_batch in mine:
            first = step * plan.images_per_step + micro_batch * batch_size
            rows = order.rows(seed, len(data), first, batch_size)
            cuts = order.generator(seed, "pixels", step, micro_batch)
            pixels = data.batch(rows, cuts, config.data.random_flip)
            clean = images.to_model(pixels.to(device, non_blocking=True))
            draws = order.generator(seed, "noise", step, micro_batch, device)
            noise, timesteps = diffusion.draw(clean.shape, len(alphas_cumprod), draws, device)
            noisy = diffusion.add_noise(alphas_cumprod, clean, noise, timesteps)
            wanted = diffusion.target(
                objective.prediction_type, alphas_cumprod, clean, noise, timesteps
            )
            weights = diffusion.weights(
                objective.prediction_type, alphas_cumprod, timesteps, objective.snr_gamma
            )
            if has_dropout:
                torch.manual_seed(order.seed_of(seed, "dropout", step, micro_batch))
            with _synchronised(accelerator, unet, last=micro_batch == mine[-1]):
                prediction = unet(noisy, timesteps, return_dict=False)[0]
                loss = diffusion.loss(prediction, wanted, weights)
                accelerator.backward(loss / accumulation)
            meter.add(loss)

        # Update the weights and their average; a step that fp16's scaler skips never happened
        for group in optimizer.param_groups:
            group["lr"] = lr
        grad_norm = accelerator.clip_grad_norm_(parameters, optimization.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.optimizer_step_was_skipped:
            skipped += 1
            if skipped == MAX_SKIPPED:
                raise UserError(
                    f"fp16 overflowed {MAX_SKIPPED} times in a row after step {step}. "
                    f"{_last_good(output_dir)} Use --mixed_precision bf16, or a smaller rate."
                )
            continue
        step, skipped = step + 1, 0
        if ema is not None:
            ema.update(step)
        meter.step(step, grad_norm)
        bar.update()
        at_end = step == plan.total_steps
        number = stop.agreed()
        reports = at_end or due(step, config.tracking.logging_steps)
        saves = at_end or due(step, config.checkpoint.checkpointing_steps) or number
        previews = not at_end and due(step, plan.preview_every)
        exports = not at_end and due(step, plan.export_every)
        if reports or saves or previews or exports:
            _require_finite(meter, lr, output_dir)
        clock.stop(device, wait=reports)

        # Report
        if reports:
            values = {
                "epoch": round(step * plan.images_per_step / plan.num_images, 4),
                "loss": meter.mean_loss(),
                "lr": lr,
                "grad_norm": float(grad_norm),
                "images_per_s": round(clock.rate(step - state.step) * plan.images_per_step, 2),
                "seconds": round(clock.seconds, 3),
            }
            tracker.scalars(step, values)
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s")
            if (
                bar.disable
                and main
                and (at_end or step % (10 * config.tracking.logging_steps) == 0)
            ):
                print(_status(step, plan, values), flush=True)

        # Checkpoint: on time, at the end, and when asked to stop
        if saves:
            now = replace(start, step=step, seconds=clock.seconds)
            limit = config.checkpoint.checkpoints_total_limit
            checkpoint.save(accelerator, ema, now, output_dir, limit)
        if number and not at_end:
            bar.close()
            tracker.finish()
            raise Interrupted(
                f"Stopped by {number.name} after step {step:,}; saved in "
                f"{output_dir}/checkpoint-{step}. The same command goes on from there.",
                exit_code=128 + number,
            )

        # Preview
        if previews:
            _preview(accelerator, bare_unet, ema, scheduler, config, step, tracker)

        # Pipeline
        if exports and main:
            with evaluating(bare_unet, ema):
                pipeline.export(bare_unet, scheduler, output_dir)
    bar.close()
    stop.release()

    # The end: the last preview, the pipeline, the record. A run cut off here does it all again.
    if config.preview.save_images_epochs:
        _preview(accelerator, bare_unet, ema, scheduler, config, step, tracker)
    if main:
        with evaluating(bare_unet, ema):
            pipeline.export(bare_unet, scheduler, output_dir)
        images_seen, last = step * plan.images_per_step, tracker.last()
        facts = {
            "steps": step,
            "images_seen": images_seen,
            "epochs": round(images_seen / plan.num_images, 2),
            "seconds": round(clock.seconds, 1),
            "images_per_s": round(images_seen / max(clock.seconds, 1e-9), 1),
            "final_loss": last.get("loss"),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        runfolder.write_record(output_dir, training=facts, wandb=tracker.address, finished=True)
        print(_closing(output_dir, facts))
    tracker.finish()
    accelerator.wait_for_everyone()


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


def _preview(
    accelerator: Accelerator,
    unet: UNet2DModel,
    ema: EMA | None,
    scheduler: DDPMScheduler,
    config: TrainConfig,
    step: int,
    tracker: Tracker,
) -> None:
    """Draw the grid of `step`, always from the same seeds, shared over all processes."""
    count = config.preview.eval_batch_size
    each = math.ceil(count / accelerator.num_processes)
    seeds = range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
    sampler, steps = samplers.build_sampler(
        "ddim", scheduler.config, config.preview.ddpm_num_inference_steps
    )
    with evaluating(unet, ema):
        drawn = [image for _, image in generation.generate(unet, sampler, steps, seeds, each)]
    gathered = accelerator.gather(torch.stack(drawn).to(accelerator.device)).cpu()
    if accelerator.is_main_process:
        sheet = pictures.grid(list(gathered[:count]))
        folder = Path(config.output_dir) / runfolder.SAMPLES
        folder.mkdir(exist_ok=True)
        pictures.save_png(sheet, folder / f"step-{step:06d}.png", {"step": str(step)})
        tracker.grid(step, sheet)


def _synchronised(
    accelerator: Accelerator, unet: torch.nn.Module, last: bool
) -> AbstractContextManager[None]:
    """Gradients are averaged over processes once a step, in its last micro-batch."""
    return nullcontext() if last else accelerator.no_sync(unet)


def _require_finite(meter: Meter, lr: float, output_dir: Path) -> None:
    step = meter.first_bad_step()
    if step:
        raise UserError(
            f"The loss or its gradients were not finite at step {step:,} (learning rate {lr:.3g}). "
            f"{_last_good(output_dir)} Try a smaller --learning_rate, a longer --lr_warmup_steps, "
            "or --mixed_precision no."
        )


def _last_good(output_dir: Path) -> str:
    last = checkpoint.latest(output_dir)
    return f"The last good checkpoint is {last}." if last else "No checkpoint had been saved yet."


def _finished(output_dir: Path) -> bool:
    whole = all((output_dir / name).exists() for name in runfolder.PIPELINE_FILES)
    return whole and bool(runfolder.read_record(output_dir).get("finished"))


def _opening(config: TrainConfig, plan: Plan, data: images.ImageSet, unet: UNet2DModel) -> str:
    kind = "gray" if data.channels == 1 else "RGB"
    lines = [
        f"UNet2DModel of {unet.num_parameters() / 1e6:.2f} M parameters on {len(data):,} {kind} "
        f"images of {data.resolution}x{data.resolution}.",
        f"{plan.total_steps:,} steps of {plan.images_per_step} images: "
        f"{plan.total_steps * plan.images_per_step / len(data):.0f} epochs. Run folder: "
        f"{config.output_dir}",
    ]
    if data.report["unreadable"]:
        first = "; ".join(data.report["unreadable_first"])
        lines.append(f"{data.report['unreadable']} unreadable images are skipped: {first}")
    if config.optimization.lr_warmup_steps >= plan.total_steps:
        lines.append(
            f"Note: --lr_warmup_steps {config.optimization.lr_warmup_steps} is not shorter than "
            "the run: the learning rate never reaches its peak."
        )
    return "\n".join(lines)


def _status(step: int, plan: Plan, values: dict[str, float]) -> str:
    left = (plan.total_steps - step) * plan.images_per_step / max(values["images_per_s"], 1e-9)
    return (
        f"step {step:,}/{plan.total_steps:,}  loss {values['loss']:.4f}  "
        f"{values['images_per_s']:.0f} images/s  {_minutes(left)} left"
    )


def _closing(output_dir: Path, facts: dict[str, Any]) -> str:
    return (
        f"Trained {facts['steps']:,} steps in {_minutes(facts['seconds'])} "
        f"({facts['images_per_s']:,.0f} images/s), final loss {facts['final_loss']:.4f}.\n"
        f"{output_dir} is a DDPMPipeline; the grids are in {output_dir / runfolder.SAMPLES}.\n"
        f"{next_command(output_dir)}"
    )


def next_command(output_dir: Path) -> str:
    """The line that publishes a finished run."""
    return f"Next: python push.py {shlex.quote(str(output_dir))} {runfolder.repo_name(output_dir)}"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
