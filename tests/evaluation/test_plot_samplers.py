"""The picture of the menu: points lie where their numbers are."""

import numpy as np
import pytest
from PIL import ImageColor

from ddpm.evaluation import plot_samplers
from ddpm.sampling import image_io
from tests.sampling.test_sampler_table import entry, menu_of


def pixels_of(image, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of a colour."""
    apart = np.abs(np.asarray(image).astype(int) - ImageColor.getrgb(colour)).sum(-1)
    below_the_names = np.nonzero(apart[40:] == 0)
    return below_the_names[0] + 40, below_the_names[1]


def test_axis_is_logarithmic():
    axis = plot_samplers.Axis([1.0, 100.0], 0, 1160)  # a room of 0.16 on both sides of two decades
    assert axis.at(1.0) == pytest.approx(80) and axis.at(100.0) == pytest.approx(1080)
    assert axis.at(10.0) == pytest.approx(580)
    assert axis.at(0.0) == 0 and axis.at(1e9) == 1160
    assert axis.ticks() == pytest.approx([1, 2, 5, 10, 20, 50, 100])


def test_short_axis_has_ticks_too():
    assert len(plot_samplers.Axis([3.0, 3.1], 0, 100).ticks()) == 5
    assert len(plot_samplers.Axis([3.0], 0, 100).ticks()) == 5


def test_points_are_where_their_numbers_are():
    """Better and slower is to the right and lower; the second sampler has its own colour."""
    made = menu_of(
        entry("ddim", 5, 8.0, 0.01, 0),
        entry("ddim", 50, 2.0, 0.1, 0),
        entry("ddpm", 1000, 1.0, 1.0, 0),
    )
    image = plot_samplers.plot_sampler_table(made)
    across = plot_samplers.Axis(
        [0.01, 1.0], plot_samplers.LEFT, plot_samplers.WIDTH - plot_samplers.RIGHT
    )
    up = plot_samplers.Axis(
        [1.0, 8.0], plot_samplers.HEIGHT - plot_samplers.BOTTOM, plot_samplers.TOP
    )
    first, second = plot_samplers.COLOURS[:2]
    for colour, seconds, distance in ((first, 0.01, 8.0), (first, 0.1, 2.0), (second, 1.0, 1.0)):
        rows, columns = pixels_of(image, colour)
        x, y = across.at(seconds), up.at(distance)
        near = (np.abs(rows - y) < 3) & (np.abs(columns - x) < 3)
        assert near.sum() > 20, (colour, seconds)
    assert up.at(1.0) > up.at(2.0) > up.at(8.0)


def test_a_bar_is_as_long_as_the_noise():
    made = menu_of(
        entry("ddim", 5, 2.0, 0.01, 0.5),
        entry("unipc", 5, 8.0, 0.1, 0),
        entry("ddpm", 9, 1.0, 1.0, 0),
    )
    rows, columns = pixels_of(plot_samplers.plot_sampler_table(made), plot_samplers.COLOURS[0])
    x = plot_samplers.Axis(
        [0.01, 1.0], plot_samplers.LEFT, plot_samplers.WIDTH - plot_samplers.RIGHT
    ).at(0.01)
    up = plot_samplers.Axis(
        [1.0, 8.0], plot_samplers.HEIGHT - plot_samplers.BOTTOM, plot_samplers.TOP
    )
    bar = rows[np.abs(columns - x) <= 1]
    error = (0.9 * 2 * 0.25) ** 0.5  # of differences 0.5, -0.5 and eight times 0
    assert bar.min() == pytest.approx(up.at(2 + 2 * error), abs=1.5)
    assert bar.max() == pytest.approx(up.at(2 - 2 * error), abs=1.5)


def test_one_entry_and_distances_below_zero_can_be_drawn(tmp_path):
    path = tmp_path / "evaluation" / "trade-off.png"
    plot_samplers.save_sampler_plot(
        menu_of(entry("ddim", 5, -0.1, 0.01), entry("ddim", 9, -0.2, 0.02)), path
    )
    plot_samplers.save_sampler_plot(menu_of(entry("ddim", 5, 3.0, 0.01)), path)
    shape = (3, plot_samplers.HEIGHT, plot_samplers.WIDTH)
    assert image_io.read_png(path).shape == shape
