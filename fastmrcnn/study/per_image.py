"""Time per image of the paper's networks on this machine, in training and in inference (section 4.4)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmrcnn.files import make_folder, write_json
from fastmrcnn.speed.apart import Apart
from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.inference_rows import EAGER, Inference
from fastmrcnn.speed.markdown import origin
from fastmrcnn.speed.step_workload import RANDOM_WEIGHTS, Workload, load_recipe, set_up_device
from fastmrcnn.speed.timing import summary, waited_for
from fastmrcnn.speed.training_rows import EAGER as EAGER_STEP
from fastmrcnn.speed.training_rows import OurRunner, Row
from fastmrcnn.study.document import Block, Heading, Paragraph, Table
from fastmrcnn.study.places import per_image_file
from fastmrcnn.study.runs import CONFIGS, read_json
from fastmrcnn.study.suite import Text
from fastmrcnn.study.words import Language, say
from fastmrcnn.training.execution import choose_execution

NETWORKS = {
    "paper_r50_c4": "R50-C4",
    "paper_r101_c4": "R101-C4",
    "paper_r50_fpn": "R50-FPN",
    "paper_r101_fpn": "R101-FPN",
    "paper_x101_fpn": "X101-FPN",
}
SHAPE = (800, 1088)  # that an image of 3:4, as most of COCO's are, is padded to
STEPS, IMAGES = 3, 1  # that are timed; of a step
# arXiv 1703.06870v3, section 4.4: ms of an image on a Tesla M40, and seconds of a step of 16 images on 8 GPUs.
PAPER_INFERENCE = {"paper_r101_fpn": 195.0, "paper_r101_c4": 400.0}
PAPER_TRAINING = {"paper_r50_fpn": 0.72}
PAPER_FPS = 5.0

_TITLE = Text("Time per image", "每幅图像所需时间")
_QUESTION = Text("How long does a network take for an image?", "一个网络处理一幅图像需要多长时间？")
_HOW = Text(
    "The paper's own networks in full width, with random weights, on synthetic images of {height} by {width} "
    "pixels, one at a time, on {device}. Inference: the model and its masks pasted to full size, median of "
    "{steps}. Training: a step, by images. The paper's figures are of a Tesla M40 (inference) and of eight GPUs "
    "(training); its title figure is 5 frames a second.",
    "论文中的完整宽度网络，随机权重，{height}×{width} 像素的合成图像，每次一幅，运行于 {device}。推理：模型加上把掩码贴回"
    "原图大小，取 {steps} 次的中位数。训练：一步所需时间，按图像计。论文的数据来自 Tesla M40（推理）与八块 GPU（训练）；"
    "其标志性数字为每秒 5 帧。",
)
_HEAD = (
    Text("network", "网络"),
    Text("inference, ms", "推理，毫秒"),
    Text("images/s", "图像/秒"),
    Text("paper, ms", "论文，毫秒"),
    Text("paper, images/s", "论文，图像/秒"),
    Text("training, s an image", "训练，秒/图像"),
    Text("paper, s an image", "论文，秒/图像"),
)
_FILE = Text(
    "Every number of this section comes from `metrics/{name}`.", "本节所有数字均来自 `metrics/{name}`。"
)


class Network:
    """One of them, ready to be timed; in a process of its own."""

    def __init__(self, recipe: str, shape: tuple[int, int], steps: int, extra: tuple[str, ...]) -> None:
        config = load_recipe(CONFIGS / f"{recipe}.yaml", [*RANDOM_WEIGHTS, f"train.batch={IMAGES}", *extra])
        device = set_up_device(config)
        self.workload = Workload(config, device, shape, IMAGES, steps)

    def inference(self) -> dict[str, Any]:
        return Inference(self.workload).measure(IMAGES, EAGER)

    def training(self) -> dict[str, Any]:
        device = self.workload.device
        execution = choose_execution(self.workload.config, device) if device.type == "cuda" else EAGER_STEP
        row = Row("step", precision=self.workload.config.runtime.precision, execution=execution)
        runner = OurRunner(row, self.workload, 0)
        runner.warm_up()
        steps = [partial(runner.step, number) for number in range(self.workload.steps)]
        times = [waited_for(step, device)[1] for step in steps]
        return {"precision": runner.precision.name, **summary(times)._asdict()}

    def machine(self) -> dict[str, Any]:
        return environment(self.workload.device)


def measure_networks(
    output: Path,
    suite: str,
    tell: Callable[[str], None] = print,
    *,
    shape: tuple[int, int] = SHAPE,
    steps: int = STEPS,
    extra: tuple[str, ...] = (),
) -> None:
    """Time every network and write what came out, if it is not there yet.

    Raises:
        GoneError: a process died, for want of memory as a rule.
    """
    path = per_image_file(output, suite)
    if path.exists():
        return
    rows: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    for recipe, name in NETWORKS.items():
        with Apart(Network, recipe, shape, steps, extra) as process:
            rows[recipe] = {"inference": process.ask("inference"), "training": process.ask("training")}
            machine = process.ask("machine")
        tell(
            f"{name}: {rows[recipe]['inference']['p50_ms']:.0f} ms, {_seconds(rows[recipe]):.2f} s to train on"
        )
    make_folder(path.parent)
    write_json(
        path,
        {
            "networks": rows,
            "shape": list(shape),
            "images": IMAGES,
            "steps": steps,
            "threads": torch.get_num_threads(),
            "environment": machine,
            "finished": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        },
    )


def _seconds(row: Mapping[str, Any]) -> float:
    """Of training, an image."""
    return float(row["training"]["p50_ms"]) / 1e3 / IMAGES


def per_image_section(folder: Path, suite: str, language: Language) -> list[Block]:
    """Nothing, where nothing has been measured."""
    path = per_image_file(folder, suite)
    if not path.exists():
        return []
    found = read_json(path, {"networks", "shape", "environment"})
    rows = []
    for recipe, name in NETWORKS.items():
        one = found["networks"].get(recipe)
        if one is None:
            continue
        theirs, training = PAPER_INFERENCE.get(recipe, math.nan), PAPER_TRAINING.get(recipe, math.nan)
        rows.append(
            [
                name,
                f"{one['inference']['p50_ms']:.0f}",
                f"{one['inference']['images_per_second']:.2f}",
                _known(theirs, "{:.0f}"),
                _known(PAPER_FPS if recipe == "paper_r101_fpn" else 1e3 / theirs, "{:.1f}"),
                f"{_seconds(one):.2f}",
                _known(training / 16, "{:.3f}"),
            ]
        )
    height, width = found["shape"]
    told = {"height": height, "width": width, "steps": found["steps"], "device": origin(found["environment"])}
    return [
        Heading(2, f"{say(_TITLE, language)} (Section 4.4)"),
        Paragraph(f"*{say(_QUESTION, language)}*"),
        Paragraph(say(_HOW, language).format(**told)),
        Table([say(word, language) for word in _HEAD], rows),
        Paragraph(say(_FILE, language).format(name=f"{suite}/{path.name}")),
    ]


def _known(value: float, form: str) -> str:
    return "" if math.isnan(value) else form.format(value)
