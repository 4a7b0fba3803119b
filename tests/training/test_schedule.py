"""Lengths, intervals, the learning rate and the time budget as functions of the optimizer step."""

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from ddpm.config.base import flatten
from ddpm.config.data import DataConfig
from ddpm.config.train import (
    CheckpointConfig,
    DiffusionConfig,
    OptimizationConfig,
    TrackingConfig,
    TrainConfig,
)
from ddpm.errors import UsageError
from ddpm.file_io import write_json
from ddpm.training import schedule
from ddpm.training.schedule import (
    EXIT_SECONDS,
    UNLIMITED_STEPS,
    WARMUP_STEPS,
    Schedule,
    TimeBudget,
    keep_micro_batches,
    learning_rate,
    require_same_config,
    seconds_since_launch,
)

RULES = "1:10,0.1:30,0.02"


# The learning rate


def lr_config(name, **values):
    rules = RULES if name == "piecewise_constant" else None
    return OptimizationConfig(lr_scheduler=name, lr_step_rules=rules, **values)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_learning_rate_equals_that_of_diffusers_scheduler(name):
    config = lr_config(name, lr_warmup_steps=7, learning_rate=3e-3, lr_num_cycles=2, lr_power=2.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = get_scheduler(name, optimizer, RULES, 7, 50, num_cycles=2, power=2.0)
    for step in range(50):
        expected = scheduler.get_last_lr()[0]
        assert learning_rate(config, step, 50) == pytest.approx(expected, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_learning_rate_by_hand():
    cosine = lr_config("cosine", lr_warmup_steps=10)
    rates = {step: learning_rate(cosine, step, 110) for step in (0, 5, 10, 60, 110)}
    assert rates == pytest.approx({0: 0.0, 5: 5e-5, 10: 1e-4, 60: 5e-5, 110: 0.0}, abs=1e-12)
    rates = [learning_rate(lr_config("piecewise_constant"), step, 99) for step in (9, 10, 29, 30)]
    assert rates == pytest.approx([1e-4, 1e-5, 1e-5, 2e-6])


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_run_that_only_time_ends_begins_at_the_peak(name):
    config = lr_config(name, lr_warmup_steps=10)
    assert learning_rate(config, 10 if name != "piecewise_constant" else 0, UNLIMITED_STEPS) == 1e-4


# Lengths


def make_schedule(num_images=64, num_processes=1, **values):
    config = TrainConfig(optimization=OptimizationConfig(**values))
    return Schedule.make(config, num_images, num_processes)


def test_schedule_counts_optimizer_steps():
    made = make_schedule(25, 2, train_batch_size=2, gradient_accumulation_steps=3, num_epochs=5)
    assert (made.micro_batches, made.images_per_step) == (6, 12)
    assert (made.steps_per_epoch, made.total_steps, made.preview_every) == (3, 15, 30)
    assert made.epoch(4) == 1.92


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_length_is_in_optimizer_steps(num_processes, accumulation):
    """64 images, 8 in a micro-batch: more micro-batches in a step make fewer steps an epoch."""
    made = make_schedule(
        64,
        num_processes,
        train_batch_size=8,
        gradient_accumulation_steps=accumulation,
        num_epochs=10,
    )
    assert made.total_steps == 10 * 8 // (accumulation * num_processes)
    assert make_schedule(64, num_processes, max_train_steps=33, num_epochs=10).total_steps == 33


def test_budget_leaves_the_length_open_unless_steps_are_given():
    assert make_schedule(budget="1h").total_steps == UNLIMITED_STEPS
    assert make_schedule(budget="1h", max_train_steps=50).total_steps == 50


# What may change between the parts of a run


@pytest.fixture
def earlier_run(tmp_path):
    """A config whose output_dir holds a run with the same settings."""
    config = TrainConfig(output_dir=str(tmp_path))
    write_json(tmp_path / "train_config.json", flatten(config))
    return config


def test_settings_that_may_change_are_noted_in_one_line(earlier_run):
    changed = replace(
        earlier_run,
        optimization=OptimizationConfig(num_epochs=200),
        tracking=TrackingConfig(logger="wandb"),
    )
    note = require_same_config(changed)
    assert note.count("\n") == 1
    assert "num_epochs was 100, now 200" in note and "logger was none, now wandb" in note
    assert "learning rate follows the new length" in note
    logging = replace(earlier_run, tracking=TrackingConfig(logging_steps=5))
    assert "learning rate" not in require_same_config(logging)
    resume = CheckpointConfig(resume_from_checkpoint="checkpoint-5")
    assert require_same_config(replace(earlier_run, checkpoint=resume)) == ""


@pytest.mark.parametrize(
    ("micro_batches", "accumulation", "num_processes", "kept"),
    [(2, 1, 1, 2), (8, 1, 4, 2), (8, 2, 4, 2), (2, 1, 4, 1), (3, 1, 2, 1), (8, 4, 4, 4)],
)
def test_another_number_of_processes_keeps_the_micro_batches(
    earlier_run, tmp_path, micro_batches, accumulation, num_processes, kept
):
    """The run in output_dir has an accumulation of 1; where another one is given it counts, and
    what cannot be shared equally is left for the checkpoint to refuse."""
    (tmp_path / "checkpoint-2").mkdir()
    state = {"step": 2, "micro_batches": micro_batches, "pixels_sha256": "f", "seconds": 1.0}
    write_json(tmp_path / "checkpoint-2" / "state.json", {**state, "num_parameters": 8})
    optimization = OptimizationConfig(gradient_accumulation_steps=accumulation)
    config = replace(earlier_run, optimization=optimization)
    adapted = keep_micro_batches(config, tmp_path / "checkpoint-2", num_processes)
    assert adapted.optimization.gradient_accumulation_steps == kept
    assert replace(adapted, optimization=optimization) == config


def test_settings_that_an_older_version_did_not_have_count_as_their_default(earlier_run, tmp_path):
    settings = flatten(earlier_run)
    del settings["budget"], settings["hub_model_id"], settings["resize_mode"]
    write_json(tmp_path / "train_config.json", settings)
    assert require_same_config(earlier_run) == ""
    with pytest.raises(UsageError, match="resize_mode was crop, now pad"):
        require_same_config(replace(earlier_run, data=DataConfig(resize_mode="pad")))


def test_data_may_move_once_a_checkpoint_knows_the_pixels(earlier_run, tmp_path):
    """A scratch folder for each job, another disk, a copy of a Hub dataset."""
    moved = replace(earlier_run, data=DataConfig(train_data_dir="/scratch/2/photos"))
    with pytest.raises(UsageError, match="train_data_dir was None, now /scratch/2/photos"):
        require_same_config(moved)
    (tmp_path / "checkpoint-5").mkdir()
    assert "train_data_dir was None, now /scratch/2/photos" in require_same_config(moved)
    for resolution, text in ((32, "32"), ((48, 80), "48,80")):
        with pytest.raises(UsageError, match=f"resolution was 64, now {text}"):
            require_same_config(replace(earlier_run, data=DataConfig(resolution=resolution)))


def test_other_changes_are_refused_with_each_was_and_now(earlier_run):
    changed = replace(
        earlier_run,
        optimization=OptimizationConfig(seed=7, num_epochs=3),
        diffusion=DiffusionConfig(snr_gamma=5.0),
    )
    with pytest.raises(UsageError) as refused:
        require_same_config(changed)
    assert "seed was 0, now 7" in str(refused.value)
    assert "snr_gamma was None, now 5.0" in str(refused.value)
    assert "num_epochs" not in str(refused.value)


# The time budget


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: clock.now, in seconds."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(schedule, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def run_to_horizon(budget, clock, seconds_per_step, final_work=None, periodic_work=()):
    """Take steps until the horizon is reached, with (every, name, seconds) of periodic work."""
    step, horizon = 0, budget.horizon(0, final_work or {})
    while step < horizon:
        clock.now += seconds_per_step(step)
        step += 1
        budget.end_step()
        for every, name, seconds in periodic_work:
            if step % every == 0:
                with budget.measure(name):
                    clock.now += seconds
        horizon = budget.horizon(step, final_work or {})


def test_run_ends_within_its_time_and_uses_it(clock):
    budget = TimeBudget(600.0, UNLIMITED_STEPS)
    work = ((100, "preview", 20.0), (50, "checkpoint", 4.0))
    run_to_horizon(budget, clock, lambda step: 0.5, {"preview": 5.0, "checkpoint": 5.0}, work)
    end = clock.now - 1000.0 + 20.0 + 4.0  # after the last preview and checkpoint
    assert 600.0 - EXIT_SECONDS - 12.0 < end <= 600.0


@pytest.mark.parametrize("speeds", [(0.2, 0.6), (0.6, 0.2)], ids=["slower", "faster"])
def test_run_that_changes_its_speed_still_ends_in_time(clock, speeds):
    budget = TimeBudget(300.0, UNLIMITED_STEPS)
    run_to_horizon(budget, clock, lambda step: speeds[clock.now > 1150.0])
    assert 290.0 < clock.now - 1000.0 <= 300.0


def test_slow_first_steps_are_not_measured(clock):
    """Compilation and warm-up take a minute; the horizon is that of the steps after them."""
    budget = TimeBudget(200.0, UNLIMITED_STEPS)
    for seconds in [30.0] * (WARMUP_STEPS + 1):
        clock.now += seconds
        budget.end_step()
        assert budget.horizon(1, {}) == UNLIMITED_STEPS
    clock.now += 1.0
    budget.end_step()
    left = 200.0 - 30.0 * (WARMUP_STEPS + 1) - 1.0 - EXIT_SECONDS - 0.5
    assert budget.horizon(5, {}) == 5 + int(left)


def test_work_that_was_never_measured_is_reserved_in_steps(clock):
    budget = TimeBudget(100.0, UNLIMITED_STEPS, seconds_per_step=1.0)
    assert budget.horizon(0, {}) - budget.horizon(0, {"preview": 25.0}) == 25


def test_periodic_work_does_not_count_as_a_slow_step(clock):
    budget = TimeBudget(1000.0, UNLIMITED_STEPS)
    for step in range(10):
        clock.now += 1.0
        budget.end_step()
        if step == 7:
            with budget.measure("preview"):
                clock.now += 100.0
    assert budget.horizon(10, {}) == 10 + int(1000.0 - 110.0 - EXIT_SECONDS - 0.5)


def test_earlier_parts_count(clock):
    """A part that begins with everything spent takes no step."""
    budget = TimeBudget(100.0, UNLIMITED_STEPS, spent=99.0, seconds_per_step=0.5)
    assert budget.horizon(180, {"checkpoint": 1.0}) == 180
    longer = TimeBudget(200.0, UNLIMITED_STEPS, spent=99.0, seconds_per_step=0.5)
    assert longer.horizon(180, {}) == 180 + int((101.0 - EXIT_SECONDS - 0.25) / 0.5)


def test_number_of_steps_limits_the_horizon(clock):
    assert TimeBudget(None, 77).horizon(5, {}) == 77
    assert TimeBudget(1e6, 77, seconds_per_step=0.1).horizon(5, {}) == 77


def test_budget_that_the_start_has_used_up_takes_one_step(clock):
    budget = TimeBudget(40.0, UNLIMITED_STEPS, spent=38.0)
    assert budget.horizon(1, {}) == 1 and budget.overrun == 0.0
    clock.now += 5.0
    assert budget.overrun == pytest.approx(3.0)
    assert TimeBudget(None, 7, spent=38.0).overrun == 0.0


def test_launch_is_that_of_the_launcher(monkeypatch):
    """Time counts from the start of the launcher, this process having been started before it."""
    alone = seconds_since_launch()
    assert 0 < alone <= seconds_since_launch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setattr(os, "getppid", lambda: launcher.pid)
        assert seconds_since_launch() < alone
        launcher.communicate(b"\n")


@pytest.mark.skipif(not hasattr(schedule.time, "CLOCK_BOOTTIME"), reason="the clock of Linux")
def test_setting_the_clock_of_the_machine_changes_no_budget(monkeypatch):
    before, budget = seconds_since_launch(), TimeBudget(1e6, 77)
    for wall_clock in (0.0, 1e12):
        monkeypatch.setattr(schedule.time, "time", lambda now=wall_clock: now)
        assert 0 <= seconds_since_launch() - before < 1e5 and budget.spent < 1e5


def test_launch_is_found_without_a_clock_of_the_boot(monkeypatch):
    """On systems other than Linux; the wall clock may differ by its resolution."""
    monkeypatch.delattr(schedule.time, "CLOCK_BOOTTIME", raising=False)
    assert seconds_since_launch() >= 0
