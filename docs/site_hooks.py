"""What MkDocs needs beyond mkdocs.yml to show the pages that are written for GitHub."""

import re
from pathlib import Path

CHINESE = "[\u3001-\u9fff\uff00-\uffef]"


def on_config(config):
    """Read pages from the whole repository; MkDocs refuses that as a setting."""
    config.docs_dir = str(Path(config.config_file_path).parent)
    return config


def on_page_markdown(markdown: str, **_) -> str:
    """Remove the link to the other language, which each page of the site has above.

    Markdown in <details> is formatted if the tag says so. A line that ends between two Chinese
    characters would become a space.
    """
    markdown = re.sub(r"^\[(English|繁體中文)\]\(\S+\)\n", "", markdown, flags=re.M)
    markdown = re.sub(f"(?<={CHINESE})\n *(?={CHINESE})", "", markdown)
    return markdown.replace("<details>", '<details markdown="1">')
