"""Warnings about a run, from series of evaluations written by hand."""

import pytest
import torch

from ddpm.config.train import EMAConfig
from ddpm.diffusion.ema import EMA
from ddpm.training import diagnostics


def decay_of(**settings):
    return EMA(torch.nn.Linear(1, 1), EMAConfig(**settings)).decay


def series(losses, raw=None, epochs=1.0, skipped=None, every=250):
    """Return evaluations at regular intervals of steps and epochs."""
    lines = []
    for number, loss in enumerate(losses, 1):
        line = {"step": number * every, "epoch": number * epochs, "eval_loss": loss}
        if raw is not None:
            line["eval_loss_raw"] = raw[number - 1]
        if skipped is not None:
            line["skipped_steps"] = skipped[number - 1]
        lines.append(line)
    return lines


def warnings(lines, decay=None, last_step=10_000):
    """Return the warnings of a run, evaluation by evaluation: [(step, text), ...]."""
    return [
        (lines[number - 1]["step"], text)
        for number in range(1, len(lines) + 1)
        for text in diagnostics.new_warnings(lines[:number], decay, last_step)
    ]


def ema_weights(decay, n):
    """Return the weights in the EMA at step n of the parameters of each step 1 .. n."""
    weights = []
    for step in range(1, n + 1):
        weights = [weight * decay(step) for weight in weights] + [1 - decay(step)]
    return weights


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_power": 1.0}, {"ema_max_decay": 0.99}, {"ema_inv_gamma": 20.0, "ema_power": 0.9}],
)
def test_ema_is_usable_once_its_mean_step_has_reached_this_one(settings):
    """Compared with the weights in the EMA, computed one by one."""
    decay, step = decay_of(**settings), 60
    n = diagnostics.ema_usable_step(step, decay)

    def mean_step(n):
        weights = ema_weights(decay, n)
        return sum(weight * k for k, weight in enumerate(weights, 1)) / sum(weights)

    assert mean_step(n) >= step - 1e-6 and mean_step(n - 1) < step


def test_mean_of_all_steps_is_usable_at_twice_the_step():
    """With power 1 the EMA at step n is the mean of the weights so far: its mean step is n / 2."""
    assert diagnostics.ema_usable_step(1000, decay_of(ema_power=1.0)) == pytest.approx(2000, abs=3)


def test_ema_that_never_moves_is_never_usable():
    assert diagnostics.ema_usable_step(100, lambda step: 1.0) is None


def test_lag_is_reported_once():
    lines = series([0.9, 0.8, 0.5, 0.3], raw=[0.4, 0.35, 0.32, 0.3])
    ((step, text),) = warnings(lines, decay_of(ema_power=1.0))
    assert step == 250
    assert text == (
        "The average lags: held-out loss 0.9000, of the raw weights 0.4000. Usable at about step "
        "500; the raw weights are better now."
    )


def test_second_lag_is_reported_again_with_the_end_of_the_run():
    lines = series([0.9, 0.3, 0.9], raw=[0.4, 0.3, 0.4])
    reported = warnings(lines, decay_of(ema_power=1.0), last_step=1000)
    assert [step for step, _ in reported] == [250, 750]
    assert "end of this run" not in reported[0][1]
    assert "about step 1,500" in reported[1][1] and "lower --ema_max_decay" in reported[1][1]


def test_lag_that_crosses_the_limit_repeatedly_is_reported_once():
    """Losses of a real run: 4.7% between two of more than 5%."""
    lines = series([0.443, 0.4253, 0.412], raw=[0.3891, 0.4053, 0.3831])
    assert [step for step, _ in warnings(lines, decay_of(ema_power=1.0))] == [250]


@pytest.mark.parametrize("raw", [0.96, 1.0, 1.5])
def test_ema_as_good_as_the_raw_weights_does_not_lag(raw):
    assert warnings(series([1.0], raw=[raw]), decay_of()) == []
    assert warnings(series([1.0]), decay_of()) == []


def test_rising_loss_after_many_epochs_is_reported():
    lines = series([0.50, 0.40, 0.405, 0.42, 0.432, 0.44], epochs=2.5)
    ((step, text),) = warnings(lines)
    assert step == 1250  # 0.405 is within 2%; 0.42 and 0.432 are above 0.408
    assert text.startswith(
        "12 epochs, and the loss on held-out images has risen by 8% since step 500: expect copies"
    )
    assert "--random_shift" in text and "--pretrained_model_name_or_path" in text


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([0.50, 0.40, 0.43, 0.43], 1.0),  # few epochs
        ([0.50, 0.40, 0.43, 0.40, 0.43], 5.0),  # not twice in a row
        ([0.50, 0.40, 0.407, 0.407], 5.0),  # within the noise
        ([0.50, 0.45, 0.40, 0.35], 5.0),
    ],
)
def test_other_courses_of_the_loss_are_no_rise(losses, epochs):
    assert [w for _, w in warnings(series(losses, epochs=epochs)) if "risen" in w] == []


def test_skipped_steps_are_counted_since_the_previous_evaluation():
    lines = series([0.5, 0.4, 0.3], skipped=[4, 34, 38])
    ((step, text),) = warnings(lines)
    assert step == 500
    assert text.startswith("11% of the last 280 steps were not finite and were skipped (fp16)")


def test_few_skipped_steps_are_normal():
    assert warnings(series([0.5], skipped=[4], every=20)) == []
    assert warnings(series([0.5, 0.4], skipped=[3, 8], every=1000)) == []


def test_loss_that_no_longer_falls_is_reported():
    lines = series([0.5, 0.4, 0.3, 0.2999, 0.3, 0.2995, 0.2991, 0.2990])
    ((step, text),) = warnings(lines)
    assert step == 1750
    assert "no longer falls: it has been at 0.3000 since step 750" in text
    assert warnings(series([0.5, 0.4, 0.39, 0.38, 0.37, 0.36, 0.35])) == []
    assert warnings(series([0.3, 0.3, 0.3, 0.3])) == []  # too short to tell


def test_resumed_run_does_not_repeat_a_warning():
    """The evaluations before the stop are read from metrics.jsonl."""
    lines = series([0.9, 0.8, 0.7], raw=[0.4, 0.35, 0.32])
    assert diagnostics.new_warnings(lines, decay_of(), 10_000) == []


def test_generated_images_alone_give_no_warning():
    assert warnings([{"step": 10, "epoch": 9.0, "eval_fid": 3.0}] * 7, decay_of()) == []
