"""A Hub that misbehaves: a push survives the fault, or ends in a sentence that says what is there.

Whatever the fault, the branch holds all of a push or nothing of it, no file of the run folder is
lost or changed, and the same command again completes. The full table of faults is slow; FAST has
each kind of fault and each endpoint once.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from huggingface_hub import constants

from ddpm import file_io, run_folder
from ddpm import hub as ddpm_hub
from ddpm.config.parser import parse_push
from ddpm.errors import UserError
from ddpm.publishing import publish
from ddpm.publishing.access import require_write_access
from ddpm.sampling import pipeline, proof
from tests.conftest import ROOT
from tests.hub import LARGE_DOWNLOADS as DOWNLOADS
from tests.hub import LARGE_UPLOADS as UPLOADS
from tests.hub import Fault

WHOAMI, INFO, COMMIT = "/whoami", r"^/api/models/alice/[^/]+$", "/commit/"
BATCH, TREE = "/objects/batch|/xet-write-token/", "/tree/"
UNTOUCHED = "Nothing of this push is visible"
UNSENT = "Nothing was sent"
UNPROVED = r"holds this push as commit [0-9a-f]{40}, but it is not proved yet"


@dataclass(frozen=True)
class Case:
    """A fault, and a pattern of the error that it ends in: None when the push gets through."""

    name: str
    fault: Fault
    error: str | None = None


def status(path, code, error=None, *, name, times=1, method=".*", **more):
    return Case(
        name, Fault("status", path=path, status=code, times=times, method=method, **more), error
    )


SLOW_DOWN = {"headers": {"Retry-After": "3"}}
CASES = [
    # Transient errors
    status(WHOAMI, 429, name="429 to whoami", **SLOW_DOWN),
    status(BATCH, 429, name="429 to an upload's batch", **SLOW_DOWN),
    status(UPLOADS, 429, name="429 to an upload", **SLOW_DOWN),
    status(COMMIT, 429, name="429 to the commit", **SLOW_DOWN),
    status(DOWNLOADS, 429, name="429 to a download", **SLOW_DOWN),
    status("/repos/create", 500, name="500 once to the creation"),
    status("/validate-yaml", 502, name="502 once to the card"),
    status("/preupload/", 503, name="503 once to the preupload"),
    status(UPLOADS, 500, name="500 once to an upload"),
    status(COMMIT, 502, name="502 once to the commit"),
    status(COMMIT, 503, name="503 once, the commit made", when="after"),
    status(INFO, 503, name="503 twice to the information", times=2),
    status(DOWNLOADS, 503, name="503 once to a download"),
    status(TREE, 500, name="500 once to the listing"),
    Case("no answer to the commit", Fault("drop", path=COMMIT)),
    Case("no answer, the commit made", Fault("drop", path=COMMIT, when="after")),
    Case("reset mid-upload", Fault("reset", path=UPLOADS)),
    Case("reset mid-commit", Fault("reset", path=COMMIT)),
    Case("a download cut short", Fault("truncate", method="GET", path=DOWNLOADS)),
    Case("a download corrupted", Fault("corrupt", method="GET", path=DOWNLOADS)),
    Case("a slow answer to whoami", Fault("delay", path=WHOAMI, seconds=1.5)),
    Case("a slow answer, the commit made", Fault("delay", path=COMMIT, seconds=1.5, when="after")),
    # Errors that stay
    status(WHOAMI, 500, r"has a problem \(500\)", name="500 always", times=None),
    status(WHOAMI, 429, r"asks for a pause \(429\)", name="429 always", times=None, **SLOW_DOWN),
    status(
        "/repos/create",
        503,
        rf"has a problem \(503\).*{UNSENT}",
        name="503 always to the creation",
        times=None,
    ),
    status(
        UPLOADS,
        500,
        rf"has a problem \(500\).*{UNTOUCHED}",
        name="500 always to uploads",
        times=None,
    ),
    status(
        COMMIT,
        502,
        rf"has a problem \(502\).*{UNTOUCHED}",
        name="502 always to the commit",
        times=None,
        method="POST",
    ),
    status(
        DOWNLOADS,
        503,
        rf"has a problem \(503\).*{UNPROVED}",
        name="503 always to downloads",
        times=None,
    ),
    Case("no answer always", Fault("drop", times=None), "could not be reached"),
    Case(
        "no answer to any commit",
        Fault("drop", path=COMMIT, times=None),
        f"could not be reached.*{UNTOUCHED}",
    ),
    Case(
        "every upload reset",
        Fault("reset", path=UPLOADS, times=None),
        f"could not be reached.*{UNTOUCHED}",
    ),
    Case(
        "time-out always",
        Fault("delay", path=COMMIT, seconds=60, times=None),
        f"could not be reached.*{UNTOUCHED}",
    ),
    # Refusals
    status(
        "/preupload/",
        401,
        f"does not accept the token.*{UNTOUCHED}",
        name="401 in the middle",
        times=None,
    ),
    status(
        COMMIT, 401, f"does not accept the token.*{UNTOUCHED}", name="401 to the commit", times=None
    ),
    status(
        DOWNLOADS,
        401,
        "does not accept the token.*" + UNPROVED,
        name="401 to downloads",
        times=None,
    ),
    status(COMMIT, 403, f"no right.*{UNTOUCHED}", name="403 to the commit", times=None),
    status(COMMIT, 409, f"by somebody else.*{UNTOUCHED}", name="409 to the commit"),
    status(COMMIT, 412, f"by somebody else.*{UNTOUCHED}", name="412 to the commit"),
    Case(
        "an upload whose hash is wrong",
        Fault("corrupt_upload", path=UPLOADS, times=None),
        rf"refuses what was sent \(400\).*{UNTOUCHED}",
    ),
    Case(
        "downloads always corrupted",
        Fault("corrupt", method="GET", path=DOWNLOADS, times=None),
        rf"differ from the Hub's hashes .*twice.*{UNPROVED}",
    ),
    Case(
        "downloads always cut",
        Fault("truncate", method="GET", path=DOWNLOADS, times=None),
        f"could not be reached.*{UNPROVED}",
    ),
]


FAST = (
    "429 to the commit",
    "500 once to an upload",
    "502 once to the card",
    "503 once, the commit made",
    "503 once to a download",
    "500 once to the listing",
    "reset mid-upload",
    "a download corrupted",
    "a slow answer, the commit made",
    "500 always",
    "503 always to downloads",
    "no answer to any commit",
    "401 in the middle",
    "403 to the commit",
    "412 to the commit",
    "an upload whose hash is wrong",
    "downloads always cut",
)


FAST_LFS = ("reset mid-upload", "503 always to downloads", "an upload whose hash is wrong")


def test_the_fast_cases_are_in_the_table():
    names = [case.name for case in CASES]
    assert {*FAST, *FAST_LFS} <= set(names) and len(set(names)) == len(names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny finished run folder for all cases."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("faults") / "run"
    folder.mkdir()
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    scheduler = DDPMScheduler(num_train_timesteps=4)
    pipeline.export_pipeline(unet.eval(), scheduler, folder)
    proof.write_proof(folder, unet, scheduler)
    return folder


@pytest.fixture
def short_waits(new_client, monkeypatch):
    """No sleeping between tries, and a Hub that is silent for 0.4 s counts as unreachable."""
    monkeypatch.setattr(ddpm_hub.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(ddpm_hub, "TIMEOUT", 0.4)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)


def push(folder, repo_id, check_images=False):
    """Push without generating images, which send no request."""
    config = parse_push([str(folder), repo_id])
    repo_id = require_write_access(repo_id, "run")
    return publish.publish(folder, repo_id, config, check_images=check_images)


def contents(folder):
    skip = {run_folder.PUBLISHED}
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in skip
    }


def files_on_branch(hub, repo_id):
    repository = hub.store.find("models", repo_id)
    return set(repository.files()) - {".gitattributes"} if repository else set()


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in FAST else pytest.mark.slow)
        for case in CASES
    ],
)
def test_each_fault_is_survived_or_reported(hub, alice, finished, short_waits, case):
    survive_or_report(hub, alice, finished, case, f"alice/fault-{CASES.index(case)}")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if case.name in FAST_LFS else pytest.mark.slow)
        for case in CASES
        if case.fault.path in (BATCH, UPLOADS, DOWNLOADS)
    ],
)
def test_faults_of_large_files_without_xet(hub, alice, finished, short_waits, without_xet, case):
    survive_or_report(hub, alice, finished, case, f"alice/lfs-fault-{CASES.index(case)}")


def survive_or_report(hub, alice, finished, case, repo_id):
    before = contents(finished)
    (finished / run_folder.PUBLISHED).unlink(missing_ok=True)
    hub.inject(case.fault)
    if case.error is None:
        assert push(finished, repo_id).is_new
        assert hub.faults.waiting()[0]["seen"] > 0, "the fault did not happen"
    else:
        with pytest.raises(UserError, match=case.error) as caught:
            push(finished, repo_id)
        assert alice not in str(caught.value) and "\n" not in str(caught.value)
        assert not (finished / run_folder.PUBLISHED).exists()
    complete = {*before, "README.md"}
    assert files_on_branch(hub, repo_id) in (set(), complete), "half of a model is visible"
    assert contents(finished) == before, "a local file changed"

    # The same again completes: one commit in all, next to the Hub's own first one.
    hub.clear_faults()
    push(finished, repo_id)
    assert files_on_branch(hub, repo_id) == complete
    assert len(hub.repo("model", repo_id).commits()) == 2
    assert (finished / run_folder.PUBLISHED).exists()


def test_after_an_interruption_only_what_is_missing_is_sent(hub, alice, finished, short_waits):
    """Uploads arrived and the commit did not; an earlier push was killed and left its files."""
    (finished / publish.SCRATCH / "staged").mkdir(parents=True)
    (finished / publish.SCRATCH / "staged" / "leftover.txt").touch()
    hub.inject(Fault("status", path=COMMIT, status=403))
    with pytest.raises(UserError, match=f"no right.*{UNTOUCHED}"):
        push(finished, "alice/interrupted", check_images=True)
    sent = hub.count(path=UPLOADS)
    assert push(finished, "alice/interrupted", check_images=True).difference == 0
    assert hub.count(path=UPLOADS) == sent > 0, "a finished file was sent again"
    assert "leftover.txt" not in files_on_branch(hub, "alice/interrupted")
    assert not list(finished.glob(".push*"))


def test_a_commit_waits_as_long_as_retry_after_says(hub, alice, finished, monkeypatch):
    waits = []
    monkeypatch.setattr(ddpm_hub.time, "sleep", waits.append)
    hub.inject(Fault("status", path=COMMIT, status=429, headers={"Retry-After": "7"}))
    push(finished, "alice/patience")
    assert 7.0 in waits


def test_a_refused_connection_is_reported(hub, alice, finished, short_waits, monkeypatch):
    before = contents(finished)
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(UserError, match=r"http://127.0.0.1:9 could not be reached"):
            push(finished, "alice/refused")
    assert not files_on_branch(hub, "alice/refused") and contents(finished) == before
    assert push(finished, "alice/refused").is_new


def test_an_unreachable_store_of_large_files_is_reported(hub, alice, finished, short_waits):
    """The Hub answers, the server for large files does not."""
    weights = file_io.file_sha256(finished / run_folder.UNET_WEIGHTS)
    size = (finished / run_folder.UNET_WEIGHTS).stat().st_size
    dead = {"upload": {"href": "http://127.0.0.1:9/upload"}}
    body = {"transfer": "basic", "objects": [{"oid": weights, "size": size, "actions": dead}]}
    body |= {"casUrl": "http://127.0.0.1:9", "accessToken": "none", "exp": time.time_ns()}
    hub.inject(Fault("status", path=BATCH, status=200, body=json.dumps(body), times=None))
    with pytest.raises(UserError, match=f"could not be reached.*{UNTOUCHED}"):
        push(finished, "alice/store-refused")
    assert not files_on_branch(hub, "alice/store-refused")
    hub.clear_faults()
    assert push(finished, "alice/store-refused").is_new


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "scheduler_config"])
def test_a_full_disk_while_staging_sends_nothing(
    hub, alice, finished, short_waits, monkeypatch, name
):
    real, before, repo_id = shutil.copyfile, contents(finished), f"alice/full-{len(name)}"

    def full(source, destination, **options):
        if name in str(source):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(destination))
        return real(source, destination, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(UserError, match=f"No space left on device.*{UNSENT}"):
            push(finished, repo_id)
    assert not files_on_branch(hub, repo_id) and contents(finished) == before
    assert push(finished, repo_id).is_new


def test_a_full_disk_during_the_verification_is_reported(
    hub, alice, finished, short_waits, monkeypatch
):
    from huggingface_hub import file_download

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "blob")

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        with pytest.raises(UserError, match=f"No space left on device.*{UNPROVED}"):
            push(finished, "alice/full-later")
    again = push(finished, "alice/full-later")
    assert not again.is_new and len(hub.repo("model", "alice/full-later").commits()) == 2


PUSH_LIMITED = """
import resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.argv = ["push.py", *sys.argv[1:]]
sys.path.insert(0, ".")
runpy.run_path("push.py", run_name="__main__")
"""


@pytest.mark.slow
def test_a_file_size_limit_ends_in_one_sentence(hub, alice, finished):
    """With a real limit of the kernel and the real command."""
    limit = (finished / run_folder.UNET_WEIGHTS).stat().st_size // 2
    command = [sys.executable, "-c", PUSH_LIMITED, str(limit), str(finished), "alice/limited"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr and UNSENT in done.stderr
    assert f"To go on: python push.py {finished} alice/limited" in done.stderr
    assert not files_on_branch(hub, "alice/limited")


@pytest.mark.slow
def test_a_killed_push_is_completed_by_the_same_command(hub, alice, start, finished):
    """SIGKILL between the uploads and the commit; nothing that arrived is sent again."""
    command = [sys.executable, "push.py", str(finished), "alice/killed"]
    hub.inject(Fault("delay", method="POST", path=COMMIT, seconds=30))
    process = start(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not hub.faults.waiting()[0]["seen"]:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    sent = hub.count(path=UPLOADS)
    assert sent > 0
    assert not files_on_branch(hub, "alice/killed")
    assert (finished / publish.SCRATCH).is_dir()
    hub.clear_faults()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert hub.count(path=UPLOADS) == sent, "a finished file was sent again"
    assert len(hub.repo("model", "alice/killed").commits()) == 2
    assert not list(finished.glob(".push*"))
