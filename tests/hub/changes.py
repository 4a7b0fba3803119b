"""The Hub's JSON API that changes history: preupload, commits, branches, tags, pull requests."""

from __future__ import annotations

import base64
import binascii
import json
from typing import TYPE_CHECKING, Any

from tests.hub import cards
from tests.hub.api import page, web_url
from tests.hub.objects import LARGEST_REGULAR_FILE, File, is_lfs
from tests.hub.repository import Change, Commit, Repository, apply_changes, now
from tests.hub.wire import HubError, Request, Response, route

if TYPE_CHECKING:
    from tests.hub.hub import Hub


def _writable_at(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Repository:
    """Return the repository if the login may commit to the revision or open a pull request."""
    as_pull_request = request.flag("create_pr")
    if revision.startswith("refs/pr/") and request.login:
        repository = hub.store.readable(request.login, kind, repo)
        discussion = _discussion(repository, revision.rsplit("/", 1)[1])
        as_pull_request = discussion["author"] == request.login.user
    return hub.store.writable(request.login, kind, repo, as_pull_request=as_pull_request)


@route("POST", "/api/{kind}/{repo}/preupload/{revision}")
def preupload(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Return the upload mode of each file, and the id of its present content to skip equal ones."""
    present = _writable_at(hub, request, kind, repo, revision).commit_at(revision).files
    answers = []
    for file in request.json().get("files", []):
        path, sample = file["path"], base64.b64decode(file.get("sample", ""))
        lfs = is_lfs(path, file["size"], sample)
        answer = {
            "path": path,
            "uploadMode": "lfs" if lfs else "regular",
            "shouldIgnore": False,
        }
        if path in present and lfs == bool(present[path].sha256):
            answer["oid"] = present[path].sha256 or present[path].oid
        answers.append(answer)
    return Response.json({"files": answers})


@route("POST", "/api/{kind}/{repo}/commit/{revision}")
def commit(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = _writable_at(hub, request, kind, repo, revision)
    try:
        lines = [json.loads(line) for line in request.body().splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        changes = [
            _change(repository, line["key"], line["value"])
            for line in lines
            if line["key"] != "header"
        ]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise HubError(400, f"The commit cannot be read: {error!r}") from None
    title, description = header.get("summary") or "", header.get("description") or ""
    if not title:
        raise HubError(400, "A commit needs a summary")
    author, parent, number = request.login.user, header.get("parentCommit"), None
    if request.flag("create_pr"):
        with repository.lock:
            base = repository.commit_at(revision)
            if parent and not base.sha.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            apply_changes(base.files, changes)  # refuse before the pull request exists
            number = _open_discussion(repository, author, title, description, base)["num"]
            revision, parent = f"refs/pr/{number}", None
            created = repository.commit(
                revision, changes, title, author=author, description=description
            )
    else:
        created = repository.commit(
            revision, changes, title, author=author, description=description, parent=parent
        )
    answer: dict[str, Any] = {
        "success": True,
        "commitOid": created.sha,
        "commitUrl": f"{web_url(hub, repository)}/commit/{created.sha}",
        "hookOutput": "",
    }
    if number:
        answer["pullRequestUrl"] = f"{web_url(hub, repository)}/discussions/{number}"
    return Response.json(answer)


def _change(repository: Repository, key: str, value: dict[str, Any]) -> Change:
    path = value["path"]
    if key == "deletedFile":
        return Change(path)
    if key == "deletedFolder":
        return Change(path, folder=True)
    if key == "file":
        content = value["content"].encode()
        if value.get("encoding") == "base64":
            try:
                content = base64.b64decode(content, validate=True)
            except binascii.Error as error:
                raise HubError(400, f"{path} is not base64: {error}") from None
        if len(content) > LARGEST_REGULAR_FILE:
            raise HubError(400, f"{path} is larger than 10 MB: it must be stored with LFS")
        if path == "README.md" and (errors := cards.validate(content.decode(errors="replace"))[0]):
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
        return Change(path, repository.store_regular(content))
    if key == "lfsFile":
        if not repository.has_lfs(value["oid"]):
            raise HubError(400, f"{path}: its LFS content {value['oid']} was never uploaded")
        size = (repository.folder / "lfs" / value["oid"]).stat().st_size
        if value.get("size", size) != size:
            raise HubError(400, f"{path}: the LFS content has {size} bytes, not {value['size']}")
        return Change(path, File.lfs(value["oid"], size))
    raise HubError(400, f"Unknown operation {key!r} in a commit")


# Branches and tags


@route("POST", "/api/{kind}/{repo}/branch/{branch}")
def create_branch(hub: Hub, request: Request, kind: str, repo: str, branch: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo)
    start = repository.resolve(request.json().get("startingPoint") or "main")
    repository.add_ref(f"refs/heads/{branch}", start)
    return Response.json({})


@route("DELETE", "/api/{kind}/{repo}/branch/{branch}")
def delete_branch(hub: Hub, request: Request, kind: str, repo: str, branch: str) -> Response:
    hub.store.writable(request.login, kind, repo).delete_ref(f"refs/heads/{branch}")
    return Response.json({})


@route("POST", "/api/{kind}/{repo}/tag/{revision}")
def create_tag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo)
    repository.add_ref(f"refs/tags/{request.json()['tag']}", repository.resolve(revision))
    return Response.json({})


@route("DELETE", "/api/{kind}/{repo}/tag/{tag}")
def delete_tag(hub: Hub, request: Request, kind: str, repo: str, tag: str) -> Response:
    hub.store.writable(request.login, kind, repo).delete_ref(f"refs/tags/{tag}")
    return Response.json({})


@route("POST", "/api/{kind}/{repo}/super-squash/{branch}")
def super_squash(hub: Hub, request: Request, kind: str, repo: str, branch: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo)
    with repository.lock:
        ref = repository.writable_ref(branch)
        files = dict(repository.commit_at(branch).files)
        title = request.json().get("message") or f"Super-squash branch '{branch}'"
        squashed = repository.add_commit(None, files, title, "", request.login.user)
        repository.refs[ref] = squashed.sha
        repository.save()
    return Response.json({"commitId": squashed.sha})


@route("GET", "/api/{kind}/{repo}/lfs-files")
def list_lfs_files(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    """List every LFS content in store, whether a commit names it or not."""
    repository = hub.store.writable(request.login, kind, repo)
    contents = sorted((repository.folder / "lfs").glob("[0-9a-f]*"))
    items = [
        {
            "fileOid": path.name,
            "oid": path.name,
            "filename": path.name,
            "size": path.stat().st_size,
            "pushedAt": now(),
        }
        for path in contents
    ]
    return page(hub, request, items, lambda item: item)


@route("POST", "/api/{kind}/{repo}/lfs-files/batch")
def delete_lfs_files(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    """Delete contents. One that a branch names is refused here, to catch mistakes; the Hub would
    rewrite the branch."""
    repository = hub.store.writable(request.login, kind, repo)
    with repository.lock:
        named = {
            file.sha256
            for sha in repository.refs.values()
            for file in repository.commit_at(sha).files.values()
        }
        for oid in request.json().get("deletions", {}).get("sha", []):
            if oid in named:
                raise HubError(400, f"{oid} is in use")
            (repository.folder / "lfs" / oid).unlink(missing_ok=True)
    return Response.json({})


# Pull requests: a discussion record in repo.json, and the ref refs/pr/NUMBER


def _open_discussion(
    repository: Repository, author: str, title: str, description: str, base: Commit | None
) -> dict[str, Any]:
    """Open a discussion, or with a base commit a pull request."""
    with repository.lock:
        discussion = {
            "num": len(repository.record["discussions"]) + 1,
            "title": title,
            "author": author,
            "created": now(),
            "status": "draft" if base else "open",
            "base": base.sha if base else None,
            "merge_commit": None,
            "events": [],
        }
        repository.record["discussions"].append(discussion)
        _add_event(discussion, author, "comment", _comment(description))
        if base:
            repository.refs[f"refs/pr/{discussion['num']}"] = base.sha
        repository.save()
    return discussion


def _comment(text: str) -> dict[str, Any]:
    return {"edited": False, "hidden": False, "latest": {"raw": text}}


def _add_event(
    discussion: dict[str, Any], author: str, kind: str, data: dict[str, Any]
) -> dict[str, Any]:
    event = {
        "id": f"{discussion['num']:08x}{len(discussion['events']):08x}",
        "type": kind,
        "createdAt": now(),
        "author": {"name": author},
        "data": data,
    }
    discussion["events"].append(event)
    return event


def _discussion(repository: Repository, number: str) -> dict[str, Any]:
    for discussion in repository.record["discussions"]:
        if str(discussion["num"]) == number:
            return discussion
    raise HubError(404, f"Discussion {number} does not exist")


def _summary(repository: Repository, discussion: dict[str, Any]) -> dict[str, Any]:
    return {
        "num": discussion["num"],
        "title": discussion["title"],
        "author": {"name": discussion["author"]},
        "createdAt": discussion["created"],
        "status": discussion["status"],
        "isPullRequest": discussion["base"] is not None,
        "repo": {"name": repository.id, "type": repository.kind[:-1]},
    }


@route("GET", "/api/{kind}/{repo}/discussions")
def list_discussions(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)
    summaries = [
        _summary(repository, discussion) for discussion in repository.record["discussions"]
    ]
    # Everything is on page 0; a client that asks for more gets none.
    page_0 = summaries[::-1] if request.query.get("p", ["0"])[-1] == "0" else []
    return Response.json({"discussions": page_0, "count": len(summaries), "start": 0})


@route("POST", "/api/{kind}/{repo}/discussions")
def open_discussion(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo, as_pull_request=True)
    body = request.json()
    base = repository.commit_at("main") if body.get("pullRequest") else None
    discussion = _open_discussion(
        repository,
        request.login.user,
        body.get("title") or "",
        body.get("description") or "",
        base,
    )
    return Response.json(_summary(repository, discussion))


@route("GET", "/api/{kind}/{repo}/discussions/{number}")
def show_discussion(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)
    discussion = _discussion(repository, number)
    details = {**_summary(repository, discussion), "events": discussion["events"]}
    if discussion["base"]:
        details["changes"] = {
            "base": "refs/heads/main",
            "mergeCommitId": discussion["merge_commit"],
        }
        details["filesWithConflicts"] = []
    return Response.json(details)


@route("POST", "/api/{kind}/{repo}/discussions/{number}/comment")
def comment(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo, as_pull_request=True)
    with repository.lock:
        data = _comment(request.json().get("comment") or "")
        event = _add_event(_discussion(repository, number), request.login.user, "comment", data)
        repository.save()
    return Response.json({"newMessage": event})


@route("POST", "/api/{kind}/{repo}/discussions/{number}/status")
def change_status(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo)
    with repository.lock:
        discussion = _discussion(repository, number)
        discussion["status"] = request.json()["status"]
        event = _add_event(
            discussion, request.login.user, "status-change", {"status": discussion["status"]}
        )
        repository.save()
    return Response.json({"newStatus": event})


@route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
def merge(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Response:
    """Apply the changes of the pull request to main, as one commit."""
    repository = hub.store.writable(request.login, kind, repo)
    with repository.lock:
        discussion = _discussion(repository, number)
        if not discussion["base"] or discussion["status"] in ("merged", "closed"):
            raise HubError(400, f"Discussion {number} is not an open pull request")
        before = repository.commit_at(discussion["base"]).files
        after = repository.commit_at(f"refs/pr/{number}").files
        changes = [Change(path, file) for path, file in after.items() if before.get(path) != file]
        changes += [Change(path) for path in before.keys() - after.keys()]
        created = repository.commit(
            "main", changes, f"{discussion['title']} (#{number})", author=request.login.user
        )
        discussion["status"], discussion["merge_commit"] = "merged", created.sha
        _add_event(discussion, request.login.user, "status-change", {"status": "merged"})
        repository.save()
    return Response.json({})
