"""A canary as the token: it is sent to the Hub in one header, and appears nowhere else."""

import base64
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from ddpm import hub as ddpm_hub
from ddpm.config.parser import parse_push
from ddpm.config.train import HubConfig
from ddpm.errors import UserError
from ddpm.publishing import publish
from ddpm.publishing.access import require_write_access
from ddpm.publishing.background import Publisher
from ddpm.run_folder import PUBLISHED
from tests.conftest import ROOT
from tests.hub import LARGE_UPLOADS, Fault

CANARY = "hf_" + "cAnArY0123456789" * 2 + "xy"


def encodings(secret: str) -> list[bytes]:
    """Return the secret as text, reversed, and as it appears within base64 text."""
    within_base64 = [base64.b64encode(b"_" * shift + secret.encode())[4:-4] for shift in range(3)]
    return [secret.encode(), secret.encode()[::-1], *within_base64]


def places_with_canary(places: dict[str, bytes]) -> list[str]:
    """Return the names of the contents that show the canary."""
    return [
        name
        for name, content in places.items()
        if any(encoding in content for encoding in encodings(CANARY))
    ]


def files_below(*folders: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def canary(hub, monkeypatch):
    """Log in with the canary; the Hub keeps everything that it receives."""
    hub.add_user("birdie", token=CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.received = []
    yield hub
    hub.received = None


def received(hub) -> dict[str, bytes]:
    return {f"request {number}": body for number, body in enumerate(hub.received)}


def test_the_search_finds_the_canary(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text(f"token={CANARY}")
    assert len(places_with_canary(files_below(tmp_path))) == 1
    for shift in range(6):
        assert places_with_canary(
            {"body": base64.b64encode(b"x" * shift + CANARY.encode() + b"rest")}
        )


def test_a_push_and_its_failures_do_not_show_the_token(
    canary, run_folder, monkeypatch, tmp_path, caplog
):
    monkeypatch.setattr(ddpm_hub.time, "sleep", lambda seconds: None)
    config, errors = parse_push([str(run_folder), "--tag=v1"]), {}
    faults = [
        Fault("status", path="/whoami", status=401),
        Fault("status", path="/repos/create", status=403),
        Fault("status", path="/commit/", status=503, times=None),
        Fault("drop", path=LARGE_UPLOADS, times=None),
        Fault("corrupt", path="^/cdn/", times=None),
    ]
    for number, fault in enumerate([*faults, None]):
        if fault:
            canary.inject(fault)
        try:
            repo_id = require_write_access(f"birdie/secret-{number}", "run")
            publish.publish(run_folder, repo_id, config, check_images=fault is None)
        except UserError as error:
            errors[f"error {number}"] = "".join(traceback.format_exception(error)).encode()
            errors[f"repr {number}"] = repr(error).encode()
        canary.clear_faults()
    assert len(errors) == 2 * len(faults)
    kept = {"log": caplog.text.encode(), **files_below(run_folder, canary.root / "repos")}
    assert len(canary.received) > 50 and (run_folder / PUBLISHED).exists()
    assert not places_with_canary({**errors, **kept, **received(canary)})


def command_lines() -> dict[str, bytes]:
    """Return the command lines of all processes, which every user of a machine can read."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[str(path)] = path.read_bytes()
        except OSError:  # gone meanwhile
            continue
    return lines


def run_watched(command, **options) -> tuple[subprocess.CompletedProcess, dict[str, bytes]]:
    """Run a command; also return the command lines with the canary that appeared meanwhile."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )
    exposed: dict[str, bytes] = {}
    while process.poll() is None:
        exposed |= {
            name + str(len(exposed)): line
            for name, line in command_lines().items()
            if any(encoding in line for encoding in encodings(CANARY))
        }
        time.sleep(0.1)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err), exposed


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the process list is read from /proc")
def test_train_push_and_background_do_not_show_the_token(canary, tmp_path):
    """The real commands with W&B's own files, and uploads in the background."""
    folder, home = tmp_path / "run", tmp_path / "home"
    environment = {**os.environ, **canary.env(CANARY, home), "WANDB_DIR": str(tmp_path / "wandb")}
    train = [
        sys.executable,
        "train.py",
        f"--output_dir={folder}",
        "--max_train_steps=4",
        "--checkpointing_steps=4",
        "--logger=wandb",
        "--save_images_epochs=0",
        "--train_batch_size=16",
        "--logging_steps=2",
    ]
    trained, exposed = run_watched(train, env=environment)
    assert trained.returncode == 0, trained.stderr.decode()
    assert list(folder.rglob("run-*.wandb")), "W&B wrote its files"

    push = [sys.executable, "push.py", str(folder), "birdie/real", "--private"]
    pushed, exposed_by_push = run_watched(push, env=environment)
    assert pushed.returncode == 0, pushed.stderr.decode()
    canary.inject(Fault("status", path="/commit/", status=403, times=None))
    (folder / PUBLISHED).unlink()
    refused, exposed_by_failure = run_watched([*push[:3], "birdie/other"], env=environment)
    assert refused.returncode == 1 and b"error: " in refused.stderr
    canary.clear_faults()

    config = HubConfig(push_to_hub=True, hub_checkpoints=True, hub_model_id="birdie/later")
    publisher = Publisher(folder, config)
    publisher.submit(4)
    publisher.submit_checkpoint(folder / "checkpoint-4")
    publisher._pipelines.join(120)
    publisher._checkpoints.join(120)
    publisher.stop()
    repositories = {repository.id for repository in canary.store.all("models")}
    assert {"birdie/later", "birdie/later-training-state"} <= repositories
    output = {
        f"{number}.{name}": getattr(done, name)
        for name in ("stdout", "stderr")
        for number, done in enumerate((trained, pushed, refused))
    }
    kept = files_below(folder, home, tmp_path / "wandb", canary.root / "repos")
    assert not places_with_canary(
        {
            **output,
            **kept,
            **received(canary),
            **exposed,
            **exposed_by_push,
            **exposed_by_failure,
        }
    )
