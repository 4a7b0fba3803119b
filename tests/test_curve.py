"""The loss curve: which points, and that the line is where they are."""

import numpy as np
from PIL import Image, ImageColor

from ddpm import curve


def test_only_whole_and_finite_losses_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 20, "loss": 0.5}\n{"step": 10, "loss": 1.0}\n'
    bad = '{"step": 30}\n{"step": 40, "loss": NaN}\n{"step": 50, "loss": 0.0}\n[1]\n{"step": 6'
    path.write_text(good + bad)
    assert curve.read_losses(path) == [(10, 1.0), (20, 0.5)]
    assert curve.read_losses(tmp_path / "none") == []


def test_the_running_mean_of_its_neighbours():
    assert curve.smooth([1.0, 2.0, 6.0], 1) == [1.5, 3.0, 4.0]


def test_fewer_than_two_points_are_no_line(tmp_path):
    assert not curve.draw([(1, 0.5)], tmp_path / "x.png") and not (tmp_path / "x.png").exists()


def test_the_line_falls_from_top_left_to_bottom_right(tmp_path):
    """A straight line on the logarithmic axis, because the loss is a power."""
    losses = [(step, 10.0 ** -(step / 500)) for step in range(0, 1001)]
    assert curve.draw(losses, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    smooth = np.abs(pixels - ImageColor.getrgb(curve.SMOOTH)).sum(-1) == 0
    rows, columns = np.nonzero(smooth)
    middle = rows[np.abs(columns - (curve.LEFT + curve.WIDTH - curve.RIGHT) // 2) <= 1].mean()
    assert abs(middle - (curve.TOP + curve.HEIGHT - curve.BOTTOM) / 2) < 3
    assert rows[columns < curve.LEFT + 20].mean() < middle < rows[columns > 680].mean()


def test_a_constant_loss_can_be_drawn(tmp_path):
    assert curve.draw([(1, 0.5), (2, 0.5)], tmp_path / "x.png")
