"""A canary in place of the token: it goes to the Hub in one header, and nowhere else."""

import base64
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from ddpm import hub as hub_module
from ddpm.config.parser import parse_push
from ddpm.errors import UserError
from ddpm.hub import require_write_access
from ddpm.publishing import background, checkpoint_repo, publish
from ddpm.run_folder import PUBLISHED
from tests.conftest import ROOT
from tests.hub import Fault

CANARY = "hf_" + "cAnArY0123456789" * 2 + "xy"


def traces_of(secret: str) -> list[bytes]:
    """The secret as it stands in a text, and as any base64 text that contains it would show it."""
    inside = [base64.b64encode(b"_" * shift + secret.encode())[4:-4] for shift in range(3)]
    return [secret.encode(), secret.encode()[::-1], *inside]


def hits(places: dict[str, bytes]) -> list[str]:
    return [
        name
        for name, content in places.items()
        if any(trace in content for trace in traces_of(CANARY))
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
    """Logged in with the canary; the Hub keeps all that it receives."""
    hub.add_user("birdie", token=CANARY)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    hub.received = []
    yield hub
    hub.received = None


def received(hub) -> dict[str, bytes]:
    return {f"request {number}": body for number, body in enumerate(hub.received)}


def test_the_search_would_find_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text(f"token={CANARY}")
    assert len(hits(files_below(tmp_path))) == 1
    for shift in range(6):
        assert hits({"body": base64.b64encode(b"x" * shift + CANARY.encode() + b"rest")})


def test_a_push_and_its_failures_do_not_show_it(canary, run_folder, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(hub_module.time, "sleep", lambda seconds: None)
    config, errors = parse_push([str(run_folder), "--tag=v1"]), {}
    faults = [
        Fault("status", path="/whoami", status=401),
        Fault("status", path="/repos/create", status=403),
        Fault("status", path="/commit/", status=503, times=None),
        Fault("drop", path="^/upload/", times=None),
        Fault("corrupt", path="^/cdn/", times=None),
    ]
    for number, fault in enumerate([*faults, None]):
        if fault:
            canary.inject(fault)
        try:
            repo_id = require_write_access(f"birdie/secret-{number}", "run")
            publish.publish(run_folder, repo_id, config)
        except UserError as error:
            errors[f"error {number}"] = "".join(traceback.format_exception(error)).encode()
            errors[f"words {number}"] = repr(error).encode()
        canary.clear_faults()
    assert len(errors) == 2 * len(faults)
    kept = {"log": caplog.text.encode(), **files_below(run_folder, canary.root / "repos")}
    assert len(canary.received) > 50 and (run_folder / PUBLISHED).exists()
    assert not hits({**errors, **kept, **received(canary)})


def command_lines() -> dict[str, bytes]:
    """What anybody on this machine can see of its processes."""
    lines = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines[str(path)] = path.read_bytes()
        except OSError:  # gone meanwhile
            continue
    return lines


def watched(command, **options) -> tuple[subprocess.CompletedProcess, dict[str, bytes]]:
    """Run a command and look at the process list again and again while it lasts."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )
    seen: dict[str, bytes] = {}
    while process.poll() is None:
        seen |= {
            name + str(len(seen)): line
            for name, line in command_lines().items()
            if any(trace in line for trace in traces_of(CANARY))
        }
        time.sleep(0.1)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err), seen


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="the process list is read from /proc")
def test_train_push_and_background_do_not_show_it(canary, tmp_path):
    """The real commands, with W&B's own files, and the process of a push in the background."""
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
    trained, seen = watched(train, env=environment)
    assert trained.returncode == 0, trained.stderr.decode()
    assert list(folder.rglob("run-*.wandb")), "W&B wrote its files"

    push = [sys.executable, "push.py", str(folder), "birdie/real", "--private"]
    pushed, more = watched(push, env=environment)
    assert pushed.returncode == 0, pushed.stderr.decode()
    canary.inject(Fault("status", path="/commit/", status=403, times=None))
    (folder / PUBLISHED).unlink()
    refused, third = watched([*push[:3], "birdie/other"], env=environment)
    assert refused.returncode == 1 and b"error: " in refused.stderr
    canary.clear_faults()

    publisher = background.Publisher(folder, "birdie/later", checkpoints=True)
    publisher.submit(4)
    publisher.submit_checkpoint(folder / "checkpoint-4")
    lines = {}
    while publisher._pipelines.poll() | publisher._checkpoints.poll():
        lines |= command_lines()
        time.sleep(0.1)
    publisher.stop()
    assert checkpoint_repo.checkpoint_repo_id("birdie/later") in {
        r.id for r in canary.store.all("models")
    }
    said = {
        f"{number}.{name}": getattr(done, name)
        for name in ("stdout", "stderr")
        for number, done in enumerate((trained, pushed, refused))
    }
    kept = files_below(folder, home, tmp_path / "wandb", canary.root / "repos")
    assert not hits({**said, **kept, **received(canary), **seen, **more, **third, **lines})
