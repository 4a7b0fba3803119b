"""sample.py as a user runs it, in this process: what it writes, prints and refuses."""

import json
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageSequence

import sample
from ddpm import file_io, run_folder
from ddpm.config.parser import parse_sample
from ddpm.data.transforms import to_pixels
from ddpm.errors import UsageError, UserError
from ddpm.sampling import image_io, outputs, pipeline, sampler, sampler_results
from tests.sampling.test_sampler_results import make_entry, make_table

TABLE = (
    ("ddim", 5, 4.0, 0.01),
    ("unipc", 8, 3.0, 0.02),
    ("dpmsolver++", 20, 1.0, 0.05),
    ("ddpm", 40, 0.5, 0.2),
)


@pytest.fixture
def model(tmp_path, make_unet):
    """A pipeline of 8x8 RGB images with 40 timesteps."""
    scheduler = DDPMScheduler(40, timestep_spacing="trailing", prediction_type="v_prediction")
    pipeline.export_pipeline(make_unet(channels=3), scheduler, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(arguments...) -> what sample.py prints; its images are in tmp_path / out."""

    def main(*arguments, out="out"):
        argv = ["sample.py", *map(str, arguments), f"--output_dir={tmp_path / out}", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", argv)
        sample.main()
        return capsys.readouterr().out

    return main


@pytest.fixture
def picture(tmp_path):
    """A PNG of noise, 16 high and 20 wide."""
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def text_of(path):
    return image_io.read_png_text(path)


def files_of(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_table(folder, *entries) -> None:
    """Write a sampler table for the model in a folder: (scheduler, steps, distance, seconds)."""
    weights = sampler_results.unet_weights_sha256(folder)
    table = make_table(*(make_entry(*entry) for entry in entries), weights=weights)
    table.write(folder / run_folder.SAMPLER_TABLE)


# Images of seeds


def test_images_grid_and_collections_are_written(model, run, tmp_path):
    flags = ["--num_images=3", "--seed=5", "--num_inference_steps=4", "--npz", "--parquet"]
    printed = run(model, *flags)
    out = tmp_path / "out"
    assert names(out) == [
        "grid.png",
        "samples.npz",
        "samples.parquet",
        *(f"seed-0000{k}.png" for k in (5, 6, 7)),
    ]
    assert "dpmsolver-sde, 4 steps, on cpu: 3 images." in printed and "Drew 3 images:" in printed
    text = text_of(out / "seed-00006.png")
    assert list(text) == [
        "model",
        "version",
        "scheduler",
        "num_inference_steps",
        "dtype",
        "software",
        "seed",
    ]
    assert text["model"] == "model" and len(text["version"]) == 64 and text["seed"] == "6"
    assert (text["scheduler"], text["num_inference_steps"]) == ("dpmsolver-sde", "4")
    assert text["dtype"] == "fp32"
    assert text["software"] == f"diffusers {diffusers.__version__}, torch {torch.__version__}"
    (out / "seed-00006.png").unlink()
    assert "Drew 1 image, 2 were there already" in run(model, *flags)
    assert len(np.load(out / "samples.npz")["arr_0"]) == 3


def test_compile_is_refused_where_torch_cannot(model, run, monkeypatch):
    monkeypatch.setattr(sampler, "compile_failure_reason", lambda device_type: "No C++ compiler.")
    with pytest.raises(UserError, match=r"^--compile: No C\+\+ compiler\. Leave it out\.$"):
        run(model, "--compile")


def test_steps_that_would_spoil_the_images_are_replaced(model, run, tmp_path):
    printed = run(model, "--num_images=1", "--num_inference_steps=27", "--scheduler=ddim")
    assert (
        "ddim with 27 steps would leave noise in the images of this model: 40 steps are used."
        in printed
    )
    assert text_of(tmp_path / "out" / "seed-00000.png")["num_inference_steps"] == "40"
    flags = ["--num_images=1", "--num_inference_steps=10", "--scheduler=ddim"]
    assert "would leave noise" not in run(model, *flags, out="two")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_changes_pixels_little(model, run, tmp_path, dtype, capsys):
    run(model, "--num_images=1", "--num_inference_steps=8", out="fp32")
    run(model, "--num_images=1", "--num_inference_steps=8", f"--dtype={dtype}")
    full, half = (
        image_io.read_png(tmp_path / folder / "seed-00000.png").int() for folder in ("fp32", "out")
    )
    assert (full - half).abs().float().mean() < 3
    assert text_of(tmp_path / "out" / "seed-00000.png")["dtype"] == dtype
    assert "float32" not in capsys.readouterr().err  # no warnings of the library


def test_trajectory_is_a_strip_and_a_gif(model, run, tmp_path):
    flags = ["--num_images=2", "--num_inference_steps=10", "--trajectory"]
    run(model, *flags)
    out = tmp_path / "out"
    written = {f"seed-0000{k}-trajectory.{kind}" for k in (0, 1) for kind in ("png", "gif")}
    assert written <= set(names(out))
    strip = image_io.read_png(out / "seed-00001-trajectory.png")
    assert strip.shape == (3, 2 * 66 + 2, 10 * 66 + 2)
    image = image_io.read_png(out / "seed-00001.png")
    cell = strip[:, 2:66:8, 9 * 66 + 2 : 9 * 66 + 66 : 8]
    assert torch.equal(cell, image)  # the last of the upper row is the image itself
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(strip[:, 2:66:8, 2:66:8], to_pixels(noise)[0])
    with Image.open(out / "seed-00001-trajectory.gif") as gif:
        assert gif.n_frames == 11  # ten steps and the image
    (out / "seed-00001-trajectory.gif").unlink()
    run(model, *flags)  # the images are there, a trajectory is missing
    assert (out / "seed-00001-trajectory.gif").exists()


def test_interpolation_starts_at_the_first_seed_and_is_animated(model, run, tmp_path):
    run(model, "--interpolate", 3, 9, "--num_images=4", "--num_inference_steps=4")
    flags = ["--seed=3", "--num_images=1", "--num_inference_steps=4", "--scheduler=ddim"]
    run(model, *flags, out="end")
    out = tmp_path / "out"
    assert names(out) == [*(f"between-0000{k}.png" for k in range(4)), "between.gif", "grid.png"]
    first = image_io.read_png(out / "between-00000.png")
    image = image_io.read_png(tmp_path / "end" / "seed-00003.png")
    assert (first.int() - image.int()).abs().max() <= 1
    text = text_of(out / "between-00001.png")
    assert (text["interpolate"], text["scheduler"]) == ("3 to 9 in 4", "ddim")
    with Image.open(out / "between.gif") as gif:
        assert len(list(ImageSequence.Iterator(gif))) == 4


# --like


def test_image_is_made_again_from_its_own_text(model, run, tmp_path):
    run(model, "--num_images=3", "--scheduler=euler-ancestral", "--num_inference_steps=6")
    original = tmp_path / "out" / "seed-00002.png"
    printed = run(model, f"--like={original}", out="again")
    again = tmp_path / "again" / "seed-00002.png"
    assert names(again.parent) == [again.name] and text_of(again) == text_of(original)
    one, other = (image_io.read_png(path).int() for path in (original, again))
    assert (one - other).abs().max() <= 1
    assert "has exactly the pixels" in printed or "by 1 of 255 at most" in printed
    # Into the folder of the image itself nothing is written, not even a grid.
    before = {path.name: path.stat().st_mtime_ns for path in original.parent.iterdir()}
    assert "The image drawn again" in run(model, f"--like={original}")
    assert {path.name: path.stat().st_mtime_ns for path in original.parent.iterdir()} == before


def test_like_refuses_another_model(model, run, tmp_path, make_unet):
    run(model, "--num_images=1", "--num_inference_steps=1")
    pipeline.export_pipeline(make_unet(channels=3, seed=1), DDPMScheduler(40), tmp_path / "other")
    with pytest.raises(UserError, match="was made with another model"):
        run(tmp_path / "other", "--like", tmp_path / "out" / "seed-00000.png", out="again")


def test_like_loads_the_commit_that_made_the_image(hub, model, run, tmp_path):
    repository = hub.create_repo("model", "bob/likeness")
    commit = repository.write(files_of(model), "first")
    run("bob/likeness", "--num_images=1", "--num_inference_steps=4")
    repository.write({"README.md": b"newer"}, "second")
    printed = run("--like", tmp_path / "out" / "seed-00000.png", out="again")
    assert f"bob/likeness at {commit[:12]}" in printed and "has exactly the pixels" in printed


# --quality


def test_quality_uses_sampler_and_steps_of_the_table(model, run, tmp_path):
    """The pixels are those of the same flags by hand; --like needs no table."""
    write_table(model, *TABLE)
    printed = run(model, "--num_images=1", "--quality=fast")
    assert "--quality fast: unipc, 8 steps, a distance of 3, the lowest in 10 steps" in printed
    path = tmp_path / "out" / "seed-00000.png"
    text = text_of(path)
    assert (text["scheduler"], text["num_inference_steps"]) == ("unipc", "8")
    assert text["quality"] == "fast"
    run(model, "--num_images=1", "--scheduler=unipc", "--num_inference_steps=8", out="by-hand")
    by_hand = image_io.read_png(tmp_path / "by-hand" / "seed-00000.png")
    assert torch.equal(image_io.read_png(path), by_hand)
    (model / run_folder.SAMPLER_TABLE).unlink()
    assert "has exactly the pixels" in run(model, f"--like={path}", out="again")


def test_quality_without_a_table_says_what_to_do(model, run):
    with pytest.raises(UserError) as error:
        run(model, "--quality=good")
    assert "were not measured (no samplers.json" in str(error.value)
    hint = f"`evaluate.py {model} --samplers` measures them; or give --scheduler"
    assert hint in str(error.value)


def test_table_of_other_weights_is_not_used(model, run, make_unet):
    write_table(model, *TABLE)
    pipeline.export_pipeline(make_unet(channels=3, seed=1), DDPMScheduler(40), model)
    with pytest.raises(UserError, match="or one of other weights"):
        run(model, "--quality=good")


def test_table_and_weights_are_of_one_revision(hub, model, run):
    repository = hub.create_repo("model", "bob/tables")
    write_table(model, *TABLE)
    first = repository.write(files_of(model), "first")
    write_table(model, ("ddim", 3, 1.0, 0.1))
    second = repository.write(files_of(model), "second")
    printed = run("bob/tables", "--num_images=1", "--quality=good")
    assert "ddim, 3 steps, on cpu" in printed and f"bob/tables at {second[:12]}" in printed
    flags = [f"--revision={first}", "--num_images=1", "--quality=best"]
    printed = run("bob/tables", *flags, out="old")
    assert f"bob/tables at {first[:12]}, ddpm, 40 steps, on cpu" in printed


# --image


def test_restoring_writes_three_images_and_a_strip(model, run, tmp_path, picture):
    flags = ["--noise_level=0.25", "--num_inference_steps=20", "--scheduler=unipc"]
    printed = run(model, "--image", picture, *flags)
    out = tmp_path / "out"
    assert names(out) == ["noisy.png", "prediction.png", "restored.png", "strip.png"]
    text = text_of(out / "restored.png")
    assert (text["noise_level"], text["scheduler"], text["seed"]) == ("0.25", "unipc", "0")
    assert text["image_sha256"] == file_io.file_sha256(picture)
    original = image_io.resize_and_crop(image_io.read_image(picture, 3), 8, 8)
    rows = [line.split() for line in printed.splitlines() if line.strip()[:2] in ("0.", "1.")]
    assert [row[0] for row in rows] == ["0.10", "0.25", "0.50", "0.75", "0.95"]
    for name, column in (("noisy", 2), ("prediction", 3), ("restored", 4)):
        image = image_io.read_png(out / f"{name}.png").double()
        error = (image - original).square().mean().sqrt()
        assert float(rows[1][column]) == pytest.approx(float(error), abs=0.06)
    strip = image_io.read_png(out / "strip.png")
    assert strip.shape == (3, 5 * 66 + 2, 4 * 66 + 2)
    assert torch.equal(strip[:, 2:66:8, 2:66:8], original)
    assert torch.equal(strip[:, 68:132:8, 68:132:8], image_io.read_png(out / "noisy.png"))
    Image.new("L", (2, 2)).save(out / "noisy.png")
    with pytest.raises(UserError, match="noisy.png was not made by this command"):
        run(model, "--image", picture)


def test_image_is_brought_to_the_rectangle_of_the_model(run, tmp_path, make_unet, chain):
    pipeline.export_pipeline(make_unet(resolution=(8, 12), channels=3), chain, tmp_path / "wide")
    Image.new("RGB", (30, 20), "black").save(tmp_path / "picture.png")
    mask = Image.new("L", (30, 20), "black")
    mask.paste("white", (15, 0, 30, 20))  # the right half
    mask.save(tmp_path / "mask.png")
    image = ["--image", tmp_path / "picture.png", "--num_inference_steps=2"]
    run(tmp_path / "wide", *image, "--mask", tmp_path / "mask.png", "--num_resamples=1")
    painted = image_io.read_png(tmp_path / "out" / "seed-00000.png")
    assert painted.shape == (3, 8, 12)
    assert (painted[:, :, :6] == 0).all() and (painted[:, :, 6:] > 0).any()
    run(tmp_path / "wide", *image, out="restored")
    assert image_io.read_png(tmp_path / "restored" / "restored.png").shape == (3, 8, 12)
    run(tmp_path / "wide", "--interpolate", 1, 2, "--num_images=3", image[2], out="between")
    assert image_io.read_png(tmp_path / "between" / "grid.png").shape == (3, 2 * 50 + 2, 2 * 74 + 2)


def test_rgba_model_keeps_the_transparency_of_an_image(run, tmp_path, make_unet, chain):
    """Inpainted, restored and interpolated; an RGB picture is opaque."""
    pipeline.export_pipeline(make_unet(channels=4), chain, tmp_path / "rgba")
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (0, 0, 8, 8))
    clear.save(tmp_path / "picture.png")
    mask = Image.new("L", (16, 16), "black")
    mask.paste("white", (8, 0, 16, 16))  # the right half
    mask.save(tmp_path / "mask.png")
    picture, steps = ["--image", tmp_path / "picture.png"], "--num_inference_steps=2"
    inpaint = ["--mask", tmp_path / "mask.png", "--num_resamples=1", steps]
    run(tmp_path / "rgba", *picture, *inpaint)
    painted = image_io.read_png(tmp_path / "out" / "seed-00000.png")
    assert painted[:, 0, 0].tolist() == [0, 0, 255, 255] and painted[:, 7, 0].tolist() == [0] * 4
    assert Image.open(tmp_path / "out" / "grid.png").mode == "RGB"
    run(tmp_path / "rgba", *picture, steps, out="restored")
    assert image_io.read_png(tmp_path / "restored" / "restored.png").shape == (4, 8, 8)
    run(tmp_path / "rgba", "--interpolate", 1, 2, "--num_images=3", steps, out="between")
    clear.convert("RGB").save(tmp_path / "picture.png")
    run(tmp_path / "rgba", *picture, *inpaint, out="opaque")
    opaque = image_io.read_png(tmp_path / "opaque" / "seed-00000.png")
    assert (opaque[3, :, :4] == 255).all()
    with pytest.raises(UsageError, match="--background black would fill what is transparent"):
        run(tmp_path / "rgba", *picture, steps, "--background=black", out="filled")


def test_mask_is_inpainted_for_each_seed(model, run, tmp_path, picture):
    mask = np.zeros((16, 20), dtype=np.uint8)
    mask[:, :12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = ["--image", picture, "--mask", tmp_path / "mask.png", "--num_inference_steps=4"]
    flags += ["--num_resamples=2", "--num_images=2"]
    run(model, *flags)
    original = image_io.resize_and_crop(image_io.read_image(picture, 3), 8, 8)
    white = image_io.resize_and_crop(image_io.read_image(tmp_path / "mask.png", 1), 8, 8) >= 128
    one, two = (image_io.read_png(tmp_path / "out" / f"seed-0000{k}.png") for k in (0, 1))
    assert white.any() and not white.all()
    kept = ~white.expand_as(one)
    assert torch.equal(one[kept], original[kept]) and torch.equal(two[kept], original[kept])
    assert not torch.equal(one, two)
    text = text_of(tmp_path / "out" / "seed-00000.png")
    assert text["mask_sha256"] == file_io.file_sha256(tmp_path / "mask.png")

    with pytest.raises(UsageError, match="--mask with --scheduler heun"):
        run(model, *flags, "--scheduler=heun", out="other")
    Image.new("L", (20, 16)).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match="has no white"):
        run(model, *flags, out="other")
    Image.new("L", (20, 17), 255).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match="mask.png is 20x17, .* 20x16: they must be of one size"):
        run(model, *flags, out="other")
    assert not (tmp_path / "other").exists()
    for missing in ("--mask", "--image"):
        with pytest.raises(UserError, match="none.png: there is no such file"):
            run(model, *flags, missing, tmp_path / "none.png")


def test_restoring_is_deterministic_by_default(model, run, tmp_path, picture):
    run(model, "--image", picture, "--num_inference_steps=2")
    assert text_of(tmp_path / "out" / "restored.png")["scheduler"] == "ddim"
    flags = ["--num_inference_steps=2", "--scheduler=dpmsolver-sde"]
    run(model, "--image", picture, *flags, out="other")
    assert text_of(tmp_path / "other" / "restored.png")["scheduler"] == "dpmsolver-sde"


# Pipelines with a sampling loop of their own


def save_custom_loop(folder, make_unet, kind):
    """Save such a pipeline as old versions of diffusers did, and return it."""
    scheduler = {
        "ScoreSdeVePipeline": lambda: diffusers.ScoreSdeVeScheduler(20),
        "KarrasVePipeline": diffusers.KarrasVeScheduler,
    }[kind]()
    pipe = getattr(diffusers, kind)(make_unet(channels=3), scheduler)
    pipe.save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return pipe


@pytest.mark.parametrize("kind", ["ScoreSdeVePipeline", "KarrasVePipeline"])
def test_custom_loop_gives_the_images_of_stock_diffusers(kind, run, tmp_path, make_unet):
    """One at a time: their steps depend on the whole batch."""
    stock = save_custom_loop(tmp_path / "model", make_unet, kind)
    stock.set_progress_bar_config(disable=True)
    run(tmp_path / "model", "--num_images=2", "--num_inference_steps=3")
    for seed in (0, 1):
        path = tmp_path / "out" / f"seed-0000{seed}.png"
        expected = stock(generator=torch.Generator().manual_seed(seed), num_inference_steps=3)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected.images[0]))
    assert text_of(path)["scheduler"] == kind.replace("Pipeline", "Scheduler")
    for flag in (
        ["--scheduler=ddim"],
        ["--trajectory"],
        ["--interpolate", "1", "2"],
        ["--dtype=bf16"],
    ):
        with pytest.raises(UsageError, match=kind):
            run(tmp_path / "model", *flag, out="other")


@pytest.mark.parametrize("name", ["GoneScheduler", "utils", "DDPMPipeline"])
def test_scheduler_that_diffusers_does_not_have_is_refused(tmp_path, make_unet, name):
    """The name is a stranger's: only a scheduler class of diffusers is used."""
    save_custom_loop(tmp_path / "model", make_unet, "ScoreSdeVePipeline")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": name}))
    with pytest.raises(UserError, match="is no scheduler of diffusers"):
        sampler.load_sampler(parse_sample([str(tmp_path / "model")]))


# Several processes


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(model, run, script, tmp_path):
    """Even if one of them has nothing to draw."""
    flags = ["--num_images=5", "--num_inference_steps=4", "--scheduler=ddpm", "--npz"]
    run(model, *flags)
    launcher = ["--num_processes=2", "--main_process_port=0"]
    launcher += ["--config_file", "accelerate_config.yaml"]
    command = [*launcher, "sample.py", model, *flags, f"--output_dir={tmp_path / 'two'}"]
    done = script(*command, launch=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Drew") == 1
    assert names(tmp_path / "two") == names(tmp_path / "out")
    one, two = (
        np.load(tmp_path / folder / "samples.npz")["arr_0"].astype(int) for folder in ("out", "two")
    )
    assert np.abs(one - two).max() <= 1
    (tmp_path / "two" / "seed-00003.png").unlink()  # of the second process
    done = script(*command, launch=True)
    assert done.returncode == 0, done.stderr
    assert "Drew 0 images in process 1 of 2, 3 were there already" in done.stdout
    assert (tmp_path / "two" / "seed-00003.png").is_file()


@pytest.mark.slow
def test_process_that_fails_ends_the_others(model, script, tmp_path):
    """The launcher ends the process that waits; what it wrote is kept."""
    out = tmp_path / "two"
    out.mkdir()
    Image.new("L", (2, 2)).save(out / "seed-00001.png")  # a stranger's file, for the second process
    launcher = ["--num_processes=2", "--main_process_port=0"]
    launcher += ["--config_file", "accelerate_config.yaml"]
    flags = ["--num_images=2", "--num_inference_steps=1", f"--output_dir={out}"]
    done = script(*launcher, "sample.py", model, *flags, launch=True, timeout=120)
    assert done.returncode != 0
    assert not (out / outputs.GRID).exists()
