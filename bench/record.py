"""The file of one GPU's results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any


def file_name(facts: dict[str, Any]) -> str:
    """Of the GPU's name."""
    return re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-") + ".json"


def write(folder: Path, facts: dict[str, Any], found: list[dict[str, Any]]) -> Path:
    """Write `<gpu>.json`, onto what an earlier run of the same commit and versions wrote."""
    path = folder / file_name(facts)
    rows = {(row["operator"], row["pass"]): row for row in found}
    if path.exists():
        earlier = json.loads(path.read_text())
        kept = earlier.pop("results")
        if earlier == facts and facts["commit"] and not facts["commit"].endswith("-dirty"):
            rows = {(row["operator"], row["pass"]): row for row in kept} | rows
    path.write_text(json.dumps({**facts, "results": list(rows.values())}, indent=1) + "\n")
    return path
