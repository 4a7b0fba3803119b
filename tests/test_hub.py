"""The client of the Hub: addresses and proxies that cannot be used, retries, failures in words."""

import sys
import traceback

import pytest
from huggingface_hub import HfApi, constants

from ddpm import hub as client
from ddpm.errors import UsageError, UserError
from ddpm.hub import PROXY_VARIABLES
from tests.hub import Fault


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """Seconds of the sleeps between retries, which take no time."""
    delays = []
    monkeypatch.setattr(client.time, "sleep", delays.append)
    return delays


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


# Retries and failures


def whoami():
    """Make one call that needs a token."""
    with client.hub_errors("Your account"):
        return client.call(HfApi().whoami)


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
    assert whoami()["name"] == "alice"
    assert hub.count("GET", "/whoami") == 3 and delays == [1.0, 2.0]


def test_retry_after_is_obeyed(hub, alice, delays):
    hub.inject(Fault("status", path="/whoami", status=429, headers={"Retry-After": "30"}))
    whoami()
    assert delays == [30.0]


def test_silent_hub_times_out(hub, alice, new_client, monkeypatch):
    """The client alone would wait forever."""
    monkeypatch.setattr(client, "TIMEOUT", 0.2)
    hub.inject(Fault("delay", path="/whoami", seconds=2, times=None))
    with pytest.raises(UserError, match="could not be reached"):
        whoami()


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
    with pytest.raises(UserError, match="has characters that no token has. Log in with") as error:
        whoami()
    assert "é" not in str(error.value) and "xxx" not in str(error.value)
