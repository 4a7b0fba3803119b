"""The commands and snippets of README and docs/: found, taken apart, and counted.

    python -m tests.docs.snippets        how many formulas, snippets and commands, page by page

Every fenced block names its language. `text` is what a command printed; each other block is run by
tests/docs/test_snippets.py, unless the line before it says why it cannot be, where no reader sees it:

    <!-- not run: needs two machines -->

Every command line, in a block that is run, in one that is not, or in a sentence, goes through the
parser of its script.
"""

import re
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(
    r"^(?:<!-- ?(?P<marker>[^\n]*?) ?-->\n)?```(?P<language>[^\n]*)\n(?P<text>.*?)^```", re.M | re.S
)
INLINE = re.compile(r"`((?:[A-Z_]+=\S+ )*(?:python|accelerate|pytest|pip|hf|\w+\.py)\s[^`]*)`")
VARIABLE = re.compile(r"\\?\$(?:\(\([^)]*\)\)|\w+)")
"""$NAME and $((arithmetic)) of a shell script, which stand for a number or a path."""
LANGUAGES = ("bash", "python", "json", "yaml", "text")


@dataclass(frozen=True)
class Snippet:
    """A fenced block; `reason` is why it is not run, None for one that is."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """The fenced blocks of a page, but for what commands printed. ValueError for a block or a
    marker that is not of the form above."""
    found, text, name = [], page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    for match in FENCE.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        marker = match["marker"] or "run"
        if match["language"] not in LANGUAGES:
            raise ValueError(f"{name}:{line}: a block must be one of {', '.join(LANGUAGES)}")
        reason = marker.removeprefix("not run:").strip() if marker != "run" else None
        if reason == "" or reason == marker:
            raise ValueError(
                f"{name}:{line}: before a block stands <!-- run --> or "
                f"<!-- not run: REASON -->, not {marker!r}"
            )
        if match["language"] != "text":
            found.append(Snippet(name, line, match["language"], match["text"], reason))
    return found


def commands(shell: str) -> list[list[str]]:
    """The command lines of a shell block as lists of words, `&&` and line ends between them.

    Words in capitals with = before a command are its environment, and left out; of a script for a
    cluster what srun starts is taken.
    """
    found = []
    for line in VARIABLE.sub("1", shell.replace("\\\n", " ")).splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words[:1] == ["srun"]:
                words = shlex.split(words[-1])
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


def inline_commands(page: Path) -> list[list[str]]:
    """The commands that stand in the sentences of a page: [optional] words and ... are left out,
    and `evaluate.py ...` is given a model."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    lines = [" ".join(match.split()) for match in INLINE.findall(text)]
    lines = [re.sub(r"\.py \.\.\.$", ".py MODEL", line) for line in lines]
    return [
        [word for word in words if not re.match(r"\[|\.\.\.$", word)]
        for line in lines
        for words in commands(line)
    ]


def count(page: Path) -> Counter:
    """What a page has of everything."""
    blocks = snippets(page)
    return Counter(
        formulas=len(re.findall(r"\$\$.+?\$\$", page.read_text(encoding="utf-8"), re.S)),
        run=sum(block.reason is None for block in blocks),
        marked=sum(block.reason is not None for block in blocks),
        commands=sum(len(commands(b.text)) for b in blocks if b.language == "bash"),
        inline=len(inline_commands(page)),
    )


def main() -> None:
    names = ("formulas", "run", "marked", "commands", "inline")
    print(f"{'page':28}" + "".join(f"{name:>10}" for name in names))
    total: Counter = Counter()
    for page in PAGES:
        counted = count(page)
        total += counted
        print(
            f"{page.relative_to(ROOT).as_posix():28}"
            + "".join(f"{counted[name]:10}" for name in names)
        )
    print(f"{'together':28}" + "".join(f"{total[name]:10}" for name in names))


if __name__ == "__main__":
    main()
