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
    ModelInfo,
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

from ddpm.errors import UsageError, UserError

LOGIN_HINT = "Log in with `hf auth login`, or set HF_TOKEN"
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)
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
    for wait in (*RETRY_DELAYS, None):
        try:
            get_session().timeout = TIMEOUT
            return function(*args, **kwargs)
        except Exception as error:
            if wait is None or not is_transient(error):
                raise
            sleep_before_retry(error, wait)
    raise AssertionError("unreachable")


def is_transient(error: BaseException) -> bool:
    """Whether the same call may succeed later: 429, 5xx, no connection, none in time."""
    chain = list(_chain(error))
    if any(isinstance(link, OfflineModeIsEnabled) for link in chain):
        return False
    status = _status(chain)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(_is_transport(link) for link in chain)


def sleep_before_retry(error: BaseException, wait: float) -> None:
    """Sleep `wait` seconds, or as long as the Hub asked for in the answer that `error` carries."""
    time.sleep(max(wait, *(_retry_after(link) for link in _chain(error))))


@contextmanager
def hub_errors(thing: str, *, revision: str | None = None) -> Iterator[None]:
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
        sentence = describe_error(error, thing, revision)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def describe_error(error: BaseException, thing: str, revision: str | None = None) -> str | None:
    """The sentence for `error`, or None when it did not come from the Hub or the way to it."""
    chain = list(_chain(error))
    for kind, sentence in (
        (
            GatedRepoError,
            f"{thing} is gated: accept its conditions on its page at {endpoint()}, "
            "then log in with the same account (`hf auth login` or HF_TOKEN).",
        ),
        (LocalTokenNotFoundError, f"{thing}: no account is known here. {LOGIN_HINT}."),
        (
            OfflineModeIsEnabled,
            f"{thing} is not in the cache, and HF_HUB_OFFLINE keeps this "
            "command off the network: unset it and run again.",
        ),
        (
            RevisionNotFoundError,
            f"{thing} has no branch, tag or commit "
            f"{revision or 'of that name'}: give another --revision.",
        ),
    ):
        if any(isinstance(link, kind) for link in chain):
            return sentence
    status = _status(chain)
    missing = any(isinstance(link, RepositoryNotFoundError) for link in chain)
    if status == 401 and get_token() is not None:
        return (
            f"{thing}: the Hub does not accept the token that is set here, or the repository is "
            f"not there for it (401). Check the name, or {LOGIN_HINT[0].lower()}{LOGIN_HINT[1:]} anew."
        )
    if missing or status == 401:
        return (
            f"{thing} does not exist on {endpoint()}, or is private and not yours. "
            f"Check the name; for a private one {LOGIN_HINT[0].lower()}{LOGIN_HINT[1:]}."
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


def download_snapshot(
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
    with hub_errors(thing, revision=revision):
        if constants.HF_HUB_OFFLINE:
            try:
                folder = Path(
                    snapshot_download(
                        **where,
                        revision=revision,
                        allow_patterns=allow_patterns,
                        local_files_only=True,
                    )
                )
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
            call(
                hf_hub_download,
                **where,
                revision=commit,
                filename=mismatch["path"],
                force_download=True,
            )
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


def is_offline() -> bool:
    """Whether the user keeps the clients off the network (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE) or os.environ.get("HF_HUB_OFFLINE") == "1"


# Who am I, and may I write there: asked before anything is made or sent.
#
# The token itself is huggingface_hub's business, as in the room hub.


@dataclass(frozen=True)
class Account:
    """Who the token belongs to: `name`, and the organisations with the role held in each.

    `writes_to`: the only owners and repositories that a fine-grained token may write to; None for
    a token that may write wherever its owner may.
    """

    name: str
    organisations: dict[str, str | None]
    can_write: bool
    writes_to: frozenset[str] | None = None


def whoami() -> Account:
    """Who the token belongs to. UserError when there is none or the Hub does not know it."""
    if get_token() is None:
        raise UserError(f"The Hub needs to know you before it takes a model. {LOGIN_HINT}.")
    with hub_errors("Your account"):
        try:
            answer = call(HfApi().whoami)
        except Exception as error:
            if status_of(error) == 401:
                raise UserError(
                    f"The Hub does not accept the token that is set here (401). {LOGIN_HINT} anew."
                ) from error
            raise
    token = answer.get("auth", {}).get("accessToken", {}) or {}
    organisations = {org["name"]: org.get("roleInOrg") for org in answer.get("orgs", [])}
    return Account(
        answer["name"],
        organisations,
        can_write=token.get("role") != "read",
        writes_to=_fine_grained(token),
    )


def require_write_access(
    repo_id: str | None, default_name: str, *, private: bool = False, create_pr: bool = False
) -> str:
    """The full id of the model repository to write to, after asking whether that is allowed.

    Nothing is created or sent. UserError for: no token, a wrong or read-only one, a malformed id,
    somebody else's namespace, a name that a dataset or Space of the same owner has, and with
    `private` a repository that is public. With `create_pr` it must exist, whoever owns it.
    """
    me = whoami()
    repo_id = repo_id or default_name
    if "/" not in repo_id:
        repo_id = f"{me.name}/{repo_id}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = str(error).partition(" Use `repo_type`")[0]
        raise UsageError(f"{repo_id!r} is no repository id: {reason}") from None
    settings = f"{endpoint()}/settings/tokens"
    if not me.can_write:
        raise UserError(
            f"The token of {me.name} may only read. Make one that may write at {settings}, then "
            "log in with it (`hf auth login` or HF_TOKEN)."
        )
    with hub_errors(f"The repository {repo_id}"):
        info = find_model_info(repo_id)
        if info is None:
            for kind in ("dataset", "space"):
                if call(HfApi().repo_exists, repo_id, repo_type=kind):
                    raise UserError(f"{repo_id} is a {kind} already. Choose another name.")
    if create_pr:
        if info is None:
            raise UserError(
                f"{repo_id} does not exist, so nothing can be proposed to it. Check "
                "the name, or leave --create_pr out."
            )
        return repo_id
    _require_owner(me, repo_id, settings)
    if info is not None:
        if private and not info.private:
            raise UserError(
                f"{repo_id} exists and is public, which --private does not change. Nothing was "
                "sent. Make it private on its page, or give another name."
            )
        with hub_errors(f"The repository {repo_id}"):
            call(HfApi().auth_check, repo_id, write=True)
    return repo_id


def find_model_info(repo_id: str) -> ModelInfo | None:
    """The model repository as this account sees it; None when it sees none."""
    try:
        return call(HfApi().model_info, repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return None


def _require_owner(me: Account, repo_id: str, settings: str) -> None:
    owner, name = repo_id.split("/")
    if owner != me.name and me.organisations.get(owner, "no member") in ("no member", "read"):
        raise UserError(
            f"{me.name} may not write to {owner}. "
            f"Use {me.name}/{name}, or ask an admin of {owner} for a writing role."
        )
    if me.writes_to is not None and not {owner, repo_id} & me.writes_to:
        raise UserError(
            f"The fine-grained token of {me.name} may not write to {owner}. Give it the right to "
            f"write to repositories of {owner} at {settings}, or use another token."
        )


def _fine_grained(token: dict[str, Any]) -> frozenset[str] | None:
    """Owners and repositories that a fine-grained token may write to; None for other tokens."""
    rights = token.get("fineGrained")
    if token.get("role") != "fineGrained" or not isinstance(rights, dict):
        return None
    return frozenset(
        str(scope.get("entity", {}).get("name"))
        for scope in rights.get("scoped", [])
        if "repo.write" in scope.get("permissions", [])
    )
