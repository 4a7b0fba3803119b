"""All repositories of a Hub by kind and id, and the permissions to read and write them."""

from __future__ import annotations

import json
import re
import shutil
import threading
from pathlib import Path
from typing import Any

from tests.hub.accounts import Accounts, Login
from tests.hub.objects import LFS_SUFFIXES, write_atomically
from tests.hub.repository import Repository
from tests.hub.wire import HubError

GIT_ATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES
)


class Moved(Exception):
    """The repository has another id now."""

    def __init__(self, old: str, new: str) -> None:
        super().__init__(f"{old} is now {new}")
        self.old, self.new = old, new


class Store:
    """The state of a Hub in the folder `root`, which can be opened again."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.accounts = Accounts(root)
        self.lock = threading.RLock()
        self._moved_path = root / "moved.json"
        self._moved: dict[str, str] = {}
        if self._moved_path.exists():
            self._moved = json.loads(self._moved_path.read_text())
        self._repositories: dict[tuple[str, str], Repository] = {}
        for path in sorted((root / "repos").glob("*/*/*/repo.json")):
            repository = Repository(path.parent)
            self._repositories[repository.kind, repository.id] = repository

    def all(self, kind: str) -> list[Repository]:
        with self.lock:
            return [repo for (its_kind, _), repo in self._repositories.items() if its_kind == kind]

    def find(self, kind: str, repo_id: str) -> Repository | None:
        with self.lock:
            return self._repositories.get((kind, repo_id))

    def create(self, kind: str, repo_id: str, author: str, **settings: Any) -> Repository:
        """Create a repository with the initial commit of the Hub; 409 if it exists."""
        if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]{0,95}", repo_id):
            raise HubError(400, f"Invalid repository name: {repo_id}")
        with self.lock:
            if (kind, repo_id) in self._repositories:
                raise HubError(409, f"You already created this {kind[:-1]} repo")
            folder = self._folder(kind, repo_id)
            shutil.rmtree(folder, ignore_errors=True)  # leftovers of a creation that was killed
            repository = Repository.create(folder, kind, repo_id, **settings)
            first = {".gitattributes": repository.store_regular(GIT_ATTRIBUTES.encode())}
            if kind == "spaces":
                card = f"---\ntitle: {repo_id.split('/')[1]}\nsdk: {settings.get('sdk')}\n"
                card += "colorFrom: red\ncolorTo: blue\napp_file: app.py\npinned: false\n---\n"
                first["README.md"] = repository.store_regular(card.encode())
            commit = repository.add_commit(None, first, "initial commit", "", author)
            repository.add_ref("refs/heads/main", commit.sha)
            self._repositories[kind, repo_id] = repository
            self._forget_move(f"{kind}/{repo_id}")
            return repository

    def delete(self, repository: Repository) -> None:
        with self.lock:
            del self._repositories[repository.kind, repository.id]
            shutil.rmtree(repository.folder)

    def move(self, repository: Repository, new_id: str) -> None:
        """Rename; the old id becomes a redirect."""
        with self.lock:
            old_id, kind = repository.id, repository.kind
            if (kind, new_id) in self._repositories:
                raise HubError(409, f"{new_id} already exists")
            target = self._folder(kind, new_id)
            target.parent.mkdir(parents=True, exist_ok=True)
            with repository.lock:
                repository.folder.rename(target)
                repository.folder = target
                repository.record["id"] = new_id
                repository.save()
            del self._repositories[kind, old_id]
            self._repositories[kind, new_id] = repository
            self._moved[f"{kind}/{old_id}"] = new_id
            self._forget_move(f"{kind}/{new_id}")

    def readable(self, login: Login | None, kind: str, repo_id: str) -> Repository:
        """Return a repository that the login may read; a private one looks like a missing one."""
        direct = self.find(kind, repo_id)
        new_id = self._moved.get(f"{kind}/{repo_id}")
        repository = self.find(kind, new_id) if new_id and not direct else direct
        if repository is None or (
            repository.is_private and not (login and login.belongs_to(repository.namespace))
        ):
            # The Hub responds 401 without a token and 404 with one.
            raise HubError(404 if login else 401, "Repository not found", "RepoNotFound")
        if not direct:
            raise Moved(repo_id, repository.id)
        return repository

    def downloadable(self, login: Login | None, kind: str, repo_id: str) -> Repository:
        """As `readable`, but a gated repository also wants access granted by its owner."""
        repository = self.readable(login, kind, repo_id)
        granted = repository.record["granted"]
        has_access = login and (login.belongs_to(repository.namespace) or login.user in granted)
        if repository.record["gated"] and not has_access:
            message = f"Access to {kind[:-1]} {repo_id} is restricted"
            raise HubError(403 if login else 401, message, "GatedRepo")
        return repository

    def writable(
        self, login: Login | None, kind: str, repo_id: str, *, as_pull_request: bool = False
    ) -> Repository:
        """Return a repository that the login may write to; a pull request needs no membership."""
        repository = self.readable(login, kind, repo_id)
        namespace = login.user if login and as_pull_request else repository.namespace
        self.require_writer(login, namespace)
        return repository

    def require_writer(self, login: Login | None, namespace: str) -> Login:
        if login is None:
            raise HubError(401, "Invalid username or password.")
        if not login.may_write(namespace):
            raise HubError(
                403, f"Forbidden: this token does not have the rights to write to {namespace}"
            )
        return login

    def _folder(self, kind: str, repo_id: str) -> Path:
        return self.root / "repos" / kind / repo_id

    def _forget_move(self, key: str) -> None:
        self._moved.pop(key, None)
        write_atomically(self._moved_path, json.dumps(self._moved).encode())
