"""Every test runs in a home of its own, against a Hub of its own process on loopback.

Clients of the Hub read their settings when they are imported. `pytest_configure` therefore sets the
environment before tests are collected, and no conftest.py imports such a client at its top. They
use Xet, as they do by default; HF_HUB_DISABLE_XET=1 in the environment of pytest makes them use
git-LFS.

Fixtures that save time, for all folders:

    run_folder                   a finished run folder made without training; a copy for each test
    class_folder                 a pipeline with three classes and its proof; likewise a copy
    trained_run(name, *flags)    a run trained with these flags once a session, copied to
                                 tmp_path / name; the second call of a test with the same flags
                                 is another copy
    train_tiny(folder, *flags)   train the same run in a folder of the test, or resume it there
    shared_folder(name, make)    any other folder, filled by make(folder) once a session: read-only
"""

import errno
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from filelock import FileLock

from tests.hub import Hub

ROOT = Path(__file__).parent.parent
MAX_WORKERS = 8  # each needs about 1 GB

_home = tempfile.TemporaryDirectory(prefix="ddpm-tests-")
_hub = Hub(Path(_home.name) / "hub")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Use all cores where pytest-xdist is installed, unless -n says how many.

    A single file or test runs in this process, because each worker first imports torch.
    """
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.pluginmanager.hasplugin("xdist"):
        return
    if config.option.numprocesses is None and not any(".py" in arg for arg in config.args):
        config.option.numprocesses, config.option.maxprocesses = "logical", MAX_WORKERS
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "worksteal"  # files stay together until a worker has nothing to do


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        return  # the workers run the tests
    assert "huggingface_hub" not in sys.modules, "imported before its settings are known"
    gc.disable()  # until all is imported: nothing of it is garbage
    xet = os.environ.get("HF_HUB_DISABLE_XET") != "1"
    foreign = ("HF_", "WANDB_", "HUGGING", "TRACKIO_")
    for name in [name for name in os.environ if name.startswith(foreign)]:
        del os.environ[name]
    os.environ.update(_hub.start().env(None, Path(_home.name) / "hf", xet=xet))
    os.environ.pop("HF_TOKEN")
    os.environ.update(
        TRACKIO_DIR=f"{_home.name}/trackio",
        WANDB_MODE="offline",
        WANDB_DIR=f"{_home.name}/wandb",
        WANDB_CACHE_DIR=f"{_home.name}/wandb-cache",
        WANDB_CONFIG_DIR=f"{_home.name}/wandb-config",
        WANDB_DATA_DIR=f"{_home.name}/wandb-data",
        WANDB_SILENT="true",
        DO_NOT_TRACK="1",
        HF_XET_CLIENT_RETRY_BASE_DELAY="10ms",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    )
    Path(_home.name, "wandb").mkdir()
    # A background job of a shell ignores SIGINT, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads that wait by spinning starve each other when two workers share the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    # Tiny models are slower on more threads, and the number decides some bits. A launch in a test
    # asks for all cores.
    torch.set_num_threads(1)
    torch.set_num_threads = lambda number: None


def pytest_collection_finish() -> None:
    """Search for garbage in what tests create alone, not in two million objects of packages."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    _hub.stop()
    _home.cleanup()


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Undo changes to the environment after each test."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def session_hub() -> Hub:
    """The Hub that HF_ENDPOINT points to, for fixtures that fill it once a session."""
    return _hub


@pytest.fixture
def hub():
    """The Hub that HF_ENDPOINT points to, without faults and with an empty log."""
    _hub.clear_faults()
    _hub.clear_requests()
    yield _hub
    assert not _hub.errors, _hub.errors
    _hub.clear_faults()


@pytest.fixture
def new_client():
    """Make the HTTP client of the Hub in this test, and again after it."""
    from huggingface_hub import close_session

    close_session()
    yield
    close_session()


@pytest.fixture
def without_xet(monkeypatch):
    """Large files come and go by git-LFS and plain links, as with HF_HUB_DISABLE_XET=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@pytest.fixture(params=["xet", "lfs"])
def transfer(request, monkeypatch):
    """Both ways of large files, whatever HF_HUB_DISABLE_XET says: by Xet, and `without_xet`."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def alice(hub, monkeypatch):
    """Log in as alice, who may write, and return her token."""
    token = hub.add_user("alice")
    monkeypatch.setenv("HF_TOKEN", token)
    return token


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """shared_folder(name, make) -> a folder that make(folder) filled once for all workers.

    Do not write into it: copy it.
    """
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def shared(name: str, make: Callable[[Path], object]) -> Path:
        folder, partial = base / "shared" / name, base / "shared" / f"{name}.partial"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                make(partial)
                partial.rename(folder)
        return folder

    return shared


@pytest.fixture(scope="session")
def train_tiny(shared_folder):
    """train_tiny(folder, *flags): six steps of `tests.tiny.train`, everything switched on."""
    from tests import tiny

    pictures = shared_folder("pictures", tiny.write_pictures)
    unet = shared_folder("tiny-unet", tiny.write_unet_config)

    def train(folder: Path, *flags: str) -> Path:
        return tiny.train(folder, pictures, unet, *flags)

    return train


@pytest.fixture
def trained_run(shared_folder, train_tiny, tmp_path):
    """trained_run(name, *flags) -> tmp_path / name, a copy of what `train_tiny` trains with these
    flags, once a session. Its train_config.json names the folder it was trained in."""

    def copy(name: str, *flags: str) -> Path:
        key = "run-" + sha256(json.dumps(flags).encode()).hexdigest()[:16]
        run = shared_folder(key, lambda folder: train_tiny(folder, *flags))
        return Path(shutil.copytree(run, tmp_path / name, symlinks=True))

    return copy


@pytest.fixture
def run_folder(shared_folder, tmp_path):
    """A finished run folder, made without training: tiny weights, record, metrics, one grid."""
    from tests import tiny

    made = shared_folder("my-run", tiny.write_run_folder)
    return Path(shutil.copytree(made, tmp_path / "my-run"))


@pytest.fixture
def class_folder(shared_folder, tmp_path):
    """A pipeline with the classes `tests.tiny.CLASS_NAMES` and its proof, made without training."""
    from tests import tiny

    made = shared_folder("classes", tiny.write_class_pipeline)
    return Path(shutil.copytree(made, tmp_path / "classes"))


@pytest.fixture
def tiny_unet(tmp_path):
    """A folder with the config of a UNet of about 20,000 parameters, for --model_config_..."""
    from tests import tiny

    folder = tmp_path / "tiny-unet"
    folder.mkdir()
    tiny.write_unet_config(folder)
    return folder


@pytest.fixture
def make_unet():
    """make_unet(resolution=8, channels=1, seed=0, num_classes=None) -> the same UNet each time."""
    from tests import tiny

    return tiny.make_unet


@pytest.fixture
def chain():
    """A noise schedule of 20 steps, as training exports one."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=20, timestep_spacing="trailing")


@pytest.fixture
def pictures(tmp_path):
    """A folder of ten RGB PNGs, 8 high and 8 to 12 wide."""
    from tests import tiny

    folder = tmp_path / "pictures"
    folder.mkdir()
    tiny.write_pictures(folder)
    return folder


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
def no_locks(monkeypatch):
    """no_locks(errno): from here on no file system has locks, as NFS or Lustre may be."""

    def remove(number: int = errno.ENOLCK) -> None:
        def flock(*args: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("fcntl.flock", flock)

    return remove


@pytest.fixture
def run_main(monkeypatch):
    """run_main("push.py", *argv) -> exit code: run a script in this process, which is quick."""
    from ddpm import errors

    def run(script: str, *argv: str) -> int:
        spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        try:
            errors.run(module.main)
        except SystemExit as exit:
            return exit.code or 0
        return 0

    return run


@pytest.fixture
def script():
    """script("push.py", *argv) -> the finished process: run a script as a user does."""

    def run(*argv, env=None, cwd=ROOT, launch=False, timeout=300):
        command = [sys.executable, *map(str, argv)]
        if launch:
            launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
            command = [*launcher, *map(str, argv)]
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


@pytest.fixture
def start(request):
    """start(command, **options) -> a Popen. What still runs at the end of the test is killed."""
    import psutil

    yield lambda command, **options: subprocess.Popen(command, **{"cwd": ROOT, **options})
    for process in psutil.process_iter(["environ"]):
        test = (process.info["environ"] or {}).get("PYTEST_CURRENT_TEST", "")
        if test.startswith(f"{request.node.nodeid} ") and process.pid != os.getpid():
            process.kill()
