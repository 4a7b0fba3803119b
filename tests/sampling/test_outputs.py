"""The output folder: what is kept, who draws what, and what a PNG may decide."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.config.parser import given_flags, parse_sample
from ddpm.errors import UsageError, UserError
from ddpm.sampling import image_io, outputs
from ddpm.sampling.guidance import LabeledSeed
from ddpm.sampling.outputs import OutputFolder

METADATA = {
    "model": "you/m",
    "version": "a" * 40,
    "scheduler": "ddim",
    "num_inference_steps": "5",
    "dtype": "fp32",
    "software": "here",
}


def image_of(seed):
    return torch.full((1, 8, 8), seed % 256, dtype=torch.uint8)


def fill(images: OutputFolder, seeds):
    assert list(images.save((seed, image_of(seed)) for seed in seeds)) == list(seeds)


@pytest.fixture
def images(tmp_path):
    """An output folder for seeds 3 to 7."""
    return OutputFolder(tmp_path / "out", METADATA, range(3, 8))


def test_complete_images_with_the_same_metadata_are_kept(images):
    assert images.missing_seeds() == [3, 4, 5, 6, 7]
    fill(images, [3, 5, 6])
    other = OutputFolder(images.folder, {**METADATA, "version": "b" * 40}, images.seeds)
    fill(other, [6])
    assert images.missing_seeds() == [4, 6, 7]
    assert images.missing_seeds(again=True) == [3, 4, 5, 6, 7]
    truncated = images.path(5)
    truncated.write_bytes(truncated.read_bytes()[:-30])
    with pytest.raises(UserError, match="seed-00005.png was not made by this command"):
        images.missing_seeds()


@pytest.mark.parametrize("name", ["seed-00004.png", "grid.png"])
def test_foreign_files_are_not_replaced(images, name):
    images.folder.mkdir()
    image_io.save_png(image_of(1), images.folder / name, {"by": "me"})
    before = (images.folder / name).read_bytes()
    with pytest.raises(UserError, match=f"{name} was not made .* another --output_dir"):
        images.missing_seeds()
    assert (images.folder / name).read_bytes() == before


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_processes_divide_the_seeds_whatever_exists(tmp_path, world_size):
    """Each seed is drawn once, also by a process that starts when some images are there."""
    drawn = []
    for rank in range(world_size):
        images = OutputFolder(tmp_path, METADATA, range(5), rank=rank, world_size=world_size)
        missing = images.missing_seeds()
        assert missing == list(images.local_seeds)
        fill(images, missing)
        drawn += missing
    assert sorted(drawn) == [0, 1, 2, 3, 4]


def test_one_process_needs_no_process_group():
    assert outputs.join_processes() == (0, 1)
    outputs.wait_for_everyone()
    assert not torch.distributed.is_initialized()


def test_images_of_other_processes_must_be_in_the_folder(tmp_path):
    """Processes that do not share a disk are noticed before a grid without images is written."""
    first, second = (
        OutputFolder(tmp_path, METADATA, range(4), rank=rank, world_size=2) for rank in (0, 1)
    )
    fill(first, first.local_seeds)
    fill(second, [1])
    with pytest.raises(UserError, match="1 images of other processes are not in"):
        first.require_complete()
    fill(second, [3])
    first.require_complete()


def test_grid_and_collections_hold_the_images(images, monkeypatch):
    images.missing_seeds()
    fill(images, images.seeds)
    written = images.write_collections(npz=True, parquet=True)
    assert [path.name for path in written] == ["grid.png", "samples.npz", "samples.parquet"]
    assert np.load(written[1])["seeds"].tolist() == list(images.seeds)
    assert image_io.read_png_text(written[0]) == {**METADATA, "seed": "3"}
    assert images.missing_seeds() == []
    monkeypatch.setattr(outputs, "GRID_LIMIT", 4)
    assert image_io.read_png(images.write_collections(False, False)[0]).shape == (1, 134, 134)
    monkeypatch.setattr(outputs, "MAX_PIXELS", 2 * 8 * 8)  # a larger grid could not be read again
    assert image_io.read_png(images.write_collections(False, False)[0]).shape == (1, 68, 134)


@pytest.mark.parametrize(
    ("num_classes", "num_images", "expected"),
    [
        (40, 9, (8, [f"class {k}" for k in range(32)])),
        (2, 20, (16, ["class 0", "1"])),
        (1, 20, (None, None)),
    ],
)
def test_grid_of_classes_has_a_row_each_as_far_as_it_goes(
    tmp_path, monkeypatch, num_classes, num_images, expected
):
    """The name of a row is the id where the font lacks the name."""
    class_names = [f"class {k}" for k in range(num_classes)]
    class_names[-1] = "\u8c93"
    seeds = [LabeledSeed(label, k) for label in range(num_classes) for k in range(num_images)]
    folder = OutputFolder(tmp_path, METADATA, seeds, class_names=class_names)
    list(folder.save((seed, image_of(seed.label)) for seed in seeds))
    grids = []

    def make_grid(images, columns, row_names):
        grids.append((columns, row_names))
        shown = [int(image[0, 0, 0]) for image in images]
        rows = range(len(row_names)) if row_names else [0]
        assert shown == [row for row in rows for _ in range(columns or num_images)]
        return Image.new("L", (1, 1))

    monkeypatch.setattr(image_io, "make_grid", make_grid)
    folder.write_collections(False, False)
    assert grids == [expected]


# --like


def like(path, *flags):
    argv = ["--like", str(path), *flags]
    return outputs.config_from_image(parse_sample(argv), given_flags(argv))


def test_text_of_a_png_gives_the_settings(tmp_path):
    path = tmp_path / "a.png"
    text = {**METADATA, "seed": "7", "prompt": "--an apple", "guidance_scale": "3.5"}
    image_io.save_png(image_of(1), path, {**text, "height": "64"})
    config = like(path)
    assert (config.model, config.revision) == ("you/m", "a" * 40)
    assert (config.seed, config.num_images, config.num_inference_steps) == (7, 1, 5)
    assert (config.scheduler, config.dtype, config.prompt) == ("ddim", "fp32", "--an apple")
    assert (config.guidance_scale, config.height) == (3.5, 64)

    image_io.save_png(image_of(1), path, {**METADATA, "seed": "7", "scheduler": "PNDMScheduler"})
    assert like(path).scheduler is None


def test_flags_win_over_the_text_also_at_their_defaults(tmp_path):
    path = tmp_path / "a.png"
    image_io.save_png(image_of(1), path, {**METADATA, "seed": "7", "dtype": "bf16"})
    assert like(path, "--num-inference-steps=9").num_inference_steps == 9
    config = like(path, "--seed", "0", "--dtype=fp32", "--revision", "main")
    assert (config.seed, config.dtype, config.revision) == (0, "fp32", "main")
    assert like(path, "other/model").model == "other/model"
    assert like(path, "other/model").revision is None


def test_text_of_a_png_names_no_path_and_no_other_setting(tmp_path):
    path = tmp_path / "a.png"
    hostile = {
        "output_dir": "/tmp/elsewhere",
        "image": "/etc/passwd",
        "mask": "/etc/passwd",
        "device": "cuda",
        "npz": "True",
        "compile": "True",
        "background": "red",
        "revision": "evil",
        "like": "other.png",
        "num_images": "1000000",
        "batch_size": "1000000",
    }
    image_io.save_png(image_of(1), path, {**METADATA, "seed": "7", **hostile})
    config = like(path)
    assert (config.revision, config.num_images) == ("a" * 40, 1)
    default = parse_sample(["you/m"])
    for name in hostile.keys() - {"revision", "like", "num_images"}:
        assert getattr(config, name) == getattr(default, name), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({}, "does not say what it was made from"),
        ({"version": "f" * 64}, "a model in a folder called 'you/m'. Name"),
        ({"model": "--compile"}, "Name the folder"),
        ({"model": "../up"}, "Name the folder"),
        ({"model": "/etc"}, "Name the folder"),
        ({"model": "http://host/x"}, "Name the folder"),
        ({"model": "a\x1b[2J"}, r"called 'a\\x1b\[2J'"),
        ({"interpolate": "3 to 7 in 9"}, "lies between two seeds"),
        ({"noise_level": "0.5"}, "restores an image"),
        ({"seed": "many"}, "seed is 'many'"),
        ({"seed": "-1"}, "--seed"),
        ({"num_inference_steps": "5.5"}, "num_inference_steps is '5.5'"),
        ({"num_inference_steps": "0"}, "--num_inference_steps is 0"),
        ({"dtype": "float8\x1b"}, r"dtype is 'float8\\x1b'"),
        ({"guidance_scale": "nan", "prompt": "p"}, "guidance_scale is"),
        ({"height": "64"}, "--height has no effect without --prompt"),
        ({"height": "8193", "prompt": "p"}, "height is 8193; a PNG may ask for 8192 at most"),
        ({"width": "1" + "0" * 18, "prompt": "p"}, "width is 1"),
        ({"num_inference_steps": "1000000"}, "num_inference_steps is 1000000; a PNG may ask"),
        ({"num_resamples": "1000000"}, "num_resamples is 1000000; a PNG may ask"),
    ],
    ids=str,
)
def test_png_that_cannot_be_made_again_is_refused(tmp_path, text, message):
    metadata = {**METADATA, "seed": "1", **text} if text else {}
    image_io.save_png(image_of(1), tmp_path / "a.png", metadata)
    with pytest.raises(UserError, match=message):
        like(tmp_path / "a.png")


def test_like_needs_a_file(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        like(tmp_path / "absent.png")
    with pytest.raises(UsageError, match="Name a MODEL"):
        parse_sample([])


def test_another_model_or_input_is_refused(tmp_path):
    path = tmp_path / "a.png"
    image_io.save_png(image_of(1), path, {**METADATA, "seed": "7"})
    outputs.require_same_model(path, METADATA)
    with pytest.raises(UserError, match="another model .version 'a{40}', here 'b"):
        outputs.require_same_model(path, {**METADATA, "version": "b" * 40})
    with pytest.raises(UserError, match="another --image"):
        outputs.require_same_model(path, {**METADATA, "image_sha256": "c"})


def test_different_pixels_are_an_error_above_rounding(tmp_path):
    image = torch.full((1, 4, 4), 100, dtype=torch.uint8)
    path = Path(tmp_path / "a.png")
    image_io.save_png(image, path, {})
    assert "has exactly the pixels" in outputs.compare_images(path, image, "it")
    near, far = image.clone(), image.clone()
    near[0, 0, 0], far[0, 0, 0] = 102, 103
    assert "in 1 of 16 values, by 2 of 255 at most" in outputs.compare_images(path, near, "it")
    with pytest.raises(UserError, match="by 3 of 255 at most.*--batch_size"):
        outputs.compare_images(path, far, "it")
    with pytest.raises(UserError, match="another size"):
        outputs.compare_images(path, far[:, :2], "it")
