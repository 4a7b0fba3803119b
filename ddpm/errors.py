"""Errors that users can fix, foreign text made printable, and how a script prints and exits."""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

LACKING_ERRNOS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What a file system answers that cannot do something, such as lock a file (NFS, Lustre)."""
DISK_ERRNOS = (
    *LACKING_ERRNOS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
MAX_LENGTH = 4000
"""Longest text in characters that `printable` returns whole."""
URL_LOGIN = re.compile(r"(?<=://)[^/\s\"'<>]*@")
"""A user name, a password or a token in front of the host of an address."""
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{30}|api_org_[A-Za-z0-9]{30}"  # Hugging Face
    r"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50}|glpat-[\w-]{20}"  # GitHub, GitLab
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}"  # AWS, Google
    r"|sk-[A-Za-z0-9]{32}|sk-[a-z0-9]{2,10}-[\w-]{40}"  # OpenAI, Anthropic and others
    r"|wandb_v\d_\w{30}|xox[a-z]-[\w-]{20}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{60}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10}"  # JSON Web Token
    r")[\w-]*|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    re.ASCII,
)
"""Keys of well-known services, which begin in a way of their own. An old W&B key is 40 hex digits
like a commit, so the two look the same."""
HUB_ADDRESS = re.compile(
    r"https?://([^/@?#\[\]\s]+@)?(\[[\da-fA-F:.]+\]|[\w.-]+)(:\d{1,5})?(/[^@?#\s]*)?"
)
"""An address with a host, and perhaps a login before it, a port and a path after it."""
ESCAPE_SEQUENCES = re.compile(r"(?:[\n\r]|\x1b\[[0-9;]*[A-HJKm])+")
"""What libraries write to move the cursor and to erase lines, each in a write of its own."""
LAYOUT = re.compile(r"\A\r|\r\Z|[\n\t]|\x1b\[[0-9;]*m")
"""Line breaks, tabs and colors; a progress bar begins or ends with a carriage return."""


def printable(text: object) -> str:
    """Return text of others, such as a file name, on one line that can be printed anywhere.

    Control characters, line breaks, characters that change the direction of text, and others that
    are not visible are written as in a Python string: `\\n`, `\\x1b`. Tokens, and the login in an
    address, become ***. A very long text loses its middle. Other text stays as it is.
    """
    text = str(text)
    if len(text) > MAX_LENGTH:
        text = f"{text[: MAX_LENGTH // 2]} [...] {text[-MAX_LENGTH // 2 :]}"
    return _escape(text)


def _escape(text: str) -> str:
    text = TOKEN.sub("***", URL_LOGIN.sub("***@", text))
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class PrintableStream:
    """A text stream on which text of others cannot act, also when a library prints it.

    It keeps line breaks, colors and progress bars; all other text is escaped as by `printable`.
    So are characters that the encoding of the stream lacks, such as ascii or cp1252.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not ESCAPE_SEQUENCES.fullmatch(text):
            layout = [*LAYOUT.findall(text), ""]
            parts = zip(map(_escape, LAYOUT.split(text)), layout, strict=True)
            text = "".join(part for pair in parts for part in pair)
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class UserError(Exception):
    """An error that the user can fix. The message says what happened, on what, and what to do next.

    `exit_code` is 2 for a wrong command line or setting, 1 otherwise. The message is `printable`.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(printable(message))
        self.exit_code = exit_code


class UsageError(UserError):
    """A UserError about the command line or the settings: exit code 2."""

    def __init__(self, message: str):
        super().__init__(message, exit_code=2)


class Interrupted(Exception):
    """A signal stopped the run after it was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(printable(message))
        self.exit_code = exit_code


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has none.

    After a colon the next line follows, which is then the reason.
    """
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


@contextmanager
def foreign_errors(sentence: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises for a foreign file into a UserError: `sentence`, (the reason).

    Libraries check little of what they read, so every type of error may come. Only calls of a
    library belong inside.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{sentence} ({first_line(error)}). {advice}".rstrip()) from error


def run(main: Callable[[], None]) -> None:
    """Call a script's `main` and exit the process with its exit code.

    The first process of each machine prints a UserError without a traceback, and likewise an
    OSError of a full disk, of a path that cannot be written, or of a file system without locks.
    Other errors are bugs and keep their traceback. All that is printed from here on goes through a
    PrintableStream.
    """
    sys.stdout, sys.stderr = PrintableStream(sys.stdout), PrintableStream(sys.stderr)
    if not sys.stderr.isatty():
        # Without a terminal, no progress bars: the libraries read these at import.
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    prints = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        # Before huggingface_hub, which fails at its import or prints the password
        if not HUB_ADDRESS.fullmatch(os.environ.get("HF_ENDPOINT", "https://huggingface.co")):
            raise UsageError(
                "HF_ENDPOINT is no address. Give one such as https://huggingface.co, with %2F for "
                "a slash and %40 for an @ in a password, or unset it."
            )
        main()
    except Interrupted as stop:
        if prints:
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        # The reader of the output has exited (`| head`). Python flushes stdout at exit, which would
        # raise again, so stdout becomes /dev/null.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (UserError, OSError) as error:
        text = sentence(error)
        if text is None:
            raise
        if prints:
            print(f"error: {text}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        sys.exit(130)


def sentence(error: BaseException) -> str | None:
    """Return what `run` prints about an error that users can fix, None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        where = f"{printable(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}. {_disk_advice(error)}"
    return None


def _disk_advice(error: OSError) -> str:
    if error.errno in LACKING_ERRNOS:
        return (
            "This file system lacks what is needed, such as locks: put the caches on a local disk "
            "(HF_HOME; for data --cache_dir), then run the command again."
        )
    return (
        "Choose another folder (--output_dir; for caches HF_HOME or --cache_dir), or fix this, "
        "then run the command again."
    )
