"""Plots: which points they show, with which axes, and that a file is never half."""

import numpy as np
import pytest
from PIL import Image

from ddpm.evaluation import plots
from ddpm.evaluation.results import TimestepLosses
from ddpm.sampling import image_io
from tests.sampling.test_guidance_results import make_curve, make_result
from tests.sampling.test_sampler_results import make_entry, make_table


def lines(figure) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that has a name in the legend."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    drawn = [handle.lines[0] if hasattr(handle, "lines") else handle for handle in handles]
    return {
        label: [tuple(point) for point in line.get_xydata().tolist()]
        for label, line in zip(labels, drawn, strict=True)
    }


def test_loss_is_plotted_with_its_moving_average_on_a_logarithmic_axis():
    figure = plots.plot_loss([(1, 1.0), (2, 2.0), (3, 6.0)])
    assert lines(figure) == {
        "each logged step": [(1, 1.0), (2, 2.0), (3, 6.0)],
        "moving average": [(1, 1.5), (2, 3.0), (3, 4.0)],
    }
    assert figure.axes[0].get_yscale() == "log"


def test_held_out_losses_are_those_of_the_metrics_by_band():
    series = [
        {
            "step": step,
            "eval_loss": 1 / step,
            "eval_loss_band_0": 2 / step,
            "eval_loss_band_1": float("nan") if step == 10 else 3 / step,
            "eval_loss_raw_band_0": 9.0,
        }
        for step in (10, 20)
    ]
    assert lines(plots.plot_held_out_loss(series, 1000)) == {
        "all timesteps": [(10, 0.1), (20, 0.05)],
        "0 to 499": [(10, 0.2), (20, 0.1)],
        "500 to 999": [(20, 0.15)],
    }


def test_timestep_losses_are_at_the_middles_of_their_bands():
    losses = TimestepLosses(
        num_images=20,
        bands=[(0, 99), (100, 199)],
        held_out={"model": [0.5, 0.25], "raw": [0.6, 0.3]},
        trained={"model": [0.4, 0.2]},
    )
    assert lines(plots.plot_timestep_loss(losses)) == {
        "held out": [(49.5, 0.5), (149.5, 0.25)],
        "held out, raw": [(49.5, 0.6), (149.5, 0.3)],
        "trained on": [(49.5, 0.4), (149.5, 0.2)],
    }


def test_samplers_have_their_steps_at_the_points_and_bars_as_long_as_the_noise():
    table = make_table(
        make_entry("ddim", 50, 2.0, 0.1, 0),
        make_entry("ddim", 5, 8.0, 0.01, 0.5),
        make_entry("ddpm", 1000, 1.0, 1.0, 0),
    )
    axes = plots.plot_sampler_table(table).axes[0]
    assert lines(axes.figure) == {"ddim": [(0.01, 8.0), (0.1, 2.0)], "ddpm": [(1.0, 1.0)]}
    assert [(text.get_text(), text.xy) for text in axes.texts] == [
        ("5", (0.01, 8.0)),
        ("50", (0.1, 2.0)),
        ("1000", (1.0, 1.0)),
    ]
    bars = axes.containers[0].lines[2][0].get_segments()
    error = (0.9 * 2 * 0.25) ** 0.5  # of differences 0.5, -0.5 and eight times 0
    assert bars[0][:, 1].tolist() == pytest.approx([8 - 2 * error, 8 + 2 * error])
    assert axes.get_lines()[-1].get_ydata() == [1.0, 1.0]  # the level of the best
    assert axes.get_xscale() == axes.get_yscale() == "log"


def test_distances_below_zero_are_plotted_on_a_linear_axis(tmp_path):
    figure = plots.plot_sampler_table(make_table(make_entry("ddim", 5, -0.1, 0.01)))
    assert figure.axes[0].get_yscale() == "linear"
    assert plots.save(figure, tmp_path / "x.png")


def test_ema_lengths_have_their_errors_as_bars():
    points = [(0.02, 3.0, 0.1), (0.05, 1.0, 0.2)]
    axes = plots.plot_ema_lengths(points, {"the pipeline": 1.5}, "Frechet distance").axes[0]
    assert lines(axes.figure) == {
        "the pipeline": [(0, 1.5), (1, 1.5)],
        "averages by length": [(0.02, 3.0), (0.05, 1.0)],
    }
    bars = [bar[:, 1].tolist() for bar in axes.containers[0].lines[2][0].get_segments()]
    assert bars == [pytest.approx([2.9, 3.1]), pytest.approx([0.8, 1.2])]
    assert axes.get_xscale() == "log" and axes.get_ylabel() == "Frechet distance"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.02", "0.05"]


def test_guidance_is_plotted_over_the_accuracy_or_else_over_the_scales():
    curve = make_curve(make_result(1, 2.0, 0.5), make_result(3, 1.0, 0.9))
    axes = plots.plot_guidance(curve).axes[0]
    assert lines(axes.figure) == {"guidance": [(0.5, 2.0), (0.9, 1.0)]}
    assert [text.get_text() for text in axes.texts] == ["1", "3"]
    curve = make_curve(make_result(1, 2.0), make_result(3, 1.0))
    axes = plots.plot_guidance(curve).axes[0]
    assert lines(axes.figure) == {"guidance": [(1, 2.0), (3, 1.0)]}
    assert axes.get_xlabel() == "guidance scale"


def test_fewer_than_two_points_are_no_plot(tmp_path):
    assert plots.plot_guidance(make_curve(make_result(1, 2.0))) is None
    assert plots.plot_loss([(1, 0.5)]) is None
    assert plots.plot_held_out_loss([], 1000) is None
    assert plots.plot_held_out_loss([{"step": 5, "eval_loss": 1.0}], 1000) is None
    assert plots.plot_ema_lengths([(0.02, 3.0, 0.1)], {}, "FID") is None
    assert not plots.save(None, tmp_path / "x.png") and not (tmp_path / "x.png").exists()


def test_a_saved_plot_is_a_png_with_its_text(tmp_path):
    path = tmp_path / "evaluation" / "x.png"
    assert plots.save(plots.plot_loss([(1, 0.5), (2, 0.5)]), path, {"model": "abc"})
    assert image_io.read_png_text(path) == {"model": "abc"}
    with Image.open(path) as image:
        assert image.size == (1080, 600) and np.asarray(image.convert("L")).std() > 10
    assert [file.name for file in path.parent.iterdir()] == ["x.png"]
