"""Sentences about a run, from evaluations made by hand: when they are said, and when not."""

import pytest

from ddpm.config.train import EMAConfig
from ddpm.diffusion.ema import EMA
from ddpm.training import diagnostics


def decay_of(**settings):
    import torch

    return EMA(torch.nn.Linear(1, 1), EMAConfig(**settings)).decay


def series(losses, raw=None, epochs=1.0, skipped=None, every=250):
    """Evaluations every so many steps and epochs."""
    lines = []
    for number, loss in enumerate(losses, 1):
        line = {"step": number * every, "epoch": number * epochs, "eval_loss": loss}
        if raw is not None:
            line["eval_loss_raw"] = raw[number - 1]
        if skipped is not None:
            line["skipped_steps"] = skipped[number - 1]
        lines.append(line)
    return lines


def said(lines, decay=None, last_step=10_000):
    """The sentences of a whole run, evaluation by evaluation: [(step, sentence), ...]."""
    return [
        (lines[number - 1]["step"], sentence)
        for number in range(1, len(lines) + 1)
        for sentence in diagnostics.new_warnings(lines[:number], decay, last_step)
    ]


def weights(decay, n):
    """How much of the average at step n comes from the weights of each step 1 .. n."""
    shares = []
    for step in range(1, n + 1):
        d = decay(step)
        shares = [share * d for share in shares] + [1 - d]
    return shares


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_power": 1.0}, {"ema_max_decay": 0.99}, {"ema_inv_gamma": 20.0, "ema_power": 0.9}],
)
def test_usable_is_when_the_middle_of_the_average_has_come_to_this_step(settings):
    """Against the weights of the average, worked out one by one."""
    decay, step = decay_of(**settings), 60
    n = diagnostics.ema_usable_step(step, decay)

    def middle(n):
        shares = weights(decay, n)
        return sum(share * k for k, share in enumerate(shares, 1)) / sum(shares)

    assert middle(n) >= step - 1e-6 and middle(n - 1) < step


def test_an_average_over_all_steps_is_usable_at_twice_the_step():
    """With power 1 the average at step n is the mean of the weights so far: its middle is n / 2."""
    assert diagnostics.ema_usable_step(1000, decay_of(ema_power=1.0)) == pytest.approx(2000, abs=3)


def test_an_average_that_never_moves_is_not_waited_for():
    assert diagnostics.ema_usable_step(100, lambda step: 1.0) is None


def test_the_average_lags_is_said_once():
    lines = series([0.9, 0.8, 0.5, 0.3], raw=[0.4, 0.35, 0.32, 0.3])
    ((step, sentence),) = said(lines, decay_of(ema_power=1.0))
    assert step == 250
    assert sentence == (
        "The average lags: held-out loss 0.9000, of the raw weights 0.4000. Usable at about step "
        "500; the raw weights are better now."
    )


def test_lagging_again_is_said_again_and_the_end_of_the_run_is_known():
    lines = series([0.9, 0.3, 0.9], raw=[0.4, 0.3, 0.4])
    told = said(lines, decay_of(ema_power=1.0), last_step=1000)
    assert [step for step, _ in told] == [250, 750]
    assert "end of this run" not in told[0][1]
    assert "about step 1,500" in told[1][1] and "lower --ema_max_decay" in told[1][1]


def test_a_lag_that_goes_to_and_fro_about_the_limit_is_said_once():
    """The losses of a run: 4.7% between two of more than 5%."""
    lines = series([0.443, 0.4253, 0.412], raw=[0.3891, 0.4053, 0.3831])
    assert [step for step, _ in said(lines, decay_of(ema_power=1.0))] == [250]


@pytest.mark.parametrize("raw", [0.96, 1.0, 1.5])
def test_an_average_as_good_as_the_raw_weights_does_not_lag(raw):
    assert said(series([1.0], raw=[raw]), decay_of()) == []
    assert said(series([1.0]), decay_of()) == []


def test_rising_loss_after_many_epochs():
    lines = series([0.50, 0.40, 0.405, 0.42, 0.432, 0.44], epochs=2.5)
    ((step, sentence),) = said(lines)
    assert step == 1250  # 0.405 is near enough; 0.42 and 0.432 are two above 0.408
    assert sentence.startswith(
        "12 epochs, and the loss on held-out images has risen by 8% since step 500: expect copies"
    )


@pytest.mark.parametrize(
    ("losses", "epochs"),
    [
        ([0.50, 0.40, 0.43, 0.43], 1.0),  # few epochs
        ([0.50, 0.40, 0.43, 0.40, 0.43], 5.0),  # not twice in a row
        ([0.50, 0.40, 0.407, 0.407], 5.0),  # within the noise
        ([0.50, 0.45, 0.40, 0.35], 5.0),
    ],
)
def test_what_is_no_rise(losses, epochs):
    assert [s for _, s in said(series(losses, epochs=epochs)) if "risen" in s] == []


def test_skipped_steps_are_counted_since_the_evaluation_before():
    lines = series([0.5, 0.4, 0.3], skipped=[4, 34, 38])
    ((step, sentence),) = said(lines)
    assert step == 500
    assert sentence.startswith("11% of the last 280 steps were not finite and were skipped (fp16)")


def test_a_few_skipped_steps_are_the_scaler_finding_its_level():
    assert said(series([0.5], skipped=[4], every=20)) == []
    assert said(series([0.5, 0.4], skipped=[3, 8], every=1000)) == []


def test_a_loss_that_no_longer_falls():
    lines = series([0.5, 0.4, 0.3, 0.2999, 0.3, 0.2995, 0.2991, 0.2990])
    ((step, sentence),) = said(lines)
    assert step == 1750
    assert "no longer falls: it has been at 0.3000 since step 750" in sentence
    assert said(series([0.5, 0.4, 0.39, 0.38, 0.37, 0.36, 0.35])) == []
    assert said(series([0.3, 0.3, 0.3, 0.3])) == []  # too short to tell


def test_a_run_that_goes_on_does_not_say_it_again():
    """What was true before the stop is known from the lines of metrics.jsonl."""
    lines = series([0.9, 0.8, 0.7], raw=[0.4, 0.35, 0.32])
    assert diagnostics.new_warnings(lines, decay_of(), 10_000) == []


def test_drawn_images_alone_give_no_sentence():
    assert said([{"step": 10, "epoch": 9.0, "eval_fid": 3.0}] * 7, decay_of()) == []
