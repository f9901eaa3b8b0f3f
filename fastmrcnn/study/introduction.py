"""The report's beginning, which explains Mask R-CNN to a student, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastmrcnn.speed.markdown import origin
from fastmrcnn.study.coco import COCO, expected_seconds
from fastmrcnn.study.document import Block, Heading, Paragraph, Picture
from fastmrcnn.study.explain import draw_architecture, draw_sampling
from fastmrcnn.study.places import features_file
from fastmrcnn.study.plots import plot_losses_over_time
from fastmrcnn.study.runs import Bench, Run
from fastmrcnn.study.suite import Suite, Text
from fastmrcnn.study.words import Language, say

Cells = Mapping[str, Mapping[int, dict[str, Any]]]
GPUS, SCALING = 8, 0.9  # of the last section's estimate: devices, and what each is worth beside the others

_TITLE = Text("Mask R-CNN's experiments, run again", "重做 Mask R-CNN 的实验")

_WHAT = Text(
    "[Mask R-CNN](https://arxiv.org/abs/1703.06870) finds the objects in an image, tells what each one is, and "
    "outlines it to the pixel. Its authors claimed that a few choices decide how well that works, and "
    "measured each of them on COCO. This report runs the same comparisons again, at a scale that fits a "
    "computer without a GPU: narrow networks, from random weights, on scenes that were drawn to be hard where "
    "a claim needs it. What can be seen at such a scale is whether an effect has the sign that the paper "
    "reports; its size depends on data and network.",
    "[Mask R-CNN](https://arxiv.org/abs/1703.06870) 找出图像中的物体，判断类别，并逐像素勾勒轮廓。作者认为少数几项"
    "设计决定了效果，并在 COCO 上逐项测量。本报告在没有 GPU 的计算机能够承受的规模上重做这些比较：使用较窄的网络、"
    "随机初始权重，以及针对各项论断特意绘制得较难的场景。在这样的规模下，能够看出的是效应的方向是否与论文一致；"
    "效应的大小则取决于数据与网络。",
)

_STAGES = Text(
    "**Two stages.** A *backbone*, a ResNet, turns the image into maps of features: the deeper, the coarser and "
    "the richer in meaning. A *feature pyramid* (FPN) adds the coarse maps to the fine ones, so that each of "
    "its levels p2 to p5 knows both what and where. On these a *region proposal network* (RPN) scores a few "
    "boxes of fixed shapes, the anchors, at every place, and proposes the best as places where an object may "
    "be. That is the first stage. In the second, each proposal's features are cut out of the maps and go to "
    "three heads: one names the class, one corrects the box, one draws the mask. All is trained at once; the "
    "loss is the sum of each part's.",
    "**两个阶段。** *骨干网络*（ResNet）把图像变成特征图：越深越粗，语义也越丰富。*特征金字塔*（FPN）把粗的图加到细的图上，"
    "使 p2 到 p5 每一层既知道“是什么”，也知道“在哪里”。*候选框网络*（RPN）在每个位置为若干固定形状的框（锚框）打分，"
    "把最好的提议为可能有物体之处，这是第一阶段。第二阶段从特征图中裁出每个候选框的特征，交给三个分支：一个判断类别，"
    "一个修正边框，一个画出掩码。全部同时训练，损失是各部分之和。",
)

_ALIGN = Text(
    "**RoIAlign.** Cutting a box out of a map is where the paper's main idea lies. Its predecessor, RoIPool, "
    "rounds the box to whole cells, and each bin to whole cells again, then takes the largest value. On a map "
    "of stride 16 that moves an edge by up to 8 pixels: nothing to a classifier, much to a mask. RoIAlign "
    "rounds nothing. It reads the map at regular points within each bin, by bilinear interpolation, and takes "
    "their average.",
    "**RoIAlign。** 论文的核心思想在于如何从特征图中裁出一个框。此前的 RoIPool 把框取整到整格，每个小块再取整一次，"
    "然后取最大值。在步幅为 16 的图上，边缘可能移动多达 8 个像素：对分类无关紧要，对掩码却影响很大。RoIAlign 不做任何取整，"
    "而是在每个小块内的规则点上以双线性插值读取特征图，再取平均。",
)

_DECOUPLE = Text(
    "**One mask a class.** The mask head predicts a mask for each class, by a sigmoid for each pixel. Only the "
    "mask of the object's class is trained, and in use the box head's class chooses which mask is shown. So "
    "classes do not compete for pixels, as they do under a softmax.",
    "**每类一张掩码。** 掩码分支为每个类别预测一张掩码，每个像素用一个 sigmoid。训练时只训练物体所属类别的掩码，使用时由"
    "框分支判定的类别决定显示哪一张。因此各类别不像 softmax 那样在像素上竞争。",
)

_LOSSES = Text(
    "**The losses.** `loss_rpn_cls` and `loss_rpn_loc` are the RPN's: is there an object, and where exactly. "
    "`loss_cls` and `loss_box_reg` are the box head's, `loss_mask` the mask head's: a binary cross-entropy, "
    "which begins at ln 2, about 0.69, where the head knows nothing.",
    "**损失。** `loss_rpn_cls` 与 `loss_rpn_loc` 属于 RPN：有没有物体，确切位置在哪里。`loss_cls` 与 `loss_box_reg` "
    "属于框分支，`loss_mask` 属于掩码分支：它是二元交叉熵，从 ln 2（约 0.69）开始，此时网络一无所知。",
)

_PADDED = Text(
    "**One graph.** Images have different numbers of objects, and each of these steps finds different numbers "
    "of boxes. Programs for Mask R-CNN therefore ask the device, many times in a step, how many there are, "
    "and wait. Here everything that there may be more or less of has a fixed number of places, some of them "
    "empty: objects, proposals, sampled RoIs, masks. An empty place costs a little arithmetic and contributes "
    "zero. In return a whole training step is one graph with fixed shapes, which can be compiled as a whole, "
    "recorded once, and replayed without waiting.",
    "**一张计算图。** 每幅图像的物体数量不同，每一步得到的框数也不同。因此通常的 Mask R-CNN 程序在每个训练步中要多次询问"
    "设备“有多少个”，并等待回答。在这里，凡是数量可变的东西都有固定数目的位置，其中一些是空的：物体、候选框、采样的 RoI、"
    "掩码。空位置只耗费少量运算，贡献为零。换来的是整个训练步成为一张形状固定的计算图，可以整体编译、录制一次，之后不必等待"
    "即可重放。",
)


def introduction(suite: Suite, cells: Cells, folder: Path, language: Language) -> list[Block]:
    """
    Args:
        folder: that holds metrics/.
    """
    blocks: list[Block] = [Heading(1, say(_TITLE, language)), Paragraph(say(_WHAT, language))]
    blocks.append(Heading(2, say(Text("Mask R-CNN in two pages", "两页读懂 Mask R-CNN"), language)))
    blocks.append(Paragraph(say(_STAGES, language)))
    blocks.append(
        Picture(
            "architecture.svg",
            draw_architecture,
            say(
                Text(
                    "ResNet-50-FPN, with the shapes of its tensors for one image of 800 by 1344 pixels, as the "
                    "program computes them.",
                    "ResNet-50-FPN 及其张量形状（一幅 800×1344 的图像），由程序本身给出。",
                ),
                language,
            ),
        )
    )
    blocks.append(Paragraph(say(_ALIGN, language)))
    features = features_file(folder, suite.name)
    if features.exists():
        blocks.append(
            Picture(
                "sampling.svg",
                lambda: draw_sampling(features),
                say(
                    Text(
                        "One box (red) on a map of the trained network. Left: the cells that RoIPool's bins "
                        "take, after rounding. Right: the points that RoIAlign reads. Four bins a side, for the eye.",
                        "训练后网络的一张特征图上的一个框（红色）。左：RoIPool 取整后各小块所占的格子。右：RoIAlign 读取的点。"
                        "为便于观察，每边只画四个小块。",
                    ),
                    language,
                ),
            )
        )
    blocks += [Paragraph(say(_DECOUPLE, language)), Paragraph(say(_LOSSES, language))]
    if runs := cells.get("fpn"):
        seed = min(runs)
        name = f"`metrics/{suite.name}/{suite.cells['fpn'].name}/seed_{seed}.json`"
        blocks.append(
            Picture(
                f"{suite.name}_losses.svg",
                lambda: plot_losses_over_time(runs[seed]["losses"]),
                say(
                    Text(f"The losses by step, from {name}.", f"各项损失随训练步的变化，来自 {name}。"),
                    language,
                ),
            )
        )
    blocks.append(Paragraph(say(_PADDED, language)))
    blocks += _conditions(suite, cells, language)
    return blocks


def _conditions(suite: Suite, cells: Cells, language: Language) -> list[Block]:
    """How many runs there are, and where they were made."""
    runs = [run for by_seed in cells.values() for run in by_seed.values()]
    if not runs:
        return []
    machines = sorted({origin(run["environment"]) for run in runs})
    hours = sum(run["seconds"] for run in runs) / 3600
    text = Text(
        f"{len(runs)} runs, {hours:.1f} hours of training in all, one after another.",
        f"共 {len(runs)} 次运行，逐一相加的训练时间为 {hours:.1f} 小时。",
    )
    title = Text("What was run, and where", "运行了什么，在哪里运行")
    return [
        Heading(2, say(title, language)),
        Paragraph(say(text, language)),
        *(Paragraph(machine) for machine in machines),
    ]


def closing(suite: Suite, cells: Cells, language: Language) -> list[Block]:
    """What the same comparisons would cost on COCO."""
    bench = Bench(COCO, Path(), Path(), _no_data)
    needed = COCO.needed(COCO.comparisons)
    hours = sum(expected_seconds(bench.config(Run(cell, 0))) for cell in needed) / 3600
    text = Text(
        f"The same {len(needed)} networks with the paper's own recipes on COCO would take about {hours:.0f} hours "
        f"of one H100, or {hours / GPUS / SCALING:.0f} hours of {GPUS} (each worth {SCALING:.0%} beside the "
        "others), for one seed. That is an estimate: three times the operations of the way forward, at the rate "
        "of NVIDIA's entry to MLPerf. `python -m fastmrcnn.experiments --suite coco --data coco=DIR` runs them.",
        f"用论文自己的训练方案在 COCO 上训练同样的 {len(needed)} 个网络，每个种子约需单块 H100 {hours:.0f} 小时，"
        f"或 {GPUS} 块 {hours / GPUS / SCALING:.0f} 小时（并行时每块按 {SCALING:.0%} 计）。这是估计值：取前向运算量的三倍，"
        "按 NVIDIA 参加 MLPerf 时的速率计算。命令 `python -m fastmrcnn.experiments --suite coco --data coco=DIR` 可运行它们。",
    )
    title = Text("What COCO and eight GPUs would add", "若有 COCO 与八块 GPU")
    return [Heading(2, say(title, language)), Paragraph(say(text, language))]


def _no_data(name: str) -> Any:
    raise AssertionError(name)
