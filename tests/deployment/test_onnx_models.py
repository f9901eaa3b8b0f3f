"""Every family of recipes as ONNX: onnxruntime and OpenVINO find what the model finds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_models import images, trained
from golden_models import fill_from, golden_images
from places import CONFIGS, FIXTURES

import fastmrcnn
from fastmrcnn import evaluate, export
from fastmrcnn.config.file import load_config
from fastmrcnn.deployment.graph import ServingGraph, check_detects
from fastmrcnn.deployment.onnx_file import as_onnx
from fastmrcnn.deployment.onnx_operators import check_operators
from fastmrcnn.deployment.parity import FULL, HALF, compare
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.exported import Arrays, Runner, open_session, session_runner
from fastmrcnn.weights.trained import TrainedModel

for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name)

ONE_MAP = {
    "anchors": {"sizes": [[16, 32, 64]]},
    "rpn": {"pre_nms_top_n_test": 200, "post_nms_top_n_test": 50},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "fpn": {"rpn": {"post_nms_top_n_test": 50}, "roi": {"sampling_ratio": 0}},
    "c4": {"architecture": "c4", **ONE_MAP, "box_head": {"fcs": 0, "resolution": 14}},
    "c5, pooled": {"architecture": "c5", **ONE_MAP, "roi": {"op": "pool", "mode": "max"}},
    "keypoints": {
        "mask_head": {"enabled": False},
        "keypoint_head": {"enabled": True, "convs": 1, "channels": 16},
    },
    "one mask for all classes": {"mask_head": {"class_agnostic": True}, "box_head": {"class_agnostic": True}},
    "softmax, candidates cut": {"mask_head": {"loss": "softmax"}, "box_head": {"candidates": 100}},
    "cascade": {"box_head": {"cascade": True, "class_agnostic": True}},
    "mlp, torchvision's rules": {
        "mask_head": {"kind": "mlp", "hidden": 16},
        "anchors": {"rounding": True, "stride_rule": "grid"},
        "roi": {"aligned": False},
        "channel_order": "bgr",
    },
}


def openvino_runner(content: bytes, outputs: Sequence[str]) -> Runner:
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(pixels: np.ndarray, sizes: np.ndarray) -> Arrays:
        found = compiled({"pixels": pixels, "sizes": sizes})
        return {name: np.array(found[name]) for name in outputs}

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "half"), [*((name, False) for name in FAMILIES), ("fpn", True), ("cascade", True)]
)
def test_each_engine_finds_the_same(family: str, half: bool) -> None:
    trained_model = trained(**FAMILIES[family])
    model, config = trained_model.model, trained_model.card.config.model
    pixels, sizes = images(2)
    graph = ServingGraph(trained_model, half=half)
    content = as_onnx(graph, config, 3, 2, (pixels.shape[1], pixels.shape[2])).SerializeToString()
    runners = [session_runner(open_session(content))]
    if config.roi.op != "pool" and importlib.util.find_spec("openvino") is not None:
        runners.append(openvino_runner(content, graph.outputs))
    assert isinstance(model, MaskRCNN)
    for run in runners:
        parity = compare(model, run, [(pixels.numpy(), sizes.numpy())], HALF if half else FULL, 0.5)
        assert parity.matched >= 20
        assert parity.faults() == []


def test_every_recipe_can_be_exported_or_is_refused_by_name() -> None:
    refused = {}
    for path in sorted(CONFIGS.rglob("*.yaml")):
        config = load_config(path)
        try:
            check_detects(config)
            check_operators(config.model.roi)
        except UserError as error:
            refused[path.stem] = str(error)
    assert list(refused) == ["table2c_roiwarp_max_r50_c4"]
    assert "model.roi.op=warp, mode=max" in refused["table2c_roiwarp_max_r50_c4"]


@pytest.mark.slow
def test_a_run_and_its_file_have_the_same_figures(tmp_path: Path) -> None:
    """AP to three digits, of boxes and keypoints, and a file in fp16 with its own tolerances."""
    old, arrows = FIXTURES / "checkpoint_0_1" / "keypoints", FIXTURES / "checkpoint_0_1" / "arrows"
    val = [f"data.val.images={arrows}", f"data.val.annotations={arrows / 'set.json'}"]
    export.main(["--checkpoint", str(old), "--output", str(tmp_path / "model.onnx"), *val])
    figures = []
    for index, checkpoint in enumerate((old, tmp_path / "model.onnx")):
        folder = tmp_path / f"judged{index}"
        evaluate.main(["--checkpoint", str(checkpoint), "--output", str(folder), *val])
        figures.append((folder / "metrics.json").read_text(encoding="utf-8"))
    assert figures[0] == figures[1]
    assert '"bbox/AP": 83.8' in figures[0]
    half = tmp_path / "half" / "model.onnx"
    export.main(["--checkpoint", str(old), "--half", "--output", str(half), *val])
    import onnx

    tensors = onnx.load(str(half)).graph.initializer
    halved = sum(int(np.prod(one.dims)) for one in tensors if one.data_type == onnx.TensorProto.FLOAT16)
    weights = sum(one.numel() for one in fastmrcnn.load(old, "cpu").model.parameters())
    assert halved > 0.8 * weights


@pytest.mark.slow
def test_resnet50_as_published() -> None:
    """torchvision's network, whose weights are derived from their names: in fp16 such made-up ones give boxes
    that crowd, of which NMS then keeps others."""
    config = load_config(CONFIGS / "zoo" / "torchvision_mask_rcnn_r50_fpn.yaml")
    model = build_model(config.model, 7)
    fill_from(model, "torchvision")
    model.eval()
    names = [str(number) for number in range(7)]
    trained = TrainedModel(model, ModelCard(config, names, list(range(1, 8))))
    pixels, sizes = golden_images(255.0)
    inputs = pixels[:1].round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), sizes[:1].int()
    graph = ServingGraph(trained)
    content = as_onnx(graph, config.model, 7, 1, (256, 288)).SerializeToString()
    run = session_runner(open_session(content))
    parity = compare(model, run, [(inputs[0].numpy(), inputs[1].numpy())], FULL, 0.5)
    assert parity.matched >= 98
    assert parity.faults() == []
