"""One repository on disk: commits, refs and contents, as git and git-LFS store them.

    repos/models/alice/x/
        repo.json          settings, refs and discussions: {"refs": {"refs/heads/main": SHA}, ...}
        commits/SHA.json   parent, message, author, date, and the complete list of files
        blobs/SHA1         contents of regular files
        lfs/SHA256         contents of LFS files
        parts/SHA256/N     parts of an unfinished multipart upload

A new state becomes visible by replacing repo.json, after all that it names is on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from tests.hub.objects import File, is_lfs, object_id, tree_ids, write_atomically
from tests.hub.wire import CHUNK, HubError


@dataclass(frozen=True)
class Commit:
    """A commit; `files` is its complete content, path -> File."""

    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, File]


@dataclass(frozen=True)
class Change:
    """One operation of a commit: put `file` at `path`, or remove it (file None), or a folder."""

    path: str
    file: File | None = None
    folder: bool = False


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Repository:
    """A repository of a kind ("models", "datasets", "spaces"). Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = threading.RLock()
        self.record: dict[str, Any] = json.loads((folder / "repo.json").read_text())
        self._commits: dict[str, Commit] = {}

    @classmethod
    def create(cls, folder: Path, kind: str, repo_id: str, **settings: Any) -> Repository:
        record = {
            "kind": kind,
            "id": repo_id,
            "visibility": "public",
            "gated": False,
            "granted": [],
            "created": now(),
            "refs": {},
            "discussions": [],
            **settings,
        }
        write_atomically(folder / "repo.json", json.dumps(record).encode())
        return cls(folder)

    def save(self) -> None:
        write_atomically(self.folder / "repo.json", json.dumps(self.record).encode())

    @property
    def id(self) -> str:
        return self.record["id"]

    @property
    def kind(self) -> str:
        return self.record["kind"]

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def is_private(self) -> bool:
        return self.record["visibility"] != "public"

    @property
    def refs(self) -> dict[str, str]:
        """Full name ("refs/heads/main", "refs/tags/v1", "refs/pr/1") -> commit id."""
        return self.record["refs"]

    # Reading

    def resolve(self, revision: str = "main") -> str:
        """The commit id of a branch, a tag, a full ref name or a full commit id."""
        with self.lock:
            for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
                if name in self.refs:
                    return self.refs[name]
        is_sha = re.fullmatch("[0-9a-f]{40}", revision)
        if is_sha and (self.folder / "commits" / f"{revision}.json").exists():
            return revision
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit_at(self, revision: str = "main") -> Commit:
        sha = self.resolve(revision)
        if sha not in self._commits:
            value = json.loads((self.folder / "commits" / f"{sha}.json").read_text())
            value["files"] = {path: File(**file) for path, file in value["files"].items()}
            self._commits[sha] = Commit(**value)
        return self._commits[sha]

    def commits(self, revision: str = "main") -> list[Commit]:
        """The history, newest first."""
        history = [self.commit_at(revision)]
        while history[-1].parent:
            history.append(self.commit_at(history[-1].parent))
        return history

    def file_at(self, revision: str, path: str) -> File:
        file = self.commit_at(revision).files.get(path)
        if file is None:
            raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
        return file

    def content_path(self, file: File) -> Path:
        if file.sha256:
            return self.folder / "lfs" / file.sha256
        return self.folder / "blobs" / file.oid

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.content_path(self.file_at(revision, path)).read_bytes()

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of every file at the revision."""
        files = self.commit_at(revision).files
        return {path: self.content_path(file).read_bytes() for path, file in files.items()}

    def last_change(self, path: str, revision: str) -> Commit:
        """The commit that gave a file or folder the content it has at the revision."""
        history = self.commits(revision)
        for newer, older in zip(history, history[1:], strict=False):
            if _under(path, newer.files) != _under(path, older.files):
                return newer
        return history[-1]

    # Contents

    def has_lfs(self, sha256: str) -> bool:
        return (self.folder / "lfs" / sha256).exists()

    def store_regular(self, content: bytes) -> File:
        file = File.regular(content)
        target = self.content_path(file)
        if not target.exists():
            write_atomically(target, content)
        return file

    def store_lfs(self, sha256: str, sources: Iterable[BinaryIO]) -> File:
        """Store the joined sources; 400 if their sha256 is another one."""
        target = self.folder / "lfs" / sha256
        target.parent.mkdir(exist_ok=True)
        digest, size = hashlib.sha256(), 0
        handle, partial = tempfile.mkstemp(dir=target.parent, prefix=".writing-")
        with os.fdopen(handle, "wb") as joined:
            for source in sources:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
                    joined.write(chunk)
        if digest.hexdigest() != sha256:
            os.unlink(partial)
            raise HubError(400, f"The content's sha256 is {digest.hexdigest()}, not {sha256}")
        os.replace(partial, target)
        return File.lfs(sha256, size)

    # Writing

    def commit(
        self,
        revision: str,
        changes: Iterable[Change],
        title: str,
        *,
        author: str,
        description: str = "",
        parent: str | None = None,
    ) -> Commit:
        """One commit on a branch or a PR ref: all changes or none.

        parent: 412 unless the ref is still at this commit (an abbreviation of 7 or more will do).
        """
        with self.lock:
            ref = self.writable_ref(revision)
            head = self.refs.get(ref)
            if parent and not (len(parent) >= 7 and head and head.startswith(parent)):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = apply_changes(self.commit_at(head).files if head else {}, changes)
            commit = self.add_commit(head, files, title, description, author)
            self.refs[ref] = commit.sha
            self.save()
        return commit

    def add_commit(
        self, parent: str | None, files: dict[str, File], title: str, description: str, author: str
    ) -> Commit:
        """Store a commit that no ref names yet."""
        date = now()
        seconds = int(datetime.fromisoformat(date[:-5] + "+00:00").timestamp())
        signature = f"{author} <{author}@example.com> {seconds} +0000"
        text = f"tree {tree_ids(files)['']}\n" + (f"parent {parent}\n" if parent else "")
        text += f"author {signature}\ncommitter {signature}\n\n{title}\n"
        text += f"\n{description}\n" if description else ""
        sha = object_id("commit", text.encode())
        commit = Commit(sha, parent, title, description, author, date, files)
        write_atomically(
            self.folder / "commits" / f"{sha}.json", json.dumps(asdict(commit)).encode()
        )
        return commit

    def writable_ref(self, revision: str) -> str:
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        self.resolve(revision)
        raise HubError(400, f"{revision} is not a branch: commits go to branches and pull requests")

    def add_ref(self, ref: str, sha: str) -> None:
        bad = re.search(r"[\s~^:?*\[\\]|\.\.|//|/$|\.lock$|^refs/\w+/[./]", ref)
        if bad or ref.count("/") < 2:
            raise HubError(400, f"Invalid name for a reference: {ref}")
        with self.lock:
            if ref in self.refs:
                raise HubError(409, f"Reference already exists: {ref}")
            self.refs[ref] = sha
            self.save()

    def delete_ref(self, ref: str) -> None:
        if ref == "refs/heads/main":
            raise HubError(403, "The default branch cannot be deleted")
        with self.lock:
            if self.refs.pop(ref, None) is None:
                raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
            self.save()

    def write(
        self,
        files: Mapping[str, bytes | None],
        title: str = "Write files",
        *,
        revision: str = "main",
        author: str = "fixture",
    ) -> str:
        """Commit contents without any client (None removes a file); returns the commit id."""
        changes = []
        for path, content in files.items():
            if content is None:
                changes.append(Change(path))
            elif is_lfs(path, len(content), content[:512]):
                sha256 = hashlib.sha256(content).hexdigest()
                with tempfile.SpooledTemporaryFile() as source:
                    source.write(content)
                    source.seek(0)
                    changes.append(Change(path, self.store_lfs(sha256, [source])))
            else:
                changes.append(Change(path, self.store_regular(content)))
        return self.commit(revision, changes, title, author=author).sha


def _under(path: str, files: Mapping[str, File]) -> dict[str, File]:
    return {name: file for name, file in files.items() if (name + "/").startswith(path + "/")}


def apply_changes(files: Mapping[str, File], changes: Iterable[Change]) -> dict[str, File]:
    """Return the files after the changes, in order. Raise 400 for paths that git cannot store."""
    result = dict(files)
    for change in changes:
        path = change.path.removesuffix("/") if change.folder else change.path
        if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise HubError(400, f"Invalid path: {change.path!r}")
        if change.file is not None:
            result[path] = change.file
            continue
        removed = _under(path, result) if change.folder else {path: result.get(path)}
        if not removed or None in removed.values():
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        for name in removed:
            del result[name]
    folders = {
        name.rsplit("/", depth)[0] for name in result for depth in range(1, name.count("/") + 1)
    }
    if both := folders & result.keys():
        raise HubError(400, f"Both a file and a folder: {sorted(both)}")
    return result
