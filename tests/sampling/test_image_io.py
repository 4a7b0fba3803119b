"""Pictures as files."""

import os
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ddpm.errors import UsageError, UserError
from ddpm.sampling import image_io

# Pixels and files


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_png_keeps_pixels_and_text(tmp_path, channels, mode):
    image = torch.arange(channels * 6, dtype=torch.uint8).view(channels, 2, 3) * 10
    text = {"model": "you/名前", "seed": "7", "note": "Zürich"}
    image_io.save_png(image, tmp_path / "seed.png", text)
    assert Image.open(tmp_path / "seed.png").mode == mode
    assert torch.equal(image_io.read_png(tmp_path / "seed.png"), image)
    assert image_io.read_png_text(tmp_path / "seed.png") == text
    assert os.listdir(tmp_path) == ["seed.png"]


def test_cut_or_foreign_png_has_no_text(tmp_path):
    image_io.save_png(torch.zeros(3, 64, 64, dtype=torch.uint8), tmp_path / "a.png", {"k": "v"})
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-20])
    (tmp_path / "foreign.png").write_text("no image")
    assert image_io.read_png_text(tmp_path / "cut.png") == {}
    assert image_io.read_png_text(tmp_path / "foreign.png") == {}


def test_grid_enlarges_small_images_by_whole_pixels():
    images = [torch.full((1, 8, 8), 10 * n, dtype=torch.uint8) for n in range(5)]
    images[1][0, 0, 1] = 200
    sheet = image_io.make_grid(images)
    assert sheet.mode == "L"
    assert sheet.size == (3 * (64 + 2) + 2, 2 * (64 + 2) + 2)
    pixels = np.array(sheet)
    assert (pixels[2:66, 2:66] == 0).all()
    assert (pixels[2:10, 68 + 8 : 68 + 16] == 200).all()
    assert pixels[2, 68 + 7] == pixels[2, 68 + 16] == 10
    assert (pixels[68:132, 68:132] == 40).all()
    assert (pixels[:2] == 255).all()
    assert (pixels[68:132, 134:198] == 255).all()  # the place of a sixth


def test_grid_leaves_large_images_as_they_are():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    sheet = image_io.make_grid([image])
    assert (sheet.mode, sheet.size) == ("RGB", (68, 68))
    assert np.array_equal(np.array(sheet)[2:66, 2:66], image.permute(1, 2, 0).numpy())


# A picture that somebody gives


def test_given_picture_is_treated_as_in_training(tmp_path):
    """Modes, 16 bits, transparency and orientation, each by hand."""
    noise = np.random.default_rng(0)
    rgb = noise.integers(0, 256, (12, 9, 3), dtype=np.uint8)
    deep = noise.integers(0, 65536, (12, 9), dtype=np.uint16)
    alpha = noise.integers(0, 256, (12, 9, 4), dtype=np.uint8)
    gray = noise.integers(0, 256, (12, 9), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn clockwise
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
        ("turned.png", Image.fromarray(rgb), {"exif": turned}, 3, np.rot90(rgb, -1)),
    ]
    for name, picture, settings, channels, expected in cases:
        picture.save(tmp_path / name, **settings)
        found = image_io.read_image(tmp_path / name, channels, "blue").permute(1, 2, 0).numpy()
        assert found.shape == expected.shape, name
        assert np.abs(found - expected.astype(float)).max() <= 1.01, name


@pytest.mark.parametrize("values", [-1.0, 2.0])
def test_floats_out_of_range_are_one_sentence(tmp_path, values):
    Image.fromarray(np.full((4, 4), values, dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a.tiff cannot be read as a picture \(.* expected"):
        image_io.read_image(tmp_path / "a.tiff", 1)


@pytest.mark.parametrize("size", [(8, 8), (20, 33), (33, 20), (4, 5), (8, 30)])
def test_given_picture_is_resized_and_cut_as_in_training(size):
    from torchvision.transforms.v2 import functional as geometry

    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    expected = geometry.center_crop(geometry.resize(image, [8], antialias=True), [8, 8])
    found = image_io.resize_and_crop(image, 8, 8)
    assert found.shape == (3, 8, 8)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_picture_covers_a_size_that_is_not_square():
    image = torch.arange(40, dtype=torch.uint8).view(1, 4, 10).repeat_interleave(2, 1)
    assert image_io.resize_and_crop(image, 4, 8).shape == (1, 4, 8)
    assert image_io.resize_and_crop(image, 16, 8).shape == (1, 16, 8)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no such file"), (b"text", "not a readable image")],
)
def test_unreadable_picture_is_one_sentence(tmp_path, content, words):
    path = tmp_path / "picture.png"
    if content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        image_io.read_image(path, 3)
    with pytest.raises(UsageError, match="--background nocolour is not a color"):
        image_io.read_image(path, 3, "nocolour")


# Many in one file


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


def test_npz_holds_the_pixels_as_fid_tools_read_them(three, tmp_path):
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


def test_parquet_without_pyarrow_is_one_sentence(three, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="--parquet needs pyarrow"):
        image_io.save_parquet(*three[:2], tmp_path / "all.parquet")
    assert not list(tmp_path.glob("*parquet*"))


def test_gif_shows_every_frame_and_rests_at_the_end(tmp_path):
    frames = [Image.new("L", (8, 8), 60 * n) for n in range(4)]
    image_io.save_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.info["loop"]) == (4, 0)
        times = []
        for index, frame in enumerate(ImageSequence.Iterator(gif)):
            times.append(frame.info["duration"])
            assert frame.convert("L").getpixel((0, 0)) == 60 * index
    assert times == [80, 80, 80, 1500]


def test_spread_is_even_with_both_ends():
    assert image_io.evenly_spaced(range(5), 10) == [0, 1, 2, 3, 4]
    assert image_io.evenly_spaced(range(101), 5) == [0, 25, 50, 75, 100]


def test_grid_in_a_given_number_of_columns():
    images = [torch.zeros(1, 64, 64, dtype=torch.uint8)] * 8
    assert image_io.make_grid(images, columns=4).size == (4 * 66 + 2, 2 * 66 + 2)
