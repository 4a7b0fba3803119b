"""README.md and the pages for users have the same commands, outputs, numbers and links as their
translations; and docs/architecture.md has a line for every module.
"""

import json
import re
import shutil
from collections import Counter

import pytest
import yaml

import ddpm
from docs import set_address
from tests.conftest import ROOT
from tests.docs.test_notes import MAINLAND, TRANSLATED, anchors

ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = ("README", "docs/evaluation", "docs/gallery", "docs/sampling")
NAMES = tuple(f"{page}{language}" for page in PAGES for language in (".md", ".zh-TW.md"))
TEXT = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCE = re.compile(r"```\w*\n.*?```", re.S)
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")


def prose(text: str) -> str:
    """Remove blocks, code, and targets of links and pictures."""
    return re.sub(r"\]\([^)]*\)", "]", CODE.sub("", FENCE.sub("", text)))


def links(text: str) -> Counter:
    """Count the files that are linked, a translation as its original."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCE.sub("", text))
    return Counter(target.replace(".zh-TW.", ".") for target in targets)


@pytest.mark.parametrize(
    "extract",
    [
        lambda text: Counter(FENCE.findall(text)),
        lambda text: Counter(" ".join(code.split()) for code in CODE.findall(FENCE.sub("", text))),
        lambda text: Counter(re.findall(r"\d+(?:[.,]\d+)*", prose(text))),
        links,
        lambda text: Counter(re.findall(r"^(#+|\||- |!)", text, re.M)),
    ],
    ids=["commands and outputs", "code in sentences", "numbers", "links", "headings and rows"],
)
@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same(page, extract):
    english, chinese = (extract(TEXT[f"{page}{language}"]) for language in (".md", ".zh-TW.md"))
    assert english
    missing, extra = english - chinese, chinese - english
    assert not missing, f"the translation of {page} lacks {dict(missing)}"
    assert not extra, f"only the translation of {page} has {dict(extra)}"


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
    """The first one is the other language; headings exist that links name."""
    path = ROOT / name
    links = re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", FENCE.sub("", TEXT[name]))
    other = name.replace(".md", ".zh-TW.md") if "zh-TW" not in name else name.replace(".zh-TW", "")
    assert f"]({(ROOT / other).name})" in TEXT[name].split("\n## ")[0]
    for target, anchor in links:
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target
            page = path.parent / target if target else path
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def test_translations_have_the_headings_that_english_pages_link():
    """As an anchor of its own: on the site, a page without a translation links both languages."""
    pages = {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")}
    translated = {page for page in pages if page.with_suffix(".zh-TW.md") in pages}
    for page in pages - translated - {page.with_suffix(".zh-TW.md") for page in translated}:
        for target, anchor in re.findall(r"\]\(([^)#]+)#([^)]*)\)", page.read_text("utf-8")):
            other = (page.parent / target).resolve()
            if other in translated:
                chinese = other.with_suffix(".zh-TW.md").read_text("utf-8")
                assert f'<a id="{anchor}"></a>' in chinese, f"{page.name}: {target}#{anchor}"


def test_every_page_and_notebook_is_linked():
    for page in (ROOT / "docs").glob("*.md"):
        if page.name.endswith(".zh-TW.md"):
            assert f"docs/{page.name}" in TEXT["README.zh-TW.md"]
        else:
            assert f"docs/{page.name}" in TEXT["README.md"] or page.name == "diffusion.md"
    assert "notebooks/colab.ipynb" in TEXT["README.md"]


def test_the_address_is_written_by_one_script(tmp_path):
    """Badges, the Colab button, the command to clone and the notebooks; and taken back."""
    names = ("README.md", "README.zh-TW.md", "notebooks/colab.ipynb", "notebooks/colab.zh-TW.ipynb")
    (tmp_path / "notebooks").mkdir()
    files = [shutil.copy(ROOT / name, tmp_path / name) for name in names]
    for address in (set_address.ADDRESS, "you/name.ddpm", set_address.ADDRESS):
        set_address.set_address(tmp_path, address)
        texts = [file.read_text(encoding="utf-8") for file in files]
        has_address = [f"https://github.com/{address or None}" in text for text in texts]
        assert has_address == [bool(address)] * 4
        buttons = [f"/blob/main/{name})" in "".join(texts) for name in names[2:]]
        pictures = [f"/{address}/main/docs/images/digits" in text for text in texts[2:]]
        assert buttons == pictures == has_address[2:]
        assert [len(json.loads(text)["cells"]) > 20 for text in texts[2:]] == [True, True]
    assert texts == [(ROOT / name).read_text(encoding="utf-8") for name in names]


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
    chinese = "".join(TEXT[name] for name in NAMES if "zh-TW" in name)
    assert [word for word in (*MAINLAND, *TRANSLATED) if word in chinese] == []
    for word in ("擴散模型", "雜訊", "取樣", "訓練", "資料集", "程式", "影像"):
        assert word in chinese
