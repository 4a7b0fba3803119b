"""Xet, the storage that default clients upload to and download from, in its first version.

A client cuts files into chunks, packs them into xorbs, and sends these; then a shard, which lists
each file's sha256 and the chunks it is made of. Xorbs of all repositories are kept in ROOT/xorbs,
because clients remember what they sent. A file is then stored as any other LFS content.

For a download, a reconstruction says from which bytes of which xorbs a file is put together. Here
that is always one xorb without compression, made of the file's content when it is asked for. Only
the sha256 is compared: clients compare no hash of Xet with what they receive.
"""

from __future__ import annotations

import io
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.hub.objects import write_atomically, xet_hash
from tests.hub.repository import Repository
from tests.hub.transfers import (
    LINK_LIFETIME,
    is_signed,
    known,
    requested_span,
    require_signature,
    sign,
    signed,
)
from tests.hub.wire import HubError, Request, Response, route

if TYPE_CHECKING:
    from tests.hub.hub import Hub

LARGEST_CHUNK = 128 * 1024  # bytes
END_OF_FILES = b"\xff" * 32  # stands where the next file's hash would
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file in a shard


# Access: a token of the Hub is exchanged for one of the storage


@route("GET", "/api/{kind}/{repo}/xet-read-token/{revision}")
def read_token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    return _token(hub, hub.store.downloadable(request.login, kind, repo), "read")


@route("GET", "/api/{kind}/{repo}/xet-write-token/{revision}")
def write_token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Response:
    repository = hub.store.writable(request.login, kind, repo, as_pull_request=True)
    return _token(hub, repository, "write")


def _token(hub: Hub, repository: Repository, scope: str) -> Response:
    storage, expires = f"/xet/{repository.kind}/{repository.id}", int(time.time()) + LINK_LIFETIME
    url, token = f"{hub.cdn_url}{storage}", sign(hub, f"{scope} {storage}", expires)
    token = f"{scope}.{expires}.{token}"
    headers = {
        "X-Xet-Cas-Url": url,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expires),
    }
    return Response.json({"casUrl": url, "accessToken": token, "exp": expires}, headers=headers)


def _require_token(hub: Hub, request: Request, kind: str, repo: str, scope: str) -> Repository:
    """Return the repository of the storage that the token of the request opens."""
    token = request.headers.get("Authorization", "").removeprefix("Bearer ")
    granted, expires, signature = [*token.split("."), "", ""][:3]
    if not is_signed(hub, f"{granted} /xet/{kind}/{repo}", expires, signature):
        raise HubError(401, "This token is not for this storage, or it has expired")
    if granted not in (scope, "write"):
        raise HubError(403, "This token may only read")
    return known(hub, kind, repo)


# Uploads


@route("POST", "/xet/{kind}/{repo}/v1/xorbs/default/{hash}")
def upload_xorb(hub: Hub, request: Request, kind: str, repo: str, hash: str) -> Response:
    _require_token(hub, request, kind, repo, "write")
    content = request.body()
    try:
        list(chunks_of(content))
    except (ValueError, OSError, struct.error) as error:
        raise HubError(400, f"The xorb {hash} cannot be read: {error}") from None
    write_atomically(hub.root / "xorbs" / hash, content)
    return Response.json({"was_inserted": True})


@route("POST", "/xet/{kind}/{repo}/v1/shards")
def upload_shard(hub: Hub, request: Request, kind: str, repo: str) -> Response:
    repository = _require_token(hub, request, kind, repo, "write")
    for sha256, segments in _files(request.body()):
        content = io.BytesIO()
        for xorb, start, end in segments:
            path = hub.root / "xorbs" / xorb
            if not path.exists():
                raise HubError(400, f"The xorb {xorb} was never uploaded")
            content.writelines(list(chunks_of(path.read_bytes()))[start:end])
        content.seek(0)
        repository.store_lfs(sha256, [content])
    return Response.json({"result": 1})


def chunks_of(xorb: bytes) -> Iterator[bytes]:
    """Yield the chunks of a xorb. Each has a header of 8 bytes; a footer may follow the last."""
    position = 0
    while position < len(xorb) and not xorb.startswith(b"XETBLOB", position):
        header = xorb[position : position + 8]
        packed_size, size = (int.from_bytes(header[i : i + 3], "little") for i in (1, 5))
        position += 8 + packed_size
        yield _unpacked(xorb[position - packed_size : position], header[4], size)


def _unpacked(packed: bytes, scheme: int, size: int) -> bytes:
    """Undo the compression of a chunk: 0 none, 1 LZ4, 2 LZ4 of every fourth byte in turn."""
    if scheme == 0:
        return packed
    import pyarrow

    grouped = pyarrow.decompress(packed, size, codec="lz4", asbytes=True)
    if scheme == 1:
        return grouped
    content, start = bytearray(size), 0
    for offset in range(4):
        end = start + len(content[offset::4])
        content[offset::4], start = grouped[start:end], end
    return bytes(content)


def _files(shard: bytes) -> Iterator[tuple[str, list[tuple[str, int, int]]]]:
    """Yield the files of a shard: sha256, and the segments (xorb, first chunk, one past the last).

    After a header of 48 bytes, everything is in records of 48: a file, its segments, as many
    verifications of these, and its sha256.
    """
    records = (shard[start : start + 48] for start in range(48, len(shard), 48))
    while (record := next(records))[:32] != END_OF_FILES:
        flags, count = struct.unpack_from("<II", record, 32)
        segments = []
        for _ in range(count):
            xorb, _, _, start, end = struct.unpack("<32sIIII", next(records))
            segments.append((_hex(xorb), start, end))
        for _ in range(count if flags & WITH_VERIFICATION else 0):
            next(records)
        if not flags & WITH_SHA256:
            raise HubError(400, "A file of the shard has no sha256")
        yield _hex(next(records)[:32]), segments


def _hex(hash: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian numbers in hex."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))


# Downloads


@route("GET", "/xet/{kind}/{repo}/v1/reconstructions/{hash}")
def reconstruction(hub: Hub, request: Request, kind: str, repo: str, hash: str) -> Response:
    repository, sha256 = _require_token(hub, request, kind, repo, "read"), xet_hash(hash)
    if not repository.has_lfs(sha256):
        raise HubError(404, f"There is no file {hash}")
    size = (repository.folder / "lfs" / sha256).stat().st_size
    lengths = _chunk_lengths(size)
    start, end = requested_span(request, size) or (0, size)
    first = next(i for i in range(len(lengths)) if sum(lengths[: i + 1]) > start)
    past = next(i + 1 for i in range(len(lengths)) if sum(lengths[: i + 1]) >= end)
    chunks = {"start": first, "end": past}
    before = sum(lengths[:first])
    xorb_bytes = {
        "start": before + 8 * first,
        "end": sum(lengths[:past]) + 8 * past - 1,
    }
    url = signed(hub, f"/cdn/{repository.kind}/{repository.id}/xorbs/{sha256}")
    unpacked = sum(lengths[first:past])
    return Response.json(
        {
            "offset_into_first_range": start - before,
            "terms": [{"hash": hash, "unpacked_length": unpacked, "range": chunks}],
            "fetch_info": {hash: [{"range": chunks, "url": url, "url_range": xorb_bytes}]},
        }
    )


@route("GET", "/cdn/{kind}/{repo}/xorbs/{sha256}")
def download_xorb(hub: Hub, request: Request, kind: str, repo: str, sha256: str) -> Response:
    require_signature(hub, request)
    content = io.BytesIO((known(hub, kind, repo).folder / "lfs" / sha256).read_bytes())
    xorb = b""
    for length in _chunk_lengths(len(content.getvalue())):
        size = length.to_bytes(3, "little")
        xorb += b"\0" + size + b"\0" + size + content.read(length)
    start, end = requested_span(request, len(xorb)) or (0, len(xorb))
    return Response(206, xorb[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(xorb)}"})


def _chunk_lengths(size: int) -> list[int]:
    """Cut a content into an odd number of chunks, so that its middle byte is in no header."""
    number = size // LARGEST_CHUNK + 1 | 1
    return [size * (i + 1) // number - size * i // number for i in range(number)]
