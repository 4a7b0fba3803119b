"""Extract and count the commands and code blocks of README and docs/.

    python -m tests.docs.snippets        number of formulas, blocks and commands of each page

Every fenced block names its language. `text` is the output of a command. test_snippets.py runs
every other block, unless a comment on the line before it gives the reason why it cannot:

    <!-- not run: needs two machines -->

Every command line, in any block or in a sentence, is parsed by the parser of its script.
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
"""$NAME and $((arithmetic)) of a shell script: a number or a path."""
LANGUAGES = ("bash", "python", "json", "yaml", "text", "mermaid")


@dataclass(frozen=True)
class Snippet:
    """A fenced block. `reason` says why it is not run, and is None if it is."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """Return the fenced blocks of a page except outputs of commands.

    Raise ValueError for a block or a marker of another form than above.
    """
    blocks, text, name = [], page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    for match in FENCE.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        marker = match["marker"] or "run"
        if match["language"] not in LANGUAGES:
            raise ValueError(f"{name}:{line}: a block must be one of {', '.join(LANGUAGES)}")
        reason = marker.removeprefix("not run:").strip() if marker != "run" else None
        if reason == "" or reason == marker:
            raise ValueError(
                f"{name}:{line}: the comment before a block is <!-- run --> or "
                f"<!-- not run: REASON -->, not {marker!r}"
            )
        if match["language"] not in ("text", "mermaid"):
            blocks.append(Snippet(name, line, match["language"], match["text"], reason))
    return blocks


def commands(shell: str) -> list[list[str]]:
    """Return the command lines of a shell block as lists of words, split at `&&` and line ends.

    Environment variables before a command are dropped, and `srun` is replaced by its command.
    """
    command_lines = []
    for line in VARIABLE.sub("1", shell.replace("\\\n", " ")).splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words[:1] == ["srun"]:
                words = shlex.split(words[-1])
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                command_lines.append(words)
    return command_lines


def inline_commands(page: Path) -> list[list[str]]:
    """Return the commands in the sentences of a page, without [optional] words and `...`.

    `evaluate.py ...` is given a model.
    """
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    lines = [" ".join(match.split()) for match in INLINE.findall(text)]
    lines = [re.sub(r"\.py \.\.\.$", ".py MODEL", line) for line in lines]
    return [
        [word for word in words if not re.match(r"\[|\.\.\.$", word)]
        for line in lines
        for words in commands(line)
    ]


def count(page: Path) -> Counter:
    """Count the formulas, blocks and commands of a page."""
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
