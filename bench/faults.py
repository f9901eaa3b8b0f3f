"""Break runs on purpose, and say what was lost: `python bench/faults.py`.

Each fault is tried on real runs of `python -m fastmrcnn.train`, small ones on the CPU, in processes of their
own. What counts as lost: anything by which the run that goes on afterwards ends otherwise than one that
nothing disturbed, to the last bit of weights, optimizer and averages, and of the rows of metrics.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from breaking import NotTriedError, World
from fault_kinds import FAULTS, Fault

from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.markdown import origin, table

RESULTS = Path(__file__).parent / "results" / "faults"
HEAD = ["fault", "tries", "lost", "what was seen", "seconds"]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit code is 1 if anything was lost."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))
    with tempfile.TemporaryDirectory(prefix="faults_") as folder:
        world = World(Path(folder))
        print(f"{origin(facts)} An undisturbed run takes {world.seconds:.0f} s.", flush=True)
        rows = [tried(fault, world, arguments.tries, arguments.seed) for fault in chosen(arguments.only)]
    print("\n" + markdown(rows))
    if arguments.record:
        print(f"\nwritten to {record({**facts, 'seed': arguments.seed}, rows)}")
    return int(any(row["lost"] not in ("nothing", "") for row in rows))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Break runs on purpose, and say what was lost.")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAULT", help=f"of {', '.join(FAULTS)}")
    parser.add_argument("--tries", type=int, help="of each fault; default: 20 kills, of others what is usual")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    parser.add_argument("--record", action="store_true", help=f"write results/{RESULTS.name}/<system>.json")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.only if name not in FAULTS]:
        parser.error(f"unknown fault {', '.join(unknown)}; there are {', '.join(FAULTS)}")
    if arguments.tries is not None and arguments.tries < 1:
        parser.error("--tries must be at least 1")
    return arguments


def chosen(only: Sequence[str]) -> list[Fault]:
    return [fault for name, fault in FAULTS.items() if name in only or not only]


def tried(fault: Fault, world: World, tries: int | None, seed: int) -> dict[str, Any]:
    """The row of a fault. What was not as it should be stands under "lost"."""
    began = time.perf_counter()
    number = fault.tries if tries is None else tries
    row: dict[str, Any] = {"fault": fault.words, "tries": number}
    try:
        row |= {"lost": "nothing", "seen": fault.act(world, number, random.Random(seed))}
    except NotTriedError as reason:
        row |= {"tries": 0, "lost": "", "seen": f"not tried here: {reason}"}
    except AssertionError as loss:
        row |= {"lost": str(loss), "seen": ""}
    row["seconds"] = round(time.perf_counter() - began, 1)
    print(f"{fault.words}: {row['lost'] or row['seen']} ({row['seconds']} s)", flush=True)
    return row


def record(facts: dict[str, Any], rows: Sequence[dict[str, Any]]) -> Path:
    """Write the file of this system, onto what earlier calls with the same versions and seed wrote. Each row
    has its commit."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{platform.system().lower()}.json"
    same = {key: value for key, value in facts.items() if key != "commit"}
    known = {row["fault"]: {**row, "commit": facts["commit"]} for row in rows}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        kept = earlier.pop("results")
        if earlier == same:
            known = {row["fault"]: row for row in kept} | known
    order = [fault.words for fault in FAULTS.values()]
    found = sorted(known.values(), key=lambda row: order.index(row["fault"]))
    path.write_text(json.dumps({**same, "results": found}, indent=1) + "\n", encoding="utf-8")
    return path


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    return table(
        HEAD, [[str(row[key]) for key in ("fault", "tries", "lost", "seen", "seconds")] for row in rows]
    )


if __name__ == "__main__":
    raise SystemExit(main())
