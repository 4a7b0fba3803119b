"""README.md and README.zh-TW.md: the same commands, outputs, numbers, rooms and links.

When README.md changes, the message says what README.zh-TW.md lacks.
"""

import re
from collections import Counter

import pytest

from tests.conftest import ROOT
from tests.docs.test_notes import MAINLAND

NAMES = ("README.md", "README.zh-TW.md")
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCE = re.compile(r"```\w*\n.*?```", re.S)
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
OF_THE_LANGUAGE = {
    "README.zh-TW.md": "README.md",
    "docs/diffusion.zh-TW.md": "docs/diffusion.md",
    "notebooks/colab.zh-TW.ipynb": "notebooks/colab.ipynb",
}


def prose(text: str) -> str:
    """Without blocks, code, addresses and pictures."""
    return re.sub(r"\]\([^)]*\)", "]", CODE.sub("", FENCE.sub("", text)))


def links(text: str) -> Counter:
    found = re.findall(r"\]\(([^)#]+)\)", FENCE.sub("", text))
    return Counter(OF_THE_LANGUAGE.get(link, link) for link in found)


@pytest.mark.parametrize(
    "of",
    [
        lambda text: Counter(FENCE.findall(text)),
        lambda text: Counter(" ".join(code.split()) for code in CODE.findall(FENCE.sub("", text))),
        lambda text: Counter(re.findall(r"\d+(?:[.,]\d+)*", prose(text))),
        links,
        lambda text: Counter({"headings": len(re.findall(r"^## ", text, re.M))}),
    ],
    ids=["commands and outputs", "code in sentences", "numbers", "links", "headings"],
)
def test_both_languages_have_the_same(of):
    english, chinese = (of(TEXT[name]) for name in NAMES)
    assert sum(english.values()) > 5
    lacking, extra = english - chinese, chinese - english
    assert not lacking, f"README.zh-TW.md lacks {dict(lacking)}"
    assert not extra, f"README.zh-TW.md alone has {dict(extra)}"


def test_the_map_has_the_same_rooms_in_the_same_order():
    english, chinese = (re.findall(r"^\| (`[^|]+) \|", text, re.M) for text in TEXT.values())
    assert len(english) > 30
    lacking = [room for room in english if room not in chinese]
    assert not lacking, f"the map of README.zh-TW.md lacks {lacking}"
    assert english == chinese, "not in the same order"


def test_every_room_is_on_the_map():
    mapped = {
        name
        for line in re.findall(r"^\| (`[^|]+) \|", TEXT["README.md"], re.M)
        for name in re.findall(r"`([\w.]+)`", line)
    }
    rooms = {path.name for path in (ROOT / "ddpm").glob("*.py") if path.stem != "__init__"}
    assert rooms <= mapped


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_somewhere(name):
    other = next(each for each in NAMES if each != name)
    assert f"]({other})" in TEXT[name].split("\n## ")[0]
    for link in re.findall(r"\]\(([^)#]+)\)", FENCE.sub("", TEXT[name])):
        assert (ROOT / link).exists(), link


def test_readers_are_led_to_notes_notebook_and_pages():
    for page in (ROOT / "docs").glob("*.md"):
        if page.name.endswith(".zh-TW.md"):
            assert f"docs/{page.name}" in TEXT["README.zh-TW.md"]
        else:
            assert f"docs/{page.name}" in TEXT["README.md"] or page.name == "diffusion.md"
    assert "notebooks/colab.ipynb" in TEXT["README.md"]


def test_the_chinese_is_that_of_taiwan():
    chinese = TEXT["README.zh-TW.md"]
    assert [word for word in MAINLAND if word in chinese] == []
    for word in ("擴散模型", "雜訊", "取樣", "排程器", "訓練", "資料集", "程式", "影像"):
        assert word in chinese
