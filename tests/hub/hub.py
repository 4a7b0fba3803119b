"""The interface for tests: start a Hub, fill it, inject faults, inspect it."""

from __future__ import annotations

import dataclasses
import re
import secrets
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tests.hub.accounts import Role
from tests.hub.faults import Fault, Faults
from tests.hub.repository import Repository
from tests.hub.server import Listener, RequestRecord
from tests.hub.store import Store
from tests.hub.wire import HubError, Request, Response

RepoKind = Literal["model", "dataset", "space"]


class Hub:
    """A Hugging Face Hub on 127.0.0.1, served by threads of this process.

        with Hub(tmp_path / "hub") as hub:
            token = hub.add_user("alice")
            subprocess.run(command, env={**os.environ, **hub.env(token, tmp_path / "hf")})

    root: its folder, which a later Hub can open again; None is a temporary folder.
    port: 0 is any free one.
    multipart_size: LFS uploads above this many bytes are sent in parts of this size.
    page_size: entries on one page of a listing.
    """

    def __init__(self, root: Path | str | None = None, *, port: int = 0) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="test-hub-") if root is None else None
        self.root = Path(self._temporary.name if self._temporary else root)
        self.multipart_size = 8 * 1024 * 1024
        self.page_size = 1000
        self.store = Store(self.root)
        self.faults = Faults()
        self.errors: list[str] = []  # tracebacks of errors in the server
        self.received: list[bytes] | None = None  # set to [] to record URL and body of each request
        self.secret = secrets.token_bytes(32)
        self.stopping = threading.Event()
        self._port = port
        self._log: list[RequestRecord] = []
        self._listeners: list[Listener] = []

    def start(self) -> Hub:
        # Some clients tell origins apart by host and port, some by the host's name alone.
        self._listeners = [Listener(self, self._port), Listener(self, 0, "localhost")]
        return self

    def stop(self) -> None:
        self.stopping.set()
        for listener in self._listeners:
            listener.stop()
        if self._temporary:
            self._temporary.cleanup()

    def __enter__(self) -> Hub:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return self._listeners[0].url

    @property
    def cdn_url(self) -> str:
        """Where LFS contents are served from and uploaded to: another origin."""
        return self._listeners[1].url

    def add_user(
        self,
        name: str,
        role: Role = "write",
        *,
        orgs: Iterable[str] | Mapping[str, str] = (),
        writes_to: Iterable[str] = (),
        token: str | None = None,
    ) -> str:
        """Add a user, or another token of a user, and return the token.

        role: what the token may do; a "fineGrained" one writes in the namespaces of `writes_to`.
        orgs: organizations the user may write in; a mapping gives the role in each ("read" may
            only read).
        """
        return self.store.accounts.add(name, role, orgs, writes_to, token)

    def env(self, token: str | None, hf_home: Path | str, *, xet: bool = True) -> dict[str, str]:
        """Return the environment variables that point an unmodified client to this Hub alone.

        xet: False makes clients use git-LFS. Two Hubs must not share `hf_home`, whose caches would
        hide their responses.
        """
        home = Path(hf_home)
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    # Fill and inspect, without a client

    def create_repo(self, kind: RepoKind, repo_id: str, **settings: Any) -> Repository:
        """Create a repository. Settings: visibility="private", gated="manual", sdk="gradio"."""
        return self.store.create(f"{kind}s", repo_id, repo_id.split("/")[0], **settings)

    def repo(self, kind: RepoKind, repo_id: str) -> Repository:
        """Return a repository, with files(), read(), commits(), resolve(), refs, write()."""
        repository = self.store.find(f"{kind}s", repo_id)
        if repository is None:
            raise KeyError(f"there is no {kind} {repo_id}")
        return repository

    def inject(self, fault: Fault) -> None:
        self.faults.add(fault)

    def clear_faults(self) -> None:
        self.faults.clear()

    @property
    def requests(self) -> list[RequestRecord]:
        """The requests answered so far, in order."""
        return list(self._log)

    def clear_requests(self) -> None:
        """Begin a new log; requests that are being answered go to the old one."""
        self._log = []

    def count(self, method: str = ".*", path: str = "") -> int:
        """Count requests; the expressions are matched as those of a Fault."""
        return sum(
            bool(re.fullmatch(method, record.method) and re.search(path, record.path))
            for record in self._log
        )

    @property
    def log(self) -> list[RequestRecord]:
        """The list that a request which arrives now is added to."""
        return self._log

    def administer(self, request: Request) -> Response:
        """Do the same over HTTP: /-/requests (GET, DELETE) and /-/faults (GET, POST, DELETE)."""
        try:
            match request.method, request.path:
                case "GET", "/-/requests":
                    return Response.json([dataclasses.asdict(record) for record in self._log])
                case "DELETE", "/-/requests":
                    self.clear_requests()
                case "GET", "/-/faults":
                    return Response.json(self.faults.waiting())
                case "POST", "/-/faults":
                    self.inject(Fault(**request.json()))
                case "DELETE", "/-/faults":
                    self.clear_faults()
                case _:
                    raise HubError(404, "Known: /-/requests and /-/faults")
        except (TypeError, ValueError, re.error) as error:
            return HubError(400, f"Not a fault: {error}").response()
        except HubError as error:
            return error.response()
        return Response.json({})
