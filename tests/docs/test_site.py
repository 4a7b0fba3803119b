"""The site of README and docs/ is built without a warning, and shows what GitHub shows."""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.conftest import ROOT
from tests.docs.snippets import PAGES
from tests.docs.test_notes import DISPLAY, INLINE, without_code
from tests.docs.test_snippets import requirements

REQUIREMENTS = requirements(ROOT / "requirements-docs.txt")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("mkdocs") is None,
        reason="needs pip install -r requirements-docs.txt",
    ),
]
COUNTED = ("h1", "h2", "h3", "table", "tr", "li", "img", "pre")


class Article(HTMLParser):
    """Count the elements of a page's article, and its formulas."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements = dict.fromkeys(COUNTED, 0)
        self.formulas = 0
        [article] = re.findall(r"<article.*?</article>", html, re.S)
        self.feed(article)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in self.elements:
            self.elements[tag] += 1
        self.formulas += dict(attributes).get("class") == "arithmatex"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def built(site: Path, page: Path) -> str:
    """Return the HTML of a page: README.zh-TW.md is zh-TW/index.html."""
    name = page.relative_to(ROOT).as_posix().removesuffix(".md")
    language = "zh-TW/" if name.endswith(".zh-TW") else ""
    folder = name.removesuffix(".zh-TW").replace("README", "").lstrip("/")
    return (site / language / folder / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_what_github_shows(site, page):
    """As many headings, rows, items, pictures and blocks as by the rules of CommonMark."""
    text = page.read_text(encoding="utf-8")
    html = built(site, page)
    expected = dict.fromkeys(COUNTED, 0)
    without_formulas = DISPLAY.sub("", text)
    for token in MarkdownIt("commonmark").enable("table").parse(without_formulas):
        for each in (token, *(token.children or ())):
            tag = "pre" if each.type == "fence" else each.tag
            if tag in COUNTED and each.nesting >= 0:
                expected[tag] += 1
    shown = Article(html)
    assert shown.elements == expected
    if "$$" in text:
        inline = INLINE.findall(without_code(without_formulas))
        assert shown.formulas == len(DISPLAY.findall(text)) + len(inline)
    assert f'lang="{"zh-TW" if "zh-TW" in page.name else "en"}"' in html


def test_requirements_allow_the_installed_packages():
    for requirement in REQUIREMENTS:
        assert importlib.metadata.version(requirement.name) in requirement.specifier
