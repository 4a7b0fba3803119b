"""What every test stands on: caches in temporary folders, no account, no tracking, a tiny UNet.

huggingface_hub, datasets and wandb read the environment when they are imported, so it is set here,
before any of them is.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

SCRATCH = Path(tempfile.mkdtemp(prefix="ddpm-tests-"))
for name in [name for name in os.environ if name.startswith(("HF_", "WANDB_", "HUGGING"))]:
    del os.environ[name]
os.environ |= {
    "HF_HOME": str(SCRATCH / "huggingface"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
    "WANDB_DIR": str(SCRATCH / "wandb"),
    "WANDB_CACHE_DIR": str(SCRATCH / "wandb-cache"),
    "WANDB_CONFIG_DIR": str(SCRATCH / "wandb-config"),
    "WANDB_DATA_DIR": str(SCRATCH / "wandb-data"),
    "WANDB_SILENT": "true",
    "NO_PROXY": "127.0.0.1,localhost",
}
(SCRATCH / "wandb").mkdir()

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DModel  # noqa: E402

torch.set_num_threads(1)  # threads that wait for each other are slower than tiny models


def pytest_unconfigure() -> None:
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What a test, or code under test, does to the environment ends with the test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


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
