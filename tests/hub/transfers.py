"""Transfers of contents: resolve (downloads), signed "CDN" links, and git-LFS uploads.

LFS contents are served from, and uploaded to, signed links on a second port under another host
name. To clients that is another origin, as the real CDN is: they send no token there, and the
signature grants access.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import shutil
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.hub.api import prefix_of
from tests.hub.objects import write_atomically, xet_hash
from tests.hub.repository import Repository
from tests.hub.wire import HubError, Request, Response, route

if TYPE_CHECKING:
    from tests.hub.hub import Hub

LINK_LIFETIME = 3600  # seconds


def signed(hub: Hub, path: str) -> str:
    """Return a link to `path` (not yet percent-encoded) on the CDN port that needs no token."""
    expires = int(time.time()) + LINK_LIFETIME
    return f"{hub.cdn_url}{quote(path)}?expires={expires}&signature={sign(hub, path, expires)}"


def sign(hub: Hub, path: str, expires: int) -> str:
    return hmac.new(hub.secret, f"{path}\n{expires}".encode(), hashlib.sha256).hexdigest()


def is_signed(hub: Hub, path: str, expires: str, signature: str) -> bool:
    """Return whether the Hub signed this path, and the signature has not expired."""
    if not expires.isdecimal() or int(expires) <= time.time():
        return False
    return hmac.compare_digest(signature, sign(hub, path, int(expires)))


def require_signature(hub: Hub, request: Request) -> None:
    expires, signature = (request.query.get(name, [""])[-1] for name in ("expires", "signature"))
    if not is_signed(hub, request.path, expires, signature):
        raise HubError(403, "This link is not signed, or it has expired")


def known(hub: Hub, prefix: str, repo: str) -> Repository:
    """Return the repository of a signed link, without a login."""
    repository = hub.store.find(prefix.rstrip("/") or "models", repo)
    if repository is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repository


# Downloads


@route("GET", "/{prefix}{repo}/resolve/{revision}/{path}")
def resolve(
    hub: Hub, request: Request, prefix: str, repo: str, revision: str, path: str
) -> Response:
    """Return the content of a regular file, or a redirect to that of an LFS file."""
    repository = hub.store.downloadable(request.login, prefix.rstrip("/") or "models", repo)
    sha = repository.resolve(revision)
    try:
        file = repository.file_at(sha, path)
    except HubError as error:
        response = error.response()
        response.headers["X-Repo-Commit"] = sha  # lets clients remember that there is no such file
        return response
    headers = {"X-Repo-Commit": sha, "ETag": f'"{file.sha256 or file.oid}"'}
    if file.sha256 is None:
        return _content(repository, request, headers, repository.content_path(file).name, "blobs")
    headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(file.size)}
    token_url = f"{hub.url}/api/{repository.kind}/{repository.id}/xet-read-token/{sha}"
    headers |= {"X-Xet-Hash": xet_hash(file.sha256), "Link": f'<{token_url}>; rel="xet-auth"'}
    target = f"/cdn/{repository.kind}/{repository.id}/{file.sha256}/{path.rsplit('/', 1)[-1]}"
    headers["Location"] = signed(hub, target)
    return Response(302, b"", headers)


@route("GET", "/cdn/{kind}/{repo}/{sha256}/{name}")
def cdn(hub: Hub, request: Request, kind: str, repo: str, sha256: str, name: str) -> Response:
    require_signature(hub, request)
    repository = known(hub, kind, repo)
    return _content(repository, request, {"ETag": f'"{sha256}"'}, sha256, "lfs")


def _content(
    repository: Repository, request: Request, headers: dict[str, str], name: str, group: str
) -> Response:
    """Return a stored content, or the part in the Range header."""
    content = repository.folder / group / name
    size = content.stat().st_size
    headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    span = requested_span(request, size)
    if span is None:
        return Response(200, b"", headers, content, (0, size))
    start, end = span
    if start >= end:
        return Response(416, b"", {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    return Response(206, b"", headers, content, (start, end))


def requested_span(request: Request, size: int) -> tuple[int, int] | None:
    """Return the first byte in the Range header and one past the last; None without the header."""
    requested = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if not requested or not any(requested.groups()):
        return None
    first, last = requested.groups()
    if first:
        return int(first), min(int(last) + 1 if last else size, size)
    return max(size - int(last), 0), size  # the last bytes


# Uploads


@route("POST", "/{prefix}{repo}.git/info/lfs/objects/batch")
def lfs_batch(hub: Hub, request: Request, prefix: str, repo: str) -> Response:
    """Return where to PUT each content: at once, or in parts above `hub.multipart_size`."""
    kind = prefix.rstrip("/") or "models"
    repository = hub.store.writable(request.login, kind, repo, as_pull_request=True)
    body = request.json()
    if body.get("operation") != "upload":
        raise HubError(400, "Only uploads go through LFS here; downloads go through resolve")
    objects = []
    for item in body.get("objects", []):
        oid, size = str(item["oid"]), int(item["size"])
        answer: dict = {"oid": oid, "size": size}
        if not re.fullmatch("[0-9a-f]{64}", oid):
            answer["error"] = {"code": 422, "message": "The oid is not a sha256"}
        elif not repository.has_lfs(oid):
            target = f"/upload/{kind}/{repository.id}/{oid}"
            upload: dict = {"href": signed(hub, target)}
            if size > hub.multipart_size and "multipart" in body.get("transfers", []):
                parts = range(1, -(-size // hub.multipart_size) + 1)
                upload["href"] = signed(hub, f"{target}/complete")
                upload["header"] = {
                    "chunk_size": str(hub.multipart_size),
                    **{f"{part:05d}": signed(hub, f"{target}/parts/{part}") for part in parts},
                }
            verify = f"{hub.url}/{prefix_of(kind)}{repository.id}.git/info/lfs/verify"
            answer["actions"] = {"upload": upload, "verify": {"href": verify}}
        objects.append(answer)
    headers = {"Content-Type": "application/vnd.git-lfs+json"}
    return Response.json({"transfer": "basic", "objects": objects}, headers=headers)


@route("PUT", "/upload/{kind}/{repo}/{sha256}")
def upload_whole(hub: Hub, request: Request, kind: str, repo: str, sha256: str) -> Response:
    require_signature(hub, request)
    request.content.seek(0)
    known(hub, kind, repo).store_lfs(sha256, [request.content])
    return Response(200, b"", {"ETag": f'"{sha256}"'})


@route("PUT", "/upload/{kind}/{repo}/{sha256}/parts/{number}")
def upload_part(
    hub: Hub, request: Request, kind: str, repo: str, sha256: str, number: str
) -> Response:
    require_signature(hub, request)
    content = request.body()
    write_atomically(known(hub, kind, repo).folder / "parts" / sha256 / number, content)
    return Response(200, b"", {"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


@route("POST", "/upload/{kind}/{repo}/{sha256}/complete")
def complete_upload(hub: Hub, request: Request, kind: str, repo: str, sha256: str) -> Response:
    require_signature(hub, request)
    repository = known(hub, kind, repo)
    folder = repository.folder / "parts" / sha256
    parts = request.json().get("parts", [])
    with ExitStack() as stack:
        sources = []
        for part in sorted(parts, key=lambda part: part["partNumber"]):
            path = folder / str(part["partNumber"])
            if not path.exists() or hashlib.md5(path.read_bytes()).hexdigest() not in part["etag"]:
                raise HubError(400, f"Part {part['partNumber']} was not uploaded")
            sources.append(stack.enter_context(path.open("rb")))
        repository.store_lfs(sha256, sources)
    shutil.rmtree(folder, ignore_errors=True)
    return Response.json({"success": True})


@route("POST", "/{prefix}{repo}.git/info/lfs/verify")
def verify(hub: Hub, request: Request, prefix: str, repo: str) -> Response:
    kind = prefix.rstrip("/") or "models"
    repository = hub.store.writable(request.login, kind, repo, as_pull_request=True)
    body = request.json()
    content = repository.folder / "lfs" / str(body.get("oid"))
    if not content.exists() or content.stat().st_size != body.get("size"):
        raise HubError(404, f"{body.get('oid')} is not stored, or has another size")
    return Response.json({})
