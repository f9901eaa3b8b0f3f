"""How figures are written down: tables in Markdown, and where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows may end early; their other cells are empty."""
    padded = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    lines = [head, ["---"] * len(head), *padded]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def spread(times: Mapping[str, Any], digits: int = 1) -> str:
    """The median, and in parentheses the 20th and the 80th percentile."""
    p20, p50, p80 = (f"{times[name]:.{digits}f}" for name in ("p20_ms", "p50_ms", "p80_ms"))
    return f"{p50} ({p20} to {p80})"


def origin(facts: Mapping[str, Any]) -> str:
    """What `environment` found, in one sentence."""
    where = facts["gpu"] or f"CPU ({facts['cpu']}, {facts['threads']} threads)"
    driver = f"driver {facts['driver'] or 'unknown'}, " if facts["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(facts["versions"].items()))
    return f"{where}, {driver}{versions}, commit {facts['commit'] or 'unknown'}."
