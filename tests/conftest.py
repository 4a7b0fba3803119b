"""Every test runs in homes of its own, against a Hub of its own on loopback.

The Hub's clients read their settings when they are imported, so the environment is set here, before
any test imports them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.hub import Hub

ROOT = Path(__file__).parent.parent
for name in [name for name in os.environ if name.startswith(("HF_", "WANDB_", "HUGGING"))]:
    del os.environ[name]
_home = tempfile.TemporaryDirectory(prefix="ddpm-tests-")
_hub = Hub(Path(_home.name) / "hub").start()
os.environ.update(_hub.env(None, Path(_home.name) / "hf"))
os.environ.pop("HF_TOKEN")
os.environ.update(
    WANDB_MODE="offline",
    WANDB_DIR=f"{_home.name}/wandb",
    WANDB_CACHE_DIR=f"{_home.name}/wandb-cache",
    WANDB_CONFIG_DIR=f"{_home.name}/wandb-config",
    WANDB_DATA_DIR=f"{_home.name}/wandb-data",
    WANDB_SILENT="true",
    DO_NOT_TRACK="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
)
# A shell's background job ignores SIGINT, and its children with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Threads that wait by spinning starve each other when two test runs share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
Path(_home.name, "wandb").mkdir()

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402
from PIL import Image  # noqa: E402

torch.set_num_threads(1)  # threads that wait for each other are slower than tiny models

TINY_UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}


def pytest_sessionfinish() -> None:
    _hub.stop()
    _home.cleanup()


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or code under test, does to the environment ends with the test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def hub():
    """The Hub that HF_ENDPOINT points to, without faults and with an empty log."""
    _hub.clear_faults()
    _hub.clear_requests()
    yield _hub
    assert not _hub.errors, _hub.errors
    _hub.clear_faults()


@pytest.fixture
def alice(hub, monkeypatch):
    """Logged in as alice, who may write; the value is her token."""
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture
def tiny_unet(tmp_path):
    """A folder with the config of a UNet of about 20,000 parameters, for --model_config_..."""
    folder = tmp_path / "tiny-unet"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY_UNET))
    return folder


@pytest.fixture
def make_unet() -> Callable[..., UNet2DModel]:
    """A two-level UNet with the same weights each time: make_unet(resolution=8, channels=1)."""

    def make(resolution: int = 8, channels: int = 1, seed: int = 0) -> UNet2DModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return UNet2DModel(
                sample_size=resolution,
                in_channels=channels,
                out_channels=channels,
                layers_per_block=1,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                down_block_types=("DownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "UpBlock2D"),
            ).eval()

    return make


@pytest.fixture
def chain() -> DDPMScheduler:
    """A noising chain of 20 steps, as training exports one."""
    return DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")


@pytest.fixture
def make_disk(tmp_path):
    """make_disk(kibibytes) -> a folder on a disk of that size; skips where none may be mounted."""
    mounted = []

    def make(kibibytes: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def pictures(tmp_path):
    """A folder of ten RGB PNGs, 8 high and 8 to 12 wide."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0)
    for index in range(10):
        pixels = noise.integers(0, 256, (8, 8 + index % 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def run_folder(tmp_path):
    """A finished run folder, made without training: tiny weights, record, metrics, one grid."""
    from ddpm.config.parser import parse_train
    from ddpm.config.train import flatten
    from ddpm.run_folder import (
        METRICS,
        SAMPLES,
        TRAIN_CONFIG,
        environment,
        write_json,
        write_record,
    )
    from ddpm.sampling import pipeline, proof

    torch.manual_seed(0)
    folder = tmp_path / "my-run"
    folder.mkdir()
    unet = UNet2DModel.from_config({**TINY_UNET, "in_channels": 1, "out_channels": 1})
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    pipeline.export_pipeline(unet, scheduler, folder)
    proof.write_proof(folder, unet, scheduler)
    write_json(folder / TRAIN_CONFIG, flatten(parse_train([])))
    write_record(
        folder,
        finished=True,
        dataset={
            "name": "someone/pictures",
            "on_hub": True,
            "revision": "0" * 40,
            "config_name": None,
            "rows": 10,
            "split": "train",
            "image_column": "image",
            "pixels_sha256": "f" * 64,
            "images": 10,
            "channels": 1,
            "modes": {"L": 10},
            "sizes": {"8x8": 10},
            "unreadable": 0,
            "unreadable_first": [],
        },
        model={"parameters": unet.num_parameters(), "channels": 1},
        environment=environment(None, 1, "no"),
        training={
            "steps": 6,
            "images_seen": 24,
            "epochs": 2.4,
            "seconds": 1.5,
            "images_per_s": 16.0,
            "final_loss": 0.5,
            "finished_at": "2026-01-01T00:00:00Z",
        },
    )
    (folder / METRICS).write_text('{"step": 6, "loss": 0.5}\n')
    (folder / SAMPLES).mkdir()
    Image.new("L", (20, 20)).save(folder / SAMPLES / "step-000006.png")
    return folder


@pytest.fixture
def script():
    """Run one of the scripts as a person would: script("push.py", ...) -> the finished process."""

    def run(*words, env=None, cwd=ROOT, launch=False, timeout=300):
        command = [sys.executable, *map(str, words)]
        if launch:
            launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
            command = [*launcher, *map(str, words)]
        return subprocess.run(
            command,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
        )

    return run
