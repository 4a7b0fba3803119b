"""Failures of the Hub in words, write access, and downloads that are verified."""

import errno
import sys
import traceback

import pytest
from huggingface_hub import HfApi, ModelInfo, constants

from ddpm import hub as client
from ddpm.errors import UsageError, UserError
from ddpm.hub import PROXY_VARIABLES, require_write_access, whoami
from tests.hub import LARGE_DOWNLOADS, Fault

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """Seconds of the sleeps between retries, which take no time."""
    delays = []
    monkeypatch.setattr(client.time, "sleep", delays.append)
    return delays


@pytest.fixture
def model(hub, request):
    """A public model of alice with a small file of each kind; the value is its id."""
    repo_id = f"alice/{request.node.name[:60].strip('[]-').replace('[', '-')}"
    repository = hub.create_repo("model", repo_id)
    repository.write({"config.json": b"{}", WEIGHTS: bytes(range(256)) * 40}, "first")
    return repo_id


# Logins in addresses


def test_the_login_in_the_address_of_the_hub_is_not_shown(monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://alice:s3cr3t@127.0.0.1:9/")
    assert client.endpoint() == "http://***@127.0.0.1:9"
    with pytest.raises(UserError, match="could not be reached") as error, client.hub_errors("It"):
        client.call(HfApi().model_info, "a/b")
    assert "s3cr3t" not in str(error.value)


@pytest.fixture
def no_proxies(new_client, monkeypatch):
    """The client is made in the test, and no proxy is set yet."""
    for name in PROXY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize("proxy", ["http://a:s3cr3t@host:9x", "foo://a:s3cr3t@host:9"])
def test_a_proxy_that_is_no_address_is_named_and_not_shown(no_proxies, monkeypatch, proxy):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    problem = pytest.raises(UsageError, match=r"variable \(HTTPS_PROXY\) is no address.*unset it")
    with problem as error, client.hub_errors("It"):
        client.call(HfApi().model_info, "a/b")
    assert "s3cr3t" not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("scheme", ["socks", "socks4", "socks5", "SOCKS5h"])
def test_a_socks_proxy_is_named_with_its_cure(no_proxies, monkeypatch, scheme):
    """Desktops set both spellings. Without socksio no scheme of SOCKS can be used."""
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    for name in ("ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"{scheme}://a:s3cr3t@127.0.0.1:1080/")
    problem = pytest.raises(
        UsageError, match=r"^The SOCKS proxy in ALL_PROXY and all_proxy .*unset it .*socksio\.$"
    )
    with problem as error, client.hub_errors("It"):
        client.call(HfApi().model_info, "a/b")
    assert "s3cr3t" not in "".join(traceback.format_exception(error.value))


def test_certificates_that_are_not_there_are_named(no_proxies, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/absent.pem")
    with pytest.raises(UsageError, match=r"^SSL_CERT_FILE .* cannot be read \(.*No such file"):
        client.call(HfApi().model_info, "a/b")


def test_offline_no_client_is_made(no_proxies, monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1080/")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE keeps"), client.hub_errors("It"):
        client.call(HfApi().model_info, "a/b")


# Accounts and write access


def test_without_a_token_the_message_says_how_to_log_in(hub):
    with pytest.raises(UserError, match=r"hf auth login.*HF_TOKEN"):
        whoami()
    assert not hub.requests


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("status", path="/whoami", status=401, times=None), "does not accept the token"),
        (Fault("status", path="/whoami", status=403, times=None), "no right"),
        (Fault("status", path="/whoami", status=429, times=None), "asks for a pause"),
        (Fault("status", path="/whoami", status=503, times=None), r"has a problem \(503\)"),
        (Fault("drop", path="/whoami", times=None), "could not be reached"),
    ],
    ids=["401", "403", "429", "503", "no answer"],
)
def test_failure_is_a_message_without_the_token(hub, alice, fault, message):
    hub.inject(fault)
    with pytest.raises(UserError, match=message) as error:
        whoami()
    assert alice not in str(error.value)


def test_transient_failure_is_retried(hub, alice, delays):
    hub.inject(Fault("status", path="/whoami", status=503, times=2))
    assert whoami().name == "alice"
    assert hub.count("GET", "/whoami") == 3 and delays == [1.0, 2.0]


def test_retry_after_is_obeyed(hub, alice, delays):
    hub.inject(Fault("status", path="/whoami", status=429, headers={"Retry-After": "30"}))
    whoami()
    assert delays == [30.0]


def test_namespace_defaults_to_the_account(hub, alice):
    assert require_write_access(None, "run") == "alice/run"
    assert require_write_access("not-there-yet", "run") == "alice/not-there-yet"
    assert not [r for r in hub.requests if r.method != "GET"]


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [
        ("bob/x", "alice may not write to bob.*alice/x"),
        ("readers/x", "alice may not write to readers"),
        ("alice/a b", "is not a repository id"),
        ("alice/b/c", "is not a repository id"),
        ("alice/taken", "is a dataset already"),
    ],
)
def test_no_write_access_is_an_error_before_anything_is_sent(hub, monkeypatch, repo_id, message):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("alice", orgs={"readers": "read", "us": "write"}))
    if hub.store.find("datasets", "alice/taken") is None:
        hub.create_repo("dataset", "alice/taken")
    with pytest.raises(UserError, match=message) as error:
        require_write_access(repo_id, "run")
    assert isinstance(error.value, UsageError) == ("repository id" in message)
    assert not [r for r in hub.requests if r.method != "GET"]
    assert require_write_access("us/x", "run") == "us/x"


def test_read_only_token_is_refused(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("reader", role="read"))
    with pytest.raises(UserError, match="may only read"):
        require_write_access("reader/x", "run")


def test_fine_grained_token_writes_only_in_its_scope(hub, monkeypatch):
    token = hub.add_user("carol", role="fineGrained", orgs=["us"], writes_to=["us"])
    monkeypatch.setenv("HF_TOKEN", token)
    assert require_write_access("us/x", "run") == "us/x"
    with pytest.raises(UserError, match="carol may not write to carol/x"):
        require_write_access("carol/x", "run")
    assert not [r for r in hub.requests if r.method != "GET"]


def test_access_that_the_hub_denies_is_an_error_before_anything_is_sent(hub, alice):
    hub.create_repo("model", "alice/denied")
    hub.inject(Fault("status", path="/auth-check/write", status=403, times=None))
    with pytest.raises(UserError, match="alice may not write to alice/denied with this token"):
        require_write_access("alice/denied", "run")


def test_public_repository_is_refused_as_private(hub, alice):
    hub.create_repo("model", "alice/open-to-all")
    with pytest.raises(UserError, match="exists and is public"):
        require_write_access("alice/open-to-all", "run", private=True)
    hub.create_repo("model", "alice/closed", visibility="private")
    assert require_write_access("alice/closed", "run", private=True) == "alice/closed"


def test_silent_hub_times_out(hub, alice, new_client, monkeypatch):
    """The client alone would wait forever."""
    monkeypatch.setattr(client, "TIMEOUT", 0.2)
    hub.inject(Fault("delay", path="/whoami", seconds=2, times=None))
    with pytest.raises(UserError, match="could not be reached"):
        whoami()


# Downloads


def download(repo_id, tmp_path, **options):
    return client.download_snapshot(repo_id, cache_dir=str(tmp_path / "cache"), **options)


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


@pytest.mark.parametrize("revision", [None, "main"])
def test_cache_does_not_replace_a_hub_that_is_down(hub, model, tmp_path, revision):
    download(model, tmp_path)
    hub.inject(Fault("status", status=503, times=None))
    with pytest.raises(UserError, match="has a problem"):
        download(model, tmp_path, revision=revision)


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "copies"])
def test_offline_the_cache_is_used_and_verified(
    hub, model, transfer, tmp_path, monkeypatch, has_links
):
    """With Xet, the default, every offline use once ended in "damaged in the cache"."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not has_links)
    path = download(model, tmp_path).folder / WEIGHTS
    assert path.is_symlink() == has_links
    if has_links:  # Xet's blob is a link again, to one that all repositories of the cache share
        assert (path.parent / path.readlink()).is_symlink() == (transfer == "xet")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.clear_requests()
    offline = download(model, tmp_path)
    assert offline.folder == path.parents[1] and not hub.requests
    assert offline.num_checked == len(hub.repo("model", model).files())
    path.resolve().write_bytes(bytes(256) * 40)
    with pytest.raises(UserError, match=f"damaged in the cache .{WEIGHTS}"):
        download(model, tmp_path)


def test_offline_without_a_copy_is_an_error(hub, model, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE"):
        download(model, tmp_path)


def test_missing_private_gated_and_wrong_revision_differ(hub, model, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"alice/nothing does not exist .* or is private"):
        download("alice/nothing", tmp_path)
    with pytest.raises(UserError, match="no branch, tag or commit v9"):
        download(model, tmp_path, revision="v9")
    for settings, word in (({"visibility": "private"}, "private"), ({"gated": "manual"}, "gated")):
        repo_id = f"bob/{word}-of-{len(hub.store.all('models'))}"
        hub.create_repo("model", repo_id, **settings).write({"config.json": b"{}"}, "first")
        with pytest.raises(UserError, match=word):
            download(repo_id, tmp_path)
        monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
        assert download(repo_id, tmp_path).commit
        monkeypatch.delenv("HF_TOKEN")


@pytest.mark.parametrize("sha", ["../../x", "main", "A" * 40, "a" * 39, f"{'a' * 40}\n", None])
def test_commit_of_the_hub_that_is_none_names_no_folder(tmp_path, monkeypatch, sha):
    monkeypatch.setattr(HfApi, "repo_info", lambda *a, **k: ModelInfo(id="a/b", sha=sha))
    with pytest.raises(UserError, match="as its commit, which is none"):
        download("a/b", tmp_path)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("text", ["./here", "/abs", "~/home", "a b", "a/b/c"])
def test_paths_are_not_ids(text):
    assert not client.is_repo_id(text)
    assert client.is_repo_id("owner/name-1.0") and client.is_repo_id("gpt2")


def test_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), client.hub_errors("The model x"):
        _ = 1 / 0


def test_token_that_no_header_can_hold_is_one_sentence(hub, monkeypatch):
    """As when a token is pasted with a stray letter; nothing of it is printed."""
    monkeypatch.setenv("HF_TOKEN", "hf_é" + "x" * 20)
    calls = (whoami, lambda: client.download_snapshot("a/b", allow_patterns=["config.json"]))
    for call in calls:
        with pytest.raises(
            UserError, match="has characters that no token has. Log in with"
        ) as error:
            call()
        assert "é" not in str(error.value) and "xxx" not in str(error.value)
