"""Which bytes ship: stage an allow-list, make one commit, pull it back, prove it.

Nothing is called published until the very revision was downloaded into an empty cache, every file
has the sha256 of the one staged, stock diffusers loads it, and it draws the proof images. Whatever
goes wrong on the way ends in one sentence that says what is on the Hub by then.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils.sha import git_hash

from ddpm import hub, run_folder
from ddpm.config.commands import PushConfig
from ddpm.errors import UserError
from ddpm.publishing import model_card
from ddpm.publishing.stage import is_published_name, stage_files
from ddpm.sampling import pipeline, proof

SCRATCH = ".push.partial"
"""Staged files and the download, in the run folder: what a killed push leaves the next one removes.
"""

LOCK = ".push.lock"
UNTOUCHED = "Nothing of this push is visible in {0}."


@dataclass(frozen=True)
class PublishResult:
    """What is on the Hub now; `is_new` is False when that revision held all of it before."""

    repo_id: str
    commit: str
    is_new: bool
    num_files: int
    difference: int
    """Largest difference of a pixel between the proof images and those of the download, of 255."""
    pull_request: str | None = None
    """Address of the pull request, when one was asked for."""


@dataclass
class Progress:
    """How far a push has come, for the sentence that says what is on the Hub when it fails."""

    repo_id: str
    state: str = "Nothing was sent to {0}."

    def now(self, state: str) -> None:
        self.state = state

    def __str__(self) -> str:
        return self.state.format(self.repo_id)


def publish(folder: Path, repo_id: str, config: PushConfig) -> PublishResult:
    """Make the model repository hold `folder`'s pipeline, and prove that it does.

    `repo_id` must be one that may be written to (account.require_write). Raises UserError with
    what is and what is not on the Hub. The same call again goes on where this one stopped.
    """
    progress = Progress(repo_id)
    try:
        with _scratch(folder) as scratch:
            return _publish(folder, repo_id, config, scratch, progress)
    except UserError as error:
        raise UserError(f"{error} {progress}", error.exit_code) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{error.filename or folder}: {reason}. {progress}") from error


def _publish(
    folder: Path, repo_id: str, config: PushConfig, scratch: Path, progress: Progress
) -> PublishResult:
    staging = scratch / "staged"
    files = stage_files(folder, staging, repo_id, config)
    proof.compare_with_proof(staging, str(folder), "staged")
    api, thing = HfApi(), f"The repository {repo_id}"
    with hub.hub_errors(thing, revision=config.revision):
        _require_valid_card(files["README.md"], repo_id)
        hub.call(api.create_repo, repo_id, private=config.private, exist_ok=True)
        progress.now(UNTOUCHED)
        if config.revision:
            hub.call(api.create_branch, repo_id, branch=config.revision, exist_ok=True)
        info = hub.call(api.repo_info, repo_id, revision=config.revision)
        if config.private and not info.private:
            raise UserError(f"{repo_id} is public, which --private does not change.")
        head = info.sha
        _keep_their_words(files["README.md"], repo_id, head, config.license)
        hashes = {name: pipeline.file_sha256(path) for name, path in files.items()}
        stale, same = diff_with_repo(api, repo_id, head, files, hashes, is_published_name)
        _require_free_tag(api, repo_id, config.tag, head if same else None)
        commit, pull_request = head, None
        if not same:
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
    progress.now("{0} holds this push as commit " + commit + ", but it is not proved yet.")
    verdict = prove_commit(repo_id, commit, hashes, scratch / "cache")
    if config.tag:
        progress.now(
            "{0} holds this push as commit " + commit + f", proved, but not as {config.tag} yet."
        )
        with hub.hub_errors(f"The tag {config.tag}"):
            hub.call(api.create_tag, repo_id, tag=config.tag, revision=commit, exist_ok=True)
    progress.now("{0} holds this push as commit " + commit + ", proved.")
    done = PublishResult(repo_id, commit, not same, len(files), verdict.difference, pull_request)
    _write_facts(folder, staging, done, hashes, config)
    return done


def prove_commit(
    repo_id: str, commit: str, hashes: dict[str, str], cache: Path
) -> proof.ProofResult:
    """Download a commit into the empty `cache`; UserError unless it is what was staged.

    `hashes` maps each file to its sha256. The proof images ship, so they are among the files.
    """
    snapshot = hub.download_snapshot(
        repo_id, revision=commit, cache_dir=str(cache), allow_patterns=list(hashes)
    )
    wrong = [
        name
        for name, wanted in hashes.items()
        if not (snapshot.folder / name).is_file()
        or pipeline.file_sha256(snapshot.folder / name) != wanted
    ]
    if wrong:
        raise UserError(
            f"Do not use {repo_id}: {', '.join(wrong)} there is not what was sent. Run the same "
            "command again; if somebody else pushes to it, agree on who does."
        )
    return proof.compare_with_proof(snapshot.folder, repo_id, commit)


def create_commit(
    api: HfApi,
    repo_id: str,
    files: dict[str, Path],
    stale: list[str],
    head: str,
    message: str,
    progress: Progress,
    **where: str | bool | None,
) -> tuple[str, str | None]:
    """One commit on top of `head`: (its id, the address of the pull request if one was asked for).

    `where` is revision and create_pr. Large files go first, one by one; those that the Hub has are
    not sent again. The commit itself is tried again while that can help: on top of `head` alone,
    so it is never made twice.
    """
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    api.preupload_lfs_files(repo_id, additions, **where)
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    for wait in (*hub.RETRY_DELAYS, None):
        try:
            progress.now("Whether the commit arrived in {0} is not known; running again tells.")
            info = api.create_commit(
                repo_id, operations, commit_message=message, parent_commit=head, **where
            )
            return info.oid, info.pr_url
        except Exception as error:
            passing = hub.is_transient(error)
            if where.get("create_pr") and passing:
                raise  # a second try would open a second pull request
            # The answer may be lost when the commit is made: ask what is there. The proof, which
            # compares every file, tells whether it is ours.
            now = hub.call(api.repo_info, repo_id, revision=where.get("revision")).sha
            if now != head and passing:
                return now, None
            progress.now(UNTOUCHED)
            if wait is None or not passing:
                raise
            hub.sleep_before_retry(error, wait)
    raise AssertionError("unreachable")


def diff_with_repo(
    api: HfApi,
    repo_id: str,
    head: str,
    files: dict[str, Path],
    hashes: dict[str, str],
    is_ours: Callable[[str], bool],
) -> tuple[list[str], bool]:
    """(files of an earlier push that have no place in this one, whether `head` holds just this)."""
    tree = hub.call(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=head)))
    there = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    stale = [name for name in there if is_ours(name) and name not in files]

    def is_there(name: str) -> bool:
        entry = there.get(name)
        if entry is None:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == hashes[name]
        return entry.blob_id == git_hash(files[name].read_bytes())

    return stale, not stale and all(map(is_there, files))


def _require_free_tag(api: HfApi, repo_id: str, tag: str | None, allowed: str | None) -> None:
    """UserError when `tag` is given and names a commit other than `allowed`."""
    if tag is None:
        return
    for known in hub.call(api.list_repo_refs, repo_id).tags:
        if known.name == tag and known.target_commit != allowed:
            raise UserError(
                f"{repo_id} has a tag {tag} already, at commit {known.target_commit[:12]}. Choose "
                f"another --tag, or delete it first: hf repos tag delete {repo_id} {tag}"
            )


def _require_valid_card(readme: Path, repo_id: str) -> None:
    """Let the Hub judge the card's metadata before anything is made."""
    content = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    try:
        hub.call(content.validate)
    except ValueError as error:
        raise UserError(
            f"The Hub does not take the card of {repo_id}: {' '.join(str(error).split())} "
            "(--license takes the Hub's identifiers, such as apache-2.0)."
        ) from error


def _keep_their_words(readme: Path, repo_id: str, head: str, license: str | None) -> None:
    """Carry over what people wrote into the README that is on the Hub."""
    if not hub.call(HfApi().file_exists, repo_id, "README.md", revision=head):
        return
    name = hub.call(
        HfApi().hf_hub_download,
        repo_id,
        "README.md",
        revision=head,
        cache_dir=readme.parent.parent / "readme",
    )
    existing = Path(name).read_text(encoding="utf-8")
    merged = model_card.merge_card(existing, readme.read_text(encoding="utf-8"), license)
    readme.write_text(merged, encoding="utf-8")


def _write_facts(
    folder: Path, staging: Path, done: PublishResult, hashes: dict[str, str], config: PushConfig
) -> None:
    shown = proof.read_proof(staging, str(folder))
    assert shown is not None, "a proof is always staged"
    facts = {
        "repo_id": done.repo_id,
        "endpoint": hub.endpoint(),
        "commit": done.commit,
        "revision": config.revision,
        "tag": config.tag,
        "pull_request": done.pull_request,
        "published_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sha256": hashes,
        "proof": {
            "seeds": shown.seeds,
            "scheduler": shown.scheduler,
            "num_inference_steps": shown.num_inference_steps,
            "pixels_sha256": shown.pixels_sha256,
            "largest_difference": done.difference,
        },
    }
    known = {name: value for name, value in facts.items() if value is not None}
    run_folder.write_json(folder / run_folder.PUBLISHED, known)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """An empty folder inside the run folder, for one push at a time."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder. Give the --output_dir of a training run.")
    try:
        with FileLock(folder / LOCK, timeout=0):
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
            (folder / SCRATCH).mkdir()
            try:
                yield folder / SCRATCH
            finally:
                shutil.rmtree(folder / SCRATCH, ignore_errors=True)
                (folder / LOCK).unlink(missing_ok=True)
    except Timeout:
        raise UserError(f"Another push of {folder} is under way. Wait for it to end.") from None
