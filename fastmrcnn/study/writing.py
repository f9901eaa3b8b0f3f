"""The report on a suite, from its metrics files: no number in it is typed in by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmrcnn.files import make_folder, replacing, write_text
from fastmrcnn.study.document import Block, Heading, Items, Paragraph, Picture, Table, as_html, as_markdown
from fastmrcnn.study.introduction import closing, introduction
from fastmrcnn.study.per_image import per_image_section
from fastmrcnn.study.pictures import strip
from fastmrcnn.study.plots import plot_cells, plot_effects
from fastmrcnn.study.race_section import race_section
from fastmrcnn.study.runs import read_metrics
from fastmrcnn.study.statistics import Estimate, Judged, estimate, judge, spread
from fastmrcnn.study.suite import Comparison, Suite
from fastmrcnn.study.words import WORDS, Language, say

Values = dict[str, dict[int, float]]  # metric: seed: value


class Results(NamedTuple):
    """Of a suite: what its metrics files hold."""

    cells: Mapping[str, Mapping[int, dict[str, Any]]]  # cell: seed: file
    folder: Path  # that holds metrics/

    def values(self, cell: str, metric: str) -> dict[int, float]:
        runs = self.cells.get(cell, {})
        return {seed: run["metrics"][metric] for seed, run in runs.items() if metric in run["metrics"]}


def read_results(suite: Suite, folder: Path) -> Results:
    """Every metrics file of a suite, whatever the settings of its run: a report is of what is there.

    Raises:
        UserError: a file is damaged.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name, cell in suite.cells.items():
        for path in sorted((folder / "metrics" / suite.name / cell.name).glob("seed_*.json")):
            found.setdefault(name, {})[int(path.stem.removeprefix("seed_"))] = read_metrics(path)
    return Results(found, folder)


def write_report(suite: Suite, folder: Path) -> list[Path]:
    """Write report.md and report.html, in English and in Chinese, and figures/; returns the four files.

    Raises:
        UserError: a metrics file is damaged; the folder cannot be written.
    """
    results = read_results(suite, folder)
    make_folder(folder / "figures")
    written = []
    pictures: dict[str, bytes] = {}
    endings: dict[Language, str] = {"en": "", "zh": ".zh"}
    for language, ending in endings.items():
        blocks = document(suite, results, language)
        for block in blocks:
            if isinstance(block, Picture) and block.name not in pictures:
                pictures[block.name] = block.draw()
        for form, text in (
            ("md", as_markdown(blocks, "figures")),
            ("html", as_html(blocks, language, pictures)),
        ):
            written.append(folder / f"report{ending}.{form}")
            write_text(written[-1], text)
    for name, data in pictures.items():
        with replacing(folder / "figures" / name) as stream:
            stream.write(data)
    return written


def document(suite: Suite, results: Results, language: Language) -> list[Block]:
    blocks = introduction(suite, results.cells, results.folder, language)
    judged = {one.name: judge_all(one, results) for one in suite.comparisons}
    blocks += overview(suite, judged, language)
    for comparison in suite.comparisons:
        blocks += section(comparison, judged[comparison.name], results, suite, language)
    if suite.races:
        blocks += per_image_section(results.folder, suite.name, language)
        blocks += race_section(results.folder, language)
    blocks += closing(suite, results.cells, language)
    return blocks


def judge_all(comparison: Comparison, results: Results) -> list[Judged]:
    return [
        judge(claim, results.values(claim.one, claim.metric), results.values(claim.other, claim.metric))
        for claim in comparison.claims
    ]


def overview(suite: Suite, judged: Mapping[str, Sequence[Judged]], language: Language) -> list[Block]:
    """A row a claim: what the paper found, what was found here."""
    rows = []
    for comparison in suite.comparisons:
        for one in judged[comparison.name]:
            claim, labels = one.claim, comparison.cells
            rows.append(
                [
                    f"{labels[claim.one]} - {labels[claim.other]}",
                    claim.metric,
                    "" if claim.paper is None else signed(claim.paper),
                    interval(one.difference),
                    say(WORDS[one.verdict], language),
                ]
            )
    head = [say(WORDS[name], language) for name in ("claim", "metric", "paper", "here", "verdict")]
    return [
        Heading(2, say(WORDS["overview"], language)),
        Paragraph(say(WORDS["how judged"], language)),
        Table(head, rows),
    ]


def section(
    comparison: Comparison, judged: Sequence[Judged], results: Results, suite: Suite, language: Language
) -> list[Block]:
    cells, metrics = comparison.cells, comparison.metrics
    values = {(cell, metric): results.values(cell, metric) for cell in cells for metric in metrics}
    found = {place: estimate(list(runs.values())) for place, runs in values.items() if runs}
    rows = []
    for cell, label in cells.items():
        row = [label]
        for metric in metrics:
            row.append(spread(found[cell, metric]) if (cell, metric) in found else "")
            paper = comparison.paper.get(cell, {}).get(metric)
            row.append("" if paper is None else f"{paper:.1f}")
        rows.append(row)
    paper_word = say(WORDS["paper"], language)
    head = ["", *(word for metric in metrics for word in (metric, paper_word))]
    blocks: list[Block] = [
        Heading(2, f"{say(comparison.title, language)} ({comparison.source})"),
        Paragraph(f"*{say(comparison.question, language)}*"),
        Table(head, rows),
    ]
    if found:
        runs = {place: list(by_seed.values()) for place, by_seed in values.items()}
        blocks.append(
            Picture(
                f"{suite.name}_{comparison.name}.svg",
                lambda: plot_cells(list(cells.values()), metrics, found, runs, list(cells)),
                say(WORDS["cells caption"], language),
            )
        )
    if any(one.difference is not None for one in judged):
        blocks.append(
            Picture(
                f"{suite.name}_{comparison.name}_effects.svg",
                lambda: plot_effects(judged, cells),
                say(WORDS["effects caption"], language),
            )
        )
    own = [suite.cells[cell] for cell in cells]
    shown = strip(results.folder, suite.name, own[0].data, [cell.name for cell in own])
    if shown is not None:
        names = [say(WORDS["truth"], language), *(cells[cell] for cell in cells)]
        caption = say(WORDS["pictures caption"], language).format(names=", ".join(names))
        blocks.append(Picture(f"{suite.name}_{comparison.name}_pictures.png", shown, caption))
    blocks.append(Items([sentence(one, cells, language) for one in judged]))
    files = ", ".join(f"`metrics/{suite.name}/{cell.name}/`" for cell in own)
    blocks.append(Paragraph(f"{say(WORDS['numbers from'], language)} {files}"))
    return blocks


def sentence(judged: Judged, labels: Mapping[str, str], language: Language) -> str:
    """Whether a claim held."""
    claim, found = judged.claim, judged.difference
    key = f"{claim.expects} {judged.verdict}"
    if found is None:
        key = "missing sentence"
    paper = "" if claim.paper is None else say(WORDS["paper had"], language).format(signed(claim.paper))
    return say(WORDS[key], language).format(
        one=labels[claim.one],
        other=labels[claim.other],
        metric=claim.metric,
        difference=interval(found),
        margin=f"{claim.margin:g}",
        runs=0 if found is None else found.runs,
        paper=paper,
    )


def signed(value: float) -> str:
    return f"{value:+.1f}"


def interval(found: Estimate | None) -> str:
    """Mean and 95 % interval of a difference."""
    if found is None:
        return ""
    if math.isnan(found.half_width):
        return signed(found.mean)
    low, high = found.mean - found.half_width, found.mean + found.half_width
    return f"{signed(found.mean)} [{signed(low)}, {signed(high)}]"
