"""The whole story by the real commands: train here, publish, sample elsewhere; and what is refused.

Each command has a Hugging Face home of its own, as three machines would.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.hub import Fault

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


def one_sentence(done, *words):
    """The command refused: words on stderr, no traceback of ours, an exit code that is not 0."""
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0]


def test_train_publish_sample_on_three_machines(hub, script, tmp_path):
    token = hub.add_user("alice")
    homes = [hub.env(None, tmp_path / "a"), hub.env(token, tmp_path / "b")]
    homes.append(hub.env(None, tmp_path / "c"))
    folder = tmp_path / "digits"

    done = script("train.py", f"--output_dir={folder}", *SMALL, env=homes[0], launch=True)
    assert done.returncode == 0, done.stderr
    assert f"Next: python push.py {folder} digits" in done.stdout
    assert "1,437 gray images of 8x8" in done.stdout and "images/s" in done.stdout
    assert json.loads((folder / "record.json").read_text())["training"]["steps"] == 6
    assert (folder / "samples" / "step-000006.png").exists()

    done = script("push.py", folder, "alice/three-machines", env=homes[1])
    assert done.returncode == 0, done.stderr
    assert "Proved: downloaded again" in done.stdout
    next_line = re.search(
        r"Next: python sample.py (alice/three-machines --revision [0-9a-f]{40})", done.stdout
    )
    assert len(hub.repo("model", "alice/three-machines").commits()) == 2

    out = tmp_path / "samples"
    done = script(
        "sample.py",
        *next_line[1].split(),
        "--num_images=5",
        "--batch_size=2",
        "--num_inference_steps=4",
        f"--output_dir={out}",
        env=homes[2],
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.png",
        *(f"seed-0000{k}.png" for k in range(5)),
    ]
    assert pixels(out / "seed-00000.png").shape == (8, 8)
    text = Image.open(out / "seed-00003.png").text
    assert text["model"] == "alice/three-machines" and text["version"] == next_line[1].split()[-1]
    assert (text["seed"], text["scheduler"]) == ("3", "dpmsolver-sde")
    assert text["num_inference_steps"] == "4"

    # The same from the folder, alone: image k is image k.
    done = script(
        "sample.py",
        folder,
        "--num_images=1",
        "--seed=3",
        "--num_inference_steps=4",
        f"--output_dir={tmp_path / 'alone'}",
    )
    alone, together = tmp_path / "alone" / "seed-00003.png", out / "seed-00003.png"
    assert np.abs(pixels(alone).astype(int) - pixels(together)).max() <= 1

    # Again: what is there is kept, a stranger's file is not touched.
    again = ["sample.py", folder, "--num_inference_steps=4", f"--output_dir={tmp_path / 'alone'}"]
    done = script(*again, "--num_images=2", "--seed=3")
    assert "Drew 1 image, 1 were there already" in done.stdout
    (tmp_path / "alone" / "seed-00009.png").write_bytes(b"holiday")
    one_sentence(script(*again, "--num_images=1", "--seed=9"), "seed-00009.png", "--output_dir")
    assert (tmp_path / "alone" / "seed-00009.png").read_bytes() == b"holiday"

    # The token is nowhere in what was written or said.
    written = [
        p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size < 1e7
    ]
    assert not [content for content in written if token.encode() in content]


@pytest.mark.slow
def test_killed_and_started_again_is_the_same_run(script, tiny_unet, tmp_path):
    """SIGKILL in the middle, the same command again: the bits of the run that was never killed."""
    flags = [
        *SMALL,
        "--max_train_steps=120",
        "--checkpointing_steps=5",
        f"--model_config_name_or_path={tiny_unet}",
    ]
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert script("train.py", f"--output_dir={straight}", *flags).returncode == 0
    command = [sys.executable, "train.py", f"--output_dir={killed}", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for(lambda: list(killed.glob("checkpoint-*")))
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-120").exists()
    again = script("train.py", f"--output_dir={killed}", *flags)
    assert again.returncode == 0 and "Going on from" in again.stdout
    for name in ("model.safetensors", "ema.safetensors", "optimizer.bin"):
        same = (path / "checkpoint-120" / name for path in (straight, killed))
        assert next(same).read_bytes() == next(same).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("launch", [False, True], ids=["the run", "its launcher"])
def test_sigterm_saves_and_says_so(tmp_path, launch):
    """Also when it reaches the launcher alone, which does not pass it on."""
    folder, words = tmp_path / "run", [sys.executable]
    if launch:
        words += ["-m", "accelerate.commands.accelerate_cli", "launch"]
    words += ["train.py", f"--output_dir={folder}", *SMALL, "--max_train_steps=100000"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen(words, cwd=ROOT, stderr=said, stdout=said)
        wait_for(lambda: list(folder.glob("checkpoint-*")))
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == (-signal.SIGTERM if launch else 143)
    wait_for(lambda: "Stopped by SIGTERM" in (tmp_path / "said").read_text())
    step = re.search(r"after step ([\d,]+); saved in", (tmp_path / "said").read_text())[1]
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
def test_all_processes_stop_together_whoever_was_asked(tiny_unet, tmp_path, number, to, code):
    """All save the same step and leave; with SIGUSR1 as a success, as Slurm's requeue wants it.

    The launcher's code is its own: 0 when all went well, else 1.
    """
    folder = tmp_path / "run"
    words = [
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
    with open(tmp_path / "said", "w") as said:
        launcher = subprocess.Popen(words, cwd=ROOT, stderr=said, stdout=said)
        wait_for(lambda: list(folder.glob("checkpoint-*")))
        ranks = {
            p.environ()["RANK"]: p
            for p in psutil.Process(launcher.pid).children()
            if "RANK" in p.environ()
        }
        asked = {"the first process": ranks["0"].pid, "the second process": ranks["1"].pid}
        os.kill(asked.get(to, launcher.pid), number)
        assert launcher.wait(90) == code
    told = (tmp_path / "said").read_text()
    assert told.count(f"Stopped by {number.name} after step") == 1, told
    step = re.search(r"after step ([\d,]+); saved in", told)[1].replace(",", "")
    assert (folder / f"checkpoint-{step}" / "state.json").exists()
    assert not [process for process in ranks.values() if process.is_running()]


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)


@pytest.mark.slow
def test_two_processes_are_one_run(script, tmp_path):
    """2 processes x accumulation 1 and 1 x 2: the same draws, weights within float-sum order."""
    from safetensors.torch import load_file

    one, two = tmp_path / "one", tmp_path / "two"
    config = ["--config_file", "accelerate_config.yaml"]
    flags = [*SMALL, "--mixed_precision=no"]
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
    a, b = (load_file(path / "checkpoint-6" / "model.safetensors") for path in (one, two))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3
    told = [
        [json.loads(line) for line in (p / "metrics.jsonl").read_text().splitlines()]
        for p in (one, two)
    ]
    steps = [[line for line in lines if "lr" in line] for lines in told]
    assert steps[0][0]["loss"] == pytest.approx(steps[1][0]["loss"], rel=1e-5)
    assert [line["lr"] for line in steps[0]] == [line["lr"] for line in steps[1]]
    held_out = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in told]
    assert len(held_out[0]) == 1 and held_out[0] == pytest.approx(held_out[1], rel=1e-2)

    # A checkpoint of one process is continued by two.
    done = script(*processes, f"--output_dir={one}", "--max_train_steps=8", launch=True)
    assert done.returncode == 0 and f"Going on from {one}/checkpoint-6" in done.stdout, done.stderr
    assert (one / "checkpoint-8").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["parquet", "imagefolder"])
def test_any_dataset_on_the_hub(hub, script, tmp_path, layout):
    """An image column of any name, gray or RGB, pinned to the commit that was read."""
    import datasets

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
@pytest.mark.parametrize(("flags", "words"), BAD_TRAINING, ids=[f[0][0] for f in BAD_TRAINING])
def test_bad_settings_are_one_sentence_and_write_nothing(hub, script, tmp_path, flags, words):
    folder = tmp_path / "run"
    done = script("train.py", f"--output_dir={folder}", *flags)
    one_sentence(done, *words)
    assert not (folder / "train_config.json").exists() and not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
def test_where_it_is_run_and_written_is_checked(script, tmp_path):
    one_sentence(script(ROOT / "train.py", cwd=tmp_path), "repository's folder", "--dataset_name")
    (tmp_path / "file").write_text("mine")
    one_sentence(script("train.py", f"--output_dir={tmp_path / 'file'}", *SMALL), "File exists")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_what_cannot_be_sampled_is_one_sentence(hub, script, tmp_path, run_folder):
    weights = "unet/diffusion_pytorch_model"
    files = {
        str(p.relative_to(run_folder)): p.read_bytes() for p in run_folder.rglob("*") if p.is_file()
    }
    hub.create_repo("model", "bob/whole").write(files, "all")
    pickled = {**files, f"{weights}.bin": b"code", f"{weights}.safetensors": None}
    hub.create_repo("model", "bob/pickles").write(
        {name: content for name, content in pickled.items() if content}, "all"
    )
    index = {**json.loads(files["model_index.json"]), "_class_name": ["pipeline", "MyPipeline"]}
    own = {**files, "model_index.json": json.dumps(index).encode(), "pipeline.py": b"print(1)"}
    hub.create_repo("model", "bob/own-code").write(own, "all")
    home, out = hub.env(None, tmp_path / "home"), f"--output_dir={tmp_path / 'out'}"
    one_sentence(script("sample.py", "bob/pickles", out, env=home), "safetensors", "pickled")
    one_sentence(script("sample.py", "bob/own-code", out, env=home), "cannot sample")
    one_sentence(script("sample.py", "bob/whole", "--revision=v9", out, env=home), "v9")
    one_sentence(
        script("sample.py", "bob/whole", "--num_inference_steps=2000", out, env=home), "1 to 1000"
    )
    one_sentence(script("sample.py", "bob/whole", "--device=cuda:99", out, env=home), "cuda:99")
    hub.inject(Fault("corrupt", path="/cdn/", times=None))
    empty = hub.env(None, tmp_path / "empty")
    one_sentence(script("sample.py", "bob/whole", out, env=empty), "not what the Hub holds")
    assert not (tmp_path / "out").exists()
    dead = {**hub.env(None, tmp_path / "home2"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    one_sentence(script("sample.py", "bob/whole", out, env=dead), "could not be reached")


@pytest.mark.slow
def test_wandb_stays_offline_and_never_asks(script, tmp_path):
    """Without a key and without WANDB_MODE a run must not wait for a login."""
    folder, environment = tmp_path / "run", dict(os.environ)
    for name in [n for n in environment if n.startswith("WANDB_")]:
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
