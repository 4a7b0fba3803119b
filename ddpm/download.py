"""Verified downloads from the Hub: every file of a revision is compared with the Hub's hashes.

Failures are UserErrors, as in hub.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils._verification import HashAlgo, compute_file_hash

from ddpm.errors import UserError
from ddpm.file_io import read_json
from ddpm.hub import Repository, call, find_commit, hub_errors, is_offline
from ddpm.typed_json import parse_json

LISTING_LIMIT = 2**28
"""Largest listing of a repository in bytes: that of a million files."""


@dataclass(frozen=True)
class Snapshot:
    """A downloaded revision: its folder, its 40-hex commit, and the number of verified files."""

    folder: Path
    commit: str
    num_checked: int


def download_snapshot(
    repo_id: str,
    *,
    revision: str | None = None,
    allow_patterns: list[str] | None = None,
    cache_dir: str | None = None,
    kind: str | None = None,
    repo_type: str = "model",
) -> Snapshot:
    """Download a revision of a repository and verify the hash of every file.

    `kind` is the repository's name in error messages, if not its type. The client accepts a
    download of the right length with wrong bytes, so a file that differs is downloaded once more;
    UserError if it still differs. The commit is requested first, so that a cached copy never
    replaces a repository that is gone or out of reach. With HF_HUB_OFFLINE=1 the cached copy is
    used, and verified as far as the cache contains hashes.
    """
    repository = Repository(repo_id, repo_type, revision, kind)
    subject = str(repository)
    options = {
        "allow_patterns": allow_patterns,
        "cache_dir": cache_dir,
        "repo_type": repo_type,
    }
    with hub_errors(repository if cache_dir is None else subject):
        if is_offline():
            folder = cached_folder(repo_id, revision, **options)
        else:
            folder = _downloaded_folder(repo_id, revision, **options)
        if not folder.is_dir():
            raise UserError(
                f"{subject} lacks every required file. Check that it is the repository you mean."
            )
        num_checked, damaged = verify_files(folder, repo_id, repo_type)
        if damaged:
            download_again(folder, damaged, subject, repo_id, repo_type)
    return Snapshot(folder, folder.name, num_checked)


def _downloaded_folder(repo_id: str, revision: str | None, **options: Any) -> Path:
    commit = find_commit(repo_id, revision, options["repo_type"])
    # By name first, so that the cache knows the name when offline. If the name moved since, or the
    # client fell back on an older copy, the commit is downloaded then. The call as a whole is
    # retried, because the client does not repeat a 5xx in the body of a file.
    folder = Path(call(snapshot_download, repo_id, revision=revision, **options))
    if folder.name != commit:
        folder = folder.with_name(commit)
        call(snapshot_download, repo_id, revision=commit, **options)
    return folder


def cached_folder(repo_id: str, revision: str | None, **options: Any) -> Path:
    """Return the folder of a cached revision. Raise OfflineModeIsEnabled if files are missing."""
    try:
        path = snapshot_download(repo_id, revision=revision, local_files_only=True, **options)
    except LocalEntryNotFoundError as error:
        raise OfflineModeIsEnabled(str(error)) from error
    return Path(path)


def complete_snapshot(repo_id: str, revision: str | None, repo_type: str) -> Path | None:
    """Return the folder of a cached revision that has every file of its listing, None otherwise.

    `hf download` leaves a listing in the cache.
    """
    try:
        folder = cached_folder(repo_id, revision, repo_type=repo_type)
    except OfflineModeIsEnabled:
        return None
    return folder if _listing_path(folder).exists() else None


def dataset_folder(repo_id: str, commit: str) -> Path:
    """Return where the cache keeps the downloaded files of a commit of a dataset, if it has any."""
    name = repo_folder_name(repo_id=repo_id, repo_type="dataset")
    return Path(constants.HF_HUB_CACHE, name, "snapshots", commit)


def verify_files(folder: Path, repo_id: str, repo_type: str = "model") -> tuple[int, list[str]]:
    """Compare the files of a cached revision, which is the name of `folder`, with the Hub's hashes.

    Offline they are compared with the hashes that the cache contains. Return the number of files
    compared, and the names of those that differ.
    """
    if not is_offline():
        result = call(
            HfApi().verify_repo_checksums,
            repo_id,
            repo_type=repo_type,
            revision=folder.name,
            local_dir=folder,
        )
        return result.checked_count, [mismatch["path"] for mismatch in result.mismatches]
    num_checked, damaged = 0, []
    for name, expected in _cached_hashes(folder).items():
        if (folder / name).is_file() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", expected):
            algorithm: HashAlgo = "sha256" if len(expected) == 64 else "git-sha1"
            num_checked += 1
            if compute_file_hash(folder / name, algorithm) != expected:
                damaged.append(name)
    return num_checked, damaged


def download_again(
    folder: Path, names: list[str], subject: str, repo_id: str, repo_type: str = "model"
) -> None:
    """Replace damaged files of a cached revision. UserError if that gives other bytes again."""
    if is_offline():
        raise UserError(
            f"{subject} is damaged in the cache ({', '.join(names)}). Unset HF_HUB_OFFLINE and run "
            "again to download it again."
        )
    options = {"repo_type": repo_type, "revision": folder.name, "cache_dir": folder.parents[2]}
    for name in names:
        call(hf_hub_download, repo_id, name, force_download=True, **options)
    _, names = verify_files(folder, repo_id, repo_type)
    if names:
        raise UserError(
            f"{subject}: downloaded files differ from the Hub's hashes ({', '.join(names)}, "
            "twice). Nothing was loaded. A proxy or a disk changes files; try another network or "
            "HF_HOME."
        )


@dataclass(frozen=True)
class _ListedFile:
    blob_id: str
    lfs_sha256: str | None = None


@dataclass(frozen=True)
class _Listing:
    """What the client keeps of a repository's listing when it downloads a snapshot."""

    files: dict[str, _ListedFile]


def _cached_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 or git sha1 of each file of a cached snapshot, as far as it is kept there.

    The hash is the name of the blob that a file of the snapshot links to. That blob may itself be
    a link, to a blob that repositories share, whose name is another hash. Files that are no links,
    as on Windows, have their hashes in the listing of the repository.
    """
    path, hashes = _listing_path(folder), {}
    if path.exists():
        listing = parse_json(_Listing, read_json(path, LISTING_LIMIT), str(path))
        hashes = {name: file.lfs_sha256 or file.blob_id for name, file in listing.files.items()}
    links = (path for path in folder.rglob("*") if path.is_symlink())
    return hashes | {link.relative_to(folder).as_posix(): link.readlink().name for link in links}


def _listing_path(folder: Path) -> Path:
    return folder.parent.parent / "trees" / f"{folder.name}.json"
