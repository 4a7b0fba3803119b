"""The test Hub, driven by the unmodified clients over real HTTP.

In-process calls name their endpoint, token and cache; programs run with `Hub.env`.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

from tests.hub import Fault, Hub, transfers, xet
from tests.hub.objects import is_lfs, xet_hash

ROOT = Path(__file__).parent.parent
WEIGHTS = bytes(range(256)) * 1200  # 307200 bytes, stored with LFS
CARD = b"---\nlicense: mit\ntags:\n- tiny\n---\n# A model\n"


@pytest.fixture(autouse=True)
def quiet_clients(monkeypatch):
    """This process may have imported the client with other settings than `Hub.env` gives."""
    for name, value in (
        ("HF_HUB_DISABLE_XET", True),  # except in the tests of Xet
        ("HF_HUB_DISABLE_TELEMETRY", True),
        ("HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        yield hub
        assert hub.errors == []


@pytest.fixture
def alice(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.add_user("alice", orgs=["lab"]))


@pytest.fixture
def model(hub):
    """A public model of alice's with a card, a config and weights."""
    repo = hub.create_repo("model", "alice/x")
    repo.write({"README.md": CARD, "unet/config.json": b"{}", "unet/w.safetensors": WEIGHTS})
    return repo


def client_of(hub: Hub, name: str, *arguments, **options) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.add_user(name, *arguments, **options))


def status_of(call) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def send(url: str, method: str = "GET", body: bytes | None = None, **headers: str):
    """Send a bare HTTP request: (status, headers, body)."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, parts.path + f"?{parts.query}", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


def run_client(hub: Hub, token: str, home: Path, *command: str) -> str:
    environment = {**os.environ, **hub.env(token, home)}
    done = subprocess.run(
        command, env=environment, cwd=home.parent, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Commits


def test_folder_is_one_commit_and_again_none(hub, alice, tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    wanted = {"README.md": CARD, "unet/config.json": b"{}", "unet/w.safetensors": WEIGHTS}
    for path, content in wanted.items():
        (folder / path).write_bytes(content)
    url = alice.create_repo("x")
    assert url.repo_id == "alice/x" and url == f"{hub.url}/alice/x"
    assert alice.create_repo("x", exist_ok=True) == url
    assert status_of(lambda: alice.create_repo("x")) == 409

    first = alice.upload_folder(repo_id="alice/x", folder_path=folder)
    repo = hub.repo("model", "alice/x")
    assert [commit.sha for commit in repo.commits()][0] == first.oid
    assert len(repo.commits()) == 2  # the Hub's own first commit, and the folder
    files = repo.files()
    assert files.pop(".gitattributes")
    assert files == wanted

    again = alice.upload_folder(repo_id="alice/x", folder_path=folder)
    assert again.oid == first.oid
    assert hub.count("POST", "/commit/") == 1
    assert hub.count("PUT", "/upload/") == 1


def test_ids_are_those_of_git(hub, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    repo = hub.create_repo("model", "alice/x")
    files = {"a.txt": b"1", "a/b": b"2", "a-b": b"3", "a/c/d": b"", "b": "ä\n".encode()}
    sha = repo.write({**files, ".gitattributes": None}, "Grüße")

    for path, content in files.items():
        (tmp_path / "work" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work" / path).write_bytes(content)
    commit = repo.commit_at(sha)

    def git(*command: str, **environment: str) -> str:
        folders = {"GIT_DIR": str(tmp_path / "git"), "GIT_WORK_TREE": str(tmp_path / "work")}
        return subprocess.run(
            ["git", "-c", "core.autocrlf=false", *command],
            env={**os.environ, **folders, **environment},
            cwd=tmp_path / "work",
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    git("init")
    git("add", "--force", ".")
    text = f"tree {git('write-tree')}\nparent {commit.parent}\n"
    for role in ("author", "committer"):
        when = int(time.mktime(time.strptime(commit.date, "%Y-%m-%dT%H:%M:%S.000Z")))
        text += f"{role} fixture <fixture@example.com> {when - time.timezone} +0000\n"
    content = (text + "\nGrüße\n").encode()
    assert sha == hashlib.sha1(f"commit {len(content)}\0".encode() + content).hexdigest()


def test_commit_is_atomic(hub, alice, model):
    before = model.resolve()
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("missing.txt")]
    with pytest.raises(EntryNotFoundError):
        alice.create_commit("alice/x", operations, commit_message="both")
    assert model.resolve() == before
    assert "new.txt" not in model.files()


def test_operations_add_replace_and_delete(hub, alice, model):
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationAdd("README.md", CARD + b"more"),
        CommitOperationCopy("unet/w.safetensors", "copy.safetensors"),
        CommitOperationCopy("unet/config.json", "copy.json"),
        CommitOperationDelete("unet/", is_folder=True),
    ]
    created = alice.create_commit(
        "alice/x", operations, commit_message="Title", commit_description="Body"
    )
    files = model.files(created.oid)
    assert set(files) == {
        *(".gitattributes", "README.md", "new.txt", "copy.json", "copy.safetensors")
    }
    assert files["README.md"] == CARD + b"more"
    assert files["copy.safetensors"] == WEIGHTS and files["copy.json"] == b"{}"
    last = alice.list_repo_commits("alice/x")[0]
    assert (last.commit_id, last.title, last.message) == (created.oid, "Title", "Body")
    assert last.authors == ["alice"]


def test_parent_commit_must_be_the_head(hub, alice, model):
    old = model.resolve()
    new = model.write({"a.txt": b"a"})

    def upload(parent: str):
        return alice.upload_file(
            repo_id="alice/x", path_in_repo="b", path_or_fileobj=b"b", parent_commit=parent
        )

    assert status_of(lambda: upload(old)) == 412
    assert model.resolve() == new
    assert model.commit_at(upload(new).oid).parent == new


def test_concurrent_commits_all_succeed(hub, alice, model):
    def upload(number: int) -> str:
        path = f"{number}.bin"
        content = bytes([number, 0])
        return alice.upload_file(repo_id="alice/x", path_in_repo=path, path_or_fileobj=content).oid

    with ThreadPoolExecutor(8) as pool:
        created = set(pool.map(upload, range(16)))
    assert len(created) == 16
    assert created <= {commit.sha for commit in model.commits()}
    assert {f"{number}.bin" for number in range(16)} <= set(model.files())


def test_invalid_card_is_refused(hub, alice, model):
    for metadata in ("license: no-such-license", "tags: {a: 1}", "a: [1"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
            alice.upload_file(
                repo_id="alice/x",
                path_in_repo="README.md",
                path_or_fileobj=f"---\n{metadata}\n---\n".encode(),
            )
    assert model.read("README.md") == CARD
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        alice.upload_file(repo_id="alice/x", path_in_repo="README.md", path_or_fileobj=b"# Bare")
    assert model.read("README.md") == b"# Bare"


# LFS uploads


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        ("notes.txt", b"text", False),
        ("notes.txt", "é".encode() * 400, False),
        ("notes.txt", b"a" + "é".encode() * 400, False),  # the sample ends within a character
        ("notes.txt", b"text\0", True),
        ("notes.txt", b"\xff\xfe text of another encoding", True),
        ("table.parquet", b"text", True),
        ("model.SAFETENSORS", b"text", True),
        ("empty.bin", b"", False),
    ],
)
def test_large_and_binary_files_go_to_lfs(hub, alice, path, content, expected):
    alice.create_repo("x")
    alice.upload_file(repo_id="alice/x", path_in_repo=path, path_or_fileobj=content)
    repo = hub.repo("model", "alice/x")
    assert repo.read(path) == content
    assert bool(repo.file_at("main", path).sha256) == expected
    assert is_lfs("notes.txt", 20_000_000, b"text")


@pytest.mark.parametrize("multipart_size", [1 << 20, 100_000])
def test_lfs_content_is_uploaded_once(hub, alice, multipart_size):
    hub.multipart_size = multipart_size
    alice.create_repo("x")
    for name in ("a.bin", "b.bin"):
        alice.upload_file(repo_id="alice/x", path_in_repo=name, path_or_fileobj=WEIGHTS)
    repo = hub.repo("model", "alice/x")
    assert repo.read("a.bin") == repo.read("b.bin") == WEIGHTS
    assert repo.file_at("main", "a.bin").sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert hub.count("PUT", "/upload/") == (1 if multipart_size > len(WEIGHTS) else 4)
    assert hub.count("POST", "/lfs/verify") == 1
    uploads = [request for request in hub.requests if request.path.startswith("/upload/")]
    assert not any(request.authorized for request in uploads)


@pytest.mark.parametrize("multipart_size", [1 << 20, 100_000])
def test_lfs_content_with_another_hash_is_refused(hub, alice, multipart_size):
    hub.multipart_size = multipart_size
    alice.create_repo("x")
    hub.inject(Fault("corrupt_upload", method="PUT", path="/upload/"))
    with pytest.raises(RuntimeError, match="Error while uploading") as caught:
        alice.upload_file(repo_id="alice/x", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    assert "sha256" in str(caught.value.__cause__)
    repo = hub.repo("model", "alice/x")
    assert not repo.has_lfs(hashlib.sha256(WEIGHTS).hexdigest())
    assert set(repo.files()) == {".gitattributes"}
    alice.upload_file(repo_id="alice/x", path_in_repo="w.bin", path_or_fileobj=WEIGHTS)
    assert repo.read("w.bin") == WEIGHTS


@pytest.mark.parametrize(("oid", "size"), [("0" * 64, 5), (hashlib.sha256(WEIGHTS).hexdigest(), 5)])
def test_commit_with_missing_lfs_content_is_refused(hub, alice, model, oid, size):
    before = model.resolve()
    lines = [
        {"key": "header", "value": {"summary": "Pretend"}},
        {"key": "lfsFile", "value": {"path": "w", "algo": "sha256", "oid": oid, "size": size}},
    ]
    status, _, body = send(
        f"{hub.url}/api/models/alice/x/commit/main",
        "POST",
        "\n".join(map(json.dumps, lines)).encode(),
        Authorization=f"Bearer {alice.token}",
    )
    assert status == 400 and b"LFS content" in body
    assert model.resolve() == before


# Branches, tags, pull requests


def test_branches_and_tags_name_commits(hub, alice, model):
    first = model.resolve()
    alice.create_tag("alice/x", tag="v1", tag_message="first")
    alice.create_branch("alice/x", branch="feature/a", revision="v1")
    assert status_of(lambda: alice.create_branch("alice/x", branch="feature/a")) == 409
    alice.create_branch("alice/x", branch="feature/a", exist_ok=True)
    created = alice.upload_file(
        repo_id="alice/x", path_in_repo="b", path_or_fileobj=b"b", revision="feature/a"
    )
    for revision, sha in (
        ("main", first),
        ("v1", first),
        ("feature/a", created.oid),
        (first, first),
    ):
        assert alice.model_info("alice/x", revision=revision).sha == sha
    assert alice.list_repo_files("alice/x", revision="feature/a") == sorted(
        model.files(created.oid)
    )
    refs = alice.list_repo_refs("alice/x")
    assert {ref.name: ref.target_commit for ref in refs.branches} == {
        "main": first,
        "feature/a": created.oid,
    }
    assert [(tag.name, tag.ref) for tag in refs.tags] == [("v1", "refs/tags/v1")]
    alice.delete_tag("alice/x", tag="v1")
    alice.delete_branch("alice/x", branch="feature/a")
    assert set(model.refs) == {"refs/heads/main"}
    with pytest.raises(RevisionNotFoundError):
        alice.model_info("alice/x", revision="v1")
    assert status_of(lambda: alice.delete_branch("alice/x", branch="main")) == 403
    assert alice.model_info("alice/x", revision=created.oid).sha == created.oid


def test_squash_leaves_one_commit_with_the_same_files(alice, model):
    files = model.files()
    alice.super_squash_history("alice/x")
    assert len(model.commits()) == 1
    assert model.files() == files


def test_users_without_write_access_open_pull_requests(hub, alice, model):
    bob = client_of(hub, "bob")
    upload = {"repo_id": "alice/x", "path_in_repo": "b.txt", "path_or_fileobj": b"b"}
    assert status_of(lambda: bob.upload_file(**upload)) == 403
    before = model.resolve()
    created = bob.upload_file(**upload, create_pr=True)
    assert created.pr_revision == "refs/pr/1" and created.pr_num == 1
    assert model.resolve("refs/pr/1") == created.oid and model.resolve() == before
    assert "b.txt" in alice.list_repo_files("alice/x", revision="refs/pr/1")
    refs = alice.list_repo_refs("alice/x", include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.pull_requests] == [
        ("refs/pr/1", created.oid)
    ]
    alice.comment_discussion("alice/x", 1, comment="Good")
    alice.merge_pull_request("alice/x", 1)
    details = alice.get_discussion_details("alice/x", 1)
    assert details.status == "merged" and details.merge_commit_oid == model.resolve()
    assert model.read("b.txt") == b"b"
    assert [discussion.num for discussion in alice.get_repo_discussions("alice/x")] == [1]


# Who may do what


def test_tokens_name_user_and_role(hub, alice):
    me = alice.whoami()
    assert me["name"] == "alice" and [org["name"] for org in me["orgs"]] == ["lab"]
    assert me["auth"]["accessToken"]["role"] == "write"
    assert alice.create_repo("lab/x").repo_id == "lab/x"
    assert status_of(lambda: alice.create_repo("bob/x")) == 403

    reader = client_of(hub, "alice", "read")
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    assert status_of(lambda: reader.create_repo("y")) == 403
    fine = client_of(hub, "alice", "fineGrained", writes_to=["lab"])
    assert fine.create_repo("lab/y").repo_id == "lab/y"
    assert status_of(lambda: fine.create_repo("alice/y")) == 403
    member = client_of(hub, "carol", orgs={"lab": "read"})
    assert status_of(lambda: member.create_repo("lab/z")) == 403

    other = HfApi(endpoint=hub.url, token="hf_wrong")
    assert status_of(other.whoami) == 401
    assert status_of(lambda: other.model_info("lab/x")) == 401
    assert status_of(lambda: HfApi(endpoint=hub.url, token=False).create_repo("alice/y")) == 401


def test_private_repository_does_not_exist_for_others(hub, alice, tmp_path):
    alice.create_repo("secret", private=True)
    alice.upload_file(repo_id="alice/secret", path_in_repo="a", path_or_fileobj=b"a")
    assert alice.model_info("alice/secret").private
    alice.auth_check("alice/secret")
    others = (client_of(hub, "bob"), HfApi(endpoint=hub.url, token=False))
    for other in others:
        for call in (
            lambda: other.model_info("alice/secret"),  # noqa: B023
            lambda: other.list_repo_files("alice/secret"),  # noqa: B023
            lambda: other.hf_hub_download("alice/secret", "a", cache_dir=tmp_path),  # noqa: B023
        ):
            with pytest.raises((RepositoryNotFoundError, OSError)) as caught:
                call()
            causes = [caught.value, caught.value.__cause__]
            assert any(isinstance(cause, RepositoryNotFoundError) for cause in causes)
    assert [repo.id for repo in alice.list_models(author="alice")] == ["alice/secret"]
    assert list(others[0].list_models(author="alice")) == []
    alice.update_repo_settings("alice/secret", private=False)
    assert others[0].model_info("alice/secret").private is False


def test_gated_files_need_a_grant(hub, alice, model, tmp_path):
    alice.update_repo_settings("alice/x", gated="manual")
    bob = client_of(hub, "bob")
    assert bob.model_info("alice/x").gated == "manual"
    for other in (bob, HfApi(endpoint=hub.url, token=False)):
        with pytest.raises(GatedRepoError):
            other.get_hf_file_metadata(url=f"{hub.url}/alice/x/resolve/main/README.md")
    # Not by `alice.grant_access`: huggingface_hub 1.x sends that to the public Hub, always.
    grant = f"{hub.url}/api/models/alice/x/user-access-request/grant"
    authorization = {"Authorization": f"Bearer {alice.token}"}
    assert send(grant, "POST", b'{"user": "bob"}')[0] == 401
    assert send(grant, "POST", b'{"user": "bob"}', **authorization)[0] == 200
    path = bob.hf_hub_download("alice/x", "README.md", cache_dir=tmp_path)
    assert Path(path).read_bytes() == CARD


# Repositories


def test_repositories_are_created_moved_and_deleted(hub, alice, tmp_path):
    alice.create_repo("x", repo_type="dataset")
    alice.create_repo("x", repo_type="space", space_sdk="static")
    assert alice.space_info("alice/x").sdk == "static"
    alice.upload_file(
        repo_id="alice/x", path_in_repo="a", path_or_fileobj=b"a", repo_type="dataset"
    )
    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/x")
    alice.move_repo("alice/x", "lab/y", repo_type="dataset")
    assert alice.dataset_info("alice/x").id == "lab/y"  # redirected
    path = alice.hf_hub_download("alice/x", "a", repo_type="dataset", cache_dir=tmp_path)
    assert Path(path).read_bytes() == b"a"
    alice.delete_repo("lab/y", repo_type="dataset")
    with pytest.raises(RepositoryNotFoundError):
        alice.dataset_info("lab/y")
    assert alice.repo_exists("alice/x", repo_type="space")


def test_info_describes_the_repository(hub, alice, model):
    info = alice.model_info("alice/x", files_metadata=True)
    assert info.sha == model.resolve() and info.tags == ["tiny"]
    assert info.card_data.license == "mit"
    weights = {file.rfilename: file for file in info.siblings}["unet/w.safetensors"]
    assert weights.size == weights.lfs.size == len(WEIGHTS)
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert alice.model_info("alice/x", expand=["sha"]).siblings is None


def test_tree_is_listed_in_pages(hub, alice, model):
    hub.page_size = 2
    entries = list(alice.list_repo_tree("alice/x", recursive=True, expand=True))
    assert [entry.path for entry in entries] == [
        ".gitattributes",
        "README.md",
        "unet",
        "unet/config.json",
        "unet/w.safetensors",
    ]
    assert hub.count("GET", "/tree/") == 3
    assert entries[0].last_commit.title == "initial commit"
    assert entries[2].last_commit.oid == model.resolve()
    assert [entry.path for entry in alice.list_repo_tree("alice/x", "unet")] == [
        "unet/config.json",
        "unet/w.safetensors",
    ]
    with pytest.raises(EntryNotFoundError):
        list(alice.list_repo_tree("alice/x", "missing"))
    paths = alice.get_paths_info("alice/x", ["unet", "README.md", "missing"])
    assert [path.path for path in paths] == ["unet", "README.md"]


def test_unknown_path_is_a_404(hub):
    for path in ("/api/agent-harnesses", "/nowhere", "/api/models/a/b/unheard-of"):
        status, headers, body = send(hub.url + path)
        assert status == 404 and "error" in json.loads(body)
        assert headers["Content-Type"] == "application/json"


# Downloads


def test_snapshot_is_what_was_committed(hub, alice, model, tmp_path):
    sha = model.resolve()
    folder = Path(alice.snapshot_download("alice/x", cache_dir=tmp_path / "cache"))
    assert folder.name == sha
    got = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    assert got == model.files()
    assert alice.verify_repo_checksums("alice/x", cache_dir=tmp_path / "cache").checked_count == 4
    cdn = [request for request in hub.requests if request.path.startswith("/cdn/")]
    assert len(cdn) == 1 and not cdn[0].authorized
    with pytest.raises(EntryNotFoundError):
        alice.hf_hub_download("alice/x", "missing", cache_dir=tmp_path / "cache")
    known = try_to_load_from_cache("alice/x", "missing", cache_dir=tmp_path / "cache")
    assert known is huggingface_hub._CACHED_NO_EXIST
    with pytest.raises(RevisionNotFoundError):
        alice.hf_hub_download("alice/x", "a", revision="nowhere", cache_dir=tmp_path / "cache")


def test_headers_name_commit_and_content(hub, model, monkeypatch):
    status, headers, body = send(f"{hub.url}/alice/x/resolve/main/README.md", "HEAD")
    assert status == 200 and body == b"" and headers["Content-Length"] == str(len(CARD))
    assert headers["X-Repo-Commit"] == model.resolve()
    blob = hashlib.sha1(f"blob {len(CARD)}\0".encode() + CARD).hexdigest()
    assert headers["ETag"] == f'"{blob}"'

    status, headers, _ = send(f"{hub.url}/alice/x/resolve/main/unet/w.safetensors", "HEAD")
    assert status == 302 and headers["X-Linked-Size"] == str(len(WEIGHTS))
    assert headers["X-Linked-ETag"] == f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    link, endpoint = urlsplit(headers["Location"]), urlsplit(hub.url)
    assert link.hostname != endpoint.hostname and link.port != endpoint.port
    assert send(headers["Location"])[2] == WEIGHTS
    assert send(headers["Location"].split("?")[0])[0] == 403
    assert send(headers["Location"].replace("expires=", "expires=1"))[0] == 403
    assert send(headers["Location"].replace("w.safetensors", "other"))[0] == 403
    monkeypatch.setattr(transfers, "LINK_LIFETIME", -1)
    _, headers, _ = send(f"{hub.url}/alice/x/resolve/main/unet/w.safetensors", "HEAD")
    assert send(headers["Location"])[0] == 403


def test_ranges_are_parts_of_the_file(hub, model):
    url = send(f"{hub.url}/alice/x/resolve/main/unet/w.safetensors", "HEAD")[1]["Location"]
    size = len(WEIGHTS)
    for wanted, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=1000-1999", 1000, 2000),
        ("bytes=307000-", 307000, size),
        ("bytes=-7", size - 7, size),
        ("bytes=307000-999999", 307000, size),
    ):
        status, headers, body = send(url, Range=wanted)
        assert status == 206 and body == WEIGHTS[start:end]
        assert headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
    status, headers, _ = send(url, Range=f"bytes={size}-")
    assert status == 416 and headers["Content-Range"] == f"bytes */{size}"
    assert send(f"{hub.url}/alice/x/resolve/main/README.md", Range="bytes=4-6")[2] == CARD[4:7]


# Faults


def test_status_fault_applies_the_given_number_of_times(hub, alice, model):
    hub.inject(Fault("status", path="whoami", skip=1, times=2, status=503))
    statuses = [send(f"{hub.url}/api/whoami-v2")[0] for _ in range(4)]
    assert statuses == [401, 503, 503, 401]
    hub.inject(
        Fault(
            "status", path="/api/", status=429, headers={"Retry-After": "7"}, times=None, body="x"
        )
    )
    for _ in range(3):
        status, headers, body = send(f"{hub.url}/api/whoami-v2")
        assert (status, headers["Retry-After"], body) == (429, "7", b"x")
    hub.clear_faults()
    assert alice.whoami()["name"] == "alice"


def test_client_retries(hub, alice, model):
    hub.inject(Fault("status", path="/preupload/", status=429, headers={"Retry-After": "0"}))
    alice.upload_file(repo_id="alice/x", path_in_repo="a", path_or_fileobj=b"a")
    preuploads = [record.status for record in hub.requests if "/preupload/" in record.path]
    assert preuploads == [429, 200]
    assert model.read("a") == b"a"


@pytest.mark.parametrize("kind", ["status", "drop"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_fault_applies_before_or_after_the_effect(hub, alice, model, kind, when):
    before = model.resolve()
    hub.inject(Fault(kind, method="POST", path="/commit/", status=500, when=when))
    with pytest.raises(Exception) as caught:  # noqa: B017
        alice.upload_file(repo_id="alice/x", path_in_repo="a", path_or_fileobj=b"a")
    if kind == "status":
        assert caught.value.response.status_code == 500
    else:
        assert "disconnected" in str(caught.value)
    assert ("a" in model.files()) == (when == "after")
    assert len(model.commits()) == (3 if when == "after" else 2)
    assert (model.resolve() == before) == (when == "before")
    assert hub.requests[-1].status == (500 if kind == "status" else None)


def test_delay_fault_waits(hub, alice):
    hub.inject(Fault("delay", path="whoami", seconds=0.4))
    start = time.monotonic()
    alice.whoami()
    assert time.monotonic() - start >= 0.4
    start = time.monotonic()
    alice.whoami()
    assert time.monotonic() - start < 0.4


def test_reset_fault_resets_the_connection_in_the_body(hub, alice, model):
    hub.inject(Fault("reset", method="PUT", path="/upload/"))
    alice.upload_file(repo_id="alice/x", path_in_repo="new.bin", path_or_fileobj=WEIGHTS[::-1])
    puts = [record.status for record in hub.requests if record.method == "PUT"]
    assert puts == [None, 200] and model.read("new.bin") == WEIGHTS[::-1]
    hub.inject(Fault("reset", path="/whoami"))
    with pytest.raises(Exception, match="disconnected|reset"):
        alice.whoami()


def test_received_requests_can_be_read(hub, alice, model):
    hub.received = []
    alice.upload_file(repo_id="alice/x", path_in_repo="a", path_or_fileobj=b"to be found")
    received = b"\n".join(hub.received)
    assert (
        base64.b64encode(b"to be found") in received
        and b"/api/models/alice/x/commit/main" in received
    )
    assert alice.token.encode() not in received


def test_lfs_contents_that_no_commit_names_can_be_deleted(hub, alice, model):
    alice.upload_file(
        repo_id="alice/x", path_in_repo="unet/w.safetensors", path_or_fileobj=WEIGHTS[::-1]
    )
    named = hashlib.sha256(WEIGHTS[::-1]).hexdigest()
    files = {file.file_oid: file for file in alice.list_lfs_files("alice/x")}
    assert set(files) == {named, hashlib.sha256(WEIGHTS).hexdigest()}
    assert files[named].size == len(WEIGHTS)
    with pytest.raises(HfHubHTTPError):
        alice.permanently_delete_lfs_files("alice/x", [files.pop(named)])
    alice.permanently_delete_lfs_files("alice/x", files.values())
    assert [file.file_oid for file in alice.list_lfs_files("alice/x")] == [named]


def test_truncated_download_is_retried(hub, alice, model, tmp_path):
    hub.inject(Fault("truncate", method="GET", path="/cdn/.*/w.safetensors"))
    path = alice.hf_hub_download("alice/x", "unet/w.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert hub.count("GET", "/cdn/") == 2


def test_corrupt_download_differs_in_one_byte(hub, alice, model, tmp_path):
    hub.inject(Fault("corrupt", method="GET", path="/cdn/"))
    path = alice.hf_hub_download("alice/x", "unet/w.safetensors", cache_dir=tmp_path)
    got = Path(path).read_bytes()
    assert len(got) == len(WEIGHTS)
    assert sum(one != other for one, other in zip(got, WEIGHTS, strict=True)) == 1


def test_faults_and_log_over_http(hub, alice, model):
    fault = {"kind": "status", "path": "whoami", "status": 503, "times": None}
    assert send(f"{hub.url}/-/faults", "POST", json.dumps(fault).encode())[0] == 200
    assert status_of(alice.whoami) == 503
    assert json.loads(send(f"{hub.url}/-/faults")[2])[0]["seen"] == 1
    assert send(f"{hub.url}/-/faults", "DELETE")[0] == 200
    alice.whoami()
    for wrong in (b'{"kind": "meteor"}', b'{"kind": "drop", "path": "("}', b"{}", b"["):
        assert send(f"{hub.url}/-/faults", "POST", wrong)[0] == 400
    log = send(f"{hub.url}/-/requests")[2]
    assert [(record["path"], record["status"], record["user"]) for record in json.loads(log)] == [
        ("/api/whoami-v2", 503, "alice"),
        ("/api/whoami-v2", 200, "alice"),
    ]
    assert alice.token.encode() not in log and "hf_hub/" in log.decode()
    send(f"{hub.url}/-/requests", "DELETE")
    assert hub.requests == []


# The server itself


def test_restart_keeps_everything(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        alice = client_of(hub, "alice")
        alice.create_repo("x", private=True)
        created = alice.upload_file(
            repo_id="alice/x", path_in_repo="w.bin", path_or_fileobj=WEIGHTS
        )
        alice.create_tag("alice/x", tag="v1")
        alice.upload_file(repo_id="alice/x", path_in_repo="a", path_or_fileobj=b"a", create_pr=True)
        alice.upload_file(repo_id="alice/x", path_in_repo="last", path_or_fileobj=b"last")
        refs, old_url = dict(hub.repo("model", "alice/x").refs), hub.url
    with pytest.raises(OSError):
        send(f"{old_url}/api/whoami-v2")
    assert alice.token not in (tmp_path / "hub" / "users.json").read_text()

    with Hub(tmp_path / "hub") as hub:
        again = HfApi(endpoint=hub.url, token=alice.token)
        assert again.model_info("alice/x", revision="v1").sha == created.oid
        assert hub.repo("model", "alice/x").refs == refs and "refs/pr/1" in refs
        path = again.hf_hub_download("alice/x", "w.bin", cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == WEIGHTS
        assert [discussion.num for discussion in again.get_repo_discussions("alice/x")] == [1]


def test_stop_closes_connections_kept_alive(hub):
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    with contextlib.closing(connection):
        for _ in range(2):  # one connection carries both, though the body was not wanted
            connection.request("POST", "/nowhere", body=b"x" * 100_000)
            assert connection.getresponse().read()
        hub.stop()
        with pytest.raises((http.client.HTTPException, OSError)):
            connection.request("GET", "/api/whoami-v2")
            connection.getresponse()


def test_clients_that_hang_up_are_ignored(hub, alice, model, capfd):
    address = urlsplit(hub.url)
    for message in (b"", b"nonsense\r\n\r\n", b"POST /x HTTP/1.1\r\nContent-Length: 99\r\n\r\nabc"):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(message)
    assert alice.whoami()["name"] == "alice"
    assert capfd.readouterr().err == ""


def test_chunked_uploads_are_read(hub, alice):
    connection = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    with contextlib.closing(connection):
        body = json.dumps({"name": "x", "type": "model"}).encode()
        headers = {"Authorization": f"Bearer {alice.token}", "Transfer-Encoding": "chunked"}
        pieces = iter([body[:5], body[5:]])
        connection.request("POST", "/api/repos/create", pieces, headers, encode_chunked=True)
        assert connection.getresponse().status == 200
    assert hub.repo("model", "alice/x")


# Xet


@pytest.fixture
def with_xet(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", False)


def test_xet_content_is_sent_once_and_comes_back(hub, alice, with_xet, tmp_path):
    """Contents of one and of several chunks, compressed in each way."""
    noise = np.random.default_rng(0)
    contents = {
        "noise.bin": noise.bytes(400_000),
        "repeated.bin": WEIGHTS,
        "floats.bin": noise.normal(size=100_001).astype(np.float32).tobytes()[:-3],
        "small.bin": b"\0",
    }
    (tmp_path / "folder").mkdir()
    for name, content in contents.items():
        (tmp_path / "folder" / name).write_bytes(content)
    alice.create_repo("x")
    alice.upload_folder(repo_id="alice/x", folder_path=tmp_path / "folder")
    assert hub.repo("model", "alice/x").files().items() >= contents.items()
    assert hub.count("POST", "/v1/xorbs/") > 0 and not hub.count("PUT")

    folder = Path(alice.snapshot_download("alice/x", cache_dir=tmp_path / "cache"))
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    assert hub.count("GET", "/cdn/.*/xorbs/") == hub.count("GET", "/cdn/") == len(contents)

    sent = hub.count("POST", "/v1/xorbs/")
    alice.upload_file(repo_id="alice/x", path_in_repo="again.bin", path_or_fileobj=WEIGHTS)
    assert hub.count("POST", "/v1/xorbs/") == sent
    assert hub.repo("model", "alice/x").read("again.bin") == WEIGHTS


def test_xet_content_with_another_hash_is_refused(hub, alice, with_xet):
    alice.create_repo("x")
    upload = {"repo_id": "alice/x", "path_in_repo": "w.bin", "path_or_fileobj": WEIGHTS}
    hub.inject(Fault("corrupt_upload", path="/v1/xorbs/"))
    with pytest.raises(ConnectionError, match="400"):
        alice.upload_file(**upload)
    assert not list(hub.repo("model", "alice/x").folder.glob("lfs/*"))
    alice.upload_file(**upload)
    assert hub.repo("model", "alice/x").read("w.bin") == WEIGHTS


def test_xet_tokens_are_for_one_repository_and_purpose(hub, alice, model):
    hub.create_repo("model", "alice/closed", visibility="private")
    hub.add_user("bob", token="hf_bob")
    login = {"Authorization": f"Bearer {alice.token}"}

    def token(repo: str, scope: str, **headers: str) -> tuple[int, dict]:
        status, _, body = send(f"{hub.url}/api/models/{repo}/xet-{scope}-token/main", **headers)
        return status, json.loads(body)

    assert token("alice/closed", "read")[0] == 401
    assert token("alice/x", "write")[0] == 401
    assert token("alice/closed", "write", Authorization="Bearer hf_bob")[0] == 404
    read, write = token("alice/x", "read")[1], token("alice/x", "write", **login)[1]
    other = token("alice/closed", "write", **login)[1]["accessToken"]
    for given, status in (
        (write["accessToken"], 400),
        (read["accessToken"], 403),
        (other, 401),
        (read["accessToken"].replace("read", "write"), 401),
        ("", 401),
    ):
        bearer = {"Authorization": f"Bearer {given}"}
        url = f"{read['casUrl']}/v1/xorbs/default/{'0' * 64}"
        assert send(url, "POST", b"no xorb", **bearer)[0] == status


def test_xet_reconstruction_of_a_range(hub, model):
    file = model.file_at("main", "unet/w.safetensors")
    read = json.loads(send(f"{hub.url}/api/models/alice/x/xet-read-token/main")[2])
    url = f"{read['casUrl']}/v1/reconstructions/{xet_hash(file.sha256)}"
    headers = {"Authorization": f"Bearer {read['accessToken']}", "Range": "bytes=150000-250000"}
    answer = json.loads(send(url, **headers)[2])
    (term,), ((part,),) = answer["terms"], answer["fetch_info"].values()
    assert term["range"] == part["range"] == {"start": 1, "end": 3}
    span = part["url_range"]
    status, _, xorb = send(part["url"], Range=f"bytes={span['start']}-{span['end']}")
    chunks = b"".join(xet.chunks_of(xorb))
    assert status == 206 and len(chunks) == term["unpacked_length"]
    start = answer["offset_into_first_range"]
    assert chunks[start : start + 100_001] == WEIGHTS[150_000:250_001]


# Programs


@pytest.mark.slow
def test_command_line_uploads_and_downloads(hub, alice, tmp_path):
    command = str(Path(sys.executable).parent / "hf")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "w.bin").write_bytes(WEIGHTS)

    def hf(*arguments: str) -> str:
        return run_client(hub, alice.token, tmp_path / "home", command, *arguments)

    assert "alice" in hf("auth", "whoami")
    hf("upload", "alice/x", str(tmp_path / "folder"), "--repo-type", "dataset", "--private")
    repo = hub.repo("dataset", "alice/x")
    assert repo.is_private and repo.read("w.bin") == WEIGHTS
    hf("download", "alice/x", "--repo-type", "dataset", "--local-dir", str(tmp_path / "got"))
    assert (tmp_path / "got" / "w.bin").read_bytes() == WEIGHTS


def test_module_serves_a_hub(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.hub", "--port", "0", "--root", str(tmp_path / "hub")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        while "Ctrl+C" not in (line := process.stdout.readline()):
            assert line, "the server ended"
            lines.append(line)
        exports = [line.removeprefix("export ").strip() for line in lines if "export" in line]
        settings = dict(export.split("=", 1) for export in exports)
        assert settings["HF_HUB_DISABLE_XET"] == "0"
        api = HfApi(endpoint=settings["HF_ENDPOINT"], token=settings["HF_TOKEN"])
        assert api.whoami()["name"] == "me"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        process.stdout.close()


LOAD_DATASETS = """
import json
from datasets import Dataset, load_dataset

numbers = Dataset.from_dict({"n": list(range(10))})
numbers.push_to_hub("alice/numbers", private=True)
back = load_dataset("alice/numbers", split="train")
streamed = load_dataset("alice/numbers", split="train", streaming=True)
images = load_dataset("alice/images", split="train")
print(json.dumps({
    "n": back["n"][:],
    "streamed": [row["n"] for row in streamed],
    "pixels": [image.getpixel((0, 0)) for image in images["image"]],
}))
"""


@pytest.mark.slow
def test_datasets_are_pushed_and_loaded(hub, alice, tmp_path):
    colors = [(10, 20, 30), (200, 100, 0)]
    files = {}
    for number, color in enumerate(colors):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), color).save(buffer, "PNG")
        files[f"train/{number}.png"] = buffer.getvalue()
    hub.create_repo("dataset", "alice/images", visibility="private").write(files)

    output = run_client(hub, alice.token, tmp_path / "home", sys.executable, "-c", LOAD_DATASETS)
    got = json.loads(output.splitlines()[-1])
    assert got["n"] == got["streamed"] == list(range(10))
    assert got["pixels"] == [list(color) for color in colors]
    repo = hub.repo("dataset", "alice/numbers")
    (parquet,) = [path for path in repo.files() if path.endswith(".parquet")]
    assert repo.is_private and repo.file_at("main", parquet).sha256


PUSH_PIPELINE = """
import json
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

unet = UNet2DModel(
    sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
    down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
)
created = DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).push_to_hub("alice/ddpm", private=True)
loaded = DDPMPipeline.from_pretrained("alice/ddpm", revision=created.oid)
pairs = zip(unet.state_dict().items(), loaded.unet.state_dict().items(), strict=True)
same = all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)
print(json.dumps({"oid": created.oid, "same": same}))
"""


@pytest.mark.slow
def test_pipeline_is_pushed_and_loaded(hub, alice, tmp_path):
    pytest.importorskip("diffusers")
    output = run_client(hub, alice.token, tmp_path / "home", sys.executable, "-c", PUSH_PIPELINE)
    got = json.loads(output.splitlines()[-1])
    repo = hub.repo("model", "alice/ddpm")
    assert got == {"oid": repo.resolve(), "same": True}
    assert len(repo.commits()) == 2 and repo.is_private
    assert {"model_index.json", "README.md", "unet/config.json"} <= set(repo.files())
