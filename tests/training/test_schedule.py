"""Lengths, intervals and the learning rate as arithmetic on the optimizer step."""

import pytest
import torch
from diffusers.optimization import SchedulerType, get_scheduler

from ddpm.config.base import flatten
from ddpm.config.train import OptimizationConfig, TrainConfig
from ddpm.errors import UsageError
from ddpm.run_folder import write_json
from ddpm.training.schedule import UNLIMITED_STEPS, Schedule, learning_rate, require_same_config

RULES = "1:10,0.1:30,0.02"


def schedule(name, **values):
    rules = RULES if name == "piecewise_constant" else None
    return OptimizationConfig(lr_scheduler=name, lr_step_rules=rules, **values)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_every_schedule_of_diffusers_is_stepped_as_diffusers_steps_it(name):
    config = schedule(name, lr_warmup_steps=7, learning_rate=3e-3, lr_num_cycles=2, lr_power=2.0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs = get_scheduler(name, optimizer, RULES, 7, 50, num_cycles=2, power=2.0)
    for step in range(50):
        assert learning_rate(config, step, 50) == pytest.approx(theirs.get_last_lr()[0], abs=1e-15)
        optimizer.step()
        theirs.step()


def test_rates_by_hand():
    rate = {
        step: learning_rate(schedule("cosine", lr_warmup_steps=10), step, 110)
        for step in (0, 5, 10, 60, 110)
    }
    assert rate == pytest.approx({0: 0.0, 5: 5e-5, 10: 1e-4, 60: 5e-5, 110: 0.0}, abs=1e-12)
    pieces = [learning_rate(schedule("piecewise_constant"), step, 99) for step in (9, 10, 29, 30)]
    assert pieces == pytest.approx([1e-4, 1e-5, 1e-5, 2e-6])


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType])
def test_a_run_that_only_time_ends_begins_at_the_peak(name):
    config = schedule(name, lr_warmup_steps=10)
    assert learning_rate(config, 10 if name != "piecewise_constant" else 0, UNLIMITED_STEPS) == 1e-4


def test_a_plan_counts_optimizer_steps():
    config = TrainConfig(
        optimization=OptimizationConfig(
            train_batch_size=2, gradient_accumulation_steps=3, num_epochs=5
        )
    )
    made = Schedule.make(config, num_images=25, num_processes=2)
    assert (made.micro_batches, made.images_per_step) == (6, 12)
    assert (made.steps_per_epoch, made.total_steps, made.preview_every) == (3, 15, 30)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_horizon_is_in_optimizer_steps(accumulation, num_processes):
    """64 images, 8 in a micro-batch: more of these in a step make fewer steps an epoch."""
    optimization = OptimizationConfig(
        train_batch_size=8, gradient_accumulation_steps=accumulation, num_epochs=10
    )
    made = Schedule.make(TrainConfig(optimization=optimization), 64, num_processes)
    assert made.total_steps == 10 * 8 // (accumulation * num_processes)
    explicit = OptimizationConfig(max_train_steps=33, num_epochs=10)
    assert Schedule.make(TrainConfig(optimization=explicit), 64, num_processes).total_steps == 33


def test_time_is_the_only_limit_of_a_budget():
    def total(**values):
        config = TrainConfig(optimization=OptimizationConfig(budget="1h", **values))
        return Schedule.make(config, 64, 1).total_steps

    assert total() == UNLIMITED_STEPS
    assert total(max_train_steps=50) == 50


# What may change


def settings(**changes):
    return {**flatten(TrainConfig()), **changes}


def test_legal_changes_are_one_note_with_each_was_and_now(tmp_path):
    write_json(tmp_path / "train_config.json", settings())
    said = require_same_config(tmp_path, settings(num_epochs=200, logger="wandb"))
    assert said.count("\n") == 1
    assert "num_epochs was 100, now 200" in said and "logger was none, now wandb" in said
    assert "learning rate follows the new length" in said
    assert "learning rate" not in require_same_config(tmp_path, settings(logging_steps=5))
    assert require_same_config(tmp_path, settings(resume_from_checkpoint="checkpoint-5")) == ""


def test_a_note_leaves_out_settings_that_a_run_of_an_older_version_did_not_have(tmp_path):
    was = settings()
    del was["budget"], was["hub_model_id"], was["resize_mode"]
    write_json(tmp_path / "train_config.json", was)
    assert require_same_config(tmp_path, settings()) == ""
    with pytest.raises(UsageError, match="resize_mode was crop, now pad"):
        require_same_config(tmp_path, settings(resize_mode="pad"))


def test_other_changes_are_refused_with_each_was_and_now(tmp_path):
    write_json(tmp_path / "train_config.json", settings())
    with pytest.raises(UsageError) as refused:
        require_same_config(tmp_path, settings(seed=7, num_epochs=3, snr_gamma=5.0))
    assert "seed was 0, now 7" in str(refused.value)
    assert "snr_gamma was None, now 5.0" in str(refused.value)
    assert "num_epochs" not in str(refused.value)
