"""README.md and its translation have the same commands, outputs, numbers and links; and
docs/architecture.md has a line for every module.
"""

import re
from collections import Counter

import pytest
import yaml

import ddpm
from tests.conftest import ROOT
from tests.docs.test_notes import MAINLAND

ARCHITECTURE = ROOT / "docs" / "architecture.md"
NAMES = ("README.md", "README.zh-TW.md")
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCE = re.compile(r"```\w*\n.*?```", re.S)
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")
ORIGINALS = {
    "README.zh-TW.md": "README.md",
    "docs/diffusion.zh-TW.md": "docs/diffusion.md",
    "docs/score-and-flow.zh-TW.md": "docs/score-and-flow.md",
    "notebooks/colab.zh-TW.ipynb": "notebooks/colab.ipynb",
}


def prose(text: str) -> str:
    """Remove blocks, code, and targets of links and pictures."""
    return re.sub(r"\]\([^)]*\)", "]", CODE.sub("", FENCE.sub("", text)))


def links(text: str) -> Counter:
    targets = re.findall(r"\]\(([^)#]+)\)", FENCE.sub("", text))
    return Counter(ORIGINALS.get(target, target) for target in targets)


@pytest.mark.parametrize(
    "extract",
    [
        lambda text: Counter(FENCE.findall(text)),
        lambda text: Counter(" ".join(code.split()) for code in CODE.findall(FENCE.sub("", text))),
        lambda text: Counter(re.findall(r"\d+(?:[.,]\d+)*", prose(text))),
        links,
        lambda text: Counter({"headings": len(re.findall(r"^## ", text, re.M))}),
    ],
    ids=["commands and outputs", "code in sentences", "numbers", "links", "headings"],
)
def test_both_languages_have_the_same(extract):
    english, chinese = (extract(TEXT[name]) for name in NAMES)
    assert sum(english.values()) > 5
    missing, extra = english - chinese, chinese - english
    assert not missing, f"README.zh-TW.md lacks {dict(missing)}"
    assert not extra, f"only README.zh-TW.md has {dict(extra)}"


def test_every_module_has_a_line_in_the_architecture():
    """A table row begins with the module, `sampling/proof.py`; no row names another file."""
    text = ARCHITECTURE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` \|", text, re.M)
    package = ROOT / "ddpm"
    modules = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert Counter(rows) == Counter(modules)


@pytest.mark.parametrize("name", NAMES)
def test_every_link_has_a_target(name):
    other = next(readme for readme in NAMES if readme != name)
    assert f"]({other})" in TEXT[name].split("\n## ")[0]
    for link in re.findall(r"\]\(([^)#]+)\)", FENCE.sub("", TEXT[name])):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_every_page_and_notebook_is_linked():
    for page in (ROOT / "docs").glob("*.md"):
        if page.name.endswith(".zh-TW.md"):
            assert f"docs/{page.name}" in TEXT["README.zh-TW.md"]
        else:
            assert f"docs/{page.name}" in TEXT["README.md"] or page.name == "diffusion.md"
    assert "notebooks/colab.ipynb" in TEXT["README.md"]


def test_the_version_is_the_same_everywhere():
    """That of the code, of what to cite, and of the newest entry of the changelog."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (\d+\.\d+\.\d+), (\d{4}-\d\d-\d\d)$", changelog, re.M)
    assert len(dict(entries)) == changelog.count("\n## ") > 3
    assert entries == sorted(entries, key=lambda entry: entry[1], reverse=True)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], str(citation["date-released"])) == entries[0]
    assert ddpm.__version__ == entries[0][0]


def test_chinese_uses_the_terms_of_taiwan():
    chinese = TEXT["README.zh-TW.md"]
    assert [word for word in MAINLAND if word in chinese] == []
    for word in ("擴散模型", "雜訊", "取樣", "訓練", "資料集", "程式", "影像"):
        assert word in chinese
