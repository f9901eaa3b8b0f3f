"""The report's section on the race with torchvision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastmrcnn.speed.markdown import origin
from fastmrcnn.study.document import Block, Heading, Items, Paragraph, Picture, Table
from fastmrcnn.study.plots import COLOURS, new_figure, plain, svg
from fastmrcnn.study.race import CONTENDERS, DEFAULTS, OURS, TRACKS, TUNED
from fastmrcnn.study.runs import read_json
from fastmrcnn.study.statistics import estimate, spread
from fastmrcnn.study.suite import Text
from fastmrcnn.study.words import Language, say

AIM = 6.0  # times as fast to the same AP
METRIC = "segm/AP"

LABELS = {
    OURS: Text("ours", "本项目"),
    DEFAULTS: Text("torchvision, its defaults", "torchvision，默认设置"),
    TUNED: Text("torchvision, our optimizer settings", "torchvision，本项目的优化器设置"),
}
_TITLE = Text("Against torchvision, by the clock", "与 torchvision 按时间比较")
_QUESTION = Text(
    "How much sooner has a user the same model, with the same network, images and machine?",
    "网络、图像与机器相同时，用户能早多久得到同样好的模型？",
)
_HOW = Text(
    "Every contender trains on one thread for so many minutes, without what evaluating takes, from random "
    "weights. Backbone, pyramid, widths, anchors and numbers of samples are the same. torchvision's images and "
    "masks are decoded once and kept in memory, and so are ours. Its defaults are those of its references: SGD "
    "at 0.02 for 16 images, momentum 0.9, flips. The other row gives it our AdamW, schedule, clipping and moving "
    "average. A schedule ends with its run, so ours and that row begin anew for each time. Columns: minutes.",
    "每个参赛者用一个线程、从随机权重开始训练若干分钟，评测所用时间不计。骨干、金字塔、通道数、锚框与采样数均相同。"
    "torchvision 的图像与掩码解码一次后留在内存中，我们的也一样。其默认设置取自官方参考脚本：每 16 幅图像学习率 0.02 的 SGD，"
    "动量 0.9，水平翻转。另一行给它使用我们的 AdamW、学习率曲线、梯度裁剪与滑动平均。学习率曲线随运行结束，因此我们的运行和"
    "这一行在每个时长都重新开始。各列为分钟数。",
)
_CAPTION = Text(
    "Mask AP by minutes of training; means over seeds, dots are runs.",
    "掩码 AP 随训练分钟数的变化；线为各种子均值，点为每次运行。",
)
_HELD = Text(
    "*{data}*: ours has the mask AP that torchvision's {label} reaches in {whole:g} minutes ({theirs:.1f}) "
    "{at_least}{factor:.1f} times as fast: the aim, {aim:g} times, is met.",
    "*{data}*：torchvision（{label}）用 {whole:g} 分钟达到的掩码 AP（{theirs:.1f}），我们快 {at_least}{factor:.1f} 倍达到："
    "目标（{aim:g} 倍）已实现。",
)
_SHORT = Text(
    "*{data}*: ours has the mask AP that torchvision's {label} reaches in {whole:g} minutes ({theirs:.1f}) "
    "{at_least}{factor:.1f} times as fast: the aim, {aim:g} times, is not met.",
    "*{data}*：torchvision（{label}）用 {whole:g} 分钟达到的掩码 AP（{theirs:.1f}），我们快 {at_least}{factor:.1f} 倍达到："
    "未达到 {aim:g} 倍的目标。",
)
_NEVER = Text(
    "*{data}*: ours does not reach the mask AP that torchvision's {label} has after {whole:g} minutes "
    "({theirs:.1f}) in that time: {ours:.1f}.",
    "*{data}*：torchvision（{label}）{whole:g} 分钟后的掩码 AP 为 {theirs:.1f}，我们在同样时间内未达到：{ours:.1f}。",
)
_FILES = Text("Every number of this section comes from", "本节所有数字均来自")

Curve = dict[float, float]  # minutes: mean AP


class Heats(NamedTuple):
    """Of one set: contender: seed: metrics file."""

    data: str
    files: Mapping[str, Mapping[int, dict[str, Any]]]

    def values(self, contender: str, minutes: float, metric: str = METRIC) -> list[float]:
        return [
            mark["metrics"][metric]
            for file in self.files.get(contender, {}).values()
            for mark in file["marks"]
            if mark["minutes"] == minutes and metric in mark["metrics"]
        ]

    def curve(self, contender: str) -> Curve:
        found = {m: self.values(contender, m) for m in self.minutes()}
        return {m: estimate(values).mean for m, values in found.items() if values}

    def minutes(self) -> list[float]:
        return sorted(
            {m["minutes"] for files in self.files.values() for f in files.values() for m in f["marks"]}
        )


def read_race(folder: Path) -> list[Heats]:
    """Every set that has a metrics file."""
    found = []
    for data in TRACKS:
        files: dict[str, dict[int, dict[str, Any]]] = {}
        for contender in CONTENDERS:
            for path in sorted((folder / "metrics" / "race" / data).glob(f"{contender}_seed_*.json")):
                seed = path.stem.removeprefix(f"{contender}_seed_")
                if seed.isdigit():
                    files.setdefault(contender, {})[int(seed)] = read_json(path, {"marks", "environment"})
        if files:
            found.append(Heats(data, files))
    return found


def race_section(folder: Path, language: Language) -> list[Block]:
    """Nothing, where no heat has been run."""
    race = read_race(folder)
    if not race:
        return []
    blocks: list[Block] = [
        Heading(2, say(_TITLE, language)),
        Paragraph(f"*{say(_QUESTION, language)}*"),
        Paragraph(say(_HOW, language)),
    ]
    for heats in race:
        blocks += [Heading(3, heats.data), Table(*_table(heats, language))]
    blocks.append(Picture("race.svg", lambda: plot_race(race), say(_CAPTION, language)))
    blocks.append(Items([line for heats in race for line in verdicts(heats, language)]))
    machines = {origin(f["environment"]) for h in race for files in h.files.values() for f in files.values()}
    blocks += [Paragraph(machine) for machine in sorted(machines)]
    blocks.append(Paragraph(f"{say(_FILES, language)} `metrics/race/`"))
    return blocks


def _table(heats: Heats, language: Language) -> tuple[list[str], list[list[str]]]:
    minutes = heats.minutes()
    rows = []
    for contender in CONTENDERS:
        row = [say(LABELS[contender], language)]
        for m in minutes:
            values = heats.values(contender, m)
            row.append(spread(estimate(values)) if values else "")
        rows.append(row)
    return [METRIC, *(f"{m:g}" for m in minutes)], rows


def verdicts(heats: Heats, language: Language) -> list[str]:
    """A sentence on ours and each of torchvision's rows."""
    mine, lines = heats.curve(OURS), []
    for contender in (DEFAULTS, TUNED):
        theirs = heats.curve(contender)
        if not theirs or not mine:
            continue
        whole = max(theirs)
        level = theirs[whole]
        label = say(LABELS[contender], language).removeprefix("torchvision, ").removeprefix("torchvision，")
        told = {"data": heats.data, "label": label, "whole": whole, "theirs": level, "aim": AIM}
        reached = time_to(mine, level)
        if reached is None or reached > whole:
            lines.append(say(_NEVER, language).format(**told, ours=mine[max(mine)]))
            continue
        factor = whole / reached
        at_least = {"en": "at least ", "zh": "至少 "}[language] if reached == min(mine) else ""
        text = _HELD if factor >= AIM else _SHORT
        lines.append(say(text, language).format(**told, factor=factor, at_least=at_least))
    return lines


def time_to(curve: Curve, level: float) -> float | None:
    """Minutes until a curve reaches a level, between its marks by straight lines over the logarithm of the
    time; its first mark, if it is there by then; None: never."""
    before: tuple[float, float] | None = None
    for minutes, value in sorted(curve.items()):
        if value >= level:
            if before is None:
                return minutes
            start, low = before
            share = (level - low) / (value - low)
            return math.exp(math.log(start) + share * (math.log(minutes) - math.log(start)))
        before = (minutes, value)
    return None


def plot_race(race: Sequence[Heats]) -> bytes:
    """A panel a set: mask AP by minutes, a line a contender."""
    figure = new_figure(2.9 * len(race) + 0.6, 3.0)
    panels = figure.subplots(1, len(race), squeeze=False)[0]
    for axes, heats in zip(panels, race, strict=True):
        plain(axes)
        minutes = heats.minutes()
        for number, contender in enumerate(CONTENDERS):
            curve = heats.curve(contender)
            if not curve:
                continue
            axes.plot(list(curve), list(curve.values()), color=COLOURS[number], label=contender)
            for m in curve:
                values = heats.values(contender, m)
                axes.plot([m] * len(values), values, "o", color=COLOURS[number], ms=3.5)
        axes.set_xscale("log")
        axes.set_xticks(minutes, [f"{m:g}" for m in minutes])
        axes.minorticks_off()
        axes.set_title(heats.data, fontsize=10)
        axes.set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=7)
    return svg(figure)
