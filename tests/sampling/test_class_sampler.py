"""sample.py --class_label as a user runs it: images, names, texts, collections and refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from huggingface_hub import constants
from PIL import Image

import sample
from ddpm import run_folder as files_of_run
from ddpm.diffusion.class_labels import fold_label
from ddpm.diffusion.schedulers import SCHEDULERS, build_sampling_scheduler
from ddpm.errors import UserError
from ddpm.evaluation.results import Evaluation, ModelVersion
from ddpm.file_io import write_json
from ddpm.sampling import generate, image_io, outputs, pipeline, sampler_results
from tests.sampling.test_guidance_results import CURVE
from tests.sampling.test_sampler_results import make_entry, make_table
from tests.tiny import CLASS_NAMES

SLOW = pytest.mark.slow
STEPS = "--num_inference_steps=4"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(arguments...) -> what sample.py prints; its images are in tmp_path / out."""

    def main(*arguments, out="out"):
        argv = ["sample.py", *map(str, arguments), f"--output_dir={tmp_path / out}", "--device=cpu"]
        monkeypatch.setattr("sys.argv", argv)
        sample.main()
        return capsys.readouterr().out

    return main


@pytest.fixture
def forward_sizes(monkeypatch):
    """The batch sizes of all forward passes."""
    sizes, forward = [], UNet2DModel.forward

    def counting(self, images, *arguments, **options):
        sizes.append(len(images))
        return forward(self, images, *arguments, **options)

    monkeypatch.setattr(UNet2DModel, "forward", counting)
    return sizes


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def difference(one, other) -> int:
    """Return the largest difference of two images, tensors or PNGs."""
    one, other = (
        image if torch.is_tensor(image) else image_io.read_png(image) for image in (one, other)
    )
    return int((one.int() - other.int()).abs().max())


def read_folder(folder) -> dict:
    return {path.name: image_io.read_png(path) for path in sorted(folder.glob("label-*.png"))}


# Images of classes


def test_all_classes_have_images_of_the_same_seeds_and_a_row_each(class_folder, run, tmp_path):
    """Ids, never names of classes, are in the names of files."""
    flags = [STEPS, "--num_images=2", "--seed=5", "--npz", "--parquet"]
    printed = run(class_folder, "--class_label=all", *flags)
    assert "dpmsolver-sde, 4 steps, 3 classes, guidance 2.0, on cpu: 6 images." in printed
    out = tmp_path / "out"
    files = [f"label-00{label}-seed-0000{seed}.png" for label in range(3) for seed in (5, 6)]
    assert names(out) == ["grid.png", *files, "samples.npz", "samples.parquet"]
    text = image_io.read_png_text(out / files[5])
    assert (text["class_label"], text["class_name"], text["seed"]) == ("2", "a/../b", "6")
    assert (text["guidance_scale"], text["guidance_interval"]) == ("2.0", "0.0,1.0")
    images = read_folder(out)
    assert difference(images[files[0]], images[files[2]]) > 10

    with np.load(out / "samples.npz") as arrays:
        assert arrays["labels"].dtype == np.int64
        assert arrays["labels"].tolist() == [0, 0, 1, 1, 2, 2]
        assert arrays["seeds"].tolist() == [5, 6] * 3
        assert np.array_equal(arrays["arr_0"][5].transpose(2, 0, 1), images[files[5]].numpy())

    grid = image_io.read_png(out / "grid.png")
    right = grid[:, :, grid.shape[2] - (2 * 66 + 2) :]
    assert torch.equal(right, image_io.pil_to_tensor(image_io.make_grid([*images.values()], 2)))
    assert all((grid[:, 66 * row : 66 * (row + 1), :-134] < 128).any() for row in range(3))

    # One class alone is the same images, which are kept
    printed = run(class_folder, "--class_label=dog", *flags)
    assert "class dog (id 1)" in printed and "Drew 0 images, 2 were there already" in printed
    assert "Drew 2 images: " in run(class_folder, "--class_label=dog", *flags[:3], out="dog")
    assert read_folder(tmp_path / "dog").keys() == {files[2], files[3]}
    for name in files[2:4]:
        assert difference(tmp_path / "dog" / name, images[name]) <= 1
        text = image_io.read_png_text(tmp_path / "dog" / name)
        assert text == image_io.read_png_text(out / name)
    assert "Drew 6 images: " in run(class_folder, "--class_label=all", *flags, "--guidance_scale=3")


def test_parquet_is_read_back_with_its_class_names(class_folder, run, tmp_path):
    from datasets import ClassLabel, load_dataset

    run(class_folder, "--class_label=all", STEPS, "--num_images=1", "--parquet")
    path = str(tmp_path / "out" / "samples.parquet")
    rows = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "hf"))
    assert rows.features["label"] == ClassLabel(names=list(CLASS_NAMES))
    assert (rows["label"][:], rows["seed"][:]) == ([0, 1, 2], [0, 0, 0])
    assert rows[2]["image"].size == (8, 8)


def test_too_many_images_of_classes_are_refused(class_folder, run):
    with pytest.raises(UserError, match="of 3 classes: give at most 333,333, and draw more with"):
        run(class_folder, "--class_label=all", STEPS, "--num_images=333334")


@pytest.mark.parametrize("flags", [["--batch_size=4"], ["2 processes"]])
def test_an_image_depends_on_its_seed_and_class_alone(
    class_folder, run, tmp_path, monkeypatch, flags
):
    settings = ["--class_label=all", STEPS, "--num_images=2", "--guidance_interval=0.2,0.8"]
    run(class_folder, *settings)
    if flags == ["2 processes"]:
        for rank in (1, 0):
            monkeypatch.setattr(outputs, "join_processes", lambda rank=rank: (rank, 2))
            run(class_folder, *settings, out="other")
    else:
        run(class_folder, *settings, *flags, out="other")
    expected, images = (read_folder(tmp_path / name) for name in ("out", "other"))
    assert len(expected) == 6 and expected.keys() == images.keys()
    assert max(difference(images[name], expected[name]) for name in images) <= 1


def test_guidance_1_takes_one_pass_and_others_one_of_twice_the_batch(
    class_folder, run, forward_sizes
):
    flags = ["--class_label=cat", "--num_images=3", "--scheduler=ddim", "--num_inference_steps=5"]
    for scale, sizes in (
        (["--guidance_scale=1"], [3] * 5),
        ([], [6] * 5),
        (["--guidance_interval=0.3,0.7"], [3, 3, 6, 6, 3]),  # t is 39, 31, 23, 15, 7 of 40
    ):
        forward_sizes.clear()
        run(class_folder, *flags, *scale, out="-".join(["out", *scale]))
        assert forward_sizes == sizes


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("ddim", "dpmsolver-sde", "heun") else pytest.param(name, marks=SLOW)
        for name in SCHEDULERS
    ],
)
def test_every_scheduler_draws_a_class_as_the_unet_folded_to_it(class_folder, run, tmp_path, name):
    flags = ["--class_label=1", "--guidance_scale=1", "--num_images=2", f"--scheduler={name}"]
    run(class_folder, *flags, STEPS)
    model = pipeline.load_model(str(class_folder), conditional=True)
    scheduler = build_sampling_scheduler(name, model.scheduler_config, 4)
    expected = generate.generate_images(fold_label(model.unet, 1), scheduler, [0, 1], 2)
    for seed, image in expected:
        assert difference(tmp_path / "out" / f"label-001-seed-0000{seed}.png", image) <= 1


def test_without_a_class_stock_diffusers_and_the_null_class_draw_the_same(
    class_folder, run, tmp_path
):
    run(class_folder, "--num_images=2", "--scheduler=ddpm", "--num_inference_steps=10")
    stock = DDPMPipeline.from_pretrained(class_folder)
    stock.set_progress_bar_config(disable=True)
    model = pipeline.load_model(str(class_folder), conditional=True)
    scheduler = build_sampling_scheduler("ddpm", model.scheduler_config, 10)
    for seed, null_class in generate.generate_images(model.unet, scheduler, [0, 1], 2):
        generator = torch.Generator().manual_seed(seed)
        image = stock(generator=generator, num_inference_steps=10).images[0]
        image = image_io.pil_to_tensor(image)
        assert difference(image, tmp_path / "out" / f"seed-0000{seed}.png") <= 1
        assert difference(image, null_class) <= 1


def test_trajectories_interpolation_inpainting_and_restoring_have_classes(
    class_folder, run, tmp_path
):
    """Each draws the images of the UNet folded to the class, and says so in its text."""
    model = pipeline.load_model(str(class_folder), conditional=True)
    scheduler = build_sampling_scheduler("ddim", model.scheduler_config, 4)
    folded = fold_label(model.unet, 1)
    (_, expected), (_, last) = generate.generate_images(folded, scheduler, [3, 4], 2)
    flags = [STEPS, "--class_label=dog", "--guidance_scale=1", "--scheduler=ddim", "--seed=3"]
    run(class_folder, *flags, "--num_images=1", "--trajectory", out="trajectory")
    stem = "label-001-seed-00003"
    assert names(tmp_path / "trajectory") == [
        "grid.png",
        *(f"{stem}{end}" for end in ("-trajectory.gif", "-trajectory.png", ".png")),
    ]
    assert difference(tmp_path / "trajectory" / f"{stem}.png", expected) <= 1

    run(class_folder, *flags, "--num_images=3", "--interpolate", "3", "4", out="between")
    between = tmp_path / "between"
    images = [f"label-001-between-0000{k}.png" for k in range(3)]
    assert names(between) == ["grid.png", *images, "label-001-between.gif"]
    assert difference(between / images[0], expected) <= 1
    assert difference(between / images[2], last) <= 1

    Image.new("L", (8, 8), 200).save(tmp_path / "gray.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "mask.png")
    image = f"--image={tmp_path / 'gray.png'}"
    flags = [STEPS, "--num_images=1", "--num_resamples=1", image, f"--mask={tmp_path}/mask.png"]
    run(class_folder, *flags, "--class_label=all", out="mask")
    run(class_folder, *flags, "--class_label=dog", out="one")
    inpainted = read_folder(tmp_path / "mask")
    assert list(inpainted) == [f"label-00{k}-seed-00000.png" for k in range(3)]
    assert difference(inpainted["label-000-seed-00000.png"], inpainted["label-001-seed-00000.png"])
    (one,) = read_folder(tmp_path / "one").values()
    assert difference(one, inpainted["label-001-seed-00000.png"]) <= 1

    for name in ("cat", "dog"):
        run(
            class_folder,
            image,
            f"--class_label={name}",
            "--noise_level=1",
            "--num_inference_steps=2",
            out=name,
        )
    assert difference(tmp_path / "cat" / "restored.png", tmp_path / "dog" / "restored.png") > 1
    text = image_io.read_png_text(tmp_path / "dog" / "restored.png")
    assert (text["class_label"], text["class_name"], text["guidance_scale"]) == ("1", "dog", "2.0")


def test_quality_guides_by_the_measured_scale(class_folder, run, tmp_path):
    """Measured values of --guidance_scales, unless the flag gives another."""
    weights = sampler_results.unet_weights_sha256(class_folder)
    table = make_table(make_entry("ddim", 3, 1.0, 0.1), weights=weights)
    table.write(class_folder / files_of_run.SAMPLER_TABLE)
    model = ModelVersion(version=weights)
    Evaluation(metrics={"frechet_distance": 2.01}, model=model, guidance=CURVE).write(
        class_folder / files_of_run.EVALUATION
    )
    flags = ["--class_label=cat", "--num_images=1", "--quality=good"]
    assert "ddim, 3 steps, class cat (id 0), guidance 1.5, on cpu" in run(class_folder, *flags)
    image = tmp_path / "out" / "label-000-seed-00000.png"
    assert image_io.read_png_text(image)["guidance_scale"] == "1.5"
    assert "guidance 3.0" in run(class_folder, *flags, "--guidance_scale=3")


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=SLOW)])
def test_classes_in_half_precision(class_folder, run, tmp_path, dtype):
    flags = ["--class_label=all", "--num_images=1", "--num_inference_steps=8"]
    run(class_folder, *flags, out="fp32")
    run(class_folder, *flags, f"--dtype={dtype}")
    full, half = (torch.stack([*read_folder(tmp_path / name).values()]) for name in ("fp32", "out"))
    assert (full.int() - half.int()).abs().float().mean() < 5


# --like and the Hub


def test_image_of_a_class_is_made_again(class_folder, run, tmp_path):
    """Its class by the id, also when the id of one class is the name of another."""
    write_json(class_folder / files_of_run.CONDITIONAL_LABELS, {"0": "10", "1": "2", "2": "3"})
    flags = ["--num_images=2", STEPS, "--guidance_scale=-3.5", "--guidance_interval=0.1,0.9"]
    run(class_folder, "--class_label=3", *flags)
    original = tmp_path / "out" / "label-002-seed-00001.png"
    assert image_io.read_png_text(original)["class_name"] == "3"
    assert "has exactly the pixels" in run(class_folder, "--like", original, out="again")
    again = tmp_path / "again" / original.name
    assert names(again.parent) == [original.name]
    assert image_io.read_png_text(again) == image_io.read_png_text(original)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ({"class_label": "3"}, "--class_label 3: classes has no such class. It has 3"),
        ({"class_label": "-1"}, "--class_label -1: classes has no such class"),
        ({"class_label": "9" * 30}, "class_label is 9999"),
        ({"class_label": "all"}, "--class_label all does not go with --like"),
        ({"class_label": "1", "guidance_scale": "1e9"}, "--guidance_scale is 1000000000.0; give"),
        ({"class_label": "1", "guidance_scale": "nan"}, "guidance_scale is"),
        ({"class_label": "1", "guidance_interval": "1"}, "--guidance_interval 1: give two"),
        ({"guidance_interval": "0,1"}, "--guidance_interval has no effect without --class_label"),
        ({"class_label": "1", "prompt": "p"}, "--class_label does not go with --prompt"),
    ],
    ids=str,
)
def test_png_that_asks_for_an_impossible_class_is_refused(
    class_folder, run, tmp_path, text, message
):
    text = {"model": "m", "version": "v", "seed": "0", "num_inference_steps": "2", **text}
    image_io.save_png(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "a.png", text)
    with pytest.raises(UserError) as error:
        run(class_folder, "--like", tmp_path / "a.png")
    assert message in str(error.value)


def test_only_with_a_class_is_the_unet_with_classes_downloaded(hub, class_folder, run, tmp_path):
    """Of one commit, and --like finds that commit again."""
    files = {
        path.relative_to(class_folder).as_posix(): path.read_bytes()
        for path in class_folder.rglob("*")
        if path.is_file()
    }
    repository = hub.create_repo("model", "bob/classes")
    commit = repository.write(files, "first")
    cache = Path(constants.HF_HUB_CACHE) / "models--bob--classes" / "snapshots" / commit
    flags = [STEPS, "--num_images=1", f"--revision={commit}"]
    run("bob/classes", *flags)
    assert not (cache / files_of_run.CONDITIONAL).exists()
    repository.write({files_of_run.CONDITIONAL_LABELS: b"{}"}, "second")
    assert f"bob/classes at {commit[:12]}" in run("bob/classes", "--class_label=a/../b", *flags)
    assert names(cache / files_of_run.CONDITIONAL) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "labels.json",
    ]
    assert not (cache / files_of_run.PROOF_IMAGES).exists()
    image = tmp_path / "out" / "label-002-seed-00000.png"
    assert "has exactly the pixels" in run("--like", image, out="again")


def test_model_without_classes_is_refused_before_its_weights_are_downloaded(
    hub, class_folder, run_folder, run
):
    """Likewise a folder with a plain pipeline."""
    files = {"model_index.json": (class_folder / "model_index.json").read_bytes()}
    hub.create_repo("model", "bob/plain").write(files, "first")
    for model, name in (("bob/plain", "bob/plain"), (run_folder, "my-run")):
        with pytest.raises(UserError, match=f"^{name} has no classes: .* Leave out --class_label"):
            run(model, "--class_label=0")
