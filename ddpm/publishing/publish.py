"""Publish a run folder: stage it, make one commit, download that commit, and compare it.

A push counts as published only after its very commit was downloaded into an empty cache, every file
has the sha256 of the staged one, stock diffusers loads it, and it generates the proof images again.
Every failure ends in one sentence that says what is on the Hub by then.

`HfApi.upload_folder` is not used: with hf_xet it may split a folder into several commits, and a
branch must hold all of a push or nothing of it.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import BadRequestError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import get_session, hf_raise_for_status
from huggingface_hub.utils.sha import git_hash

from ddpm import download, file_io, hub, run_folder, run_record
from ddpm.card import read_card
from ddpm.config.push import PushConfig
from ddpm.errors import UserError, printable
from ddpm.publishing import model_card
from ddpm.publishing.stage import is_published_name, stage_files
from ddpm.sampling import proof

SCRATCH = ".push.partial"
"""Folder in the run folder for staged files and the download; a push deletes an earlier one."""
LOCK = ".push.lock"
UNTOUCHED = "Nothing of this push is visible in {0}."


@dataclass(frozen=True)
class PublishResult:
    """The commit that holds the content of a push."""

    repo_id: str
    commit: str
    is_new: bool
    """False when the repository held the same content before."""
    num_files: int
    difference: int | None
    """Largest pixel difference (of 255) between the proof images and those generated from the
    download; None when none were generated."""
    pull_request: str | None = None
    """Address of the pull request, when one was asked for."""

    def __str__(self) -> str:
        address = f"{hub.endpoint()}/{self.repo_id}"
        sentence = f"{address} holds the same content already: no new commit."
        if self.pull_request:
            sentence = f"Proposed {self.num_files} files in one commit: {self.pull_request}"
        elif self.is_new:
            sentence = f"Published {self.num_files} files in one commit: {address}"
        return (
            f"{sentence}\nProved: downloaded again, hashes compared, loaded with diffusers, proof "
            f"images drawn; largest difference of a pixel {self.difference} of 255."
        )


@dataclass
class Progress:
    """State of the repository during a push, as a sentence for error messages."""

    repo_id: str
    state: str = "Nothing was sent to {0}."

    def __str__(self) -> str:
        return self.state.format(self.repo_id)


def publish(
    folder: Path,
    repo_id: str,
    config: PushConfig,
    *,
    check_images: bool = True,
    step: int | None = None,
) -> PublishResult:
    """Make the model repository hold the pipeline of `folder`, and verify the commit.

    `repo_id` must be writable (access.require_write_access). `check_images=False` compares hashes
    only and needs no torch, for a folder whose proof.json is up to date. With a `step`, a
    repository that holds a model of a later one is left as it is. Raise UserError that says what
    is on the Hub; the same call again continues from there.
    """
    progress = Progress(repo_id)
    try:
        with _scratch_folder(folder) as scratch:
            return _publish(folder, repo_id, config, check_images, step, scratch, progress)
    except UserError as error:
        raise UserError(f"{error} {progress}", error.exit_code) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{error.filename or folder}: {reason}. {progress}") from error


def _publish(
    folder: Path,
    repo_id: str,
    config: PushConfig,
    check_images: bool,
    step: int | None,
    scratch: Path,
    progress: Progress,
) -> PublishResult:
    # Stage
    staging = scratch / "staged"
    files = stage_files(folder, staging, repo_id, config)
    if check_images:
        proof.compare_with_proof(staging, str(folder), "staged")

    # Create the repository and commit
    api = HfApi()
    with hub.hub_errors(hub.Repository(repo_id, "model", config.revision, "repository")):
        _validate_card(files["README.md"], repo_id)
        hub.call(api.create_repo, repo_id, private=config.private, exist_ok=True)
        progress.state = UNTOUCHED
        if config.revision:
            hub.call(api.create_branch, repo_id, branch=config.revision, exist_ok=True)
        info = hub.call(api.repo_info, repo_id, revision=config.revision)
        if config.private and not info.private:
            raise UserError(f"{repo_id} is public, which --private does not change.")
        head, pull_request = hub.require_commit(info.sha, repo_id), None
        if step is not None and (path := download_file(repo_id, run_folder.RECORD, head, scratch)):
            training = run_record.read_record(path.parent).training
            require_no_later_step(repo_id, training.steps if training else 0, step)
        _merge_existing_readme(files["README.md"], repo_id, head, config.license)
        hashes = {name: file_io.file_sha256(path) for name, path in files.items()}
        stale, is_same = diff_with_repo(api, repo_id, head, files, hashes, is_published_name)
        _require_free_tag(api, repo_id, config.tag, allowed_commit=head if is_same else None)
        commit = head
        if not is_same:
            commit, pull_request = create_commit(
                api,
                repo_id,
                files,
                stale,
                head,
                config.commit_message,
                progress,
                revision=config.revision,
                create_pr=config.create_pr,
            )

    # Verify what others will download
    progress.state = f"{{0}} holds this push as commit {commit}, but it is not proved yet."
    snapshot = verify_commit(repo_id, commit, hashes, scratch / "cache")
    difference = None
    if check_images:
        difference = proof.compare_with_proof(snapshot, repo_id, commit).difference

    # Tag
    if config.tag:
        progress.state = (
            f"{{0}} holds this push as commit {commit}, proved, but not as {config.tag} yet."
        )
        with hub.hub_errors(f"The tag {config.tag}"):
            hub.call(api.create_tag, repo_id, tag=config.tag, revision=commit, exist_ok=True)
    progress.state = f"{{0}} holds this push as commit {commit}, proved."
    result = PublishResult(repo_id, commit, not is_same, len(files), difference, pull_request)
    _write_published_json(folder, staging, result, hashes, config)
    return result


def download_file(
    repo_id: str, name: str, commit: str, scratch: Path, repo_type: str = "model"
) -> Path | None:
    """Download a file of a commit into a folder in `scratch`; None if the commit lacks it."""
    api, target = HfApi(), {"repo_id": repo_id, "filename": name, "revision": commit}
    target["repo_type"] = repo_type
    if not hub.call(api.file_exists, **target):
        return None
    return Path(hub.call(api.hf_hub_download, **target, cache_dir=scratch / "present"))


def require_no_later_step(repo_id: str, present: int, step: int) -> None:
    """Raise UserError if a repository holds a model or a state of a later step than `step`."""
    if present > step:
        raise UserError(
            f"{repo_id} holds step {present:,} already, which a run does not replace by its step "
            f"{step:,}. If it is of another run, give another --hub_model_id, or delete it there."
        )


def verify_commit(
    repo_id: str, commit: str, hashes: dict[str, str], cache: Path, repo_type: str = "model"
) -> Path:
    """Download a commit into the empty folder `cache`, compare every file, and return its folder.

    `hashes` maps file names to sha256. Raise UserError for a file that is not what was staged.
    """
    commit = hub.require_commit(commit, repo_id)
    snapshot = download.download_snapshot(
        repo_id,
        revision=commit,
        cache_dir=str(cache),
        allow_patterns=list(hashes),
        repo_type=repo_type,
    )
    wrong = [
        name
        for name, sha256 in hashes.items()
        if not (snapshot.folder / name).is_file()
        or file_io.file_sha256(snapshot.folder / name) != sha256
    ]
    if wrong:
        raise UserError(
            f"Do not use {repo_id}: {', '.join(wrong)} there is not what was sent. Run the same "
            "command again; if somebody else pushes to it, agree on who does."
        )
    return snapshot.folder


def create_commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path],
    stale: list[str],
    head: str,
    message: str,
    progress: Progress,
    *,
    revision: str | None = None,
    create_pr: bool = False,
    repo_type: str = "model",
) -> tuple[str, str | None]:
    """Commit `files` and delete `stale` on top of `head`.

    Return the commit's id and the address of the pull request, if one was asked for. Large files go
    first, except those that the Hub has. The commit is tried again after a transient error; with
    `head` as its parent it cannot be made twice.
    """
    target = {"revision": revision, "create_pr": create_pr, "repo_type": repo_type}
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    api.preupload_lfs_files(repo_id, additions, **target)
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    for delay in (*hub.RETRY_DELAYS, None):
        try:
            progress.state = "Whether the commit arrived in {0} is not known; running again tells."
            info = api.create_commit(
                repo_id, operations, commit_message=message, parent_commit=head, **target
            )
            return info.oid, info.pr_url and printable(info.pr_url)
        except Exception as error:
            is_transient = hub.is_transient(error)
            if create_pr and is_transient:
                raise  # a second try would open a second pull request
            # The commit may exist although its answer was lost. If the branch moved, take its new
            # head: the verification, which compares every file, tells whether it is ours.
            new_head = hub.find_commit(repo_id, revision, repo_type)
            if new_head != head and is_transient:
                return new_head, None
            progress.state = UNTOUCHED
            if delay is None or not is_transient:
                raise
            hub.sleep_before_retry(error, delay)
    raise AssertionError("unreachable")


def diff_with_repo(
    api: HfApi,
    repo_id: str,
    head: str,
    files: dict[str, Path],
    hashes: dict[str, str],
    is_ours: Callable[[str], bool],
    repo_type: str = "model",
) -> tuple[list[str], bool]:
    """Compare `files` with commit `head`.

    Return the names there that `is_ours` accepts and `files` lacks, and whether nothing differs.
    """
    remote_files = list_files(api, repo_id, head, repo_type)
    stale = [name for name in remote_files if is_ours(name) and name not in files]

    def is_unchanged(name: str) -> bool:
        remote = remote_files.get(name)
        if remote is None:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == hashes[name]
        return remote.blob_id == git_hash(files[name].read_bytes())

    return stale, not stale and all(map(is_unchanged, files))


def list_files(
    api: HfApi, repo_id: str, commit: str, repo_type: str = "model"
) -> dict[str, RepoFile]:
    """Return the files of a commit by their names."""
    target = {"recursive": True, "revision": commit, "repo_type": repo_type}
    tree = hub.call(lambda: list(api.list_repo_tree(repo_id, **target)))
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _require_free_tag(
    api: HfApi, repo_id: str, tag: str | None, allowed_commit: str | None
) -> None:
    """Raise UserError when `tag` names a commit other than `allowed_commit`."""
    if tag is None:
        return
    for ref in hub.call(api.list_repo_refs, repo_id).tags:
        if ref.name == tag and ref.target_commit != allowed_commit:
            raise UserError(
                f"{repo_id} has a tag {tag} already, at commit {ref.target_commit[:12]}. Choose "
                f"another --tag, or delete it first: hf repos tag delete {repo_id} {tag}"
            )


def _validate_card(readme: Path, repo_id: str) -> None:
    """Let the Hub check the metadata of the card before anything is created.

    `ModelCard.validate` of huggingface_hub 1 asks huggingface.co, whatever HF_ENDPOINT says.
    """
    request = {
        "url": f"{constants.ENDPOINT}/api/validate-yaml",
        "json": {"repoType": "model", "content": readme.read_text(encoding="utf-8")},
        "headers": {"Accept": "text/plain"},
    }
    try:
        hub.call(lambda: hf_raise_for_status(get_session().post(**request)))
    except BadRequestError as error:
        reason = " ".join(error.response.text.split())
        raise UserError(
            f"The Hub does not accept the card of {repo_id}: {reason} "
            "(--license takes the Hub's identifiers, such as apache-2.0)."
        ) from error


def _merge_existing_readme(readme: Path, repo_id: str, head: str, license: str | None) -> None:
    """Carry over what people wrote into the README on the Hub."""
    path = download_file(repo_id, "README.md", head, readme.parent.parent)
    if path is None:
        return
    existing = read_card(path, f"The README.md of {repo_id}")
    merged = model_card.merge_card(existing, readme.read_text(encoding="utf-8"), license)
    readme.write_text(merged, encoding="utf-8")


def _write_published_json(
    folder: Path, staging: Path, result: PublishResult, hashes: dict[str, str], config: PushConfig
) -> None:
    staged_proof = proof.read_proof(staging, str(folder))
    assert staged_proof is not None, "a proof is always staged"
    facts = {
        "repo_id": result.repo_id,
        "endpoint": hub.endpoint(),
        "commit": result.commit,
        "revision": config.revision,
        "tag": config.tag,
        "pull_request": result.pull_request,
        "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": hashes,
        "proof": {
            "seeds": staged_proof.seeds,
            "scheduler": staged_proof.scheduler,
            "num_inference_steps": staged_proof.num_inference_steps,
            "pixels_sha256": staged_proof.pixels_sha256,
            "largest_difference": result.difference,
        },
    }
    known = {name: value for name, value in facts.items() if value is not None}
    file_io.write_json(folder / run_folder.PUBLISHED, known)


@contextmanager
def _scratch_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder inside the run folder, to one push at a time."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the --output_dir of a training run.")
    message = f"Another push of {folder} is under way. Wait for it to end."
    with run_folder.hold_lock(folder / LOCK, message):
        shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        (folder / SCRATCH).mkdir()
        try:
            yield folder / SCRATCH
        finally:
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            (folder / LOCK).unlink(missing_ok=True)
