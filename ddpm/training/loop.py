"""The loop. Its headings tell the run: what happens, in which order.

One clock counts optimizer steps; learning rate, EMA, intervals, file names and the position in the
data are arithmetic on it. Work that comes once in a while stands after the step, in blocks of the
same form, and every process takes its share of it.
"""

import math
import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from ddpm import run_folder
from ddpm.config.base import flatten
from ddpm.config.train import TrainConfig
from ddpm.data import report
from ddpm.diffusion import power_ema, schedulers
from ddpm.diffusion.ema import eval_weights
from ddpm.errors import Interrupted, UserError
from ddpm.publishing import checkpoint_repo
from ddpm.publishing.background import Publisher
from ddpm.sampling import generate, image_io
from ddpm.training import checkpoint
from ddpm.training.schedule import (
    UNLIMITED_STEPS,
    Schedule,
    TimeBudget,
    is_due,
    learning_rate,
    require_same_config,
)
from ddpm.training.signals import StopSignals
from ddpm.training.step import (
    TrainState,
    build_train_state,
    describe_run,
    export_model,
    format_duration,
    train_step,
)
from ddpm.training.tracking import LossMeter, StepTimer, Tracker, peak_memory_mib
from ddpm.training.validation import Validator

MAX_SKIPPED = 50
"""Steps in a row that fp16's gradient scaler may skip before the run is given up."""


def train(
    accelerator: Accelerator,
    config: TrainConfig,
    publisher: Publisher,
    spent: float = 0.0,
) -> None:
    """Train, or go on training, until OUTPUT_DIR holds the finished pipeline and its record.

    Call on every process. `publisher` is what sends to the Hub on the way, `spent` how many seconds
    of --budget have gone since the launch. Raises UserError for what a person can put right,
    Interrupted after a signal that asks to stop, once the state is saved.
    """
    with ExitStack() as held:
        _train(accelerator, config, publisher, spent, held)


def _train(
    accelerator: Accelerator,
    config: TrainConfig,
    publisher: Publisher,
    spent: float,
    held: ExitStack,
) -> None:
    output_dir, device = Path(config.output_dir), accelerator.device
    main, say = accelerator.is_main_process, accelerator.print

    # Settings of an earlier run in this folder
    if not config.overwrite_output_dir:
        say(require_same_config(output_dir, flatten(config)), end="")

    # Data, model, noise, optimizer, average
    parts = build_train_state(accelerator, config)
    plan, ema, bare_unet = parts.plan, parts.ema, parts.bare_unet
    watch = Validator.open(parts)
    start = checkpoint.CheckpointState(
        step=0,
        micro_batches=plan.micro_batches,
        pixels_sha256=parts.data.facts.pixels_sha256,
        seconds=0.0,
        num_parameters=bare_unet.num_parameters(),
    )

    # The folder: emptied when that was asked for, and only now that everything else is in order
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(run_folder.run_lock(output_dir))
        if config.overwrite_output_dir:
            run_folder.delete_run(output_dir)
    accelerator.wait_for_everyone()

    # Resume
    wanted = config.checkpoint.resume_from_checkpoint
    if checkpoint_repo.is_hub_address(wanted):
        if accelerator.is_local_main_process:
            checkpoint_repo.download_checkpoint(
                wanted, output_dir, trust=config.hub.trust_checkpoint
            )
        accelerator.wait_for_everyone()
        wanted = "latest"
    folder = checkpoint.find_checkpoint(wanted, output_dir)
    state = start
    if folder is not None:
        found = checkpoint.read_state(folder)
        checkpoint.require_same_run(found, start, folder)
        if _finished(output_dir, found.step, plan, config):
            say(f"{output_dir} is finished: {found.step:,} steps are done.")
            say(next_command(output_dir))
            return
        state = checkpoint.load_checkpoint(accelerator, ema, folder, parts.tracks)
        parts.data.restore(state.stream, state.step * plan.images_per_step)
        say(f"Going on from {folder}.")
    watch.begin(state.step, state.skipped)
    if main:
        power_ema.delete_snapshots_after(output_dir, state.step)
        run_folder.write_json(output_dir / run_folder.TRAIN_CONFIG, flatten(config))
        run_folder.write_record(
            output_dir,
            finished=False,
            dataset=parts.data.facts,
            model={"parameters": bare_unet.num_parameters(), "channels": parts.data.channels},
            environment=run_folder.Environment.current(
                torch.cuda.get_device_name(device) if device.type == "cuda" else None,
                accelerator.num_processes,
                accelerator.mixed_precision,
            ),
        )
    tracker = Tracker(accelerator, config.tracking, output_dir, flatten(config), state.step)
    say("\n".join([*report.format_report(parts.data.facts), *describe_run(parts)]))

    # The loop
    clock, meter, stop = StepTimer(state.seconds), LossMeter(accelerator), StopSignals(accelerator)
    budget = TimeBudget(
        config.optimization.budget_seconds,
        plan.total_steps,
        state.spent + spent,
        state.seconds / state.step if state.step else None,
    )
    at_the_end = {**_chores(config, accelerator.num_processes), **watch.chores()}
    step, skipped = state.step, 0
    _, horizon = stop.agreed(budget.horizon(step, at_the_end), wait=True)
    if horizon == 0:
        raise UserError(
            f"The budget of {config.optimization.budget} was over before the first "
            "step: give a longer --budget."
        )
    # disable=None: no bar where the output is no terminal
    bar = tqdm(
        total=_known(horizon),
        initial=step,
        desc="Training",
        unit=" steps",
        disable=None if main else True,
    )
    parts.unet.train()
    while step < horizon:
        clock.start()
        lr = learning_rate(config.optimization, step, horizon)
        grad_norm = train_step(parts, step, lr, meter)
        if grad_norm is None:
            skipped, watch.skipped = skipped + 1, watch.skipped + 1
            if skipped == MAX_SKIPPED:
                raise UserError(
                    f"fp16 overflowed {MAX_SKIPPED} times in a row after step {step}. "
                    f"{_last_good(output_dir)} Use --mixed_precision bf16, or a smaller rate."
                )
            continue
        step, skipped = step + 1, 0
        meter.step(step, grad_norm)
        budget.step_done()
        signal, horizon = stop.agreed(budget.horizon(step, at_the_end))
        at_end = step >= horizon
        reports = at_end or is_due(step, config.tracking.logging_steps)
        saves = at_end or is_due(step, config.checkpoint.checkpointing_steps) or signal
        previews = not at_end and is_due(step, plan.preview_every)
        exports = not at_end and is_due(step, plan.export_every)
        evaluates = watch.is_on and (at_end or is_due(step, config.evaluation.eval_steps))
        snaps = parts.tracks is not None and (at_end or power_ema.snapshot_due(step))
        if reports or saves or previews or exports or evaluates or snaps:
            _require_finite(meter, lr, output_dir)
        clock.stop(device, wait=reports)
        bar.total = _known(horizon)
        bar.update()

        # Evaluation: held-out images, and drawn ones when asked; the best pipeline so far
        if evaluates:
            with budget.chore("evaluation"):
                watch.evaluate(step, None if horizon == UNLIMITED_STEPS else horizon, tracker)

        # Report
        if reports:
            values = {
                "epoch": round(step * plan.images_per_step / plan.num_images, 4),
                "loss": meter.mean_loss(),
                "lr": lr,
                "grad_norm": float(grad_norm),
                "images_per_s": round(clock.rate(step - state.step) * plan.images_per_step, 2),
                "seconds": round(clock.seconds, 3),
                "memory_mib": round(peak_memory_mib(device)),
            }
            tracker.scalars(step, values)
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s")
            seldom = at_end or step % (10 * config.tracking.logging_steps) == 0
            if bar.disable and main and seldom:
                print(_status(step, horizon, plan, values), flush=True)

        # Snapshot, for any EMA length: before the checkpoint that a resume goes on from
        if snaps:
            with budget.chore("snapshot"):
                parts.tracks.snapshot(output_dir, step, main)

        # Checkpoint: on time, at the end, and when asked to stop
        if saves:
            now = replace(
                start,
                step=step,
                seconds=clock.seconds,
                spent=budget.spent,
                stream=parts.data.state(step * plan.images_per_step),
                skipped=watch.skipped,
            )
            with budget.chore("checkpoint"):
                limit = config.checkpoint.checkpoints_total_limit
                checkpoint.save_checkpoint(accelerator, ema, now, output_dir, limit, parts.tracks)
            publisher.submit_checkpoint(checkpoint.checkpoint_folder(output_dir, step))
        if signal and not at_end:
            bar.close()
            tracker.finish()
            publisher.stop()
            raise Interrupted(
                f"Stopped by {signal.name} after step {step:,}; saved in "
                f"{output_dir}/checkpoint-{step}. The same command goes on from there.",
                exit_code=0 if signal.name == "SIGUSR1" else 128 + signal,
            )

        # Preview
        if previews:
            with budget.chore("preview"):
                _preview(parts, step, tracker)

        # Pipeline
        if exports:
            with budget.chore("export"):
                export_model(parts, output_dir, with_proof=publisher.uploads_pipelines)
            publisher.submit(step)
    bar.close()
    stop.release()

    # The end: the last preview, the pipeline, the record. A run cut off here does it all again.
    if config.preview.save_images_epochs:
        _preview(parts, step, tracker)
    export_model(parts, output_dir, with_proof=True)
    if main:
        images_seen, last = step * plan.images_per_step, tracker.last()
        facts = run_folder.TrainingRecord(
            steps=step,
            images_seen=images_seen,
            epochs=round(images_seen / plan.num_images, 2),
            seconds=round(clock.seconds, 1),
            images_per_s=round(images_seen / max(clock.seconds, 1e-9), 1),
            peak_memory_mib=round(peak_memory_mib(device)),
            final_loss=last.get("loss"),
            finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        run_folder.write_record(
            output_dir, training=facts, wandb=tracker.address, finished=True, exported_ema=None
        )
        print(_closing(output_dir, facts))
        if budget.lateness > 0:
            print(
                f"The budget of {config.optimization.budget} was exceeded by "
                f"{budget.lateness:.0f} s: it was too short."
            )
        if not config.hub.push_to_hub:
            print(next_command(output_dir))
    tracker.finish()
    publisher.finish()
    accelerator.wait_for_everyone()


def _preview(parts: TrainState, step: int, tracker: Tracker) -> None:
    """Draw the grid of `step`, always from the same seeds, shared over all processes."""
    accelerator, config = parts.accelerator, parts.config
    count = config.preview.eval_batch_size
    each = math.ceil(count / accelerator.num_processes)
    seeds = range(accelerator.process_index * each, (accelerator.process_index + 1) * each)
    scheduler = schedulers.build_sampling_scheduler(
        schedulers.DEFAULT_SCHEDULER,
        parts.scheduler.config,
        config.preview.ddpm_num_inference_steps,
    )
    with eval_weights(parts.bare_unet, parts.ema):
        drawn = [im for _, im in generate.generate_images(parts.bare_unet, scheduler, seeds, each)]
    gathered = accelerator.gather(torch.stack(drawn).to(accelerator.device)).cpu()
    if accelerator.is_main_process:
        sheet = image_io.make_grid(list(gathered[:count]))
        folder = Path(config.output_dir) / run_folder.SAMPLES
        folder.mkdir(exist_ok=True)
        image_io.save_png(sheet, folder / f"step-{step:06d}.png", {"step": str(step)})
        tracker.grid(step, sheet)


def _chores(config: TrainConfig, num_processes: int) -> dict[str, float]:
    """What must be done at the end, with the time to keep for it while unmeasured, in steps.

    A preview is a forward pass for each of its denoising steps; a training step costs three of one
    with train_batch_size images.
    """
    chores = {"checkpoint": 10.0, "export": 5.0}
    if config.ema.post_hoc_ema:
        chores["snapshot"] = 5.0
    if config.preview.save_images_epochs:
        share = config.preview.eval_batch_size / num_processes
        batches = share / config.optimization.train_batch_size
        passes = config.preview.ddpm_num_inference_steps * max(batches, 0.3)
        chores["preview"] = passes / 3 / config.optimization.gradient_accumulation_steps
    return chores


def _known(horizon: int) -> int | None:
    return None if horizon == UNLIMITED_STEPS else horizon


def _require_finite(meter: LossMeter, lr: float, output_dir: Path) -> None:
    step = meter.first_bad_step()
    if step:
        raise UserError(
            f"The loss or its gradients were not finite at step {step:,} (learning rate {lr:.3g}). "
            f"{_last_good(output_dir)} Try a smaller --learning_rate, a longer --lr_warmup_steps, "
            "or --mixed_precision no."
        )


def _last_good(output_dir: Path) -> str:
    last = checkpoint.latest_checkpoint(output_dir)
    return f"The last good checkpoint is {last}." if last else "No checkpoint had been saved yet."


def _finished(output_dir: Path, step: int, plan: Schedule, config: TrainConfig) -> bool:
    """Whether all that this config asks for was done by a run that is now at `step`."""
    complete = all((output_dir / name).exists() for name in run_folder.PIPELINE_FILES)
    if not complete or not run_folder.read_record(output_dir).finished:
        return False
    was = run_folder.read_json(output_dir / run_folder.TRAIN_CONFIG).get("budget")
    same_budget = config.optimization.budget is not None and was == config.optimization.budget
    return step >= plan.total_steps or same_budget


def _status(step: int, horizon: int, plan: Schedule, values: dict[str, float]) -> str:
    left = (horizon - step) * plan.images_per_step / max(values["images_per_s"], 1e-9)
    return (
        f"step {step:,}/{horizon:,}  loss {values['loss']:.4f}  "
        f"{values['images_per_s']:.0f} images/s  {format_duration(left)} left"
    )


def _closing(output_dir: Path, facts: run_folder.TrainingRecord) -> str:
    loss = facts.final_loss  # None when a run was stopped before its first report, for good
    said = "" if loss is None else f", final loss {loss:.4f}"
    return (
        f"Trained {facts.steps:,} steps in {format_duration(facts.seconds)} "
        f"({facts.images_per_s:,.0f} images/s){said}.\n"
        f"{output_dir} is a DDPMPipeline; the grids are in {output_dir / run_folder.SAMPLES}."
    )


def next_command(output_dir: Path) -> str:
    """The line that publishes a finished run."""
    return f"Next: python push.py {shlex.quote(str(output_dir))} {run_folder.default_repo_name(output_dir)}"
