"""The loss curve: which points, and that the line is where they are."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from ddpm.evaluation import plots


def test_only_whole_and_finite_losses_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 20, "loss": 0.5}\n{"step": 10, "loss": 1.0}\n'
    bad = '{"step": 30}\n{"step": 40, "loss": NaN}\n{"step": 50, "loss": 0.0}\n[1]\n{"step": 6'
    path.write_text(good + bad)
    assert plots.read_losses(path) == [(10, 1.0), (20, 0.5)]
    assert plots.read_losses(tmp_path / "none") == []


def test_the_running_mean_of_its_neighbours():
    assert plots.moving_average([1.0, 2.0, 6.0], 1) == [1.5, 3.0, 4.0]


def test_fewer_than_two_points_are_no_line(tmp_path):
    assert not plots.plot_loss([(1, 0.5)], tmp_path / "x.png") and not (tmp_path / "x.png").exists()


def test_the_line_falls_from_top_left_to_bottom_right(tmp_path):
    """A straight line on the logarithmic axis, because the loss is a power."""
    losses = [(step, 10.0 ** -(step / 500)) for step in range(0, 1001)]
    assert plots.plot_loss(losses, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    smooth = np.abs(pixels - ImageColor.getrgb(plots.SMOOTH)).sum(-1) == 0
    rows, columns = np.nonzero(smooth)
    middle = rows[np.abs(columns - (plots.LEFT + plots.WIDTH - plots.RIGHT) // 2) <= 1].mean()
    assert abs(middle - (plots.TOP + plots.HEIGHT - plots.BOTTOM) / 2) < 3
    assert rows[columns < plots.LEFT + 20].mean() < middle < rows[columns > 680].mean()


def test_a_constant_loss_can_be_drawn(tmp_path):
    assert plots.plot_loss([(1, 0.5), (2, 0.5)], tmp_path / "x.png")


def test_lines_are_where_their_points_are_and_have_their_names(tmp_path):
    """Two flat lines, of which the higher is the larger loss, each in a colour of its own."""
    lines = {"held out": [(0, 1.0), (9, 1.0)], "trained on": [(0, 0.1), (9, 0.1)]}
    pixels = np.asarray(plots.plot_lines("title", lines)).astype(int)
    places = []
    for colour in plots.COLOURS[:2]:
        found = np.abs(pixels - ImageColor.getrgb(colour)).sum(-1) == 0
        axes = found[:, plots.LEFT + 5 : plots.WIDTH - plots.RIGHT - plots.BESIDE - 5]
        places.append(np.nonzero(axes.mean(1) > 0.9)[0].mean())
        assert found[:, plots.WIDTH - plots.BESIDE :].any()
    assert places[0] == pytest.approx(plots.TOP, abs=2)
    assert places[1] == pytest.approx(plots.HEIGHT - plots.BOTTOM, abs=2)


def test_what_is_no_line_is_not_drawn():
    assert plots.plot_lines("x", {}) is None
    assert plots.plot_lines("x", {"one": [(5, 1.0)], "other": [(5, 2.0)]}) is None
    assert plots.plot_lines("x", {"one": [(1, float("nan")), (2, 1.0), (3, 0.0)]}) is None
    assert plots.plot_lines("x", {"one": [(1, 1.0), (2, 1.0)], "none": []}) is not None


def test_bands_stand_at_their_middles():
    found = plots.band_lines([(0, 99), (100, 199)], {"held out": [0.5, 0.25]})
    assert found == {"held out": [(49.5, 0.5), (149.5, 0.25)]}


def test_the_course_of_the_bands_is_that_of_the_metrics():
    series = [
        {
            "step": s,
            "eval_loss": 1 / s,
            "eval_loss_band_0": 2 / s,
            "eval_loss_band_1": 3 / s,
            "eval_loss_raw_band_0": 9.0,
        }
        for s in (10, 20)
    ]
    assert plots.held_out_loss_lines(series, 1000) == {
        "all": [(10, 0.1), (20, 0.05)],
        "0 to 499": [(10, 0.2), (20, 0.1)],
        "500 to 999": [(10, 0.3), (20, 0.15)],
    }
    assert plots.held_out_loss_lines([], 1000) == {"all": []}
