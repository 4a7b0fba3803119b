"""Write the address of this project into the READMEs and notebooks: set ADDRESS, then

    python docs/set_address.py

Badges and the Colab button lead there; the notebook clones it, and Colab shows its pictures. While
ADDRESS is empty, what needs one is left out.
"""

import re
from pathlib import Path

ADDRESS = ""
"""Owner and name on GitHub, as in owner/name."""

ROOT = Path(__file__).parent.parent
SHIELD = "https://img.shields.io/badge"
COLAB = "https://colab.research.google.com"
RAW = "https://raw.githubusercontent.com"


def badges(address: str, language: str) -> str:
    """Return the badges of README.md (`language` "") or README.zh-TW.md (".zh-TW") as one line."""
    links = [
        f"[![Python 3.10+]({SHIELD}/python-3.10%2B-blue)](requirements.txt)",
        f"[![Apache 2.0]({SHIELD}/license-Apache_2.0-blue)](LICENSE)",
    ]
    if address:
        actions = f"https://github.com/{address}/actions/workflows/ci.yml"
        notebook = f"{COLAB}/github/{address}/blob/main/notebooks/colab{language}.ipynb"
        links = [
            f"[![ci]({actions}/badge.svg)]({actions})",
            *links,
            f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({notebook})",
        ]
    return " ".join(links)


def set_address(root: Path, address: str) -> None:
    """Rewrite the badges and the `git clone` of the READMEs, and the notebooks' address."""
    url = f"https://github.com/{address}" if address else ""
    pictures = f"{RAW}/{address}/main" if address else ".."
    for language in ("", ".zh-TW"):
        readme = root / f"README{language}.md"
        text = readme.read_text(encoding="utf-8")
        line = badges(address, language)
        text = re.sub(r"^\[!\[.*$", line, text, count=1, flags=re.M)
        clone = f"git clone {url or 'https://github.com/owner/name'} ddpm"
        readme.write_text(re.sub(r"git clone \S+ ddpm", clone, text), encoding="utf-8")
        notebook = root / "notebooks" / f"colab{language}.ipynb"
        text = notebook.read_text(encoding="utf-8")
        text = re.sub(r'REPOSITORY = \\"[^"]*\\"', f'REPOSITORY = \\\\"{url}\\\\"', text)
        text = re.sub(rf"\]\((\.\.|{RAW}/\S+?/main)/docs/", f"]({pictures}/docs/", text)
        notebook.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    set_address(ROOT, ADDRESS)
