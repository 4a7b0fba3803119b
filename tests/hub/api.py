"""The Hub's JSON API about people and repositories: who am I, create, info, tree, refs, history."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlencode

from tests.hub import cards
from tests.hub.objects import File, lfs_pointer, tree_ids, xet_hash
from tests.hub.repository import Commit, Repository
from tests.hub.wire import HubError, Request, Response, route

if TYPE_CHECKING:
    from tests.hub.hub import Hub

Item = TypeVar("Item")


def prefix_of(kind: str) -> str:
    return "" if kind == "models" else f"{kind}/"


def web_url(hub: Hub, repository: Repository) -> str:
    return f"{hub.url}/{prefix_of(repository.kind)}{repository.id}"


def page(
    hub: Hub, request: Request, items: Sequence[Item], describe: Callable[[Item], dict[str, Any]]
) -> Response:
    """One page of a listing; the `Link` header names the next one."""
    start = int(request.query.get("cursor", ["0"])[-1])
    end = start + hub.page_size
    headers = {}
    if end < len(items):
        query = urlencode({**request.query, "cursor": [str(end)]}, doseq=True)
        headers["Link"] = f'<{hub.url}{request.raw_path}?{query}>; rel="next"'
    return Response.json([describe(item) for item in items[start:end]], headers=headers)


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Response:
    if request.login is None:
        raise HubError(401, "Invalid username or password.")
    return Response.json(request.login.whoami())


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: Hub, request: Request) -> Response:
    errors, warnings = cards.validate(str(request.json().get("content", "")))
    answer = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return Response.json(answer, 400 if errors else 200)


# Repositories as a whole


def _named_repo(request: Request, body: dict[str, Any]) -> tuple[str, str]:
    """(kind, id) of a body with `name`, `organization` and `type`."""
    kind = f"{body.get('type') or 'model'}s"
    if kind not in ("models", "datasets", "spaces") or not body.get("name"):
        raise HubError(400, f"Invalid name or type of a repository: {body}")
    if request.login is None:
        raise HubError(401, "Invalid username or password.")
    name = body["name"]
    if "/" not in name:
        name = f"{body.get('organization') or request.login.user}/{name}"
    return kind, name


@route("POST", "/api/repos/create")
def create_repo(hub: Hub, request: Request) -> Response:
    body = request.json()
    kind, repo_id = _named_repo(request, body)
    login = hub.store.require_writer(request.login, repo_id.split("/")[0])
    visibility = body.get("visibility") or ("private" if body.get("private") else "public")
    if visibility not in ("public", "private", "protected"):
        raise HubError(400, f"Invalid visibility: {visibility}")
    settings = {"visibility": visibility}
    if kind == "spaces":
        settings["sdk"] = body.get("sdk") or "gradio"
    try:
        repository = hub.store.create(kind, repo_id, login.user, **settings)
    except HubError as error:
        if error.status == 409:  # a client with exist_ok reads the url even from this answer
            error.extra["url"] = f"{hub.url}/{prefix_of(kind)}{repo_id}"
        raise
    answer = {"url": web_url(hub, repository), "name": repo_id, "id": repo_id}
    return Response.json(answer)


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: Hub, request: Request) -> Response:
    kind, repo_id = _named_repo(request, request.json())
    hub.store.delete(hub.store.writable(request.login, kind, repo_id))
    return Response.json({})


@route("POST", "/api/repos/move")
def move_repo(hub: Hub, request: Request) -> Response:
    body = request.json()
    kind = f"{body.get('type') or 'model'}s"
    repository = hub.store.writable(request.login, kind, str(body.get("fromRepo")))
    target = str(body.get("toRepo"))
    hub.store.require_writer(request.login, target.split("/")[0])
    hub.store.move(repository, target)
    return Response.json({})


@route("PUT", "/api/{kind}/{repo}/settings")
def change_settings(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo)
    body = request.json()
    with repository.lock:
        for name in ("visibility", "gated"):
            if name in body:
                repository.record[name] = body[name]
        if "private" in body:
            repository.record["visibility"] = "private" if body["private"] else "public"
        repository.save()
    return Response.json({name: repository.record[name] for name in ("visibility", "gated")})


@route("POST", "/api/{kind}/{repo}/user-access-request/grant")
def grant_access(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo)
    with repository.lock:
        repository.record["granted"].append(request.json().get("user"))
        repository.save()
    return Response.json({})


@route("GET", "/api/{kind}/{repo}/auth-check")
def auth_check(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    hub.store.downloadable(request.login, kind, repo)
    return Response.json({})


@route("GET", "/api/{kind}/{repo}/auth-check/write")
def auth_check_write(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    hub.store.writable(request.login, kind, repo)
    return Response.json({})


# Information


@route("GET", "/api/{kind}")
def list_repos(hub: Hub, request: Request, kind: str) -> Response:
    author, search = (request.query.get(name, [None])[-1] for name in ("author", "search"))
    repositories = [
        repository
        for repository in hub.store.all(kind)
        if (author is None or repository.namespace == author)
        and (search is None or search.lower() in repository.id.lower())
        and (
            not repository.is_private
            or (request.login and request.login.belongs_to(repository.namespace))
        )
    ]
    limit = int(request.query.get("limit", [len(repositories)])[-1])
    return page(hub, request, repositories[:limit], lambda repo: _info(repo, "main", False))


@route("GET", "/api/{kind}/{repo}")
def repo_info(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    return repo_info_at(hub, request, kind, repo, "main")


@route("GET", "/api/{kind}/{repo}/revision/{revision}")
def repo_info_at(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)
    info = _info(repository, revision, request.flag("blobs"))
    if expand := request.query.get("expand"):
        info = {name: value for name, value in info.items() if name in ("id", "_id", *expand)}
    return Response.json(info)


def _info(repository: Repository, revision: str, with_blobs: bool) -> dict[str, Any]:
    commit = repository.commit_at(revision)
    card: dict[str, Any] = {}
    if "README.md" in commit.files:
        card = cards.metadata(repository.read("README.md", commit.sha).decode(errors="replace"))
    tags = card.get("tags") or []
    info = {
        "_id": commit.sha[:24],
        "id": repository.id,
        "author": repository.namespace,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repository.record["created"],
        "private": repository.is_private,
        "gated": repository.record["gated"],
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [tags] if isinstance(tags, str) else tags,
        "cardData": card,
        "siblings": [
            {"rfilename": path, **(_blob(file) if with_blobs else {})}
            for path, file in sorted(commit.files.items())
        ],
        "usedStorage": sum(file.size for file in commit.files.values()),
    }
    if repository.kind == "models":
        info["modelId"] = repository.id
        info |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
    if repository.kind == "spaces":
        info["sdk"] = card.get("sdk", repository.record.get("sdk"))
        info["runtime"] = _RUNTIME
    return info


_RUNTIME = {
    "stage": "RUNNING",
    "hardware": {"current": "cpu-basic", "requested": "cpu-basic"},
    "storage": None,
    "gcTimeout": 172800,
}


@route("GET", "/api/spaces/{repo}/runtime")
def space_runtime(hub: Hub, request: Request, repo: str) -> Response:
    hub.store.readable(request.login, "spaces", repo)
    return Response.json(_RUNTIME)


def _blob(file: File) -> dict[str, Any]:
    blob: dict[str, Any] = {"blobId": file.oid, "size": file.size}
    if file.sha256:
        pointer_size = len(lfs_pointer(file.sha256, file.size))
        blob["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": pointer_size}
    return blob


def _entry(repository: Repository, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    """A file or folder as the tree and paths-info endpoints describe it."""
    file = commit.files.get(path)
    if file is None:
        entry = {"type": "directory", "path": path, "oid": tree_ids(commit.files)[path], "size": 0}
    else:
        entry = {"type": "file", "path": path, "oid": file.oid, "size": file.size}
        if file.sha256:
            pointer_size = len(lfs_pointer(file.sha256, file.size))
            entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": pointer_size}
            entry["xetHash"] = xet_hash(file.sha256)
    if expand:
        last = repository.last_change(path, commit.sha)
        entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return entry


def _folders(commit: Commit) -> set[str]:
    return {
        path.rsplit("/", depth)[0]
        for path in commit.files
        for depth in range(1, path.count("/") + 1)
    }


@route("GET", "/api/{kind}/{repo}/tree/{revision}")
def tree(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    return subtree(hub, request, kind, repo, revision, "")


@route("GET", "/api/{kind}/{repo}/tree/{revision}/{path}")
def subtree(hub: Hub, request: Request, kind: str, repo: str, revision: str, path: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)
    commit = repository.commit_at(revision)
    folders = _folders(commit)
    path = path.strip("/")
    if path and path not in folders:
        raise HubError(404, f"{path} does not exist on {revision!r}", "EntryNotFound")
    inside = re.compile(re.escape(f"{path}/" if path else "") + "(.+)")
    names = sorted(name for name in folders | commit.files.keys() if inside.fullmatch(name))
    if not request.flag("recursive"):
        names = [name for name in names if "/" not in inside.fullmatch(name)[1]]
    expand = request.flag("expand")
    return page(hub, request, names, lambda name: _entry(repository, commit, name, expand))


@route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def paths_info(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)
    commit = repository.commit_at(revision)
    if "json" in request.headers.get("Content-Type", ""):
        paths, expand = request.json().get("paths", []), bool(request.json().get("expand"))
    else:
        form = parse_qs(request.body().decode())
        paths, expand = form.get("paths", []), form.get("expand", [""])[-1] in ("true", "True", "1")
    known = _folders(commit) | commit.files.keys()
    entries = [_entry(repository, commit, path, expand) for path in paths if path in known]
    return Response.json(entries)


@route("GET", "/api/{kind}/{repo}/refs")
def list_refs(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)
    answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    groups = {"refs/heads/": "branches", "refs/tags/": "tags"}
    if request.flag("include_prs"):
        answer["pullRequests"] = []
        groups["refs/pr/"] = "pullRequests"
    for ref, sha in sorted(repository.refs.items()):
        for start, group in groups.items():
            if ref.startswith(start):
                name = ref if group == "pullRequests" else ref.removeprefix(start)
                answer[group].append({"name": name, "ref": ref, "targetCommit": sha})
    return Response.json(answer)


@route("GET", "/api/{kind}/{repo}/commits/{revision}")
def list_commits(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = hub.store.readable(request.login, kind, repo)

    def describe(commit: Commit) -> dict[str, Any]:
        return {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }

    return page(hub, request, repository.commits(revision), describe)
