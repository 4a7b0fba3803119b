"""Text of others as Markdown that shows it on one line and does nothing else."""

import re
from typing import Any

from ddpm.errors import URL_LOGIN, printable

PLAIN_WORDS = re.compile(r"[A-Za-z0-9 ,.;:()'/%+=\x80-\U0010ffff-]*")
"""Texts without a character that Markdown gives a meaning within a line."""
CODE_CHARACTERS = str.maketrans({"`": "'", "|": "\u00a6", "<": "\u2039"})
"""Characters that can end a code span, a cell of a table or the block, and what looks like them."""
WEB_ADDRESS = re.compile(r"https?://[A-Za-z0-9._~:/?#=&%+-]+")


class Markdown(str):
    """Text that goes into the card as it is; every other value goes through `plain`."""


def plain(value: Any) -> Markdown:
    """Return a value as Markdown that shows it on one line and does nothing else.

    A text that Markdown could read as more than words, such as a link, an image or HTML, is code.
    """
    if isinstance(value, Markdown):
        return value
    text = printable(value)
    is_address = re.search(r"://|www\.", text, re.IGNORECASE)
    return Markdown(text) if PLAIN_WORDS.fullmatch(text) and not is_address else code(text)


def code(value: Any) -> Markdown:
    """Return a value as a code span, also inside a table; no character ends either."""
    text = printable(value).translate(CODE_CHARACTERS)
    return Markdown(f"`{text}`")


def link(text: str, address: str) -> Markdown:
    """Return a link, without a login in its address; if that is no web address, only show it."""
    address = URL_LOGIN.sub("", address)
    if not WEB_ADDRESS.fullmatch(address):
        return plain(address)
    return Markdown(f"[{plain(text)}]({address})")
