"""Requests, responses, errors, and the table of routes.

A route is a function marked with `@route("GET", "/api/{kind}/{repo}/refs")`. It is called with the
Hub, the request and the named parts of the path, already percent-decoded, and returns a Response or
raises HubError, which becomes the JSON and the `X-Error-*` headers that the clients read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import unquote

if TYPE_CHECKING:
    from tests.hub.accounts import Login

CHUNK = 1 << 20


class HubError(Exception):
    """An error response. `code` is what clients map to exceptions (RepoNotFound, ...)."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra

    def response(self) -> Response:
        headers = {"X-Error-Message": self.message.replace("\n", " ")}
        if self.code:
            headers["X-Error-Code"] = self.code
        return Response.json({"error": self.message, **self.extra}, self.status, headers)


@dataclass(kw_only=True)
class Request:
    """A request. `raw_path` is still percent-encoded; `query` keeps repeated parameters."""

    method: str
    raw_path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    content: BinaryIO
    login: Login | None = None

    @property
    def path(self) -> str:
        return unquote(self.raw_path)

    def body(self) -> bytes:
        self.content.seek(0)
        return self.content.read()

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body() or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from None
        if not isinstance(value, dict):
            raise HubError(400, "The body is not a JSON object")
        return value

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1] in ("1", "true", "True")


@dataclass
class Response:
    """A response: bytes, or the `span` (first byte, one past the last) of a file on disk."""

    status: int = 200
    content: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    span: tuple[int, int] = (0, 0)

    @classmethod
    def json(
        cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> Response:
        content = json.dumps(value, default=str).encode()
        return cls(status, content, {"Content-Type": "application/json", **(headers or {})})

    @property
    def length(self) -> int:
        return len(self.content) if self.file is None else self.span[1] - self.span[0]

    def chunks(self) -> Iterator[bytes]:
        if self.file is None:
            yield self.content
            return
        left = self.length
        with self.file.open("rb") as source:
            source.seek(self.span[0])
            while left and (chunk := source.read(min(CHUNK, left))):
                left -= len(chunk)
                yield chunk


Handler = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []
PARTS = {
    "kind": "models|datasets|spaces",
    "prefix": "datasets/|spaces/|",
    "repo": "[^/]+/[^/]+",
    "revision": "refs/(?:pr|convert)/[^/]+|[^/]+",
    "path": ".+",
    "number": "[0-9]+",
    "sha256": "[0-9a-f]{64}",
    "hash": "[0-9a-f]{64}",
}


def route(method: str, template: str) -> Callable[[Handler], Handler]:
    """Register a function. A `{name}` without a pattern in PARTS is one path segment."""
    pattern = re.sub(
        r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PARTS.get(part[1], '[^/]+')})", template
    )

    def register(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return register


def dispatch(hub: Any, request: Request) -> Response:
    """Find the function for the request and call it; an unknown path is a 404 in JSON."""
    method = "GET" if request.method == "HEAD" else request.method
    other_methods = False
    for known_method, pattern, handler in ROUTES:
        match = pattern.fullmatch(request.raw_path)
        if match and known_method == method:
            parts = {name: unquote(part) for name, part in match.groupdict().items()}
            return handler(hub, request, **parts)
        other_methods = other_methods or match is not None
    if other_methods:
        raise HubError(405, f"{request.method} is not allowed at {request.path}")
    raise HubError(404, "Sorry, we can't find the page you are looking for.")
