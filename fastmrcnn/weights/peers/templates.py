"""Renaming by pairs of templates, so that one table serves both directions.

A template is a key with fields: `{i}` a number, `{i+1}` that number plus one, `{2i}` twice that number,
`{leaf}` the last part of the key (weight, bias, ...), `{rest}` everything that follows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

Rule = tuple[str, str]

_FIELD = re.compile(r"\{(?P<times>\d*)(?P<name>[a-z]+)(?:\+(?P<plus>\d+))?\}")
_PATTERNS = {"leaf": r"[a-z_]+", "rest": r".+"}


def renamer(rules: Sequence[Rule]) -> Callable[[str], str | None]:
    """A function that renames by the first rule whose left side fits; None if none does."""
    compiled = [(re.compile(_pattern(left)), left, right) for left, right in rules]

    def rename(key: str) -> str | None:
        for pattern, left, right in compiled:
            if match := pattern.fullmatch(key):
                values = _values(left, match)
                if values is not None:
                    return _fill(right, values)
        return None

    return rename


def backwards(rules: Sequence[Rule]) -> list[Rule]:
    return [(right, left) for left, right in rules]


def _pattern(template: str) -> str:
    """The template as a regular expression, a group per field in order."""
    parts, end = [], 0
    for field in _FIELD.finditer(template):
        parts.append(re.escape(template[end : field.start()]))
        parts.append(f"({_PATTERNS.get(field['name'], '[0-9]+')})")
        end = field.end()
    return "".join(parts) + re.escape(template[end:])


def _values(template: str, match: re.Match[str]) -> dict[str, str | int] | None:
    """The fields' values; None if a number is not one that the template can have written."""
    values: dict[str, str | int] = {}
    for field, text in zip(_FIELD.finditer(template), match.groups(), strict=True):
        if field["name"] in _PATTERNS:
            values[field["name"]] = text
            continue
        number = int(text) - int(field["plus"] or 0)
        times = int(field["times"] or 1)
        if number < 0 or number % times:
            return None
        values[field["name"]] = number // times
    return values


def _fill(template: str, values: dict[str, str | int]) -> str:
    def write(field: re.Match[str]) -> str:
        value = values[field["name"]]
        if isinstance(value, str):
            return value
        return str(value * int(field["times"] or 1) + int(field["plus"] or 0))

    return _FIELD.sub(write, template)
