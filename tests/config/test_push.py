"""The settings of push.py: contradictions, and names that git accepts."""

import pytest

from ddpm.config.push import PushConfig
from ddpm.errors import UsageError


def refusal(**settings) -> str:
    """Return the message that refuses these settings."""
    with pytest.raises(UsageError) as error:
        PushConfig(**settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tag": "v 1"}, "--tag 'v 1' is no name"),
        ({"tag": "../v1"}, "--tag '../v1' is no name"),
        ({"tag": "v1.lock"}, "is no name"),
        ({"tag": "-v1"}, "is no name"),
        ({"revision": "refs/pr/1"}, "--revision 'refs/pr/1' is no name"),
        ({"revision": "a" * 40}, "is no name"),
        ({"create_pr": True, "tag": "v1"}, "so --tag does not go with it"),
        ({"create_pr": True, "revision": "trial"}, "so --revision does not go with it"),
        ({"commit_message": " "}, "--commit_message is empty"),
    ],
)
def test_push_settings_that_cannot_work_are_refused(settings, message):
    assert message in refusal(output_dir="run", **settings)


def test_names_that_git_accepts_are_accepted():
    PushConfig(output_dir="run", tag="v1.0-rc/2", revision="feature_x")
