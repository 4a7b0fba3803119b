"""The Hub client: retries, verified downloads, accounts and write access, failures in words.

Everything that talks to the Hub does so inside `hub_errors(...)`, which turns failures into
UserErrors. Tokens come from HF_TOKEN or `hf auth login`; huggingface_hub reads them, and they are
never read, stored or printed here.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    hf_hub_download,
    set_client_factory,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_token, validate_repo_id
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils._verification import HashAlgo, compute_file_hash

from ddpm.errors import UsageError, UserError, printable
from ddpm.file_io import read_json
from ddpm.typed_json import parse_json

LOGIN_HINT = "Log in with `hf auth login`, or set HF_TOKEN"
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries of a call."""
MAX_RETRY_AFTER = 60.0
"""Longest time in seconds to wait because the Hub asks for it."""
TIMEOUT = 120.0
"""Seconds of silence after which a call fails; the client's default is to wait forever."""

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")

LISTING_LIMIT = 2**28
"""Largest listing of a repository in bytes: that of a million files."""

Answer = TypeVar("Answer")


def endpoint() -> str:
    """Return the address of the Hub (HF_ENDPOINT) without a login and a slash at its end."""
    return printable(HfApi().endpoint.rstrip("/"))


def is_repo_id(text: str) -> bool:
    """Return whether `text` has the form of a Hub id: owner/name, or a bare name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.isprintable() and not text.startswith((".", "/", "~"))


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE keeps the client off the network."""
    return bool(constants.HF_HUB_OFFLINE)


# The client


def _make_client() -> Any:
    """Return the HTTP client of the Hub, which the first request of this process asks for.

    Work without the Hub makes none, so its proxies need not be usable. Raise UsageError that names
    the variables of the environment from which no client can be made.
    """
    if is_offline():
        raise OfflineModeIsEnabled("HF_HUB_OFFLINE is set.")
    try:
        client = default_client_factory()
    except OSError as error:
        raise UsageError(
            f"SSL_CERT_FILE or SSL_CERT_DIR names certificates that cannot be read ({error}): "
            "correct the path, or unset it."
        ) from None
    except Exception:  # its text may hold the password of a proxy
        raise UsageError(_proxy_advice()) from None
    client.timeout = TIMEOUT
    return client


set_client_factory(_make_client)


def _proxy_advice() -> str:
    """Return which variables name a proxy that cannot be used, and what to write there."""
    names = [name for name in os.environ if name.lower() in PROXY_VARIABLES and os.environ[name]]
    socks = [name for name in names if os.environ[name].lower().startswith("socks")]
    if socks:
        return (
            f"The SOCKS proxy in {' and '.join(socks)} cannot be used for the Hub: unset it "
            f"(unset {' '.join(socks)}), or write socks5://host:port and pip install socksio."
        )
    wrong = [name for name in names if not _is_http_address(os.environ[name])]
    return (
        f"A proxy variable ({', '.join(wrong or names) or 'NO_PROXY'}) is no address: write "
        "http://host:port, or unset it."
    )


def _is_http_address(text: str) -> bool:
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        return parts.scheme in ("http", "https") and parts.port != 0
    except ValueError:  # a port that is no number
        return False


# Retries
#
# The client itself retries downloads and uploads of files, but not its API calls. A retrying
# transport, installed with set_client_factory, would multiply with the client's own retries, and
# would not know which POST may be sent twice.


def call(function: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
    """Call the Hub, again after 429 (waiting for Retry-After), 5xx, or a lost connection.

    Only for calls that may safely be made twice.
    """
    for delay in (*RETRY_DELAYS, None):
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if delay is None or not is_transient(error):
                raise
            sleep_before_retry(error, delay)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Return whether the same call may succeed later: 408, 429, 5xx, or no connection."""
    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        return False
    status = _status(causes)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(_is_transport_error(cause) for cause in causes)


def sleep_before_retry(error: BaseException, delay: float) -> None:
    """Sleep for `delay` seconds, or for the Retry-After of the response that `error` carries."""
    time.sleep(max(delay, *(_retry_after(cause) for cause in _causes(error))))


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("retry-after", "0")
    return min(float(value), MAX_RETRY_AFTER) if value.replace(".", "", 1).isdigit() else 0.0


# Failures in words


@contextmanager
def hub_errors(subject: str, *, revision: str | None = None) -> Iterator[None]:
    """Turn failures of the Hub and of the connection into one UserError about `subject`.

    `subject` is a noun phrase that begins the sentence, such as "The model you/name". Failures of
    the disk become OSErrors; other errors pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = describe_error(error, subject, revision)
        if message is not None:
            raise UserError(message) from error
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and isinstance(error, RuntimeError):  # hf_xet, for instance on a full disk
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def describe_error(error: BaseException, subject: str, revision: str | None = None) -> str | None:
    """Return the message for a failure of the Hub or the connection, None for any other error.

    The client wraps causes in other errors, so the whole chain of causes is searched.
    """
    causes = list(_causes(error))
    status, login = _status(causes), f"{LOGIN_HINT[0].lower()}{LOGIN_HINT[1:]}"

    def is_caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    reason = next((r for cause in causes if (r := getattr(cause, "server_message", None))), "")
    messages = (
        (
            is_caused_by(GatedRepoError),
            f" is gated: accept its conditions on its page at {endpoint()}, then log in with the "
            "same account (`hf auth login` or HF_TOKEN).",
        ),
        (is_caused_by(LocalTokenNotFoundError), f": you are not logged in. {LOGIN_HINT}."),
        (
            is_caused_by(UnicodeEncodeError) and not (get_token() or "").isascii(),
            f": the token that is set here has characters that no token has. {LOGIN_HINT} again.",
        ),
        (
            is_caused_by(OfflineModeIsEnabled),
            " is not in the cache, and HF_HUB_OFFLINE keeps this command off the network: unset it "
            "and run again.",
        ),
        (
            is_caused_by(RevisionNotFoundError),
            f" has no branch, tag or commit {revision or 'of that name'}: give another --revision.",
        ),
        (
            status == 401 and get_token() is not None,
            ": the Hub does not accept the token that is set here, or the repository does not "
            f"exist for it (401). Check the name, or {login} again.",
        ),
        (
            is_caused_by(RepositoryNotFoundError) or status in (401, 404),
            f" does not exist on {endpoint()}, or is private and not yours. Check the name; for a "
            f"private one {login}.",
        ),
        (status == 403, ": your token has no right to do this (403). Use one that may write."),
        (
            status in (409, 412),
            f" was changed by somebody else meanwhile ({status}). Run the command again.",
        ),
        (status == 429, ": the Hub asks for a pause (429). Wait some minutes, then run it again."),
        (
            status is not None and status >= 500,
            f": the Hub has a problem ({status}). Run the same command again later.",
        ),
        (
            status == 400 and reason,
            f": the Hub refuses what was sent (400). It says: {' '.join(reason.split())}",
        ),
        (status in (400, 413, 422), f": the Hub refuses what was sent ({status})."),
        (
            any(_is_transport_error(cause) for cause in causes),
            f": {endpoint()} could not be reached, or the connection broke. Check the network and "
            "run the same command again.",
        ),
        (
            is_caused_by(LocalEntryNotFoundError, EntryNotFoundError),
            " lacks a required file. Check that it is the repository you mean.",
        ),
    )
    return next((subject + message for applies, message in messages if applies), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause or context, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(causes: list[BaseException]) -> int | None:
    """Return the first HTTP status in a chain of errors of the client, None without any.

    hf_xet raises ConnectionError and RuntimeError, and has the status only in their text.
    """
    for cause in causes:
        response = getattr(cause, "response", None) if isinstance(cause, HfHubHTTPError) else None
        if response is not None:
            return response.status_code
        found = re.search(r"HTTP status (?:client|server) error \((\d{3})", str(cause))
        if found and isinstance(cause, (ConnectionError, RuntimeError)):
            return int(found[1])
    return None


def _is_transport_error(error: BaseException) -> bool:
    """Return whether there was no connection, a broken one, or no answer in time.

    By name, because versions of huggingface_hub differ in their HTTP library. A download of hf_xet
    fails with a RuntimeError.
    """
    has_name = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    is_xet_download = isinstance(error, RuntimeError) and "CAS Client Error" in str(error)
    return has_name or is_xet_download or isinstance(error, (ConnectionError, TimeoutError))


# Downloads


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
    kind: str = "model",
) -> Snapshot:
    """Download a revision of a model repository and verify the hash of every file.

    `kind` is the repository's name in error messages. The client accepts a download of the right
    length with wrong bytes, so a file that differs is downloaded once more; UserError if it still
    differs. The commit is requested first, so that a cached copy never replaces a repository that
    is gone or out of reach. With HF_HUB_OFFLINE=1 the cached copy is used, and verified as far as
    the cache contains hashes.
    """
    subject = f"The {kind} {repo_id}"
    options = {"allow_patterns": allow_patterns, "cache_dir": cache_dir}
    with hub_errors(subject, revision=revision):
        if is_offline():
            folder = _cached_folder(repo_id, revision, **options)
        else:
            folder = _downloaded_folder(repo_id, revision, **options)
        if not folder.is_dir():
            raise UserError(
                f"{subject} lacks every required file. Check that it is the repository you mean."
            )
        num_checked, damaged = verify_files(folder, repo_id)
        if damaged:
            download_again(folder, damaged, subject, repo_id)
    return Snapshot(folder, folder.name, num_checked)


def _downloaded_folder(repo_id: str, revision: str | None, **options: Any) -> Path:
    commit = find_commit(repo_id, revision)
    # By name first, so that the cache knows the name when offline. If the name moved since, or the
    # client fell back on an older copy, the commit is downloaded then. The call as a whole is
    # retried, because the client does not repeat a 5xx in the body of a file.
    folder = Path(call(snapshot_download, repo_id, revision=revision, **options))
    if folder.name != commit:
        folder = folder.with_name(commit)
        call(snapshot_download, repo_id, revision=commit, **options)
    return folder


def find_commit(repo_id: str, revision: str | None = None, repo_type: str = "model") -> str:
    """Return the commit of a revision. Raise UserError as `require_commit`."""
    info = call(HfApi().repo_info, repo_id, revision=revision, repo_type=repo_type)
    return require_commit(info.sha, repo_id)


def require_commit(commit: str | None, repo_id: str) -> str:
    """Return the name of a commit. UserError unless it is 40 hex digits: it names folders too."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
        raise UserError(f"{repo_id}: the Hub names {commit!r:.60} as its commit, which is none.")
    return commit


def _cached_folder(repo_id: str, revision: str | None, **options: Any) -> Path:
    try:
        path = snapshot_download(repo_id, revision=revision, local_files_only=True, **options)
    except LocalEntryNotFoundError as error:
        raise OfflineModeIsEnabled(str(error)) from error
    return Path(path)


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
    path, hashes = folder.parent.parent / "trees" / f"{folder.name}.json", {}
    if path.exists():
        listing = parse_json(_Listing, read_json(path, LISTING_LIMIT), str(path))
        hashes = {name: file.lfs_sha256 or file.blob_id for name, file in listing.files.items()}
    links = (path for path in folder.rglob("*") if path.is_symlink())
    return hashes | {link.relative_to(folder).as_posix(): link.readlink().name for link in links}


# Accounts and write access


@dataclass(frozen=True)
class Account:
    """The owner of the token: `name`, and the organizations with the role in each.

    `writes_to` holds the owners and repositories that a fine-grained token may write to; None for a
    token with all rights of its owner.
    """

    name: str
    organizations: dict[str, str | None]
    can_write: bool
    writes_to: frozenset[str] | None = None


def whoami() -> Account:
    """Return the owner of the token. UserError when there is none or the Hub does not accept it."""
    if get_token() is None:
        raise UserError(f"The Hub needs an account for this. {LOGIN_HINT}.")
    with hub_errors("Your account"):
        try:
            answer = call(HfApi().whoami)
        except Exception as error:
            if _status(list(_causes(error))) == 401:
                raise UserError(
                    f"The Hub does not accept the token that is set here (401). {LOGIN_HINT} again."
                ) from error
            raise
    token = answer.get("auth", {}).get("accessToken") or {}
    return Account(
        answer["name"],
        {org["name"]: org.get("roleInOrg") for org in answer.get("orgs", [])},
        can_write=token.get("role") != "read",
        writes_to=_fine_grained_scope(token),
    )


def _fine_grained_scope(token: dict[str, Any]) -> frozenset[str] | None:
    """Return the owners and repositories of a fine-grained token; None for other tokens."""
    rights = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(rights, dict):
        return None
    return frozenset(
        str(scope.get("entity", {}).get("name"))
        for scope in rights.get("scoped", [])
        if "repo.write" in scope.get("permissions", [])
    )


def require_write_access(
    repo_id: str | None, default_name: str, *, private: bool = False, create_pr: bool = False
) -> str:
    """Return the full id of the model repository to write to, once that is known to be allowed.

    Nothing is created or sent. Raise UserError for: no token, a wrong or read-only one, a malformed
    id, no write access, a name that a dataset or Space of the same owner has, and with `private` a
    public repository. With `create_pr` it must exist, whoever owns it.
    """
    account = whoami()
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{account.name}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).partition(" Use `repo_type`")[0]
        raise UsageError(f"{repo_id!r} is not a repository id: {reason}") from None
    settings = f"{endpoint()}/settings/tokens"
    if not account.can_write:
        raise UserError(
            f"The token of {account.name} may only read. Create one that may write at {settings}, "
            "then log in with it (`hf auth login` or HF_TOKEN)."
        )
    with hub_errors(f"The repository {repo_id}"):
        info = find_model_info(repo_id)
        if create_pr and info is None:
            raise UserError(
                f"{repo_id} does not exist, so nothing can be proposed to it. Check the name, or "
                "leave --create_pr out."
            )
        if not create_pr and not _may_write(account, repo_id, exists=info is not None):
            owner, name = repo_id.split("/")
            other = f", or the name {account.name}/{name}" if owner != account.name else ""
            raise UserError(
                f"{account.name} may not write to {repo_id} with this token. Use one with that "
                f"right ({settings}){other}."
            )
    if private and info is not None and not info.private:
        raise UserError(
            f"{repo_id} exists and is public, which --private does not change. Nothing was sent. "
            "Make it private on its page, or give another name."
        )
    return repo_id


def _may_write(account: Account, repo_id: str, exists: bool) -> bool:
    """Return whether the token may write to a model repository, or create it.

    Raise UserError when a new one would have the name of a dataset or Space.
    """
    if exists:
        try:
            call(HfApi().auth_check, repo_id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code != 403:
                raise
            return False
        return True
    for kind in ("dataset", "space"):
        if call(HfApi().repo_exists, repo_id, repo_type=kind):
            raise UserError(f"{repo_id} is a {kind} already. Choose another name.")
    owner = repo_id.split("/")[0]
    is_owner = owner == account.name or account.organizations.get(owner, "read") != "read"
    return is_owner and (account.writes_to is None or bool({owner, repo_id} & account.writes_to))


def find_model_info(repo_id: str) -> ModelInfo | None:
    """Return a model repository as this account sees it; None when it does not see any."""
    try:
        return call(HfApi().model_info, repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None
