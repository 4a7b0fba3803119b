"""The workflow by the real commands: train, publish, sample on other machines; and refusals.

A Hugging Face home of its own stands for a machine.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.hub import Fault
from tests.sampling.tiny_stable import files_of

SMALL = [
    "--max_train_steps=6",
    "--checkpointing_steps=3",
    "--lr_warmup_steps=2",
    "--save_images_epochs=1",
    "--eval_batch_size=4",
    "--ddpm_num_inference_steps=4",
    "--logging_steps=2",
    "--train_batch_size=16",
]


def pixels(path):
    return np.asarray(Image.open(path))


def assert_refused(done, *fragments):
    """The command ended with one sentence on stderr, no traceback, and a failing exit code."""
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for fragment in fragments:
        assert fragment in errors[0]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.05)


def test_a_trained_run_is_published_and_sampled(trained_run, run_main, alice, tmp_path, capsys):
    """The workflow in one process; `test_train_publish_sample_on_three_machines` starts four."""
    folder = trained_run("run")
    assert run_main("push.py", folder, "alice/workflow") == 0
    output = capsys.readouterr().out
    assert "Proved: downloaded again" in output
    [model] = re.findall(r"Next: python sample.py (.+)", output)
    flags = ["--num_images=2", "--num_inference_steps=2"]
    published, local = tmp_path / "published", tmp_path / "local"
    assert run_main("sample.py", *model.split(), *flags, f"--output_dir={published}") == 0
    assert run_main("sample.py", folder, *flags, f"--output_dir={local}") == 0
    assert (pixels(published / "grid.png") == pixels(local / "grid.png")).all()
    assert alice not in capsys.readouterr().out


@pytest.mark.slow
def test_train_publish_sample_on_three_machines(hub, script, tmp_path):
    token = hub.add_user("alice")
    homes = [hub.env(None, tmp_path / "a"), hub.env(token, tmp_path / "b")]
    homes.append(hub.env(None, tmp_path / "c"))
    folder = tmp_path / "digits"

    # Train
    done = script("train.py", f"--output_dir={folder}", *SMALL, env=homes[0], launch=True)
    assert done.returncode == 0, done.stderr
    assert f"Next: python push.py {folder} digits" in done.stdout
    assert "1,437 gray images of 8x8" in done.stdout and "images/s" in done.stdout
    assert json.loads((folder / "record.json").read_text())["training"]["steps"] == 6
    assert (folder / "samples" / "step-000006.png").exists()

    # Publish
    done = script("push.py", folder, "alice/three-machines", env=homes[1])
    assert done.returncode == 0, done.stderr
    assert "Proved: downloaded again" in done.stdout
    assert "Loading" not in done.stderr  # no bars without a terminal
    [model, revision] = re.search(
        r"Next: python sample.py (alice/three-machines) --revision ([0-9a-f]{40})", done.stdout
    ).groups()
    assert len(hub.repo("model", "alice/three-machines").commits()) == 2

    # Sample the published revision
    out, steps = tmp_path / "samples", "--num_inference_steps=4"
    flags = ["--num_images=5", "--batch_size=2", steps, f"--output_dir={out}"]
    done = script("sample.py", model, "--revision", revision, *flags, env=homes[2])
    assert done.returncode == 0, done.stderr
    expected = ["grid.png", *(f"seed-0000{seed}.png" for seed in range(5))]
    assert sorted(path.name for path in out.iterdir()) == expected
    assert pixels(out / "seed-00000.png").shape == (8, 8)
    text = Image.open(out / "seed-00003.png").text
    assert (text["model"], text["version"], text["seed"]) == (model, revision, "3")
    assert (text["scheduler"], text["num_inference_steps"]) == ("dpmsolver-sde", "4")

    # Sample one seed from the run folder: the image does not depend on the batch it was in
    alone = tmp_path / "alone"
    done = script("sample.py", folder, "--num_images=1", "--seed=3", steps, f"--output_dir={alone}")
    assert done.returncode == 0, done.stderr
    difference = pixels(alone / "seed-00003.png").astype(int) - pixels(out / "seed-00003.png")
    assert np.abs(difference).max() <= 1

    # The token is in no file
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    contents = [path.read_bytes() for path in files if path.stat().st_size < 1e7]
    assert not [content for content in contents if token.encode() in content]


@pytest.mark.slow
def test_killed_and_started_again_is_the_same_run(script, start, tiny_unet, tmp_path):
    """After SIGKILL and the same command again, the weights have the bits of an undisturbed run."""
    flags = [
        *SMALL,
        "--max_train_steps=60",
        "--checkpointing_steps=5",
        f"--model_config_name_or_path={tiny_unet}",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert script("train.py", f"--output_dir={straight}", *flags).returncode == 0
    command = [sys.executable, "train.py", f"--output_dir={killed}", *flags]
    process = start(command, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(killed.glob("checkpoint-*")))
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-60").exists()
    again = script("train.py", f"--output_dir={killed}", *flags)
    assert again.returncode == 0 and "Resuming from" in again.stdout
    for name in ("model.safetensors", "ema.safetensors", "optimizer.bin"):
        expected = (straight / "checkpoint-60" / name).read_bytes()
        assert (killed / "checkpoint-60" / name).read_bytes() == expected


@pytest.mark.slow
@pytest.mark.parametrize("launch", [False, True], ids=["the run", "its launcher"])
def test_sigterm_saves_and_reports_it(start, tmp_path, launch):
    """Also when only the launcher receives it, which does not pass it on."""
    folder, log, command = tmp_path / "run", tmp_path / "log", [sys.executable]
    if launch:
        command += ["-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["train.py", f"--output_dir={folder}", *SMALL, "--max_train_steps=100000"]
    with open(log, "w") as file:
        process = start(command, stderr=file, stdout=file)
        wait_for(lambda: list(folder.glob("checkpoint-*")))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == (-signal.SIGTERM if launch else 143)
    wait_for(lambda: "Stopped by SIGTERM" in log.read_text())
    step = re.search(r"after step ([\d,]+); saved in", log.read_text())[1]
    assert (folder / f"checkpoint-{step.replace(',', '')}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to", "code"),
    [
        (signal.SIGUSR1, "the second process", 0),
        (signal.SIGTERM, "the first process", 1),
        (signal.SIGTERM, "the launcher", 1),
    ],
    ids=["USR1 to rank 1", "TERM to rank 0", "TERM to the launcher"],
)
def test_a_signal_to_any_process_stops_all_at_one_step(
    start, tiny_unet, tmp_path, number, to, code
):
    """They save the same step and exit; after SIGUSR1 with 0, as Slurm's requeue expects.

    The launcher's exit code is 0 if all processes ended well, else 1.
    """
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.accelerate_cli",
        "launch",
        "--config_file",
        "accelerate_config.yaml",
        "--num_processes=2",
        "--main_process_port=0",
        "train.py",
        f"--output_dir={folder}",
        *SMALL,
        "--max_train_steps=100000",
        f"--model_config_name_or_path={tiny_unet}",
    ]
    with open(log, "w") as file:
        launcher = start(command, stderr=file, stdout=file)
        wait_for(lambda: list(folder.glob("checkpoint-*")))
        ranks = {
            p.environ()["RANK"]: p
            for p in psutil.Process(launcher.pid).children()
            if "RANK" in p.environ()
        }
        pids = {"the first process": ranks["0"].pid, "the second process": ranks["1"].pid}
        os.kill(pids.get(to, launcher.pid), number)
        assert launcher.wait(90) == code
    output = log.read_text()
    assert output.count(f"Stopped by {number.name} after step") == 1, output
    step = re.search(r"after step ([\d,]+); saved in", output)[1].replace(",", "")
    assert (folder / f"checkpoint-{step}" / "state.json").exists()
    assert not [process for process in ranks.values() if process.is_running()]


@pytest.mark.slow
def test_two_processes_are_one_run(script, tmp_path):
    """2 processes x accumulation 1 and 1 x 2: the same draws; weights up to the order of sums."""
    one, two = tmp_path / "one", tmp_path / "two"
    config = ["--config_file", "accelerate_config.yaml"]
    flags = [*SMALL, "--mixed_precision=no", "--class_conditional"]
    done = script(
        *config,
        "train.py",
        f"--output_dir={one}",
        *flags,
        "--gradient_accumulation_steps=2",
        launch=True,
    )
    assert done.returncode == 0, done.stderr
    processes = [*config, "--num_processes=2", "--main_process_port=0", "train.py", *flags]
    done = script(*processes, f"--output_dir={two}", launch=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((two / "record.json").read_text())["environment"]["num_processes"] == 2
    first, second = (load_file(path / "checkpoint-6" / "model.safetensors") for path in (one, two))
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-3
    metrics = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (one, two)
    ]
    steps = [[line for line in lines if "lr" in line] for lines in metrics]
    assert steps[0][0]["loss"] == pytest.approx(steps[1][0]["loss"], rel=1e-5)
    assert [line["lr"] for line in steps[0]] == [line["lr"] for line in steps[1]]
    held_out = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in metrics]
    assert len(held_out[0]) == 1 and held_out[0] == pytest.approx(held_out[1], rel=1e-2)

    # Two processes resume the checkpoint of one
    done = script(*processes, f"--output_dir={one}", "--max_train_steps=8", launch=True)
    assert done.returncode == 0 and f"Resuming from {one}/checkpoint-6" in done.stdout, done.stderr
    assert (one / "checkpoint-8").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_any_dataset_on_the_hub_is_trained_on(hub, script, tmp_path, layout):
    """An image column of any name, gray or RGB, pinned to the commit that was read."""
    repository = hub.create_repo("dataset", f"bob/{layout}")
    noise = np.random.default_rng(0)
    channels = 1 if layout == "parquet" else 3
    images = [
        Image.fromarray(noise.integers(0, 256, (12, 10, 3), dtype=np.uint8)) for _ in range(8)
    ]
    images = [image.convert("L") if channels == 1 else image for image in images]
    if layout == "parquet":
        features = datasets.Features({"bild": datasets.Image(), "text": datasets.Value("string")})
        rows = {"bild": images, "text": ["x"] * 8}
        path = tmp_path / "train.parquet"
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
        files = {"data/train-00000-of-00001.parquet": path.read_bytes()}
    else:
        files = {}
        for index, image in enumerate(images):
            image.save(tmp_path / "one.png")
            files[f"train/{index}.png"] = (tmp_path / "one.png").read_bytes()
    commit = repository.write(files, "data")
    folder = tmp_path / "run"
    done = script(
        "train.py",
        f"--dataset_name=bob/{layout}",
        f"--output_dir={folder}",
        "--resolution=8",
        *SMALL,
        "--max_train_steps=2",
        "--train_batch_size=4",
        env=hub.env(None, tmp_path / "home"),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "record.json").read_text())
    assert record["dataset"]["revision"] == commit and record["dataset"]["channels"] == channels
    assert record["dataset"]["image_column"] == ("bild" if layout == "parquet" else "image")
    assert json.loads((folder / "unet" / "config.json").read_text())["in_channels"] == channels


BAD_TRAINING = [
    (["--dataset_name=bob/nothing"], ("bob/nothing does not exist", "hf auth login")),
    (["--dataset_name=./nowhere"], ("./nowhere", "neither a folder here nor an id")),
    (["--train_data_dir=/nowhere"], ("/nowhere is not a folder",)),
    (["--dataset_name=./data/digits", "--split=dev"], ("dev", "train", "test")),
    (["--dataset_name=./data/digits", "--image_column=label"], ("label (", "image (Image)")),
    (["--resolution=9"], ("--resolution 9 is not a multiple of 2", "8 or 10")),
    (["--ddpm_num_inference_steps=2000"], ("2000", "1000")),
    (["--resume_from_checkpoint=checkpoint-7"], ("checkpoint-7 is no complete checkpoint",)),
    (["--config=nowhere.json"], ("nowhere.json",)),
    (["--model_config_name_or_path=./data"], ("./data cannot be read",)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "fragments"), BAD_TRAINING, ids=[flags[0] for flags, _ in BAD_TRAINING]
)
def test_bad_settings_are_one_sentence_and_write_nothing(hub, script, tmp_path, flags, fragments):
    folder = tmp_path / "run"
    done = script("train.py", f"--output_dir={folder}", *flags)
    assert_refused(done, *fragments)
    assert not (folder / "train_config.json").exists() and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_a_wrong_working_directory_or_output_file_is_refused(script, tmp_path):
    assert_refused(script(ROOT / "train.py", cwd=tmp_path), "repository's folder", "--dataset_name")
    (tmp_path / "file").write_text("mine")
    assert_refused(script("train.py", f"--output_dir={tmp_path / 'file'}", *SMALL), "is a file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_models_that_cannot_be_sampled_are_one_sentence(hub, script, tmp_path, run_folder):
    weights = "unet/diffusion_pytorch_model"
    files = files_of(run_folder)
    hub.create_repo("model", "bob/good").write(files, "all")
    pickled = {**files, f"{weights}.bin": b"code", f"{weights}.safetensors": None}
    hub.create_repo("model", "bob/pickles").write(
        {name: content for name, content in pickled.items() if content}, "all"
    )
    index = {**json.loads(files["model_index.json"]), "_class_name": ["pipeline", "MyPipeline"]}
    own = {**files, "model_index.json": json.dumps(index).encode(), "pipeline.py": b"print(1)"}
    hub.create_repo("model", "bob/own-code").write(own, "all")
    home, out = hub.env(None, tmp_path / "home"), f"--output_dir={tmp_path / 'out'}"
    assert_refused(script("sample.py", "bob/pickles", out, env=home), "safetensors", "pickled")
    assert_refused(script("sample.py", "bob/own-code", out, env=home), "cannot sample")
    assert_refused(script("sample.py", "bob/good", "--revision=v9", out, env=home), "v9")
    assert_refused(
        script("sample.py", "bob/good", "--num_inference_steps=2000", out, env=home), "1 to 1000"
    )
    assert_refused(script("sample.py", "bob/good", "--device=cuda:99", out, env=home), "cuda:99")
    hub.inject(Fault("corrupt", path="/cdn/", times=None))
    empty = hub.env(None, tmp_path / "empty")
    assert_refused(script("sample.py", "bob/good", out, env=empty), "differ from the Hub's hashes")
    assert not (tmp_path / "out").exists()
    dead = {**hub.env(None, tmp_path / "home2"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert_refused(script("sample.py", "bob/good", out, env=dead), "could not be reached")


@pytest.mark.slow
def test_wandb_without_a_key_stays_offline(script, tmp_path):
    """Without a key and without WANDB_MODE a run must not wait for a login."""
    folder, environment = tmp_path / "run", dict(os.environ)
    for name in [name for name in environment if name.startswith("WANDB_")]:
        del environment[name]
    environment |= {"HOME": str(tmp_path / "home"), "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "train.py", f"--output_dir={folder}", *SMALL, "--logger=wandb"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=200,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "kept offline" in done.stdout
    assert list((folder / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
