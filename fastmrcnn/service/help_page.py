"""The page on the interface: HTML that loads nothing, from here or from elsewhere."""

from __future__ import annotations

from html import escape
from typing import Any

from fastmrcnn.service.limits import Limits
from fastmrcnn.service.upload import FIELD, FORM

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }}
td, th {{ text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #ccc }}
code {{ background: #8882 }}
</style></head><body>
<h1>{title}</h1>
<p>{description} The same for programs: <a href="/openapi.json">openapi.json</a>.</p>
<h2>Try it</h2>
<form method="post" enctype="{form}" action="/predict">
<input type="file" name="{field}" accept="image/*" required>
<button>boxes and RLE</button>
<button formaction="/predict?masks=polygon">boxes and polygons</button>
</form>
"""


def help_page(document: dict[str, Any], limits: Limits) -> str:
    """HTML of an OpenAPI document.

    Args:
        document: as FastAPI makes it.
    """
    info = document["info"]
    parts = [_HEAD.format(title=info["title"], description=info["description"], form=FORM, field=FIELD)]
    for path, methods in document["paths"].items():
        for method, what in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{what['summary']}.</p>")
            if "requestBody" in what:
                parts.append(
                    f"<p>The body is an image, with its Content-Type, or a form ({FORM}) with the image as "
                    f"its field <code>{FIELD}</code>: at most {limits.max_bytes:,} bytes and "
                    f"{limits.max_pixels:,} pixels.</p>"
                )
            if parameters := what.get("parameters"):
                parts.append(_table(("query", "default", ""), map(_parameter, parameters)))
            answers = what["responses"].items()
            parts.append(_table(("status", ""), ((code, one["description"]) for code, one in answers)))
    return "\n".join([*parts, "</body></html>"])


def _parameter(parameter: dict[str, Any]) -> tuple[Any, ...]:
    schema = parameter["schema"]
    choices = f": {', '.join(schema['enum'])}" if "enum" in schema else ""
    return parameter["name"], schema.get("default", ""), f"{parameter.get('description', '')}{choices}"


def _table(heads: tuple[str, ...], rows: Any) -> str:
    def row(cells: Any, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
