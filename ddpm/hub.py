"""The Hub: call it with patience, fetch a revision whole; its failures as what, why and what to do.

Everything else that talks to the Hub does so inside `told(...)`, so that each HTTP failure is put
into words in one place. Tokens are huggingface_hub's business: they come from HF_TOKEN or
`hf auth login` and are never read, held or printed here.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_session,
    hf_hub_download,
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
from huggingface_hub.utils import get_token, validate_repo_id

from ddpm.errors import UserError

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"
WAITS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of a call that the client itself does not repeat."""
TIMEOUT = 120.0
"""Seconds that the Hub may be silent in the middle of a call; the client by itself waits for ever.
"""

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Snapshot:
    """A revision on this disk: its folder, its 40-hex commit, and how many files were checked."""

    folder: Path
    commit: str
    num_checked: int


def endpoint() -> str:
    """Address of the Hub in use, without a slash at the end (HF_ENDPOINT)."""
    return HfApi().endpoint.rstrip("/")


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id: owner/name, or a bare name."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not text.startswith((".", "/", "~"))


def call(function: Callable[..., Answer], *args: Any, **kwargs: Any) -> Answer:
    """Call the Hub and try again when that can help: 429 (after Retry-After), 5xx, no connection.

    Only for calls that may safely be made twice.
    """
    for wait in (*WAITS, None):
        try:
            get_session().timeout = TIMEOUT
            return function(*args, **kwargs)
        except Exception as error:
            if wait is None or not is_passing(error):
                raise
            pause(error, wait)
    raise AssertionError("unreachable")


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed later: 429, 5xx, no connection, none in time."""
    chain = list(_chain(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return False
    status = _status(chain)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(_is_transport(link) for link in chain)


def pause(error: BaseException, wait: float) -> None:
    """Sleep `wait` seconds, or as long as the Hub asked for in the answer that `error` carries."""
    time.sleep(max(wait, *(_retry_after(link) for link in _chain(error))))


@contextmanager
def told(thing: str, *, revision: str | None = None) -> Iterator[None]:
    """Turn whatever the clients raise inside into one UserError about `thing`.

    `thing` is a noun phrase that opens the sentence, such as "The model you/name". The clients wrap
    causes in other errors, so the whole chain is searched for the one that says most.
    """
    get_session().timeout = TIMEOUT
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = explain(error, thing, revision)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def explain(error: BaseException, thing: str, revision: str | None = None) -> str | None:
    """The sentence for `error`, or None when it did not come from the Hub or the way to it."""
    chain = list(_chain(error))
    for kind, sentence in (
        (GatedRepoError, f"{thing} is gated: accept its conditions on its page at {endpoint()}, "
                         "then log in with the same account (`hf auth login` or HF_TOKEN)."),
        (LocalTokenNotFoundError, f"{thing}: no account is known here. {LOG_IN}."),
        (OfflineModeIsEnabled, f"{thing} is not in the cache, and HF_HUB_OFFLINE keeps this "
                               "command off the network: unset it and run again."),
        (RevisionNotFoundError, f"{thing} has no branch, tag or commit "
                                f"{revision or 'of that name'}: give another --revision."),
    ):  # fmt: skip
        if any(isinstance(link, kind) for link in chain):
            return sentence
    status = _status(chain)
    missing = any(isinstance(link, RepositoryNotFoundError) for link in chain)
    if status == 401 and get_token() is not None:
        return (
            f"{thing}: the Hub does not accept the token that is set here, or the repository is "
            f"not there for it (401). Check the name, or {LOG_IN[0].lower()}{LOG_IN[1:]} anew."
        )
    if missing or status == 401:
        return (
            f"{thing} does not exist on {endpoint()}, or is private and not yours. "
            f"Check the name; for a private one {LOG_IN[0].lower()}{LOG_IN[1:]}."
        )
    if status is not None and (words := _words(status, thing)):
        said = next((m for link in chain if (m := getattr(link, "server_message", None))), None)
        return f"{words} It says: {' '.join(said.split())}" if said and status == 400 else words
    if any(isinstance(link, (LocalEntryNotFoundError, EntryNotFoundError)) for link in chain) and (
        not any(_is_transport(link) for link in chain)
    ):
        return f"{thing} lacks a file that is needed: is it the repository you mean?"
    if any(_is_transport(link) for link in chain):
        return (
            f"{thing}: {endpoint()} could not be reached, or the connection broke. "
            "Check the network and run the same command again."
        )
    return None


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    allow_patterns: list[str] | None = None,
    cache_dir: str | None = None,
    kind: str = "model",
) -> Snapshot:
    """Download a model revision and check every file against the hash that the Hub holds for it.

    `kind` is what sentences call it. A download of the right length with wrong bytes is accepted by
    the stock client, so a file that does not match is fetched once more; UserError if it is still
    wrong. The commit is asked for first: a cached copy never stands in silently for a repository
    that is gone or out of reach.
    With HF_HUB_OFFLINE=1 the cached copy is used, checked as far as the cache records hashes.
    """
    thing = f"The {kind} {repo_id}"
    where = {"repo_id": repo_id, "cache_dir": cache_dir}
    with told(thing, revision=revision):
        if constants.HF_HUB_OFFLINE:
            try:
                folder = Path(snapshot_download(**where, revision=revision,
                                                allow_patterns=allow_patterns,
                                                local_files_only=True))  # fmt: skip
            except LocalEntryNotFoundError as error:
                raise OfflineModeIsEnabled(str(error)) from error
            checked, wrong = _check_by_cache(folder)
            if wrong:
                raise UserError(
                    f"{thing} is damaged in the cache ({', '.join(wrong)}). "
                    "Unset HF_HUB_OFFLINE and run again to fetch it anew."
                )
            return Snapshot(folder, folder.name, checked)
        commit = call(HfApi().repo_info, repo_id, revision=revision).sha
        # By name first, so that the cache knows the name when off the network; a name that moved
        # since, or an old copy that the client fell back on, is then fetched by commit.
        # Tried again as a whole: the client repeats what breaks off, but no 5xx of a file's body.
        patterns = {"allow_patterns": allow_patterns}
        folder = Path(call(snapshot_download, **where, revision=revision, **patterns))
        if folder.name != commit:
            folder = folder.with_name(commit)
            call(snapshot_download, **where, revision=commit, **patterns)
        if not folder.is_dir():
            raise UserError(f"{thing} lacks every file that is needed: is it the one you mean?")
        verify = {**where, "revision": commit}
        result = call(HfApi().verify_repo_checksums, **verify)
        for mismatch in result.mismatches:
            call(hf_hub_download, **where, revision=commit, filename=mismatch["path"],
                 force_download=True)  # fmt: skip
        if result.mismatches:
            result = call(HfApi().verify_repo_checksums, **verify)
    if result.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in result.mismatches)
        raise UserError(
            f"{thing}: what arrives here is not what the Hub holds ({names}, twice). Nothing was "
            "loaded. A proxy or disk on the way changes files; try another network or HF_HOME."
        )
    return Snapshot(folder, commit, result.checked_count)


def _check_by_cache(folder: Path) -> tuple[int, list[str]]:
    """(files checked, names of wrong ones): the cache names each blob by its sha256 or git sha1."""
    from huggingface_hub.utils.sha import git_hash, sha_fileobj

    checked, wrong = 0, []
    for path in folder.rglob("*"):
        name = path.resolve().name
        if path.is_symlink() and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name):
            with open(path, "rb") as file:
                actual = sha_fileobj(file).hex() if len(name) == 64 else git_hash(file.read())
            checked += 1
            if actual != name:
                wrong.append(path.relative_to(folder).as_posix())
    return checked, wrong


def _words(status: int, thing: str) -> str | None:
    if status == 403:
        return f"{thing}: your token has no right to do this (403). Use one that may write."
    if status == 404:
        return f"{thing} does not exist on {endpoint()}, or is private and not yours."
    if status in (409, 412):
        return f"{thing} was changed by somebody else meanwhile ({status}). Run the command again."
    if status == 429:
        return f"{thing}: the Hub asks for a pause (429). Wait some minutes, then run it again."
    if status >= 500:
        return f"{thing}: the Hub is in trouble ({status}). Run the same command again later."
    if status in (400, 413, 422):
        return f"{thing}: the Hub refuses what was sent ({status})."
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of the Hub's clients carries; None for any other."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    return getattr(response, "status_code", None)


def _status(chain: list[BaseException]) -> int | None:
    return next((code for link in chain if (code := status_of(link)) is not None), None)


def _is_transport(error: BaseException) -> bool:
    """No connection, a broken one, or none in time; whichever HTTP library raised it."""
    named = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    return named or isinstance(error, (ConnectionError, TimeoutError))


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("retry-after", "0") if headers else "0"
    return min(float(value), 60.0) if value.replace(".", "", 1).isdigit() else 0.0


def offline() -> bool:
    """Whether the user keeps the clients off the network (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE") == "1"
