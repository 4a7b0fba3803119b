"""Files as a stranger may write them, and what reading one may do: a sentence, or success.

`watched` holds a block to that: files are read only below a folder and where Python's own modules
are, written only below the folder, memory is bounded, and neither a process nor a connection is
started.
"""

import os
import resource
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from ddpm.errors import UserError

ROOT = Path(__file__).parent.parent
MEMORY = 2**32
"""Bytes of address space that a block may add: far more than a test needs, far less than a bomb."""
READABLE = (
    ROOT,
    sys.prefix,
    sys.base_prefix,
    sysconfig.get_path("stdlib"),
    "/proc",
    "/sys",
    "/etc",
)
FAST = settings(
    max_examples=25,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SLOW = settings(FAST, max_examples=1000)

CHARACTERS = (
    "aZ\u01c5\u02b0手\u0301\u093e\u20dd0\u0663\u2167²_-()«».:/\\~{}[]\"'+$^©🐦 \xa0\u2028\u2029"
    "\0\t\n\r\x1b\x7f\x9b\u202e\u200b\ufeff\ue000\uffff"
)
"""One of each category of Unicode and more. `st.text()` first lists all of Unicode, in seconds."""
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 7, 1e18, 10**9, 10**18, 2**63, 10**400, -(10**10), 0.5, 1e-300, 1.0]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.integers(),
    st.floats(),
    st.sampled_from(["", "someone/model", "/etc/passwd", "../..", "\x1b[2J\n", "Ä" * 5000]),
    st.text(CHARACTERS, max_size=8),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(CHARACTERS, max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b"\xff\xfe", b'"\\ud800"']),
)
"""Bytes that are mostly no JSON."""

_opened: list[tuple[str, bool]] | None = None
_forbidden: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is None:
        return
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        mode, flags = arguments[1] or "", arguments[2] or 0
        writes = any(c in mode for c in "wax+") or bool(flags & (os.O_WRONLY | os.O_RDWR))
        _opened.append((os.path.realpath(os.fsdecode(arguments[0])), writes))
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        _forbidden.append(event)


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fail if the block leaves its bounds, or raises anything but a UserError of one sentence."""
    global _opened
    _opened = []
    _forbidden.clear()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    try:
        yield
    except UserError as error:
        assert str(error).strip(), "an error without a text"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        opened, _opened = _opened, None
    inside = str(folder.resolve())
    outside = [
        (path, writes)
        for path, writes in opened
        if not path.startswith((inside, "/dev/null"))
        and (writes or not path.startswith(tuple(map(str, READABLE))))
        and "__pycache__" not in path
    ]
    assert not outside, outside
    assert not _forbidden, _forbidden
