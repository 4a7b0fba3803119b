"""The training loop: its comments give the order of a run.

The learning rate, EMA, intervals, file names and the position in the data are functions of the
optimizer step. Periodic work follows the step, a block for each kind; all processes run it.
"""

import shlex
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ddpm import file_io, run_folder, run_record
from ddpm.accelerator import from_main
from ddpm.config.base import flatten
from ddpm.config.train import TrainConfig
from ddpm.data import report
from ddpm.diffusion import power_ema
from ddpm.diffusion.ema import eval_weights
from ddpm.errors import Interrupted, UserError, foreign_errors
from ddpm.publishing import checkpoint_repo
from ddpm.publishing.background import Publisher
from ddpm.sampling import image_io
from ddpm.sampling.pipeline import export_settings
from ddpm.sampling.preview import generate_preview
from ddpm.training import checkpoint
from ddpm.training.pretrained import Pretrained
from ddpm.training.schedule import (
    UNLIMITED_STEPS,
    Schedule,
    TimeBudget,
    is_due,
    keep_micro_batches,
    learning_rate,
    require_same_config,
)
from ddpm.training.share import share_checkpoint
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

MAX_SKIPPED_IN_A_ROW = 50
"""Steps that fp16's gradient scaler may skip in a row before the run is given up."""


def train(
    accelerator: Accelerator,
    config: TrainConfig,
    publisher: Publisher,
    elapsed: float = 0.0,
    pretrained: Pretrained | None = None,
) -> None:
    """Train, or resume training, until output_dir holds the finished pipeline and its record.

    Call on every process. `publisher` uploads while training goes on; `elapsed` is the time since
    the launch, in seconds, for --budget; `pretrained` is the model that the config names. Raises
    UserError for what the user can fix, and Interrupted after a stop signal, once the state is
    saved.
    """
    output_dir, main = Path(config.output_dir), accelerator.is_main_process

    # Compare the settings with those of an earlier run in this folder; machines that do not have it
    # receive its newest checkpoint. Another number of processes shares the same micro-batches
    adapted = config
    if not config.overwrite_output_dir:
        if main:
            print(require_same_config(config), end="")
        newest = checkpoint.complete_checkpoints(output_dir)[-1:] if main else []
        share_checkpoint(accelerator, next(iter(newest), None), output_dir)
        if main and newest:
            adapted = keep_micro_batches(config, newest[0], accelerator.num_processes)
        adapted = from_main(accelerator, adapted)

    # Build the data, model, optimizer, averages and validation
    state = build_train_state(accelerator, adapted, pretrained)
    validator = Validator.open(state)

    # Lock the folder; empty it if asked, only now that everything else has been checked
    if main:
        output_dir.mkdir(parents=True, exist_ok=True)
    with run_folder.run_lock(output_dir) if main else nullcontext():
        if main and config.overwrite_output_dir:
            run_folder.delete_run(output_dir)
        accelerator.wait_for_everyone()

        # Resume from a checkpoint
        start = _resume(state)
        if start is None:
            return
        validator.resume(start.step)
        if main:
            power_ema.delete_snapshots_after(output_dir, start.step)

        # Record the settings and facts of the run
        if main:
            file_io.write_json(output_dir / run_folder.TRAIN_CONFIG, flatten(config))
            _write_first_record(state, start)
            if not (output_dir / run_folder.MODEL_INDEX).exists():
                export_settings(state.bare_unet, state.scheduler, output_dir)
        tracker = Tracker(accelerator, config.tracking, output_dir, flatten(config), start.step)
        for line in (*report.format_report(state.data.facts), *describe_run(state)):
            accelerator.print(line)

        _train(state, validator, tracker, publisher, start, elapsed)


def _train(
    state: TrainState,
    validator: Validator,
    tracker: Tracker,
    publisher: Publisher,
    start: run_record.CheckpointState,
    elapsed: float,
) -> None:
    """Train from `start` to the end of the run."""
    accelerator, config, schedule = state.accelerator, state.config, state.schedule
    output_dir, main = Path(config.output_dir), accelerator.is_main_process
    timer, meter = StepTimer(start.seconds), LossMeter(accelerator)
    signals = StopSignals(accelerator)
    budget = TimeBudget(
        config.optimization.budget_seconds,
        schedule.total_steps,
        start.spent + elapsed,
        start.seconds / start.step if start.step else None,
    )
    final_work = {**_final_work(config, accelerator.num_processes), **validator.final_work()}
    _, horizon = signals.agree(budget.horizon(start.step, final_work), wait=True)
    if horizon == 0:
        raise UserError(
            f"The budget of {config.optimization.budget} was over before the first "
            "step: give a longer --budget."
        )
    # disable=None: no progress bar if the output is not a terminal
    bar = tqdm(
        total=_known(horizon),
        initial=start.step,
        desc="Training",
        unit=" steps",
        disable=None if main else True,
    )
    step, skipped, skipped_in_a_row = start.step, start.skipped, 0
    state.unet.train()
    while step < horizon:
        # Take a step; if fp16 overflowed, take the same one again with a smaller loss scale
        timer.start()
        lr = learning_rate(config.optimization, step, horizon)
        grad_norm = train_step(state, step, lr, meter)
        if grad_norm is None:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise UserError(
                    f"fp16 overflowed {MAX_SKIPPED_IN_A_ROW} times in a row after step {step}. "
                    f"{_last_good(output_dir)} Use --mixed_precision bf16, or a smaller rate."
                )
            continue
        step, skipped_in_a_row = step + 1, 0
        meter.end_step(step, grad_norm)
        budget.end_step()
        signal, horizon = signals.agree(budget.horizon(step, final_work))

        # Find out what is due after this step; stop before anything is written if the loss or the
        # gradients were not finite
        at_end = step >= horizon
        evaluates = validator.is_on and (at_end or is_due(step, config.evaluation.eval_steps))
        reports = at_end or is_due(step, config.tracking.logging_steps)
        snapshots = state.power_ema is not None and (at_end or power_ema.snapshot_due(step))
        saves = at_end or signal or is_due(step, config.checkpoint.checkpointing_steps)
        previews = not at_end and is_due(step, schedule.preview_every)
        exports = not at_end and is_due(step, schedule.export_every)
        if evaluates or reports or snapshots or saves or previews or exports:
            _require_finite(meter, lr, output_dir)
        timer.stop(accelerator.device, wait=reports)
        bar.total = _known(horizon)
        bar.update()

        # Evaluate, and keep the best pipeline
        if evaluates:
            with budget.measure("evaluation"):
                validator.evaluate(step, _known(horizon), skipped, tracker)

        # Report
        if reports:
            values = {
                "epoch": schedule.epoch(step),
                "loss": meter.mean_loss(),
                "lr": lr,
                "grad_norm": float(grad_norm),
                "images_per_s": round(timer.rate(step - start.step) * schedule.images_per_step, 2),
                "seconds": round(timer.seconds, 3),
                "memory_mib": round(peak_memory_mib(accelerator.device)),
            }
            tracker.log(step, values)
            bar.set_postfix_str(f"loss {values['loss']:.4f}, {values['images_per_s']:.0f} images/s")
            prints = at_end or is_due(step, 10 * config.tracking.logging_steps)
            if bar.disable and main and prints:
                print(_status(step, horizon, schedule, values), flush=True)

        # Save a snapshot for post-hoc EMA, before the checkpoint that a resume starts from
        if snapshots:
            with budget.measure("snapshot"):
                state.power_ema.snapshot(output_dir, step, main)

        # Save a checkpoint, and stop after it if a signal asks for that
        if saves:
            saved = replace(
                start,
                step=step,
                seconds=timer.seconds,
                spent=budget.spent,
                stream=_gather_stream(state.data.state(step * schedule.images_per_step)),
                skipped=skipped,
            )
            limit = config.checkpoint.checkpoints_total_limit
            with budget.measure("checkpoint"):
                folder = checkpoint.save_checkpoint(
                    accelerator, state.ema, saved, output_dir, limit, state.power_ema
                )
            publisher.submit_checkpoint(folder)
            if signal and not at_end:
                bar.close()
                tracker.finish()
                publisher.stop()
                raise Interrupted(
                    f"Stopped by {signal.name} after step {step:,}; saved in {folder}. The same "
                    "command resumes from there.",
                    exit_code=0 if signal.name == "SIGUSR1" else 128 + signal,
                )

        # Preview
        if previews:
            with budget.measure("preview"):
                write_preview(state, step, tracker)

        # Export the pipeline
        if exports:
            with budget.measure("export"):
                export_model(state, output_dir, with_proof=publisher.uploads_pipelines)
            publisher.submit(step)
    bar.close()
    signals.release()

    # Write the last preview, the pipeline and the record; a run that is killed here repeats this
    if config.preview.save_images_epochs:
        write_preview(state, step, tracker)
    export_model(state, output_dir, with_proof=True)
    if main:
        facts = _training_record(state, step, timer)
        run_record.write_record(
            output_dir, training=facts, finished=True, exported_ema=None, **tracker.addresses
        )
        print(_summary(output_dir, facts))
        if budget.overrun > 0:
            print(
                f"The budget of {config.optimization.budget} was exceeded by "
                f"{budget.overrun:.0f} s: it was too short."
            )
        if not config.hub.push_to_hub:
            print(next_command(output_dir))
    tracker.finish()
    publisher.finish()


def _resume(state: TrainState) -> run_record.CheckpointState | None:
    """Load the checkpoint that the config asks for, and return where the run starts.

    None means that the run is finished, which is printed. Call on every process.
    """
    accelerator, config, schedule = state.accelerator, state.config, state.schedule
    output_dir, name = Path(config.output_dir), config.checkpoint.resume_from_checkpoint
    main = accelerator.is_main_process
    if checkpoint_repo.is_hub_address(name):
        if main:
            checkpoint_repo.download_checkpoint(name, output_dir, trust=config.hub.trust_checkpoint)
        name = "latest"
    start = run_record.CheckpointState(
        step=0,
        micro_batches=schedule.micro_batches,
        pixels_sha256=state.data.facts.pixels_sha256,
        seconds=0.0,
        num_parameters=state.bare_unet.num_parameters(),
        base_model=state.pretrained.record if state.pretrained else None,
    )
    hashes = gather_object([start.pixels_sha256])
    if len(set(hashes)) > 1 and not config.data.streaming:
        raise UserError(
            f"The processes have different images: those of ranks 0 and "
            f"{next(rank for rank, other in enumerate(hashes) if other != hashes[0])} differ. Give "
            "each machine the same data, and the same version of Pillow, which decodes it."
        )
    folder = checkpoint.find_checkpoint(name, output_dir) if main else None
    folder = share_checkpoint(accelerator, folder, output_dir)
    if folder is None:
        return start
    saved = run_record.read_checkpoint_state(folder)
    checkpoint.require_same_run(saved, start, folder)
    if from_main(accelerator, main and _is_finished(state, saved.step)):
        accelerator.print(f"{output_dir} is finished: {saved.step:,} steps are done.")
        accelerator.print(next_command(output_dir))
        return None
    start = checkpoint.load_checkpoint(accelerator, state.ema, folder, state.power_ema)
    with foreign_errors(f"{folder} cannot be loaded", checkpoint.ADVICE):
        state.data.restore(start.stream, start.step * schedule.images_per_step)
    note = " Its weights replace those of the pretrained model." if state.pretrained else ""
    accelerator.print(f"Resuming from {folder}.{note}")
    return start


def _gather_stream(lanes: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the places of all lanes from those of each process; None for data without any."""
    if lanes is None:
        return None
    return {lane: place for part in gather_object([lanes]) for lane, place in part.items()}


def _is_finished(state: TrainState, step: int) -> bool:
    """Return whether a run that has done `step` steps has done all that this config asks for."""
    output_dir, budget = Path(state.config.output_dir), state.config.optimization.budget
    complete = all((output_dir / name).exists() for name in run_folder.model_files(output_dir))
    if not complete or not run_record.read_record(output_dir).finished:
        return False
    previous = file_io.read_json(output_dir / run_folder.TRAIN_CONFIG).get("budget")
    return step >= state.schedule.total_steps or (budget is not None and budget == previous)


def _write_first_record(state: TrainState, start: run_record.CheckpointState) -> None:
    """Record the data, the model and the environment of a run that is not finished."""
    accelerator = state.accelerator
    on_gpu = accelerator.device.type == "cuda"
    run_record.write_record(
        Path(state.config.output_dir),
        finished=False,
        dataset=state.data.facts,
        model={"parameters": state.bare_unet.num_parameters(), "channels": state.data.channels},
        environment=run_record.Environment.current(
            torch.cuda.get_device_name(accelerator.device) if on_gpu else None,
            accelerator.num_processes,
            accelerator.mixed_precision,
        ),
        base_model=start.base_model,
    )


def write_preview(state: TrainState, step: int, tracker: Tracker) -> None:
    """Draw the grid of `step`, always from the same seeds. Call on every process."""
    accelerator, preview = state.accelerator, state.config.preview
    with eval_weights(state.bare_unet, state.ema):
        grid = generate_preview(
            state.bare_unet,
            state.scheduler.config,
            preview.eval_batch_size,
            preview.ddpm_num_inference_steps,
            state.data.class_names,
            accelerator.process_index,
            accelerator.num_processes,
            lambda images: accelerator.gather(images.to(accelerator.device)).cpu(),
        )
    if accelerator.is_main_process:
        folder = Path(state.config.output_dir) / run_folder.SAMPLES
        folder.mkdir(exist_ok=True)
        image_io.save_png(grid, folder / f"step-{step:06d}.png", {"step": str(step)})
        tracker.log_grid(step, grid)


def _final_work(config: TrainConfig, num_processes: int) -> dict[str, float]:
    """Return the work at the end, with the time to keep for it while unmeasured, in steps.

    A preview takes a forward pass for each of its denoising steps; a training step costs three of
    them with train_batch_size images.
    """
    work = {"checkpoint": 10.0, "export": 5.0}
    if config.ema.post_hoc_ema:
        work["snapshot"] = 5.0
    if config.preview.save_images_epochs:
        images = config.preview.eval_batch_size / num_processes
        batches = max(images / config.optimization.train_batch_size, 0.3)
        passes = config.preview.ddpm_num_inference_steps * batches
        if config.data.has_labels:  # one pass without guidance, and two with it
            passes *= 3
        work["preview"] = passes / 3 / config.optimization.gradient_accumulation_steps
    return work


def _known(horizon: int) -> int | None:
    """Return the last step, None if only time ends the run."""
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
    complete = checkpoint.complete_checkpoints(output_dir)
    if not complete:
        return "No checkpoint had been saved yet."
    return f"The last good checkpoint is {complete[-1]}."


def _status(step: int, horizon: int, schedule: Schedule, values: dict[str, float]) -> str:
    seconds = (horizon - step) * schedule.images_per_step / max(values["images_per_s"], 1e-9)
    return (
        f"step {step:,}/{horizon:,}  loss {values['loss']:.4f}  "
        f"{values['images_per_s']:.0f} images/s  {format_duration(seconds)} left"
    )


def _training_record(state: TrainState, step: int, timer: StepTimer) -> run_record.TrainingRecord:
    images_seen = step * state.schedule.images_per_step
    entries = run_folder.read_metrics(Path(state.config.output_dir))
    return run_record.TrainingRecord(
        steps=step,
        images_seen=images_seen,
        epochs=round(images_seen / state.schedule.num_images, 2),
        seconds=round(timer.seconds, 1),
        images_per_s=round(images_seen / max(timer.seconds, 1e-9), 1),
        peak_memory_mib=round(peak_memory_mib(state.accelerator.device)),
        # None if the run was stopped before its first report and its budget then ended
        final_loss=entries[-1].get("loss") if entries else None,
        finished_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )


def _summary(output_dir: Path, facts: run_record.TrainingRecord) -> str:
    loss = "" if facts.final_loss is None else f", final loss {facts.final_loss:.4f}"
    return (
        f"Trained {facts.steps:,} steps in {format_duration(facts.seconds)} "
        f"({facts.images_per_s:,.0f} images/s){loss}.\n"
        f"{output_dir} is a DDPMPipeline; the grids are in {output_dir / run_folder.SAMPLES}."
    )


def next_command(output_dir: Path) -> str:
    """Return the line that publishes a finished run."""
    repo = run_folder.default_repo_name(output_dir)
    return f"Next: python push.py {shlex.quote(str(output_dir))} {repo}"
