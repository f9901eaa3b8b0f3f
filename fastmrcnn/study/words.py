"""Words of the report that are not of one comparison, in both languages."""

from __future__ import annotations

from typing import Literal

from fastmrcnn.study.suite import Text

Language = Literal["en", "zh"]


def say(text: Text, language: Language) -> str:
    return text.en if language == "en" else text.zh


WORDS = {
    "claim": Text("compared", "比较"),
    "metric": Text("metric", "指标"),
    "paper": Text("paper", "论文"),
    "here": Text("here, 95 % interval", "本次，95% 区间"),
    "verdict": Text("verdict", "结论"),
    "held": Text("held", "成立"),
    "reversed": Text("reversed", "相反"),
    "open": Text("not resolvable", "无法分辨"),
    "missing": Text("not run", "未运行"),
    "overview": Text("All claims at a glance", "结论一览"),
    "how judged": Text(
        "Each row compares two networks that differ in one thing. The difference is taken seed by seed and "
        "averaged; the interval is Student's, at 95 %. A claim that one is better held if the whole interval "
        "lies above zero. A claim that two are the same held if the interval lies within the margin that its "
        "section names. Where the interval allows both, the runs cannot tell, and the table says so.",
        "每一行比较两个只差一处的网络。差值按随机种子逐一相减后取平均，区间为 95% 的 t 区间。“更好”的论断在整个区间"
        "大于零时成立；“相同”的论断在区间落入该节给出的界限内时成立。若区间两可，表中即写明“无法分辨”。",
    ),
    "truth": Text("ground truth", "真值"),
    "cells caption": Text(
        "Bars: means over seeds, with 95 % intervals. Dots: the runs.",
        "柱：各种子的均值与 95% 区间。点：每次运行。",
    ),
    "effects caption": Text(
        "Differences in AP. Dots: here, with 95 % intervals. Diamonds: the paper, on COCO.",
        "AP 之差。圆点：本次结果与 95% 区间。菱形：论文在 COCO 上的结果。",
    ),
    "pictures caption": Text(
        "The same validation images, from left to right: {names}. Objects with a score of 0.5 or more, seed 0.",
        "相同的验证图像，从左到右：{names}。显示得分不低于 0.5 的物体，种子 0。",
    ),
    "numbers from": Text("Every number of this section comes from", "本节所有数字均来自"),
    "paper had": Text(" (the paper: {})", "（论文：{}）"),
    "more held": Text(
        "*{one}* is better than *{other}* in {metric} by {difference}, {runs} seeds{paper}: the claim held.",
        "在 {metric} 上，*{one}* 优于 *{other}*，差 {difference}，{runs} 个种子{paper}：论断成立。",
    ),
    "more reversed": Text(
        "*{one}* is worse than *{other}* in {metric}: {difference}, {runs} seeds{paper}. Here the claim is "
        "reversed.",
        "在 {metric} 上，*{one}* 不如 *{other}*：{difference}，{runs} 个种子{paper}。此处结论相反。",
    ),
    "more open": Text(
        "*{one}* and *{other}* differ in {metric} by {difference}, {runs} seeds{paper}: not resolvable at "
        "this scale.",
        "在 {metric} 上，*{one}* 与 *{other}* 相差 {difference}，{runs} 个种子{paper}：在此规模下无法分辨。",
    ),
    "same held": Text(
        "*{one}* and *{other}* differ in {metric} by {difference}, less than {margin} AP, {runs} seeds{paper}: "
        "the claim that they are the same held.",
        "在 {metric} 上，*{one}* 与 *{other}* 相差 {difference}，小于 {margin} AP，{runs} 个种子{paper}："
        "“相同”的论断成立。",
    ),
    "same reversed": Text(
        "*{one}* and *{other}* differ in {metric} by {difference}, more than {margin} AP, {runs} seeds{paper}: "
        "they are not the same here.",
        "在 {metric} 上，*{one}* 与 *{other}* 相差 {difference}，超过 {margin} AP，{runs} 个种子{paper}："
        "此处二者并不相同。",
    ),
    "same open": Text(
        "*{one}* and *{other}* differ in {metric} by {difference}, {runs} seeds{paper}: whether that is less "
        "than {margin} AP is not resolvable at this scale.",
        "在 {metric} 上，*{one}* 与 *{other}* 相差 {difference}，{runs} 个种子{paper}：在此规模下无法判断"
        "是否小于 {margin} AP。",
    ),
    "missing sentence": Text(
        "*{one}* and *{other}* have not both been run yet.", "*{one}* 与 *{other}* 尚未都运行。"
    ),
}
