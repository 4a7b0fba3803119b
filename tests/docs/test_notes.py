"""The notes docs/diffusion.md and docs/score-and-flow.md and their translations: numbers, formulas,
names, exercises and pictures are right.

A comment after each number says where it comes from: `0.95<!-- = 0.2 + 7.5 * (0.3 - 0.2) -->` is
evaluated here with the functions of note_values.py, `<!-- given -->` is an example value, and
`<!-- cited -->` is a number from a paper.
"""

import os
import pydoc
import re
from collections import Counter
from pathlib import Path

import pytest
from diffusers import DDPMPipeline

from tests.conftest import ROOT
from tests.docs import note_values

DOCS = ROOT / "docs"
PAGES = ("diffusion", "score-and-flow")
TEXT = {
    f"{page}{language}": (DOCS / f"{page}{language}").read_text(encoding="utf-8")
    for page in PAGES
    for language in (".md", ".zh-TW.md")
}
LANGUAGES = tuple(TEXT)
MARK = re.compile(r"(-?\d[\d,]*(?:\.\d+)?)<!--\s*(.*?)\s*-->")
DISPLAY = re.compile(r"\$\$(.+?)\$\$", re.S)
INLINE = re.compile(r"(?<!\$)\$([^$]+)\$(?!\$)")
NAME = re.compile(r"`((?:ddpm|diffusers)(?:\.\w+)+)`")
MAINLAND = (
    "噪声",
    "噪聲",
    "采样",
    "採樣",
    "信息",
    "質量",
    "默認",
    "代碼",
    "函數",
    "數據",
    "模塊",
    "視頻",
    "網絡",
    "圖像",
    "概率",
    "方差",
    "内存",
    "內存",
    "調用",
)

TRANSLATED = ("界限", "步子", "評審網路", "聽話", "房間", "人話", "格子", "畫出", "畫一張")
"""Words that translate the English text and that nobody writes."""


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.S)


def marks(text: str) -> list[tuple[str, str]]:
    return [(number.replace(",", ""), how) for number, how in MARK.findall(without_code(text))]


EVALUATED = sorted({mark for text in TEXT.values() for mark in marks(text) if mark[1][0] == "="})


@pytest.mark.parametrize(("written", "how"), EVALUATED)
def test_number_is_the_value_of_its_expression(written, how):
    value = eval(how.removeprefix("="), dict(vars(note_values)))  # text of this repository
    decimals = len(written.partition(".")[2])
    assert f"{value:.{decimals}f}" == written, f"{written} is {value} by {how}"


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_decimal_number_has_a_source(name):
    """Except in code, formulas, links, arXiv ids and section numbers."""
    kinds = {how if how[0] != "=" else "=" for _, how in marks(TEXT[name])}
    assert kinds == {"=", "given", "cited"}
    text = MARK.sub("", without_code(TEXT[name]))
    text = INLINE.sub("", DISPLAY.sub("", text))
    text = re.sub(r"`[^`]*`|arXiv\s+\d{4}\.\d{4,5}|section\s+\d\.\d|第 \d\.\d 節", "", text)
    assert re.findall(r"\d+\.\d+", text) == []


def languages_of(page: str) -> tuple[str, str]:
    return TEXT[f"{page}.md"], TEXT[f"{page}.zh-TW.md"]


def sections(text: str) -> list[str]:
    """Return the text of the numbered sections."""
    return re.split(r"^## (?=\d+\. )", text, flags=re.M)[1:]


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_sections(page):
    for text in languages_of(page):
        numbers = [int(section.partition(".")[0]) for section in sections(text)]
        assert numbers == [*range(1, len(numbers) + 1)]
    english, chinese = languages_of(page)
    assert len(sections(english)) == len(sections(chinese)) > 5


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_section_has_exercises_with_answers(name):
    """Except the list of papers. Each answer has a number that is computed."""
    for section in sections(TEXT[name])[:-1]:
        title = section.partition("\n")[0]
        questions, _, answers = section.partition("<details><summary>")
        questions = re.split(r"\*\*(?:Exercises?|習題)[.。]\*\*", questions)[-1]
        asked = re.findall(r"^\d\. ", questions, re.M)
        given = re.split(r"^\d\. ", answers, flags=re.M)[1:]
        assert len(asked) == len(given) > 0, title
        assert all("<!-- = " in answer for answer in given), title
        assert section.count("<details>") == section.count("</details>") == 1, title


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(
    "extract",
    [
        lambda text: DISPLAY.findall(text),
        lambda text: sorted({" ".join(f.split()) for f in INLINE.findall(DISPLAY.sub("", text))}),
        lambda text: Counter(marks(text)),
        lambda text: Counter(NAME.findall(text)),
        lambda text: re.findall(r"\]\((images/[^)]+)\)", text),
        lambda text: re.findall(r"```.*?```", text, re.S),
    ],
    ids=["formulas", "inline formulas", "numbers", "names", "pictures", "code"],
)
def test_both_languages_have_the_same(page, extract):
    english, chinese = (extract(without_code(text)) or extract(text) for text in languages_of(page))
    assert english == chinese


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_formula_names_its_function_and_its_paper(name):
    """In a line with an arrow after the formula, before the next heading."""
    for formula in DISPLAY.finditer(TEXT[name]):
        rest = TEXT[name][formula.end() :].partition("\n#")[0]
        arrow = re.search(r"^→ (?:.+\n)+", rest, re.M)
        assert arrow, f"no arrow after {formula[0]}"
        between = DISPLAY.findall(rest[: arrow.start()])
        assert len(between) <= 2, f"the arrow is too far from {formula[0]}"
        assert NAME.search(arrow[0]), f"{formula[0]} names no function"
        assert re.search(r"\b(20\d\d|eq\.)|式 \d", arrow[0]), f"{formula[0]} names no paper"


@pytest.mark.parametrize("name", sorted({n for t in TEXT.values() for n in NAME.findall(t)}))
def test_every_function_named_exists(name):
    assert pydoc.locate(name) is not None


def anchors(page: Path) -> list[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_link_has_a_target(name):
    text = without_code(INLINE.sub("", TEXT[name]))
    for target, anchor in re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", text):
        assert (DOCS / target).is_file(), target
        assert not anchor or anchor in anchors(DOCS / target), f"{target}#{anchor}"


@pytest.mark.parametrize("name", LANGUAGES)
def test_formulas_render_on_github(name):
    """Markdown removes a backslash before punctuation; $ needs a space or ASCII next to it."""
    text = without_code(TEXT[name])
    for formula in DISPLAY.findall(text) + INLINE.findall(DISPLAY.sub("", text)):
        assert not re.search(r"\\[^A-Za-z]|\\operatorname|[<>*|]", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count(r"\left") == formula.count(r"\right"), formula
    for match in INLINE.finditer(DISPLAY.sub("", text)):
        around = DISPLAY.sub("", text)
        neighbors = around[match.start() - 1] + around[match.end()]
        assert re.fullmatch(r"[\s(\-][\s.,:;)?]", neighbors), match[0]


def test_chinese_uses_the_terms_of_taiwan():
    chinese = TEXT["diffusion.zh-TW.md"] + TEXT["score-and-flow.zh-TW.md"]
    assert [word for word in (*MAINLAND, *TRANSLATED) if word in chinese] == []
    for word in ("擴散模型", "雜訊", "取樣", "排程器", "潛在空間"):
        assert word in chinese


def test_the_snippet_restores_a_digit(run_folder, tmp_path, monkeypatch):
    """The code marked `run` works unchanged, next to a run folder and the data."""
    run_folder.rename(tmp_path / "ddpm-digits")
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(r"<!-- run -->\n```python\n(.*?)```", TEXT["diffusion.md"], re.S)
    names: dict = {}
    exec(snippet, names)
    assert names["restored"].size == (8, 8)
    assert names["noisy"].isfinite().all()


def test_the_training_loop_learns(tmp_path, monkeypatch):
    """Section 12: the loss falls, and the folder is a pipeline; here in fewer steps."""
    os.symlink(ROOT / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    [short] = re.findall(r"steps, batch_size, losses = \d+, \d+, \[\]", note_values.training_loop())
    names: dict = {}
    exec(
        note_values.training_loop().replace(short, "steps, batch_size, losses = 24, 16, []"), names
    )
    assert sum(names["losses"][-6:]) < 0.8 * sum(names["losses"][:6])
    pipe = DDPMPipeline.from_pretrained("plain-digits")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(batch_size=1, num_inference_steps=2).images[0].size == (8, 8)


@pytest.mark.slow
def test_pictures_are_plotted_from_a_run(run_folder, class_folder, tmp_path, monkeypatch):
    """docs/make_note_pictures.py makes every picture of the notes."""
    from docs import make_note_pictures

    monkeypatch.setattr(make_note_pictures, "FOLDER", tmp_path / "images")
    monkeypatch.setattr("sys.argv", ["make_note_pictures.py", str(run_folder), str(class_folder)])
    make_note_pictures.main()
    shown = re.findall(r"\]\(images/([^)]+)\)", TEXT["diffusion.md"] + TEXT["score-and-flow.md"])
    assert sorted(shown) == sorted(path.name for path in Path(tmp_path / "images").iterdir())
