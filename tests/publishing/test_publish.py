"""A push: which files, how many commits, and what is verified."""

import json
import re

import pytest
from filelock import FileLock

from ddpm.config.parser import parse_push
from ddpm.errors import UserError
from ddpm.file_io import write_json
from ddpm.hub import time
from ddpm.publishing import publish
from ddpm.publishing.access import require_write_access
from ddpm.run_folder import EVALUATION, PROOF, PUBLISHED, UNET_WEIGHTS
from ddpm.run_record import write_record
from ddpm.sampling import proof
from tests.hub import LARGE_UPLOADS, Fault

PUBLISHED_NAMES = {
    "README.md",
    "metrics.jsonl",
    "model_index.json",
    "proof.json",
    "proof/seed-00000.png",
    "proof/seed-00001.png",
    "record.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "train_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def push(run_folder, alice, request):
    """push(flags...) -> PublishResult, into a repository of this test's own."""

    def push(*flags):
        config = parse_push([str(run_folder), *flags])
        return publish.publish(run_folder, push.repo_id, config, check_images=push.check_images)

    push.check_images = False
    push.repo_id = "alice/" + re.sub(r"\W+", "-", request.node.name).strip("-")[:60]
    return push


def files_on_branch(hub, repo_id, revision="main"):
    return set(hub.repo("model", repo_id).files(revision)) - {".gitattributes"}


def test_one_commit_holds_the_published_files_and_nothing_else(hub, push, run_folder):
    push.check_images = True
    (run_folder / "checkpoint-6").mkdir()
    (run_folder / "checkpoint-6" / "optimizer.bin").write_bytes(b"private")
    (run_folder / "logs").mkdir()
    (run_folder / "logs" / "host").write_text("my machine")
    (run_folder / "notes.txt").write_text("mine")
    before = 1  # a new repository has the Hub's own first commit
    done = push()
    assert files_on_branch(hub, push.repo_id) == PUBLISHED_NAMES
    assert len(hub.repo("model", push.repo_id).commits()) == before + 1
    assert done.is_new and done.difference == 0
    assert done.commit == hub.repo("model", push.repo_id).resolve()
    facts = json.loads((run_folder / PUBLISHED).read_text())
    assert facts["commit"] == done.commit and set(facts["sha256"]) == PUBLISHED_NAMES


def test_the_same_again_makes_no_commit(hub, push):
    first = push()
    again = push()
    assert again.commit == first.commit and not again.is_new
    assert len(hub.repo("model", push.repo_id).commits()) == 2


def test_private_is_private(hub, push):
    push("--private")
    assert hub.repo("model", push.repo_id).is_private


def test_private_is_refused_for_a_public_repository(hub, push):
    hub.create_repo("model", push.repo_id)
    with pytest.raises(
        UserError,
        match="is public, which --private does not change.*Nothing of this push is visible",
    ):
        push("--private")
    assert not files_on_branch(hub, push.repo_id)


def test_a_branch_leaves_main_alone(hub, push):
    push("--revision=trial")
    assert not files_on_branch(hub, push.repo_id)
    assert files_on_branch(hub, push.repo_id, "trial") == PUBLISHED_NAMES


def test_text_written_on_the_hub_is_kept(hub, push, run_folder):
    push()
    repository = hub.repo("model", push.repo_id)
    edited = repository.read("README.md").decode() + "\n## Thanks\n\nTo Bob.\n"
    repository.write({"README.md": edited.encode()}, "words", author="alice")
    assert not push().is_new
    write_record(run_folder, wandb="https://example.org/run")
    assert push().is_new
    text = repository.read("README.md").decode()
    assert "To Bob." in text and "https://example.org/run" in text


@pytest.mark.parametrize("kind", ["drop", "status"])
def test_a_lost_answer_is_not_a_lost_commit(hub, push, kind):
    """The commit is made and its answer is lost: the head of the branch is verified."""
    hub.inject(Fault(kind, method="POST", path="/commit/", when="after"))
    done = push()
    assert done.is_new and files_on_branch(hub, push.repo_id) == PUBLISHED_NAMES


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("status", method="POST", path="/commit/", times=None), r"has a problem \(500\)"),
        (Fault("status", method="POST", path="/commit/", status=403), "no right"),
        (Fault("status", method="POST", path="/commit/", status=412), "by somebody else"),
        (Fault("drop", method="POST", path="/commit/", times=None), "could not be reached"),
        (
            Fault("corrupt_upload", path=LARGE_UPLOADS, times=None),
            "refuses what was sent|has a problem",
        ),
    ],
    ids=["500", "403", "412", "no answer", "damaged upload"],
)
def test_a_failed_push_leaves_the_branch_as_it_was(hub, push, run_folder, fault, words):
    hub.inject(fault)
    with pytest.raises(UserError, match=words):
        push()
    assert not files_on_branch(hub, push.repo_id)
    assert not (run_folder / PUBLISHED).exists()
    hub.clear_faults()
    assert push().is_new


def test_a_commit_made_meanwhile_is_kept(hub, push, monkeypatch):
    """Somebody else commits after ours was prepared: the push is refused."""
    real, theirs = publish._merge_existing_readme, []

    def merge_and_commit(readme, repo_id, *rest):
        real(readme, repo_id, *rest)
        theirs.append(hub.repo("model", repo_id).write({"theirs.txt": b"x"}, "theirs"))

    with monkeypatch.context() as patch, pytest.raises(UserError, match="by somebody else"):
        patch.setattr(publish, "_merge_existing_readme", merge_and_commit)
        push()
    assert hub.repo("model", push.repo_id).resolve() == theirs[0]
    push()
    assert "theirs.txt" in files_on_branch(hub, push.repo_id)


def test_a_damaged_download_does_not_count_as_published(hub, push, run_folder):
    hub.inject(Fault("corrupt", path="/cdn/", times=None))
    with pytest.raises(UserError, match=r"unet/diffusion_pytorch_model.safetensors.*twice"):
        push()
    assert not (run_folder / PUBLISHED).exists()


def test_a_file_changed_by_the_hub_does_not_count_as_published(hub, push, monkeypatch):
    """The Hub's hashes agree with its bytes, yet they are not the bytes that were sent."""
    real = publish.verify_commit

    def verify_changed(repo_id, commit, *rest):
        changed = hub.repo("model", repo_id).write({"unet/config.json": b"{}"}, "changed")
        return real(repo_id, changed, *rest)

    monkeypatch.setattr(publish, "verify_commit", verify_changed)
    with pytest.raises(
        UserError, match=r"Do not use alice/\S+: unet/config.json there is not what"
    ):
        push()


def test_other_pixels_do_not_count_as_published(hub, push, run_folder, monkeypatch):
    """Hashes agree, yet the downloaded model generates other images."""
    push.check_images = True
    real, folders = proof.draw_proof_images, []

    def halve_downloaded(recorded, unet, *args):
        folders.append(unet.config["_name_or_path"])
        images = real(recorded, unet, *args)
        return images // 2 if "cache" in folders[-1] else images

    monkeypatch.setattr(proof, "draw_proof_images", halve_downloaded)
    with pytest.raises(UserError, match=r"draws other images than its proof.*not proved yet"):
        push()
    assert not (run_folder / PUBLISHED).exists()
    assert len(folders) == 2  # before the commit and after


def test_an_unfinished_run_is_refused(push, run_folder):
    (run_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no finished pipeline .unet/diffusion"):
        push()


def test_weights_cut_short_are_not_sent(hub, push, run_folder):
    push.check_images = True
    weights = run_folder / UNET_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"not the one that proof.json was made for.*Nothing was"):
        push()
    (run_folder / PROOF).unlink()
    with pytest.raises(UserError, match=f"cannot load the pipeline in {run_folder}"):
        push()
    assert not [request for request in hub.requests if request.method == "POST"]


# Flags


def test_a_tag_names_the_verified_commit(hub, push):
    done = push("--tag=v1.0")
    repository = hub.repo("model", push.repo_id)
    assert repository.refs["refs/tags/v1.0"] == done.commit == repository.resolve()
    assert not push("--tag=v1.0").is_new
    assert not push("--tag=v1.0-again").is_new
    assert repository.refs["refs/tags/v1.0-again"] == done.commit


def test_a_tag_is_not_moved(hub, push, run_folder):
    first = push("--tag=v1").commit
    write_record(run_folder, wandb="https://example.org/run")
    with pytest.raises(UserError, match="has a tag v1 already.*Nothing of this push is visible"):
        push("--tag=v1")
    assert hub.repo("model", push.repo_id).resolve() == first


def test_an_unverified_commit_gets_no_tag(hub, push):
    hub.inject(Fault("corrupt", path="/cdn/", times=None))
    with pytest.raises(UserError, match="not proved yet"):
        push("--tag=v1")
    assert "refs/tags/v1" not in hub.repo("model", push.repo_id).refs


def test_a_tag_that_failed_is_created_by_the_same_push_again(hub, push):
    hub.inject(Fault("status", path="/tag/", status=403))
    with pytest.raises(UserError, match="no right.*proved, but not as v1 yet"):
        push("--tag=v1")
    assert not push("--tag=v1").is_new
    assert "refs/tags/v1" in hub.repo("model", push.repo_id).refs


def test_a_pull_request_leaves_main_alone_and_is_verified(hub, push, monkeypatch):
    """Everybody who can read may open one."""
    repository = hub.create_repo("model", push.repo_id)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
    assert require_write_access(push.repo_id, "run", create_pr=True) == push.repo_id
    with pytest.raises(UserError, match="bob may not write to alice"):
        require_write_access(push.repo_id, "run")
    done = push("--create_pr", "--commit_message=Better digits")
    assert done.pull_request == f"{hub.url}/{push.repo_id}/discussions/1"
    assert files_on_branch(hub, push.repo_id) == set()
    assert files_on_branch(hub, push.repo_id, "refs/pr/1") == PUBLISHED_NAMES
    assert repository.commits("refs/pr/1")[0].title == "Better digits"
    with pytest.raises(UserError, match="does not exist, so nothing can be proposed"):
        require_write_access("alice/nothing-there", "run", create_pr=True)


def test_an_unknown_license_is_reported_before_anything_is_created(hub, push):
    with pytest.raises(UserError, match="'free'.*--license takes.*Nothing was sent"):
        push("--license=free")
    assert hub.store.find("models", push.repo_id) is None
    push("--license=apache-2.0")
    text = hub.repo("model", push.repo_id).read("README.md").decode()
    assert text.startswith("---\nlicense: apache-2.0\n")


def test_a_branch_is_named_in_the_snippet(hub, push):
    push("--revision=trial")
    text = hub.repo("model", push.repo_id).read("README.md", "trial").decode()
    assert f'from_pretrained("{push.repo_id}", revision="trial", use_safetensors=True)' in text


def test_stale_files_of_an_earlier_push_are_deleted(hub, push, run_folder):
    write_json(run_folder / EVALUATION, {"metrics": {"fid": 3.5}})
    push()
    repository = hub.repo("model", push.repo_id)
    repository.write({"notes.txt": b"mine"}, "by hand")
    assert EVALUATION in repository.files()
    assert "model-index" in repository.read("README.md").decode()
    (run_folder / EVALUATION).unlink()
    push()
    assert files_on_branch(hub, push.repo_id) == {*PUBLISHED_NAMES, "notes.txt"}
    assert "model-index" not in repository.read("README.md").decode()


@pytest.mark.slow
def test_dry_run_shows_files_sizes_and_card_without_the_hub(hub, run_folder, script):
    done = script("push.py", run_folder, "you/digits", "--dry_run", "--private")
    assert done.returncode == 0, done.stderr
    size = (run_folder / UNET_WEIGHTS).stat().st_size
    assert f"{size:>12,} bytes  {UNET_WEIGHTS}\n" in done.stdout
    assert "to you/digits (private):" in done.stdout and "library_name: diffusers" in done.stdout
    listed = re.findall(r"bytes  (\S+)$", done.stdout, flags=re.MULTILINE)
    assert set(listed) == PUBLISHED_NAMES and not hub.requests


def test_two_pushes_of_one_folder_exclude_each_other(push, run_folder):
    with (
        FileLock(run_folder / publish.LOCK),
        pytest.raises(UserError, match="Another push of .* is under way.*Nothing was sent"),
    ):
        push()


def test_the_token_is_in_no_file(hub, push, run_folder, alice):
    push()
    published = hub.repo("model", push.repo_id).files().values()
    local = [path.read_bytes() for path in run_folder.rglob("*") if path.is_file()]
    assert not [content for content in (*published, *local) if alice.encode() in content]
