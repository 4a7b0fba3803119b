"""The HTTP side: sockets, keep-alive, bodies in and out, the faults' effects, the request log."""

from __future__ import annotations

import socket
import socketserver
import struct
import tempfile
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import api, changes, transfers, xet  # noqa: F401  they register routes
from tests.hub.faults import Fault, cut_in_half, flip_middle_byte
from tests.hub.store import Moved
from tests.hub.wire import CHUNK, HubError, Request, Response, dispatch

if TYPE_CHECKING:
    from tests.hub.hub import Hub


@dataclass(frozen=True)
class RequestRecord:
    """One line of the log. It never holds a token, nor the signature of a link.

    path: percent-decoded, without the query.
    status: as sent; None when the connection was dropped without an answer.
    user: whose token came with it; None without a token or with an unknown one.
    authorized: whether an Authorization header came at all.
    sent: bytes of the body.
    """

    method: str
    path: str
    status: int | None
    user_agent: str
    authorized: bool
    user: str | None
    sent: int = 0


class Listener(socketserver.ThreadingTCPServer):
    """One listening port of a Hub, served by a thread; every connection has its own thread."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: Hub, port: int, host: str = "127.0.0.1") -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        super().__init__(("127.0.0.1", port), Connection)
        self.url = f"http://{host}:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that hang up; an error in a route is a response 500."""

    def stop(self) -> None:
        """Stop listening, and close the connections that clients keep alive."""
        self.shutdown()
        self.server_close()
        with self._open_lock:
            for connection in self._open:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue  # the other side was first


class Connection(BaseHTTPRequestHandler):
    """The requests of one connection, one after the other."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the Hub keeps its own log."""

    def _serve(self) -> None:
        hub, log = self.server.hub, self.server.hub.log
        target = urlsplit(self.path)
        faults = hub.faults.match(self.command, unquote(target.path))
        if any(fault.kind == "reset" for fault in faults):
            self._reset(unquote(target.path))
            return
        with tempfile.SpooledTemporaryFile(max_size=8 * CHUNK) as content:
            # The whole body is read first: the next request on this connection begins behind it.
            for chunk in self._body():
                content.write(chunk)
            request = Request(
                method=self.command,
                raw_path=target.path,
                query=parse_qs(target.query, keep_blank_values=True),
                headers=self.headers,
                content=content,
            )
            if request.path.startswith("/-/"):
                self._send(hub.administer(request))
                return
            if hub.received is not None:
                hub.received.append(self.path.encode() + b"\n" + request.body())
            response = self._respond(request, faults)
            # Logged before it is sent: who has the answer also finds it in the log.
            log.append(
                RequestRecord(
                    request.method,
                    request.path,
                    response.status if response else None,
                    self.headers.get("User-Agent", ""),
                    "Authorization" in self.headers,
                    request.login.user if request.login else None,
                    response.length if response and self.command != "HEAD" else 0,
                )
            )
            if response is None:
                self.close_connection = True
            else:
                self._send(response, {fault.kind for fault in faults})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _serve  # noqa: N815

    def _reset(self, path: str) -> None:
        """Read half of what was announced, then close so that the client gets a reset."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
        agent = self.headers.get("User-Agent", "")
        self.server.hub.log.append(
            RequestRecord(self.command, path, None, agent, "Authorization" in self.headers, None)
        )
        at_once = struct.pack("ii", 1, 0)  # linger for no time: RST instead of FIN
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        self.connection.close()
        self.close_connection = True

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            chunk = self.rfile.read(min(CHUNK, left))
            if not chunk:
                raise ConnectionError("the client hung up in the middle of a body")
            left -= len(chunk)
            yield chunk

    def _respond(self, request: Request, faults: list[Fault]) -> Response | None:
        """Return the response after all faults; None is a dropped connection."""
        hub = self.server.hub
        try:
            if not request.path.startswith("/xet/"):  # has tokens of its own
                request.login = hub.store.accounts.login(self.headers.get("Authorization"))
        except HubError as error:
            return error.response()
        dropped, replaced = self._apply(faults, "before")
        if dropped or replaced:
            return replaced
        if any(fault.kind == "corrupt_upload" for fault in faults):
            _damage(request.content)
        try:
            response = dispatch(hub, request)
        except HubError as error:
            response = error.response()
        except Moved as moved:
            location = self.path.replace(moved.old, moved.new, 1)
            response = Response(307, b"", {"Location": f"{hub.url}{location}"})
        except Exception as error:
            hub.errors.append(traceback.format_exc())
            response = HubError(500, f"The test Hub failed: {error!r}").response()
        dropped, replaced = self._apply(faults, "after")
        return None if dropped else replaced or response

    def _apply(self, faults: list[Fault], when: str) -> tuple[bool, Response | None]:
        """Wait for delays; return whether to drop the connection, and a replacing response."""
        replaced = None
        for fault in faults:
            if fault.when != when:
                continue
            if fault.kind == "delay":
                self.server.hub.stopping.wait(fault.seconds)
            elif fault.kind == "drop":
                return True, None
            elif fault.kind == "status" and replaced is None:
                headers = {"Content-Type": "application/json", **fault.headers}
                replaced = Response(fault.status, fault.body.encode(), headers)
        return False, replaced

    def _send(self, response: Response, kinds: set[str] | frozenset[str] = frozenset()) -> None:
        self.send_response_only(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value.encode("utf-8", "replace").decode("latin-1"))
        self.send_header("Content-Length", str(response.length))
        self.end_headers()
        if self.command == "HEAD":
            return
        chunks = response.chunks()
        if "corrupt" in kinds:
            chunks = flip_middle_byte(chunks, response.length)
        if "truncate" in kinds:
            chunks = cut_in_half(chunks, response.length)
            self.close_connection = True
        for chunk in chunks:
            self.wfile.write(chunk)


def _damage(content: BinaryIO) -> None:
    """Invert one byte in the middle."""
    middle = content.seek(0, 2) // 2
    content.seek(middle)
    byte = content.read(1)
    content.seek(middle)
    content.write(bytes(value ^ 0xFF for value in byte))
