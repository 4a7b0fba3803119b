"""The Hub client: how it is made, retries, commits, failures in words.

Everything that talks to the Hub does so inside `hub_errors(...)`, which turns failures into
UserErrors. Tokens come from HF_TOKEN or `hf auth login`; huggingface_hub reads them, and they are
never read, stored or printed here.
"""

import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    constants,
    set_client_factory,
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
from huggingface_hub.utils._http import default_client_factory

from ddpm.errors import UsageError, UserError, printable

LOGIN_HINT = "Log in with `hf auth login`, or set HF_TOKEN"
RETRY_DELAYS = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the tries of a call."""
MAX_RETRY_AFTER = 60.0
"""Longest time in seconds to wait because the Hub asks for it."""
TIMEOUT = 120.0
"""Seconds of silence after which a call fails; the client's default is to wait forever."""

PROXY_VARIABLES = ("http_proxy", "https_proxy", "all_proxy")

MAX_NAMES = 10
"""Most names of branches and tags that a message lists."""

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
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in _causes(error)):
        return False
    status = http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return any(_is_transport_error(cause) for cause in _causes(error))


def sleep_before_retry(error: BaseException, delay: float) -> None:
    """Sleep for `delay` seconds, or for the Retry-After of the response that `error` carries."""
    time.sleep(max(delay, *(_retry_after(cause) for cause in _causes(error))))


def _retry_after(error: BaseException) -> float:
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    value = headers.get("retry-after", "0")
    return min(float(value), MAX_RETRY_AFTER) if value.replace(".", "", 1).isdigit() else 0.0


def find_commit(repo_id: str, revision: str | None = None, repo_type: str = "model") -> str:
    """Return the commit of a revision. Raise UserError as `require_commit`."""
    info = call(HfApi().repo_info, repo_id, revision=revision, repo_type=repo_type)
    return require_commit(info.sha, repo_id)


def require_commit(commit: str | None, repo_id: str) -> str:
    """Return the name of a commit. UserError unless it is 40 hex digits: it names folders too."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit or ""):
        raise UserError(f"{repo_id}: the Hub names {commit!r:.60} as its commit, which is none.")
    return commit


# Failures in words


@dataclass(frozen=True)
class Repository:
    """A revision of a repository on the Hub that is read; as text, what begins a sentence about it.

    `kind` says what it is for, if that is more than its type: "training state".
    """

    repo_id: str
    repo_type: str = "model"
    revision: str | None = None
    kind: str | None = None

    def __str__(self) -> str:
        return f"The {self.kind or self.repo_type} {self.repo_id}"

    @property
    def download_command(self) -> str:
        """The command that gets all of it into the cache."""
        command = ["hf", "download", self.repo_id]
        command += [] if self.repo_type == "model" else ["--repo-type", self.repo_type]
        return shlex.join(command + (["--revision", self.revision] if self.revision else []))


@contextmanager
def hub_errors(subject: str | Repository) -> Iterator[None]:
    """Turn failures of the Hub and of the connection into one UserError about `subject`.

    A text is a noun phrase that begins the sentence, such as "Your account". Failures of the disk
    become OSErrors; other errors pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        message = describe_error(error, subject)
        if message is not None:
            raise UserError(message + _what_exists(error, subject)) from error
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found and isinstance(error, RuntimeError):  # hf_xet, for instance on a full disk
            raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def describe_error(error: BaseException, subject: str | Repository) -> str | None:
    """Return the message for a failure of the Hub or the connection, None for any other error.

    The client wraps causes in other errors, so the whole chain of causes is searched.
    """
    causes = list(_causes(error))
    status, login = http_status(error), f"{LOGIN_HINT[0].lower()}{LOGIN_HINT[1:]}"
    read = subject if isinstance(subject, Repository) else None

    def is_caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    is_unreachable = any(_is_transport_error(cause) for cause in causes)
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
            is_caused_by(OfflineModeIsEnabled) or (is_offline() and is_unreachable),
            " is not in the cache, or not all of it, and HF_HUB_OFFLINE keeps this command off the "
            "network: unset it and run again"
            f"{f', or first run `{read.download_command}`' if read else ''}.",
        ),
        (
            is_caused_by(RevisionNotFoundError),
            f" has no branch, tag or commit {read and read.revision or 'of that name'}: give "
            "another revision.",
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
            is_unreachable,
            f": {endpoint()} could not be reached, or the connection broke. Check the network and "
            "run the same command again.",
        ),
        (
            is_caused_by(LocalEntryNotFoundError, EntryNotFoundError),
            " lacks a required file. Check that it is the repository you mean.",
        ),
    )
    return next((f"{subject}{message}" for applies, message in messages if applies), None)


def _what_exists(error: Exception, subject: str | Repository) -> str:
    """Return a sentence on what the Hub has in place of a missing revision or repository."""
    if not isinstance(subject, Repository) or isinstance(error, GatedRepoError):
        return ""
    repo_id, repo_type = subject.repo_id, subject.repo_type
    try:
        if isinstance(error, RevisionNotFoundError):
            refs = HfApi().list_repo_refs(repo_id, repo_type=repo_type)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            return f" It has {', '.join(names[:MAX_NAMES])}{more}."
        if isinstance(error, RepositoryNotFoundError):
            for other in ("model", "dataset", "space"):
                if other != repo_type and HfApi().repo_exists(repo_id, repo_type=other):
                    return f" There is a {other} of that name; give a {repo_type}."
    except Exception:  # the hint is left out: the error that it belongs to is reported
        pass
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, its cause or context, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def http_status(error: BaseException) -> int | None:
    """Return the first HTTP status in the chain of causes of an error, None without any.

    hf_xet raises ConnectionError and RuntimeError, and has the status only in their text.
    """
    for cause in _causes(error):
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
    fails with a RuntimeError, and so does a request while another thread, after a lost connection,
    closes the client that all threads share.
    """
    has_name = any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
    texts = ("CAS Client Error", "client has been closed")
    is_named = isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    return has_name or is_named or isinstance(error, (ConnectionError, TimeoutError))
