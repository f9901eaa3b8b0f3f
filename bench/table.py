"""Print the Markdown table of a file in bench/results: `python bench/table.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fastmrcnn.speed.markdown import origin, spread, table

HEAD = [
    "operator",
    "pass",
    "ms (p20 to p80)",
    "GB/s",
    "of the floor",
    "extra MB",
    "torchvision: ms, extra MB, ratio",
    "compiled reference: ms, extra MB, ratio",
    "error",
]


def markdown(recorded: dict[str, Any]) -> str:
    rows = recorded["results"]
    copies = [row["copy_gb_per_s"] for row in rows if "copy_gb_per_s" in row]
    speed = f" A plain copy moves {min(copies):.0f} to {max(copies):.0f} GB/s." if copies else ""
    return f"{origin(recorded)}{speed}\n\n{table(HEAD, [_cells(row) for row in rows])}"


def _cells(row: dict[str, Any]) -> list[str]:
    operator = row["operator"]
    if "host_syncs" in row:
        syncs = ", ".join(f"{count} of {name}" for name, count in row["host_syncs"].items())
        operator += f" (host syncs: {syncs})"
    return [
        operator,
        row["pass"],
        spread(row["ours"], 3),
        f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "",
        f"{100 * row['floor_share']:.0f}%" if "floor_share" in row else "",
        _megabytes(row["ours"]["extra_bytes"]),
        _peer(row["peers"].get("torchvision")),
        _peer(row["peers"].get("compiled reference")),
        f"{row['error']:.1e}" if row["error"] else "exact",
    ]


def _peer(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    if "p50_ms" not in peer:
        return "did not run"
    return f"{peer['p50_ms']:.3f}, {_megabytes(peer['extra_bytes'])}, {peer['ratio']:.1f}x"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python bench/table.py FILE", file=sys.stderr)
        return 2
    try:
        recorded = json.loads(Path(argv[0]).read_text())
        text = markdown(recorded)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {argv[0]} is not a file of results: {error!r}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
