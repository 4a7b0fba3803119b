"""Faults that a test injects into the server.

    hub.inject(Fault("status", method="POST", path=r"/commit/", status=503, when="after"))

lets one commit happen and responds 503. The same over HTTP, to a running server:

    curl -X POST $HF_ENDPOINT/-/faults -d '{"kind": "drop", "path": "/resolve/", "times": null}'
    curl -X DELETE $HF_ENDPOINT/-/faults
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal, get_args

LARGE_UPLOADS = "^/upload/|^/xet/.*/xorbs/"
"""The paths that large files are sent to, by git-LFS or Xet."""
LARGE_DOWNLOADS = "^/cdn/"
"""The paths that they come from."""

Kind = Literal["status", "delay", "drop", "reset", "truncate", "corrupt", "corrupt_upload"]


@dataclass
class Fault:
    """A fault.

    kind: "status" answers `status`, `headers` and `body`; "delay" waits `seconds`; "drop" closes
        the connection without an answer; "reset" reads half of the request body and then
        resets the connection, as a failing proxy does; "truncate" announces the complete body,
        sends half of it and closes; "corrupt" flips one byte of the response body;
        "corrupt_upload" flips one byte of the request body.
    method, path: regular expressions; `method` must match whole, `path` is searched in the
        percent-decoded path.
    skip: let this many matching requests pass first.
    times: then apply to this many; None means to all.
    when: "before" the request has any effect, or "after" it, when only the response is lost.
        Used by "status", "delay" and "drop".
    """

    kind: Kind
    _: KW_ONLY
    method: str = ".*"
    path: str = ""
    skip: int = 0
    times: int | None = 1
    when: Literal["before", "after"] = "before"
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    body: str = '{"error": "injected fault"}'
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown kind of fault {self.kind!r}; known: {get_args(Kind)}")
        if self.when not in ("before", "after"):
            raise ValueError(f"when is 'before' or 'after', not {self.when!r}")
        re.compile(self.method)
        re.compile(self.path)

    def matches(self, method: str, path: str) -> bool:
        return bool(re.fullmatch(self.method, method) and re.search(self.path, path))


class Faults:
    """The injected faults of a server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []
        self._seen: list[int] = []  # matching requests so far, one count per waiting fault

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._waiting.append(fault)
            self._seen.append(0)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()
            self._seen.clear()

    def waiting(self) -> list[dict[str, Any]]:
        with self._lock:
            return [
                {**vars(fault), "seen": seen}
                for fault, seen in zip(self._waiting, self._seen, strict=True)
            ]

    def match(self, method: str, path: str) -> list[Fault]:
        """Return the faults that apply to a request, and count it for each that matches it."""
        matched = []
        with self._lock:
            for index, fault in enumerate(self._waiting):
                if fault.matches(method, path):
                    turn = self._seen[index] - fault.skip
                    self._seen[index] += 1
                    if turn >= 0 and (fault.times is None or turn < fault.times):
                        matched.append(fault)
        return matched


def flip_middle_byte(chunks: Iterable[bytes], length: int) -> Iterator[bytes]:
    """Yield the chunks with the middle one of `length` bytes inverted."""
    position = length // 2
    for chunk in chunks:
        if 0 <= position < len(chunk):
            chunk = chunk[:position] + bytes([chunk[position] ^ 0xFF]) + chunk[position + 1 :]
        position -= len(chunk)
        yield chunk


def cut_in_half(chunks: Iterable[bytes], length: int) -> Iterator[bytes]:
    """Yield the first half of the bytes."""
    left = length // 2
    for chunk in chunks:
        if left <= 0:
            return
        yield chunk[:left]
        left -= len(chunk)
