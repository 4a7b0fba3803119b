"""Image files: PNG, grids, GIF, collections, and reading any image."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm.errors import UsageError, UserError
from ddpm.sampling import image_io


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_png_keeps_pixels_and_text(tmp_path, channels, mode):
    image = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3) * 10
    text = {"model": "you/名前", "seed": "7", "note": "Zürich"}
    image_io.save_png(image, tmp_path / "seed.png", text)
    assert Image.open(tmp_path / "seed.png").mode == mode
    assert torch.equal(image_io.read_png(tmp_path / "seed.png"), image)
    assert image_io.read_png_text(tmp_path / "seed.png") == text
    assert os.listdir(tmp_path) == ["seed.png"]


def test_truncated_or_foreign_png_has_no_text(tmp_path):
    image_io.save_png(torch.zeros(3, 64, 64, dtype=torch.uint8), tmp_path / "a.png", {"k": "v"})
    (tmp_path / "truncated.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "foreign.png").write_text("no image")
    assert image_io.read_png_text(tmp_path / "truncated.png") == {}
    assert image_io.read_png_text(tmp_path / "foreign.png") == {}


def test_grid_shows_transparency_as_a_checkerboard():
    """Clear, opaque black, and half transparent black, over squares of 8 pixels."""
    images = [torch.zeros(4, 16, 16, dtype=torch.uint8) for _ in range(3)]
    images[1][3], images[2][3] = 255, 51
    grid = image_io.make_grid(images, columns=3)
    assert grid.mode == "RGB" and grid.size == (3 * 66 + 2, 68)
    pixels = np.array(grid)[:, :, 0]
    assert pixels[0, 0] == 255 and (pixels[2:66, 68:132] == 0).all()
    assert [pixels[2, 2], pixels[2, 10], pixels[10, 10], pixels[10, 2]] == [255, 204, 255, 204]
    assert [pixels[2, 134], pixels[2, 142]] == [204, round(204 * 0.8)]


def test_rgba_picture_is_read_and_resized_by_its_alpha(tmp_path):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[:, :4] = (255, 0, 0, 255)
    rgba[:, 4:] = (0, 255, 0, 0)  # a hidden color
    Image.fromarray(rgba).save(tmp_path / "a.png")
    image = image_io.read_image(tmp_path / "a.png", 4)
    assert image[:, 0, 0].tolist() == [255, 0, 0, 255] and (image[:, :, 4:] == 0).all()
    small = image_io.resize_and_crop(image, 2, 2)
    assert small.shape == (4, 2, 2) and (small[1:3] == 0).all()
    assert (small[0][small[3] > 0] == 255).all()
    Image.fromarray(rgba[:, :, :3].copy()).save(tmp_path / "rgb.png")
    assert (image_io.read_image(tmp_path / "rgb.png", 4)[3] == 255).all()


def test_grid_enlarges_small_images_by_repeating_pixels():
    images = [torch.full((1, 8, 8), 10 * n, dtype=torch.uint8) for n in range(5)]
    images[1][0, 0, 1] = 200
    grid = image_io.make_grid(images)
    assert grid.mode == "L"
    assert grid.size == (3 * (64 + 2) + 2, 2 * (64 + 2) + 2)
    pixels = np.array(grid)
    assert (pixels[2:66, 2:66] == 0).all()
    assert (pixels[2:10, 68 + 8 : 68 + 16] == 200).all()
    assert pixels[2, 68 + 7] == pixels[2, 68 + 16] == 10
    assert (pixels[68:132, 68:132] == 40).all()
    assert (pixels[:2] == 255).all()
    assert (pixels[68:132, 134:198] == 255).all()  # no sixth image


def test_grid_leaves_large_images_as_they_are():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    grid = image_io.make_grid([image])
    assert (grid.mode, grid.size) == ("RGB", (68, 68))
    assert np.array_equal(np.array(grid)[2:66, 2:66], image.permute(1, 2, 0).numpy())


# Reading any image


def test_image_is_read_as_in_training(tmp_path):
    """Modes, 16 bits, transparency and orientation, each computed by hand."""
    noise = np.random.default_rng(0)
    rgb = noise.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    deep = noise.integers(0, 65536, (12, 9), dtype=np.uint16)
    alpha = noise.integers(0, 256, (12, 9, 4), dtype=np.uint8)
    gray = noise.integers(0, 256, (12, 9), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    opacity = alpha[..., 3:] / 255.0
    over_blue = alpha[..., :3] * opacity + np.array([0, 0, 255]) * (1 - opacity)
    deep_8 = np.rint(deep / 257)

    def rgb_of(array):
        return np.repeat(array[..., None], 3, axis=2)

    cases = [
        ("rgb.png", Image.fromarray(rgb), {}, 3, rgb),
        ("gray.png", Image.fromarray(gray), {}, 1, gray[..., None]),
        ("gray.png", Image.fromarray(gray), {}, 3, rgb_of(gray)),
        ("rgb.png", Image.fromarray(rgb), {}, 1, (rgb @ [0.299, 0.587, 0.114])[..., None]),
        ("deep.png", Image.fromarray(deep), {}, 1, deep_8[..., None]),
        ("deep.png", Image.fromarray(deep), {}, 3, rgb_of(deep_8)),
        ("float.tiff", Image.fromarray(gray.astype(np.float32) / 255), {}, 1, gray[..., None]),
        ("alpha.png", Image.fromarray(alpha), {}, 3, over_blue),
        ("one.png", Image.fromarray(gray > 99), {}, 1, (gray > 99)[..., None] * 255),
        ("palette.png", Image.fromarray(rgb[:2, :3]).quantize(6), {}, 3, rgb[:2, :3]),
        ("rotated.png", Image.fromarray(rgb), {"exif": exif}, 3, np.rot90(rgb, -1)),
    ]
    for name, image, settings, channels, expected in cases:
        image.save(tmp_path / name, **settings)
        pixels = image_io.read_image(tmp_path / name, channels, "blue").permute(1, 2, 0).numpy()
        assert pixels.shape == expected.shape, name
        assert np.abs(pixels - expected.astype(float)).max() <= 1.01, name


@pytest.mark.parametrize("values", [-1.0, 2.0])
def test_floats_out_of_range_are_refused(tmp_path, values):
    Image.fromarray(np.full((4, 4), values, dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a.tiff cannot be read as an image \(values from"):
        image_io.read_image(tmp_path / "a.tiff", 1)


@pytest.mark.parametrize("size", [(8, 8), (20, 33), (33, 20), (4, 5), (8, 30)])
def test_resize_and_crop_agrees_with_torchvision(size):
    from torchvision.transforms.v2 import functional as geometry

    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    expected = geometry.center_crop(geometry.resize(image, [8], antialias=True), [8, 8])
    cropped = image_io.resize_and_crop(image, 8, 8)
    assert cropped.shape == (3, 8, 8)
    assert (cropped.int() - expected.int()).abs().max() <= 1


def test_resize_and_crop_covers_any_size():
    image = torch.arange(40, dtype=torch.uint8).view(1, 4, 10).repeat_interleave(2, 1)
    assert image_io.resize_and_crop(image, 4, 8).shape == (1, 4, 8)
    assert image_io.resize_and_crop(image, 16, 8).shape == (1, 16, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no such file"), (b"text", "not a readable image")],
)
def test_unreadable_image_is_refused(tmp_path, content, message):
    path = tmp_path / "image.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        image_io.read_image(path, 3)
    with pytest.raises(UsageError, match="--background nocolor is no"):
        image_io.read_image(path, 3, "nocolor")


# Grids, animations and collections


@pytest.fixture
def three(tmp_path):
    """Three RGB PNGs with text: paths, seeds, pixels."""
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, 3, 8, 6), dtype=np.uint8)
    )
    paths = [tmp_path / f"seed-{seed:05d}.png" for seed in (5, 6, 7)]
    for path, image in zip(paths, pixels, strict=True):
        image_io.save_png(image, path, {"model": "m"})
    return paths, [5, 6, 7], pixels


def test_npz_has_the_layout_of_fid_tools(three, tmp_path):
    paths, seeds, pixels = three
    image_io.save_npz(paths, seeds, tmp_path / "all.npz")
    loaded = np.load(tmp_path / "all.npz")
    assert loaded["arr_0"].dtype == np.uint8
    assert np.array_equal(loaded["arr_0"], pixels.permute(0, 2, 3, 1).numpy())
    assert loaded["seeds"].tolist() == seeds


def test_parquet_is_an_image_dataset(three, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(image_io, "PARQUET_ROWS", 2)  # two row groups
    paths, seeds, pixels = three
    image_io.save_parquet(paths, seeds, tmp_path / "all.parquet")
    loaded = datasets.Dataset.from_parquet(
        str(tmp_path / "all.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert loaded.features == {"image": datasets.Image(), "seed": datasets.Value("int64")}
    assert loaded["seed"][:] == seeds
    for row, image in zip(loaded, pixels, strict=True):
        assert np.array_equal(np.asarray(row["image"]), image.permute(1, 2, 0).numpy())
        assert row["image"].text == {"model": "m"}


def test_parquet_without_pyarrow_is_refused(three, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="--parquet needs pyarrow"):
        image_io.save_parquet(*three[:2], tmp_path / "all.parquet")
    assert not list(tmp_path.glob("*parquet*"))


def test_gif_shows_every_frame_and_stays_on_the_last(tmp_path):
    frames = [Image.new("L", (8, 8), 60 * n) for n in range(4)]
    image_io.save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)
        durations = []
        for index, frame in enumerate(ImageSequence.Iterator(gif)):
            durations.append(frame.info["duration"])
            assert frame.convert("L").getpixel((0, 0)) == 60 * index
    assert durations == [80, 80, 80, 1500]


def test_evenly_spaced_keeps_both_ends():
    assert image_io.evenly_spaced(range(5), 10) == [0, 1, 2, 3, 4]
    assert image_io.evenly_spaced(range(101), 5) == [0, 25, 50, 75, 100]


def test_grid_has_the_columns_asked_for():
    images = [torch.zeros(1, 64, 64, dtype=torch.uint8)] * 8
    assert image_io.make_grid(images, columns=4).size == (4 * 66 + 2, 2 * 66 + 2)
