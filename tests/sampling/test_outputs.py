"""The folder of images: what is kept, who draws what, what a PNG says of itself."""

import numpy as np
import pytest
import torch

from ddpm.config.parser import given_flags, parse_sample
from ddpm.errors import UserError
from ddpm.sampling import image_io, outputs
from ddpm.sampling.outputs import OutputFolder

ORIGIN = {
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
    assert list(outputs.save_images(images, ((seed, image_of(seed)) for seed in seeds))) == list(
        seeds
    )


@pytest.fixture
def five(tmp_path):
    return OutputFolder(tmp_path / "out", ORIGIN, range(3, 8))


def test_what_is_there_whole_and_of_the_same_origin_is_kept(five):
    assert outputs.missing_seeds(five) == [3, 4, 5, 6, 7]
    fill(five, [3, 5, 6])
    cut = five.path(5)
    other = OutputFolder(five.folder, {**ORIGIN, "version": "b" * 40}, five.seeds)
    fill(other, [6])
    assert outputs.missing_seeds(five) == [4, 6, 7]
    assert outputs.missing_seeds(five, again=True) == [3, 4, 5, 6, 7]
    cut.write_bytes(cut.read_bytes()[:-30])
    with pytest.raises(UserError, match="seed-00005.png was not made by this command"):
        outputs.missing_seeds(five)


@pytest.mark.parametrize("name", ["seed-00004.png", "grid.png"])
def test_strangers_files_are_not_replaced(five, name):
    five.folder.mkdir()
    image_io.save_png(image_of(1), five.folder / name, {"by": "me"})
    before = (five.folder / name).read_bytes()
    with pytest.raises(UserError, match=f"{name} was not made .* another --output_dir"):
        outputs.missing_seeds(five)
    assert (five.folder / name).read_bytes() == before


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_processes_share_the_seeds_whatever_is_there(tmp_path, world):
    """Each seed is drawn once; a process that looks later, when some are there, draws none twice
    and misses none."""
    drawn = []
    for rank in range(world):
        mine = OutputFolder(tmp_path, ORIGIN, range(5), rank=rank, world=world)
        left = outputs.missing_seeds(mine)
        assert left == list(mine.share)
        fill(mine, left)
        drawn += left
    assert sorted(drawn) == [0, 1, 2, 3, 4]


def test_place_is_what_the_launcher_says(monkeypatch):
    assert outputs.rank_and_world_size() == (0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert outputs.rank_and_world_size() == (2, 4)


def test_first_process_waits_for_the_others(tmp_path, monkeypatch):
    first, second = (
        OutputFolder(tmp_path, ORIGIN, range(4), rank=rank, world=2) for rank in (0, 1)
    )
    outputs.missing_seeds(first)
    fill(first, first.share)
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        fill(second, [second.share[len(slept) - 1]])  # one image each time

    monkeypatch.setattr(outputs.time, "sleep", sleep)
    outputs.wait_for_other_processes(first)
    assert len(slept) == 2


def test_a_process_that_died_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    first = OutputFolder(tmp_path, ORIGIN, range(4), rank=0, world=2)
    monkeypatch.setattr(outputs, "PATIENCE", 0.01)
    with pytest.raises(UserError, match="2 images of other processes did not come"):
        outputs.wait_for_other_processes(first)


def test_sheet_and_collections(five, tmp_path, monkeypatch):
    outputs.missing_seeds(five)
    fill(five, five.seeds)
    made = outputs.write_collections(five, npz=True, parquet=True)
    assert [path.name for path in made] == ["grid.png", "samples.npz", "samples.parquet"]
    assert np.load(made[1])["seeds"].tolist() == list(five.seeds)
    assert image_io.read_png_text(made[0]) == {**ORIGIN, "seed": "3"}
    assert outputs.missing_seeds(five) == []
    monkeypatch.setattr(outputs, "GRID_LIMIT", 4)
    assert image_io.read_png(outputs.write_collections(five, False, False)[0]).shape == (
        1,
        134,
        134,
    )


# Made again


def like(path, *flags):
    config = parse_sample(["--like", str(path), *flags])
    return outputs.with_settings_of_image(config, given_flags(flags))


def test_png_says_how_to_make_it_again(tmp_path):
    path = tmp_path / "a.png"
    text = {**ORIGIN, "seed": "7", "prompt": "--an apple", "guidance_scale": "3.5", "height": "64"}
    image_io.save_png(image_of(1), path, text)
    config = like(path)
    assert (config.model, config.revision) == ("you/m", "a" * 40)
    assert (config.seed, config.num_images, config.num_inference_steps) == (7, 1, 5)
    assert (config.scheduler, config.dtype, config.prompt) == ("ddim", "fp32", "--an apple")
    assert (config.guidance_scale, config.height) == (3.5, 64)
    assert like(path, "--num_inference_steps=9").num_inference_steps == 9

    image_io.save_png(image_of(1), path, {**ORIGIN, "seed": "7", "scheduler": "PNDMScheduler"})
    assert like(path).scheduler is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({}, "does not say what it was made from"),
        ({**ORIGIN, "seed": "1", "version": "f" * 64}, "a model in a folder called you/m. Name"),
        ({**ORIGIN, "seed": "1", "model": "--compile"}, "Name the folder"),
        ({**ORIGIN, "seed": "1", "interpolate": "3 to 7 in 9"}, "lies between two seeds"),
    ],
)
def test_png_that_cannot_be_made_again_from_its_text(tmp_path, text, words):
    image_io.save_png(image_of(1), tmp_path / "a.png", text)
    with pytest.raises(UserError, match=words):
        like(tmp_path / "a.png")


def test_no_png_no_likeness(tmp_path):
    with pytest.raises(UserError, match="there is no such file"):
        like(tmp_path / "absent.png")


def test_another_model_is_not_taken_for_the_one(tmp_path):
    path = tmp_path / "a.png"
    image_io.save_png(image_of(1), path, {**ORIGIN, "seed": "7"})
    outputs.require_same_model(str(path), ORIGIN)
    with pytest.raises(UserError, match="another model .version a{40}, here b"):
        outputs.require_same_model(str(path), {**ORIGIN, "version": "b" * 40})
    with pytest.raises(UserError, match="another --image"):
        outputs.require_same_model(str(path), {**ORIGIN, "image_sha256": "c"})


def test_an_image_that_is_not_like_it_is_an_error(tmp_path):
    """Rounding is said and passed over; more is an exit code that a script can see."""
    image = torch.full((1, 4, 4), 100, dtype=torch.uint8)
    image_io.save_png(image, tmp_path / "a.png", {})
    path = str(tmp_path / "a.png")
    assert "has the very pixels" in outputs.compare_images(path, image, "it")
    near, far = image.clone(), image.clone()
    near[0, 0, 0], far[0, 0, 0] = 102, 103
    assert "in 1 of 16 values, by 2 of 255 at most" in outputs.compare_images(path, near, "it")
    with pytest.raises(UserError, match="by 3 of 255 at most.*--batch_size"):
        outputs.compare_images(path, far, "it")
    with pytest.raises(UserError, match="of another size"):
        outputs.compare_images(path, far[:, :2], "it")
