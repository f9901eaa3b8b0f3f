"""A report as a list of blocks, and the two forms that it is written in: Markdown, and one HTML page.

The page needs nothing beside it: styles and pictures are inside. It is dark where the reader's system is.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastmrcnn.speed.markdown import table


class Heading(NamedTuple):
    level: int  # 1 is the title
    text: str


class Paragraph(NamedTuple):
    """`code`, *emphasis*, **more of it** and [words](address) are taken as in Markdown, and nothing else."""

    text: str


class Items(NamedTuple):
    texts: Sequence[str]


class Table(NamedTuple):
    """The first column holds names, the others figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Picture(NamedTuple):
    """
    Args:
        name: of its file in figures/, which `draw` makes; .svg or .png.
    """

    name: str
    draw: Callable[[], bytes]
    caption: str


Block = Heading | Paragraph | Items | Table | Picture

_STYLE = """
:root { color-scheme: light dark; --text: #1d1f23; --soft: #5d636d; --page: #fff; --line: #d9dce1;
  --code: #f2f3f5; --link: #0b57c2; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #a3a9b3; --page: #15171b;
  --line: #363b44; --code: #22262d; --link: #7fb2ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); line-height: 1.6;
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC",
  "Microsoft YaHei", sans-serif; }
main { overflow-wrap: break-word; max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 1rem 0; }
h2 { font-size: 1.4rem; margin: 3rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
a { color: var(--link); }
code { background: var(--code); padding: .1em .3em; border-radius: 4px; font-size: .88em;
  overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: var(--soft); font-weight: 600; }
figure { margin: 1.5rem 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; background: #fff;
  border-radius: 6px; padding: .5rem; }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .5rem; }
"""


def as_markdown(blocks: Sequence[Block], figures: str) -> str:
    """
    Args:
        figures: folder of the pictures, as the file is to name it.
    """
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"{'#' * level} {text}")
            case Paragraph(text):
                parts.append(text)
            case Items(texts):
                parts.append("\n".join(f"- {text}" for text in texts))
            case Table(head, rows):
                parts.append(table(head, rows))
            case Picture(name, _, caption):
                plain = re.sub(r"[\[\]]", "", caption)
                parts.append(f"![{plain}]({figures}/{name})\n\n{caption}")
    return "\n\n".join(parts) + "\n"


def as_html(blocks: Sequence[Block], language: str, pictures: dict[str, bytes]) -> str:
    """
    Args:
        language: such as en.
        pictures: name: file.
    """
    title = next(block.text for block in blocks if isinstance(block, Heading))
    parts = []
    for block in blocks:
        match block:
            case Heading(level, text):
                parts.append(f"<h{level}>{_inline(text)}</h{level}>")
            case Paragraph(text):
                parts.append(f"<p>{_inline(text)}</p>")
            case Items(texts):
                parts.append("<ul>" + "".join(f"<li>{_inline(text)}</li>" for text in texts) + "</ul>")
            case Table(head, rows):
                top = "".join(f"<th>{_inline(cell)}</th>" for cell in head)
                lines = (
                    "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>" for row in rows
                )
                parts.append(
                    f'<div class="wide"><table><thead><tr>{top}</tr></thead>'
                    f"<tbody>{''.join(lines)}</tbody></table></div>"
                )
            case Picture(name, _, caption):
                kind = {".svg": "image/svg+xml", ".png": "image/png"}[Path(name).suffix]
                data = base64.b64encode(pictures[name]).decode("ascii")
                alt = html.escape(re.sub(r"[*`]", "", caption), quote=True)
                parts.append(
                    f'<figure><img alt="{alt}" src="data:{kind};base64,{data}">'
                    f"<figcaption>{_inline(caption)}</figcaption></figure>"
                )
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _inline(text: str) -> str:
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    text = re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", r'<a href="\2">\1</a>', text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
    return re.sub(r"\*([^*\s][^*]*)\*", r"<em>\1</em>", text)
