"""sample.py as a person runs it, in this process: what is written, said and refused."""

import json
import sys

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image, ImageSequence

import sample
from ddpm import device as device_module
from ddpm import run_folder
from ddpm.config.parser import parse_sample
from ddpm.data import transforms
from ddpm.errors import UsageError, UserError
from ddpm.sampling import image_io, pipeline, sampler_table
from ddpm.sampling.sampler import open_sampler
from tests.sampling.test_sampler_table import make_entry, make_table


@pytest.fixture
def model(tmp_path, make_unet):
    """A pipeline of 8x8 RGB images on a chain of 40 steps."""
    chain = DDPMScheduler(40, timestep_spacing="trailing", prediction_type="v_prediction")
    pipeline.export_pipeline(make_unet(channels=3), chain, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(words...) -> what sample.py prints; the images are in tmp_path/out."""

    def main(*words, out="out"):
        argv = ["sample.py", *map(str, words), f"--output_dir={tmp_path / out}", "--device=cpu"]
        monkeypatch.setattr(sys, "argv", argv)
        sample.main()
        return capsys.readouterr().out

    return main


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_images_grid_and_collections(model, run, tmp_path):
    words = ["--num_images=3", "--seed=5", "--num_inference_steps=4", "--npz", "--parquet"]
    said = run(model, *words)
    out = tmp_path / "out"
    assert names(out) == [
        "grid.png",
        "samples.npz",
        "samples.parquet",
        *(f"seed-0000{k}.png" for k in (5, 6, 7)),
    ]
    assert "dpmsolver-sde, 4 steps, on cpu: 3 images." in said and "Drew 3 images:" in said
    text = Image.open(out / "seed-00006.png").text
    assert text["model"] == "model" and len(text["version"]) == 64 and text["seed"] == "6"
    assert (text["scheduler"], text["num_inference_steps"]) == ("dpmsolver-sde", "4")
    assert text["dtype"] == "fp32"
    assert "diffusers " in text["software"] and "torch " in text["software"]
    (out / "seed-00006.png").unlink()
    assert "Drew 1 image, 2 were there already" in run(model, *words)
    assert len(np.load(out / "samples.npz")["arr_0"]) == 3


def test_compile_is_refused_where_torch_cannot(model, run, monkeypatch):
    monkeypatch.setattr(
        device_module, "compile_failure_reason", lambda device_type: "No C++ compiler."
    )
    with pytest.raises(UserError, match=r"^--compile: No C\+\+ compiler\. Leave it out\.$"):
        run(model, "--compile")


def test_picture_is_made_again_from_its_own_text(model, run, tmp_path):
    run(model, "--num_images=3", "--scheduler=euler-ancestral", "--num_inference_steps=6")
    like = f"--like={tmp_path / 'out' / 'seed-00002.png'}"
    said = run(model, like, out="again")
    assert names(tmp_path / "again") == ["seed-00002.png"]
    one, other = (
        image_io.read_png(tmp_path / folder / "seed-00002.png").int() for folder in ("out", "again")
    )
    assert (one - other).abs().max() <= 1
    assert "has the very pixels" in said or "by 1 of 255 at most" in said
    # In the place of the image itself nothing is written, also no sheet; but it is drawn.
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert "The image drawn again" in run(model, like)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before
    assert Image.open(tmp_path / "again" / "seed-00002.png").text == (
        Image.open(tmp_path / "out" / "seed-00002.png").text
    )
    pipeline.export_pipeline(
        pipeline.load_model(str(model)).unet.apply(lambda m: None).float(),
        DDPMScheduler(40),
        tmp_path / "other",
    )
    weights = pipeline.load_model(str(tmp_path / "other")).unet
    with torch.no_grad():
        weights.conv_out.bias += 0.1
    pipeline.export_pipeline(weights, DDPMScheduler(40), tmp_path / "other")
    with pytest.raises(UserError, match="was made with another model"):
        run(tmp_path / "other", like, out="third")


def test_picture_from_the_hub_names_all_that_is_needed(hub, model, run, tmp_path):
    files = {
        path.relative_to(model).as_posix(): path.read_bytes()
        for path in model.rglob("*")
        if path.is_file()
    }
    repository = hub.create_repo("model", "bob/likeness")
    commit = repository.write(files, "first")
    run("bob/likeness", "--num_images=1", "--num_inference_steps=4")
    repository.write({"README.md": b"newer"}, "second")
    said = run("--like", tmp_path / "out" / "seed-00000.png", out="again")
    assert f"bob/likeness at {commit[:12]}" in said and "has the very pixels" in said


def offer(folder, *entries) -> None:
    """A menu for the model in a folder: (scheduler, steps, distance, seconds) each."""
    weights = sampler_table.unet_weights_sha256(folder)
    made = make_table(*(make_entry(*each) for each in entries), weights=weights)
    made.write(folder / run_folder.SAMPLER_TABLE)


MENU = (
    ("ddim", 5, 4.0, 0.01),
    ("unipc", 8, 3.0, 0.02),
    ("dpmsolver++", 20, 1.0, 0.05),
    ("ddpm", 40, 0.5, 0.2),
)


def test_quality_takes_sampler_and_steps_from_the_menu(model, run, tmp_path):
    """The same pixels as by hand; the PNG says both, and --like needs no menu."""
    offer(model, *MENU)
    said = run(model, "--num_images=1", "--quality=fast")
    assert "--quality fast: unipc, 8 steps, a distance of 3, the lowest of 10 steps" in said
    path = tmp_path / "out" / "seed-00000.png"
    text = Image.open(path).text
    assert (text["scheduler"], text["num_inference_steps"]) == ("unipc", "8")
    assert text["quality"] == "fast"
    run(model, "--num_images=1", "--scheduler=unipc", "--num_inference_steps=8", out="by-hand")
    by_hand = image_io.read_png(tmp_path / "by-hand" / "seed-00000.png")
    assert torch.equal(image_io.read_png(path), by_hand)
    (model / run_folder.SAMPLER_TABLE).unlink()
    assert "has the very pixels" in run(model, f"--like={path}", out="again")
    offer(model, *MENU)
    assert "unipc, 8 steps, on cpu" in run(
        model, "--interpolate", 1, 2, "--num_images=2", "--quality=fast", out="between"
    )


@pytest.mark.parametrize("quality", ["fast", "good", "best"])
def test_without_a_menu_quality_says_what_to_do(model, run, quality):
    with pytest.raises(UserError) as told:
        run(model, f"--quality={quality}")
    assert "has no menu of samplers (samplers.json)" in str(told.value)
    assert f"`evaluate.py {model} --samplers` measures one; or give --scheduler" in str(told.value)


def test_a_menu_of_other_weights_is_not_used(model, run, make_unet):
    offer(model, *MENU)
    pipeline.export_pipeline(make_unet(channels=3, seed=1), DDPMScheduler(40), model)
    with pytest.raises(UserError, match="or one of other weights"):
        run(model, "--quality=good")


def test_the_menu_of_a_revision_is_used_with_its_weights(hub, model, run, tmp_path):
    """The newest revision has another menu; each comes with the model, in one go."""

    def files():
        return {
            path.relative_to(model).as_posix(): path.read_bytes()
            for path in model.rglob("*")
            if path.is_file()
        }

    repository = hub.create_repo("model", "bob/menus")
    offer(model, *MENU)
    first = repository.write(files(), "first")
    offer(model, ("ddim", 3, 1.0, 0.1))
    second = repository.write(files(), "second")
    said = run("bob/menus", "--num_images=1", "--quality=good")
    assert "ddim, 3 steps, on cpu" in said and f"bob/menus at {second[:12]}" in said
    said = run("bob/menus", f"--revision={first}", "--num_images=1", "--quality=best", out="old")
    assert f"bob/menus at {first[:12]}, ddpm, 40 steps, on cpu" in said


def test_trajectory_is_a_strip_and_a_gif(model, run, tmp_path):
    words = ["--num_images=2", "--num_inference_steps=10", "--trajectory"]
    run(model, *words)
    out = tmp_path / "out"
    assert {f"seed-0000{k}-trajectory.{kind}" for k in (0, 1) for kind in ("png", "gif")} <= set(
        names(out)
    )
    strip = image_io.read_png(out / "seed-00001-trajectory.png")
    assert strip.shape == (3, 2 * 66 + 2, 10 * 66 + 2)
    image = image_io.read_png(out / "seed-00001.png")
    cell = strip[:, 2:66:8, 9 * 66 + 2 : 9 * 66 + 66 : 8]
    assert torch.equal(cell, image)  # the last of the upper row is the image itself
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(strip[:, 2:66:8, 2:66:8], transforms.to_pixels(noise)[0])
    with Image.open(out / "seed-00001-trajectory.gif") as gif:
        assert gif.n_frames == 11  # ten steps and the image
    (out / "seed-00001-trajectory.gif").unlink()
    run(model, *words)  # images are there, the way of one is not
    assert (out / "seed-00001-trajectory.gif").exists()


def test_interpolation_is_written_with_an_animation(model, run, tmp_path):
    run(model, "--interpolate", 3, 9, "--num_images=4", "--num_inference_steps=4")
    seed = ["--seed=3", "--num_images=1", "--num_inference_steps=4", "--scheduler=ddim"]
    run(model, *seed, out="end")
    out = tmp_path / "out"
    assert names(out) == [
        "between-00000.png",
        "between-00001.png",
        "between-00002.png",
        "between-00003.png",
        "between.gif",
        "grid.png",
    ]
    first, end = (
        image_io.read_png(out / "between-00000.png"),
        image_io.read_png(tmp_path / "end" / "seed-00003.png"),
    )
    assert (first.int() - end.int()).abs().max() <= 1
    with Image.open(out / "between.gif") as gif:
        assert len(list(ImageSequence.Iterator(gif))) == 4


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_restoring_writes_three_pictures_and_a_strip(model, run, tmp_path, picture):
    said = run(
        model,
        "--image",
        picture,
        "--noise_level=0.25",
        "--num_inference_steps=20",
        "--scheduler=unipc",
    )
    out = tmp_path / "out"
    assert names(out) == ["noisy.png", "prediction.png", "restored.png", "strip.png"]
    text = Image.open(out / "restored.png").text
    assert (text["noise_level"], text["scheduler"], text["seed"]) == ("0.25", "unipc", "0")
    original = image_io.resize_and_crop(image_io.read_image(picture, 3), 8, 8)
    rows = [line.split() for line in said.splitlines() if line.strip()[:2] in ("0.", "1.")]
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


def test_mask_is_painted_anew_by_each_seed(model, run, tmp_path, picture):
    mask = np.zeros((16, 20), dtype=np.uint8)
    mask[:, :12] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    flags = [
        "--image",
        picture,
        "--mask",
        tmp_path / "mask.png",
        "--num_inference_steps=4",
        "--num_resamples=2",
        "--num_images=2",
    ]
    run(model, *flags)
    original = image_io.resize_and_crop(image_io.read_image(picture, 3), 8, 8)
    hole = image_io.resize_and_crop(image_io.read_image(tmp_path / "mask.png", 1), 8, 8) >= 128
    one, two = (image_io.read_png(tmp_path / "out" / f"seed-0000{k}.png") for k in (0, 1))
    assert hole.any() and not hole.all()
    kept = ~hole.expand_as(one)
    assert torch.equal(one[kept], original[kept]) and torch.equal(two[kept], original[kept])
    assert not torch.equal(one, two)
    assert len(Image.open(tmp_path / "out" / "seed-00000.png").text["mask_sha256"]) == 64

    with pytest.raises(UsageError, match="--mask with --scheduler heun"):
        run(model, *flags, "--scheduler=heun", out="other")
    Image.new("L", (20, 16)).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match="has no white"):
        run(model, *flags, out="other")
    Image.new("L", (20, 17), 255).save(tmp_path / "mask.png")
    with pytest.raises(UsageError, match="mask.png is 20x17, .* 20x16: they must be of one size"):
        run(model, *flags, out="other")
    assert not (tmp_path / "other").exists()


def test_steps_that_would_spoil_the_images_are_replaced_and_said(model, run, tmp_path):
    said = run(model, "--num_images=1", "--num_inference_steps=27", "--scheduler=ddim")
    assert "ddim with 27 steps would spoil the images of this model: 40 steps are taken." in said
    assert Image.open(tmp_path / "out" / "seed-00000.png").text["num_inference_steps"] == "40"
    assert "would spoil the" not in run(
        model, "--num_images=1", "--num_inference_steps=10", "--scheduler=ddim", out="two"
    )


def test_only_the_start_decides_between_two_seeds_and_from_a_picture(model, run, tmp_path, picture):
    def sampler(name, *flags):
        run(model, *flags, "--num_inference_steps=4", out=name)
        return Image.open(next((tmp_path / name).glob("*.png"))).text["scheduler"]

    assert sampler("between", "--interpolate", 1, 2, "--num_images=3") == "ddim"
    assert sampler("restored", "--image", picture) == "ddim"
    asked = ["--image", picture, "--scheduler=dpmsolver-sde"]
    assert sampler("asked", *asked) == "dpmsolver-sde"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_gives_right_pngs(model, run, tmp_path, dtype, capsys):
    run(model, "--num_images=1", "--num_inference_steps=8", out="whole")
    run(model, "--num_images=1", "--num_inference_steps=8", f"--dtype={dtype}")
    whole, half = (
        image_io.read_png(tmp_path / folder / "seed-00000.png").int() for folder in ("whole", "out")
    )
    assert (whole - half).abs().float().mean() < 3
    assert Image.open(tmp_path / "out" / "seed-00000.png").text["dtype"] == dtype
    assert "float32" not in capsys.readouterr().err  # no warnings of the library's


# Pipelines with a loop of their own


def publish_own_loop(folder, make_unet, kind):
    """Save such a pipeline as its author did, long ago, and return it."""
    import diffusers

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
def test_other_kinds_of_noise_are_drawn_as_stock_diffusers_draws_them(
    kind, run, tmp_path, make_unet
):
    """One at a time: their steps look at the whole batch, an image is a function of its seed."""
    stock = publish_own_loop(tmp_path / "model", make_unet, kind)
    stock.set_progress_bar_config(disable=True)
    run(tmp_path / "model", "--num_images=2", "--num_inference_steps=3")
    for seed in (0, 1):
        path = tmp_path / "out" / f"seed-0000{seed}.png"
        expected = stock(generator=torch.Generator().manual_seed(seed), num_inference_steps=3)
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(expected.images[0]))
    assert Image.open(path).text["scheduler"] == kind.replace("Pipeline", "Scheduler")
    for flag in (
        ["--scheduler=ddim"],
        ["--trajectory"],
        ["--interpolate", "1", "2"],
        ["--dtype=bf16"],
    ):
        with pytest.raises(UsageError, match=kind):
            run(tmp_path / "model", *flag, out="other")


def test_pipeline_that_diffusers_no_longer_has_is_one_sentence(tmp_path, make_unet):
    publish_own_loop(tmp_path / "model", make_unet, "ScoreSdeVePipeline")
    path = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "GoneScheduler"}))
    with pytest.raises(UserError, match="which diffusers .* no longer has"):
        open_sampler(parse_sample([str(tmp_path / "model")]))


# More than one process


@pytest.mark.slow
def test_two_processes_draw_the_images_of_one(model, run, script, tmp_path):
    flags = ["--num_images=5", "--num_inference_steps=4", "--scheduler=ddpm", "--npz"]
    run(model, *flags)
    launched = [
        "--num_processes=2",
        "--main_process_port=0",
        "--config_file",
        "accelerate_config.yaml",
        "sample.py",
        model,
        *flags,
        f"--output_dir={tmp_path / 'two'}",
    ]
    done = script(*launched, launch=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Drew") == 1
    assert names(tmp_path / "two") == names(tmp_path / "out")
    one, two = (
        np.load(tmp_path / folder / "samples.npz")["arr_0"].astype(int) for folder in ("out", "two")
    )
    assert np.abs(one - two).max() <= 1
