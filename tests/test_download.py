"""Downloads that are verified: damaged files, a cache without a network, a full disk."""

import errno

import pytest
from huggingface_hub import HfApi, ModelInfo, constants, snapshot_download

from ddpm.download import download_snapshot
from ddpm.errors import UserError
from tests.hub import LARGE_DOWNLOADS, Fault

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    """The sleeps between retries take no time."""
    monkeypatch.setattr("ddpm.hub.time.sleep", lambda seconds: None)


@pytest.fixture
def model(hub, request):
    """A public model of alice with a small file of each kind; the value is its id."""
    repo_id = f"alice/{request.node.name[:60].strip('[]-').replace('[', '-')}"
    repository = hub.create_repo("model", repo_id)
    repository.write({"config.json": b"{}", WEIGHTS: bytes(range(256)) * 40}, "first")
    return repo_id


def download(repo_id, tmp_path, **options):
    return download_snapshot(repo_id, cache_dir=str(tmp_path / "cache"), **options)


def test_revision_is_downloaded_and_verified(hub, model, tmp_path):
    snapshot = download(model, tmp_path)
    repository = hub.repo("model", model)
    assert snapshot.commit == repository.resolve() == snapshot.folder.name
    assert (snapshot.folder / WEIGHTS).read_bytes() == bytes(range(256)) * 40
    assert snapshot.num_checked == len(repository.files())


def test_branch_tag_and_commit_resolve_to_the_commit(hub, model, tmp_path):
    first = hub.repo("model", model).resolve()
    HfApi(token=hub.add_user("alice")).create_tag(model, tag="v1")
    newer = hub.repo("model", model).write({"config.json": b"[]"}, "second")
    for revision, commit in (("v1", first), (first, first), ("main", newer), (None, newer)):
        assert download(model, tmp_path, revision=revision).commit == commit


def test_corrupted_file_is_downloaded_again(hub, model, transfer, tmp_path):
    hub.inject(Fault("corrupt", path=LARGE_DOWNLOADS))
    snapshot = download(model, tmp_path)
    assert (snapshot.folder / WEIGHTS).read_bytes() == bytes(range(256)) * 40
    assert hub.count("GET", LARGE_DOWNLOADS) == 2


def test_file_that_stays_corrupted_is_refused(hub, model, transfer, tmp_path):
    hub.inject(Fault("corrupt", path=LARGE_DOWNLOADS, times=None))
    with pytest.raises(UserError, match=f"differ from the Hub's hashes .{WEIGHTS}, twice"):
        download(model, tmp_path)


def test_damaged_file_in_the_cache_is_downloaded_again(hub, model, transfer, tmp_path):
    path = download(model, tmp_path).folder / WEIGHTS
    path.resolve().write_bytes(bytes(256) * 40)
    assert (download(model, tmp_path).folder / WEIGHTS).read_bytes() == bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", path=LARGE_DOWNLOADS, status=401, times=None), "does not exist on"),
        (Fault("status", path=LARGE_DOWNLOADS, status=429, times=None), "asks for a pause"),
        (Fault("status", path=LARGE_DOWNLOADS, status=503, times=None), r"has a problem \(503\)"),
        (Fault("drop", path=LARGE_DOWNLOADS, times=None), "could not be reached"),
        (Fault("truncate", path=LARGE_DOWNLOADS, times=None), "could not be reached"),
    ],
    ids=["401", "429", "503", "drop", "cut"],
)
def test_failed_download_is_a_message(hub, model, tmp_path, fault, message):
    """hf_xet raises a RuntimeError for each of these."""
    hub.inject(fault)
    with pytest.raises(UserError, match=message):
        download(model, tmp_path)


def test_full_disk_is_an_error_of_the_disk(hub, model, transfer, make_disk):
    """hf_xet raises a RuntimeError."""
    hub.repo("model", model).write({"more.bin": bytes(500_000)})
    with pytest.raises(OSError) as error:
        download(model, make_disk(200))
    assert error.value.errno == errno.ENOSPC


def test_a_cache_without_locks_is_an_error_of_the_disk(hub, model, tmp_path, no_locks):
    no_locks()
    with pytest.raises(OSError, match="No locks available"):
        download(model, tmp_path)


@pytest.mark.parametrize("revision", [None, "main"])
def test_cache_does_not_replace_a_hub_that_is_down(hub, model, tmp_path, revision):
    download(model, tmp_path)
    hub.inject(Fault("status", status=503, times=None))
    with pytest.raises(UserError, match="has a problem"):
        download(model, tmp_path, revision=revision)


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "copies"])
def test_offline_the_cache_is_used_and_verified(hub, model, tmp_path, monkeypatch, has_links):
    """With Xet, the default, every offline use once ended in "damaged in the cache"."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not has_links)
    path = download(model, tmp_path).folder / WEIGHTS
    assert path.is_symlink() == has_links  # newer clients make the blob of Xet a link again
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear_requests()
    offline = download(model, tmp_path)
    assert offline.folder == path.parents[1] and not hub.requests
    assert offline.num_checked == len(hub.repo("model", model).files())
    path.resolve().write_bytes(bytes(256) * 40)
    with pytest.raises(UserError, match=f"damaged in the cache .{WEIGHTS}"):
        download(model, tmp_path)


@pytest.mark.parametrize("part", [None, "unet/*"], ids=["none", "part"])
def test_offline_without_a_whole_copy_names_the_command(hub, model, monkeypatch, part):
    if part:
        snapshot_download(model, allow_patterns=part)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    command = f"HF_HUB_OFFLINE .* unset it and run again, or first run `hf download {model}`.$"
    with pytest.raises(UserError, match=command):
        download_snapshot(model, allow_patterns=["config.json"])


def test_offline_what_hf_download_got_is_used(hub, model, monkeypatch):
    folder = snapshot_download(model, revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert str(download_snapshot(model, allow_patterns=["config.json"]).folder) == folder
    with pytest.raises(UserError, match=f"`hf download {model} --revision v1`"):
        download_snapshot(model, revision="v1")


def test_missing_private_and_gated_differ(hub, model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"alice/nothing does not exist .* or is private"):
        download("alice/nothing", tmp_path)
    for settings, word in (({"visibility": "private"}, "private"), ({"gated": "manual"}, "gated")):
        repo_id = f"bob/{word}-of-{len(hub.store.all('models'))}"
        hub.create_repo("model", repo_id, **settings).write({"config.json": b"{}"}, "first")
        with pytest.raises(UserError, match=word):
            download(repo_id, tmp_path)
        monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
        assert download(repo_id, tmp_path).commit
        monkeypatch.delenv("HF_TOKEN")


def test_a_missing_revision_is_named_with_those_that_exist(hub, model):
    HfApi(token=hub.add_user("alice")).create_tag(model, tag="v1")
    message = r"no branch, tag or commit v9: give another revision\. It has main, v1\.$"
    with pytest.raises(UserError, match=message):
        download_snapshot(model, revision="v9")


@pytest.mark.parametrize("repo_type", ["dataset", "space"])
def test_a_repository_of_another_type_is_named(hub, model, repo_type):
    name = f"{model}-{repo_type}"
    hub.create_repo(repo_type, name)
    with pytest.raises(UserError, match=rf"There is a {repo_type} of that name; give a model\.$"):
        download_snapshot(name)


@pytest.mark.parametrize("sha", ["../../x", "main", "A" * 40, "a" * 39, f"{'a' * 40}\n", None])
def test_commit_of_the_hub_that_is_none_names_no_folder(tmp_path, monkeypatch, sha):
    monkeypatch.setattr(HfApi, "repo_info", lambda *a, **k: ModelInfo(id="a/b", sha=sha))
    with pytest.raises(UserError, match="as its commit, which is none"):
        download("a/b", tmp_path)
    assert not (tmp_path / "cache").exists()


def test_token_that_no_header_can_hold_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_é" + "x" * 20)
    with pytest.raises(UserError, match="has characters that no token has. Log in with"):
        download("a/b", tmp_path)
