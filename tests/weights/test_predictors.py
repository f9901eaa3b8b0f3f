"""model.weights: the last predictors go from class to class and keypoint to keypoint by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_convert_names import same
from torch import Tensor

from fastmrcnn.config.file import parse_config
from fastmrcnn.data.keypoints import COCO_PERSON, KeypointSchema
from fastmrcnn.detection.detector import Detector
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import pack, write_tensors
from fastmrcnn.weights.peers.classes import COCO
from fastmrcnn.weights.peers.programs import export_state
from fastmrcnn.weights.start import load_weights
from fastmrcnn.weights.trained import untrained_model

NAMES = ["ant", "bee", "cat"]
ROWS = {"box_head.classes": 1, "box_head.deltas": 4, "mask_head.predictor": 1}
KINDS: dict[str, dict[str, Any]] = {
    "for each class": {},
    "class-agnostic": {"box_head": {"class_agnostic": True}, "mask_head": {"class_agnostic": True}},
    "softmax": {"mask_head": {"loss": "softmax"}},
    "mlp": {"mask_head": {"kind": "mlp", "hidden": 16}},
    "no masks": {"mask_head": {"enabled": False}},
}


def card(
    names: list[str], ids: list[int] | None = None, points: list[str] | None = None, **changes: Any
) -> ModelCard:
    tree = copy.deepcopy(tiny.TREE)
    tree["model"]["box_head"] |= {"detections": 60, "score_threshold": 0.0}
    for section, entries in changes.items():
        tree["model"][section] = {**tree["model"].get(section, {}), **entries}
    schema = None
    if points is not None:
        tree["model"]["keypoint_head"] = {"enabled": True, "convs": 1, "channels": 8}
        schema = KeypointSchema(points, [], list(range(len(points))))
    config = parse_config(tree, "the test")
    return ModelCard(config, names, ids or list(range(1, len(names) + 1)), schema)


def model_of(own: ModelCard, seed: int) -> Any:
    """A model with random weights that finds something."""
    torch.manual_seed(seed)
    model = untrained_model(own).eval()
    for name, value in model.state_dict().items():
        if name.startswith(("box_head.classes", "box_head.deltas", "mask_head.predictor", "keypoint_head")):
            value.normal_(std=0.3)
    return model


def saved(path: Path, own: ModelCard, seed: int = 1) -> tuple[Any, str]:
    model = model_of(own, seed)
    write_tensors(path, pack(step=1, model=model, card=own))
    return model, str(path)


def rows(state: dict[str, Tensor], key: str, index: int) -> Tensor:
    count = ROWS[key.rpartition(".")[0]]
    return state[key][index * count : (index + 1) * count]


PREDICTORS = [f"{owner}.{leaf}" for owner in ROWS for leaf in ("weight", "bias")]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_of_each_class_stay_in_another_order(tmp_path: Path, kind: str) -> None:
    theirs, ours = card(NAMES, **KINDS[kind]), card(["cat", "ant", "bee"], [2, 5, 9], **KINDS[kind])
    model, path = saved(tmp_path / "theirs.pt", theirs)
    other = model_of(ours, 2)
    lines = load_weights(other, path, card=ours)
    total = len(other.state_dict())
    assert f": {total} of {total} tensors (" in lines[0]
    assert lines[1:] == ["Taken over by name, 3 of 3 classes: cat, ant, bee"]
    image = np.random.default_rng(0).integers(0, 255, (60, 60, 3), np.uint8)
    expected, found = (Detector(m.eval(), c)(image, score=0.0) for m, c in ((model, theirs), (other, ours)))
    assert len(expected) > 3
    assert len(set(expected.classes)) == 3
    assert [ours.class_names[label] for label in found.classes] == [NAMES[i] for i in expected.classes]
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-6)
    if expected.masks is not None:
        assert np.array_equal(found.masks, expected.masks)


@pytest.mark.parametrize("own", [["horse", "cat", "ant"], ["bee", "horse"], ["ant", "bee", "cat", "horse"]])
def test_new_classes_start_fresh_and_old_ones_keep_their_rows(tmp_path: Path, own: list[str]) -> None:
    model, path = saved(tmp_path / "theirs.pt", card(NAMES))
    ours = card(own)
    other = model_of(ours, 2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    lines = load_weights(other, path, card=ours)
    theirs, state = model.state_dict(), other.state_dict()
    for key in PREDICTORS:
        for index, name in enumerate(own):
            source = rows(theirs, key, NAMES.index(name)) if name in NAMES else rows(before, key, index)
            assert torch.equal(rows(state, key, index), source), (key, name)
    for leaf in ("weight", "bias"):  # the background
        key = f"box_head.classes.{leaf}"
        assert torch.equal(state[key][-1], theirs[key][-1])
    assert all(torch.equal(state[key], theirs[key]) for key in state.keys() - set(PREDICTORS))
    assert f"{len(state) - 6} of {len(state)} tensors and 6 in part" in lines[0]
    kept = [name for name in own if name in NAMES]
    line = f"Taken over by name, {len(kept)} of {len(own)} classes: {', '.join(kept)}"
    gone = [name for name in NAMES if name not in own]
    line += "; new, from random weights: horse" + (f"; in the file alone: {', '.join(gone)}" if gone else "")
    assert lines[1:] == [line]


def test_as_many_classes_of_other_names_start_fresh(tmp_path: Path) -> None:
    model, path = saved(tmp_path / "theirs.pt", card(["red", "green"]))
    ours = card(["horse", "tree"])
    other = model_of(ours, 2)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    lines = load_weights(other, path, card=ours)
    for key, value in other.state_dict().items():
        assert torch.equal(value, before[key] if key in PREDICTORS else model.state_dict()[key]), key
    assert f"{len(before) - 6} of {len(before)} tensors (" in lines[0]
    assert len(lines) == 2
    assert lines[1].startswith(
        "Left out, since the file has 2 classes and this model 2, none of the same name (red, green there): "
        "box_head.classes.{weight, bias}"
    )


def test_classes_of_one_name_are_told_apart_by_their_ids(tmp_path: Path) -> None:
    model, path = saved(tmp_path / "theirs.pt", card(["cat", "cat", "dog"], [1, 2, 3]))
    ours = card(["cat", "dog", "cat"], [2, 3, 7])
    other = model_of(ours, 2)
    lines = load_weights(other, path, card=ours)
    bias, theirs = other.state_dict()["box_head.classes.bias"], model.state_dict()["box_head.classes.bias"]
    assert bias[:2].tolist() == theirs[1:3].tolist()
    assert bias[2] not in theirs
    assert lines[1].endswith(
        "2 of 3 classes: cat, dog; new, from random weights: cat; in the file alone: cat"
    )


@pytest.mark.parametrize("here", [True, False])
def test_predictors_of_one_kind_do_not_become_the_other(tmp_path: Path, here: bool) -> None:
    """One output for all classes against one for each; and a softmax against one without a background."""
    plain, other = card(NAMES), card(NAMES, box_head={"class_agnostic": True}, mask_head={"loss": "softmax"})
    theirs, ours = (plain, other) if here else (other, plain)
    model, path = saved(tmp_path / "theirs.pt", theirs)
    own = model_of(ours, 2)
    before = own.state_dict()["box_head.deltas.weight"].clone()
    lines = load_weights(own, path, card=ours)
    assert torch.equal(own.state_dict()["box_head.deltas.weight"], before)
    assert torch.equal(own.state_dict()["box_head.classes.bias"], model.state_dict()["box_head.classes.bias"])
    assert lines[2] == (
        "Left out, since only one of the two models has them for each class by itself (class_agnostic, "
        "softmax): box_head.deltas.{weight, bias}, mask_head.predictor.{weight, bias}"
    )


@pytest.mark.parametrize("program", ["torchvision", "detectron2"])
@pytest.mark.parametrize("names", [["person"], ["toothbrush", "horse", "person"], COCO.names[::-1]])
def test_the_80_classes_of_a_published_file_are_cocos(tmp_path: Path, program: str, names: list[str]) -> None:
    model = model_of(card(COCO.names, COCO.ids), 1)
    torch.save(export_state(model.state_dict(), program, "the test", COCO.ids), tmp_path / "theirs.pth")
    ours = card(names)
    other = model_of(ours, 2)
    lines = load_weights(other, str(tmp_path / "theirs.pth"), card=ours)
    for key in PREDICTORS:
        for index, name in enumerate(names):
            expected = rows(model.state_dict(), key, COCO.names.index(name))
            assert torch.equal(rows(other.state_dict(), key, index), expected), (key, name)
    if len(names) == 3:
        assert lines[1].startswith("Taken over by name, 3 of 3 classes: toothbrush, horse, person; in the fi")


def test_files_without_names_are_taken_in_their_order(tmp_path: Path) -> None:
    model = model_of(card(NAMES), 1)
    torch.save(export_state(model.state_dict(), "torchvision", "the test", [1, 2, 3]), tmp_path / "x.pth")
    numbered = tmp_path / "numbered.pt"
    write_tensors(numbered, pack(step=0, model=model, card=card(["class 1", "class 2", "class 3"])))
    for source in (tmp_path / "x.pth", numbered):
        ours = card(["horse", "tree", "house"])
        other = model_of(ours, 2)
        lines = load_weights(other, str(source), card=ours)
        assert same(other.state_dict(), model.state_dict())
        assert lines[1] == (
            "The file does not name its classes; they are taken in its order for horse, tree, house"
        )
        fewer = card(["horse"])
        lines = load_weights(model_of(fewer, 2), str(source), card=fewer)
        assert lines[1].startswith("Left out, since the file has 3 classes and this model 1: box_head.")


def test_keypoints_go_by_name_too(tmp_path: Path) -> None:
    model, path = saved(tmp_path / "theirs.pt", card(["arrow"], points=["tip", "left", "right"]))
    ours = card(["arrow"], points=["right", "end", "tip"])
    other = model_of(ours, 2)
    before = other.state_dict()["keypoint_head.deconv.weight"].clone()
    lines = load_weights(other, path, card=ours)
    theirs, state = model.state_dict(), other.state_dict()
    assert lines[2] == (
        "Taken over by name, 2 of 3 keypoints: right, tip; new, from random weights: end; in the file alone: "
        "left"
    )
    weight, bias = "keypoint_head.deconv.weight", "keypoint_head.deconv.bias"
    assert torch.equal(state[weight][:, 0], theirs[weight][:, 2])
    assert torch.equal(state[weight][:, 1], before[:, 1])
    assert torch.equal(state[weight][:, 2], theirs[weight][:, 0])
    assert torch.equal(state[bias][[0, 2]], theirs[bias][[2, 0]])
    none = card(["arrow"], points=["a", "b"])
    lines = load_weights(model_of(none, 2), path, card=none)
    assert lines[2] == (
        "Left out, since the file has 3 keypoints and this model 2, none of the same name (tip, left, right "
        "there): keypoint_head.deconv.{weight, bias}"
    )


def test_the_17_keypoints_of_a_published_file_are_a_persons(tmp_path: Path) -> None:
    config = card(["person"], points=COCO_PERSON.names, mask_head={"enabled": False})
    model = model_of(config, 1)
    torch.save(export_state(model.state_dict(), "torchvision", "the test", [1]), tmp_path / "x.pth")
    ours = card(["person"], points=["left_ear", "nose"], mask_head={"enabled": False})
    other = model_of(ours, 2)
    load_weights(other, str(tmp_path / "x.pth"), card=ours)
    expected = model.state_dict()["keypoint_head.deconv.bias"][[COCO_PERSON.names.index("left_ear"), 0]]
    assert torch.equal(other.state_dict()["keypoint_head.deconv.bias"], expected)
    assert torch.equal(
        other.state_dict()["box_head.classes.bias"], model.state_dict()["box_head.classes.bias"]
    )
