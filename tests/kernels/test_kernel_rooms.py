"""Which operators are built on which: a table that the imports must agree with."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from places import ROOT

KERNELS = ROOT / "kernels"
BUILT_ON: dict[str, set[str]] = {
    "common": set(),
    "mask_predictor": {"mask_loss", "mask_targets"},
    "mask_rle": {"mask_paste"},
    "mask_targets": {"roi_align"},
    "roi_align": {"level_assign"},
    "roi_max": {"level_assign", "roi_align"},
}


def neighbours(folder: Path) -> set[str]:
    """Folders beside this one that its modules import."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found.update(name.split(".")[0] for name in names)
    return found


def test_operators_import_what_the_table_says() -> None:
    folders = [path.parent for path in sorted(KERNELS.glob("*/__init__.py"))]
    assert len(folders) > 10
    for folder in folders:
        assert neighbours(folder) - {"common", "_ops"} == BUILT_ON.get(folder.name, set()), folder.name
    assert list(TopologicalSorter(BUILT_ON).static_order())  # raises where there is a circle
