"""The documentation, taken apart: blocks, links, anchors, sentences, words set as code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from places import ROOT

PAGES = sorted(
    page
    for folder, pattern in (("", "*.md"), ("docs", "**/*.md"), ("kernels", "**/*.md"), ("bench", "**/*.md"))
    for page in (ROOT / folder).glob(pattern)
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """What stands between fences."""
    text = read(page)
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in _FENCE.finditer(text)
    ]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a bash block, without comments; `a && b` are two."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield words[:end]
            words = words[end + 1 :]


def prose(page: Path) -> str:
    """Without blocks and comments."""
    return _COMMENT.sub("", _FENCE.sub("", read(page)))


def spans(page: Path) -> list[str]:
    """What is set as code within the text."""
    return _SPAN.findall(prose(page))


def links(page: Path) -> list[str]:
    return _LINK.findall(_SPAN.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sentences(page: Path) -> set[str]:
    """Sentences of eight words and more, in lower case without punctuation; none of tables and headings."""
    found = set()
    lines = [line for line in prose(page).splitlines() if not line.lstrip().startswith(("|", "#"))]
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:-|\d+\.) ", "\n".join(lines)):
        plain = re.sub(r"\]\([^)]*\)", "", paragraph)
        for sentence in re.split(r"(?<=[.!?:;])\s", plain):
            words = re.findall(r"[\w/.=-]*\w", sentence.lower())
            if len(words) >= 8:
                found.add(" ".join(words))
    return found
