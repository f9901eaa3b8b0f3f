"""python -m fastmrcnn.experiments: run the paper's comparisons, and report what came out."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastmrcnn.errors import Parser, UserError, run_main
from fastmrcnn.files import to_write
from fastmrcnn.study.coco import COCO, expected_seconds
from fastmrcnn.study.heats import Heat, heats_of, run_heats, waiting, why_no_race
from fastmrcnn.study.per_image import NETWORKS, measure_networks
from fastmrcnn.study.places import per_image_file
from fastmrcnn.study.plan import PastTimes, Row, plan
from fastmrcnn.study.runs import Bench, Run
from fastmrcnn.study.sets import Sets, given_sets
from fastmrcnn.study.small import SMALL
from fastmrcnn.study.suite import Comparison, Suite
from fastmrcnn.study.writing import write_report

SUITES = {suite.name: suite for suite in (SMALL, COCO)}
RACE_SEEDS = 1
RACE, SPEED = "race", "speed"  # beside the comparisons, in a suite that has them


def main(argv: list[str]) -> None:
    arguments = parse_arguments(argv)
    suite, output = SUITES[arguments.suite], to_write(arguments.output)
    seeds = arguments.seeds or suite.seeds
    chosen, others = choose(suite, arguments.only)
    work = output / "work" if arguments.work is None else to_write(arguments.work)
    given = given_sets(arguments.data)
    jobs = arguments.jobs or (os.cpu_count() or 1 if suite is SMALL else 1)
    bench = Bench(suite, output, work, Sets(work, given), extra=tuple(arguments.set))
    if arguments.report:
        tell_report(suite, output)
        return
    rows = plan(bench, chosen, seeds, expectation(bench))
    heats = race_heats(given, arguments.only) if RACE in others else []
    if heats:
        left = waiting(heats, output)
        hours = math.fsum(heat.seconds for heat in left) / 3600
        rows.append(Row(RACE, len({h.contender for h in heats}), len(heats), len(heats) - len(left), hours))
    if SPEED in others:
        done = per_image_file(output, suite.name).exists()
        rows.append(Row(SPEED, len(NETWORKS), 1, int(done), 0.0 if done else math.nan))
    if arguments.plan:
        print_plan(rows, jobs, known_by="operations" if suite is COCO else "past runs")
        return
    to_do = sum(row.runs - row.finished for row in rows)
    print(f"{sum(row.runs for row in rows)} runs, {to_do} of them to do, {jobs} at a time")
    try:
        bench.run_all(bench.runs_of(chosen, seeds), jobs)
        run_heats(heats, given, output, work, jobs)
        if SPEED in others:  # the last, so that nothing else runs beside it
            measure_networks(output, suite.name)
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on. What is finished is in {output / 'metrics'}")
        raise SystemExit(130) from None
    tell_report(suite, output)


def choose(suite: Suite, only: Sequence[str] | None) -> tuple[tuple[Comparison, ...], list[str]]:
    """The comparisons that --only names, and what of the race and the speed; all, if it was not given."""
    extra = [RACE, SPEED] if suite.races else []
    if not only:
        return suite.comparisons, extra
    others = [name for name in extra if name in only]
    names = tuple(name for name in only if name not in others)
    if not names:
        return (), others
    try:
        return suite.chosen(names), others
    except ValueError as error:
        raise UserError(f"--only: {', '.join([str(error), *extra])}") from None


def race_heats(given: Mapping[str, Path], only: Sequence[str] | None) -> list[Heat]:
    """Of the sets that were given; where there can be no race, none and a line that says why.

    Raises:
        UserError: there can be none, and --only asked for it.
    """
    problem = why_no_race(given)
    if problem is None:
        return heats_of(given, RACE_SEEDS)
    if only:
        raise UserError(f"--only {RACE}: {problem}")
    print(f"The race with torchvision is left out: {problem}")
    return []


def tell_report(suite: Suite, output: Path) -> None:
    print("The report:")
    for path in write_report(suite, output):
        print(f"  {path}")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "experiments",
        "Run the comparisons of the Mask R-CNN paper. What is finished is not run again, and what was "
        "interrupted goes on.",
    )
    parser.add_argument(
        "--suite",
        choices=sorted(SUITES),
        default="small",
        help="small (default): narrow networks on drawn scenes; coco: the paper's recipes",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="comparisons, race or speed (default: all)")
    parser.add_argument("--seeds", type=count, help="runs of each cell (default: the suite's)")
    parser.add_argument("--output", default="report", help="folder of metrics and report (report)")
    parser.add_argument("--work", help="folder of the runs themselves (default: work, in the output)")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=DIR", help="a data set, such as coco=DIR"
    )
    parser.add_argument("--jobs", type=count, help="runs at a time (default: the cores; coco: 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="key=value", help="a setting of all runs"
    )
    parser.add_argument("--plan", action="store_true", help="say what would run and how long, and end")
    parser.add_argument("--report", action="store_true", help="write the report on what is there, and end")
    return parser.parse_args(argv)


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def expectation(bench: Bench) -> Callable[[Run], float]:
    """Seconds of a run: by those that are finished; of the coco suite else by counted operations."""
    past = PastTimes(bench)
    if bench.suite is not COCO:
        return past

    def seconds(run: Run) -> float:
        known = past(run)
        return expected_seconds(bench.config(run)) if math.isnan(known) else known

    return seconds


def print_plan(rows: Sequence[Row], jobs: int, known_by: str) -> None:
    width = max(len(row.comparison) for row in rows)
    print(f"{'comparison':{width}}  cells  runs  finished  hours left")
    for row in rows:
        hours = "not known" if math.isnan(row.hours) else f"{row.hours:.2f}"
        print(f"{row.comparison:{width}}  {row.cells:5d}  {row.runs:4d}  {row.finished:8d}  {hours:>10}")
    known = [row.hours for row in rows if not math.isnan(row.hours)]
    unknown = ", without what is not known" if len(known) < len(rows) else ""
    left = f"{math.fsum(known) / jobs:.2f}" if known else "not known"
    print(f"In all {left} hours, {jobs} at a time{unknown}; by {known_by}.")


if __name__ == "__main__":
    run_main(main)
