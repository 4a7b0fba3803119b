"""The demo Space: what is sent, what people changed there, and its app in a real browser."""

import ast
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi

from ddpm.config.parser import parse_push
from ddpm.errors import UsageError, UserError
from ddpm.hub import time
from ddpm.publishing import access, demo_space
from ddpm.publishing.demo_space import publish_space
from tests.hub import Fault

FILES = {"app.py", "requirements.txt", "README.md", "space.json"}
FIRST, SECOND = "1" * 40, "2" * 40
APP = demo_space.APP_FOLDER / "app.py"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_sleep(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def model(hub, alice, request):
    """The id of an empty model repository of this test."""
    repo_id = "alice/" + re.sub(r"\W+", "-", request.node.name)[:60].strip("-")
    hub.create_repo("model", repo_id)
    return repo_id


def test_a_push_makes_a_space_of_the_commit_it_proved(hub, alice, run_folder, run_main, capsys):
    assert run_main("push.py", run_folder, "with-demo", "--space") == 0
    said = capsys.readouterr().out
    model, space = hub.repo("model", "alice/with-demo"), hub.repo("space", "alice/with-demo-demo")
    assert space.files().keys() - {".gitattributes"} == FILES and len(space.commits()) == 2
    assert f"one commit: {hub.url}/spaces/alice/with-demo-demo" in said
    assert space.read("app.py") == APP.read_bytes()
    settings = json.loads(space.read("space.json"))
    assert settings["model"] == "alice/with-demo" and settings["revision"] == model.resolve()
    card = yaml.safe_load(space.read("README.md").decode().split("---\n")[1])
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert card["models"] == ["alice/with-demo"]
    assert HfApi().space_info("alice/with-demo-demo").sdk == "gradio"
    link = "In the browser: [alice/with-demo-demo](https://huggingface.co/spaces/alice/with-demo-demo)."
    assert link in model.read("README.md").decode()
    assert run_main("push.py", run_folder, "alice/with-demo", "--dry_run") == 0
    assert link in capsys.readouterr().out  # a push without --space keeps it


def test_the_same_again_makes_no_commit(hub, model):
    first = publish_space("alice/same", model, FIRST)
    sent = hub.count("POST", "/commit/")
    again = publish_space("alice/same", model, FIRST)
    assert sent == 1 and hub.count("POST", "/commit/") == sent
    assert first.is_new and not again.is_new and again.commit == first.commit
    assert "no new commit" in str(again) and not again.kept
    assert len(hub.repo("space", "alice/same").commits()) == 2


def test_what_people_changed_is_kept_and_said(hub, model):
    publish_space("alice/edited", model, FIRST)
    space = hub.repo("space", "alice/edited")
    own = space.read("app.py") + b"# mine\n"
    space.write({"app.py": own}, "my app", author="alice")
    for _ in range(2):
        result = publish_space("alice/edited", model, SECOND)
        assert result.kept == ["app.py"] and "app.py was changed there and is kept" in str(result)
    assert space.read("app.py") == own
    assert json.loads(space.read("space.json"))["revision"] == SECOND
    assert len(space.commits()) == 4
    space.write({"app.py": None}, "deleted", author="alice")
    assert publish_space("alice/edited", model, SECOND).kept == []
    assert space.read("app.py") == APP.read_bytes()


def test_an_app_of_an_older_push_is_replaced(hub, model, tmp_path, monkeypatch):
    older = shutil.copytree(demo_space.APP_FOLDER, tmp_path / "space")
    (older / "app.py").write_text("print('older')\n")
    with monkeypatch.context() as patch:
        patch.setattr(demo_space, "APP_FOLDER", older)
        publish_space("alice/older", model, FIRST)
    result = publish_space("alice/older", model, FIRST)
    assert result.is_new and result.kept == []
    assert hub.repo("space", "alice/older").read("app.py") == APP.read_bytes()


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"app.py": b"print('theirs')"}, "files of its own"),
        ({"space.json": b"[1]"}, "must be a JSON object"),
        ({"space.json": b'{"model": "a/b", "revision": "main"}'}, "has no entry sent"),
    ],
)
def test_a_space_of_other_content_is_left_alone(hub, model, files, words):
    space = hub.create_repo("space", "alice/" + model.split("/")[1] + "-s", sdk="gradio")
    space.write(files, "theirs", author="alice")
    before = space.resolve()
    with pytest.raises(UserError, match=f"{words}.*Nothing of this push is visible"):
        publish_space(space.id, model, FIRST)
    assert space.resolve() == before


def test_the_demo_of_a_private_model_is_private(hub, alice):
    hub.create_repo("model", "alice/secret", visibility="private")
    result = publish_space("alice/secret-demo", "alice/secret", FIRST)
    assert hub.repo("space", "alice/secret-demo").is_private
    assert "HF_TOKEN" in str(result)


def test_a_lost_answer_is_no_lost_commit(hub, model):
    hub.inject(Fault("drop", method="POST", path="/commit/", when="after"))
    assert publish_space("alice/lost", model, FIRST).is_new
    assert len(hub.repo("space", "alice/lost").commits()) == 2


def test_a_damaged_upload_is_found(hub, model, monkeypatch):
    real = demo_space.publish.create_commit

    def commit_and_change(api, space_id, *rest, **options):
        result = real(api, space_id, *rest, **options)
        changed = hub.repo("space", space_id).write({"requirements.txt": b"torch"}, "changed")
        return changed, result[1]

    monkeypatch.setattr(demo_space.publish, "create_commit", commit_and_change)
    with pytest.raises(UserError, match=r"requirements.txt there is not what was sent.*alice/dama"):
        publish_space("alice/damaged", model, FIRST)


def test_rights_are_checked_before_the_model_is_sent(hub, alice, run_folder, run_main, capsys):
    hub.create_repo("space", "bob/demo", sdk="gradio")
    for name, words in (("bob/demo", "may not write"), ("a//b", "is not a repository id")):
        assert run_main("push.py", run_folder, "alice/unsent", "--space", name) != 0
        assert words in capsys.readouterr().err
    with pytest.raises(KeyError):
        hub.repo("model", "alice/unsent")
    assert access.require_write_access("mine", "", repo_type="space") == "alice/mine"


def test_a_failed_demo_names_the_command_that_goes_on(hub, alice, run_folder, run_main, capsys):
    hub.inject(Fault("status", method="POST", path="/api/spaces/.*/commit/", status=403))
    assert run_main("push.py", run_folder, "half", "--space", "half-demo") != 0
    said = capsys.readouterr()
    assert "Published 12 files in one commit" in said.out and "Traceback" not in said.err
    assert "Nothing of this push is visible in alice/half-demo" in said.err
    assert f"push.py {run_folder} alice/half --space alice/half-demo" in said.err


def test_a_dry_run_shows_the_space_without_an_account(hub, class_folder, run_main, capsys):
    assert run_main("push.py", class_folder, "--space", "--dry_run") == 0
    said = capsys.readouterr().out
    assert "the Space you/classes-demo" in said and "sdk: gradio" in said
    assert "spaces/you/classes-demo)." in said
    assert f"python {APP} {class_folder}" in said
    assert not hub.requests


@pytest.mark.parametrize("flags", [("--space", "a/b", "c/d"), ("--space", "--create_pr")])
def test_flags_that_do_not_go_together(flags):
    with pytest.raises(UsageError, match="--space"):
        parse_push(["folder", *flags])


def test_the_app_needs_no_code_of_ours():
    """It is sent as it is: no text of a model is part of it."""
    tree, names = ast.parse(APP.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    libraries = {"diffusers", "gradio", "torch", "spaces", "huggingface_hub", "numpy", "PIL"}
    assert {name.split(".")[0] for name in names} - libraries <= set(sys.stdlib_module_names)
