"""Accounts of the Hub and write access: refused before anything is sent."""

import pytest

from ddpm.errors import UsageError, UserError
from ddpm.publishing.access import require_write_access, whoami
from tests.hub import Fault


def test_without_a_token_the_message_says_how_to_log_in(hub):
    with pytest.raises(UserError, match=r"hf auth login.*HF_TOKEN"):
        whoami()
    assert not hub.requests


def test_a_token_that_the_hub_refuses_is_named(hub, alice):
    hub.inject(Fault("status", path="/whoami", status=401, times=None))
    with pytest.raises(UserError, match=r"^The Hub does not accept the token that is set") as error:
        whoami()
    assert alice not in str(error.value)


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
