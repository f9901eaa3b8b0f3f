"""Print the Markdown table of a file in bench/results: `python bench/table.py FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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
    versions = ", ".join(f"{name} {version}" for name, version in sorted(recorded["versions"].items()))
    copies = [row["copy_gb_per_s"] for row in recorded["results"] if "copy_gb_per_s" in row]
    speed = f" A plain copy moves {min(copies):.0f} to {max(copies):.0f} GB/s." if copies else ""
    lines = [
        f"{recorded['gpu']}, driver {recorded['driver'] or 'unknown'}, {versions}, "
        f"commit {recorded['commit'] or 'unknown'}.{speed}",
        "",
        _line(HEAD),
        _line(["---"] * len(HEAD)),
    ]
    for row in recorded["results"]:
        ours = row["ours"]
        operator = row["operator"]
        if "host_syncs" in row:
            syncs = ", ".join(f"{count} of {name}" for name, count in row["host_syncs"].items())
            operator += f" (host syncs: {syncs})"
        share = row.get("floor_share")
        lines.append(
            _line(
                [
                    operator,
                    row["pass"],
                    f"{ours['p50_ms']:.3f} ({ours['p20_ms']:.3f} to {ours['p80_ms']:.3f})",
                    f"{row['gb_per_s']:.0f}" if "gb_per_s" in row else "",
                    "" if share is None else f"{100 * share:.0f}%",
                    _megabytes(ours["extra_bytes"]),
                    _peer(row["peers"].get("torchvision")),
                    _peer(row["peers"].get("compiled reference")),
                    f"{row['error']:.1e}" if row["error"] else "exact",
                ]
            )
        )
    return "\n".join(lines)


def _peer(peer: dict[str, Any] | None) -> str:
    if peer is None:
        return ""
    if "p50_ms" not in peer:
        return "did not run"
    return f"{peer['p50_ms']:.3f}, {_megabytes(peer['extra_bytes'])}, {peer['ratio']:.1f}x"


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


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
