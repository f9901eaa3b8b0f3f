"""The cascade of box heads against a textbook of detectron2's CascadeROIHeads, one box at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import random_batch, small_config
from nosync import NoSync
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.cascade import CascadeBoxHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch, Losses, Proposals, present

WEIGHTS = [(10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0)]
IOUS = [0.5, 0.6, 0.7]
CLASSES = 3


def cascade_config(**box_head: Any) -> Config:
    tree = small_config().model_dump()
    del tree["model"]["box_head"]["class_agnostic"]
    tree["model"]["box_head"] |= {"cascade": True, **box_head}
    return Config.model_validate(tree)


def cascade_model(seed: int = 0, **box_head: Any) -> MaskRCNN:
    torch.manual_seed(seed)
    model = build_model(cascade_config(**box_head).model, CLASSES)
    assert isinstance(model.box_head, CascadeBoxHead)
    with torch.no_grad():  # boxes that move, and not so far that no later head has foreground
        for head in model.box_head.stages:
            head.deltas.weight.normal_(std=0.1)
            head.classes.weight.normal_(std=0.3)
    return model


# The textbook: lists of Python numbers, float64, after the paper and detectron2's cascade_rcnn.py.


def moved(delta: list[float], box: list[float], weights: tuple[float, ...], size: list[int]) -> list[float]:
    wide, high = box[2] - box[0], box[3] - box[1]
    x, y = box[0] + wide / 2, box[1] + high / 2
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights, strict=True))
    dw, dh = (min(one, math.log(1000 / 16)) for one in (dw, dh))
    x, y, wide, high = x + dx * wide, y + dy * high, wide * math.exp(dw), high * math.exp(dh)
    corners = [x - wide / 2, y - high / 2, x + wide / 2, y + high / 2]
    limits = [size[1], size[0], size[1], size[0]]
    return [min(max(value, 0), limit) for value, limit in zip(corners, limits, strict=True)]


def overlap(a: list[float], b: list[float]) -> float:
    wide = min(a[2], b[2]) - max(a[0], b[0])
    high = min(a[3], b[3]) - max(a[1], b[1])
    if wide <= 0 or high <= 0:
        return 0.0
    both = wide * high
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def delta_of(goal: list[float], box: list[float], weights: tuple[float, ...]) -> list[float]:
    wide, high = box[2] - box[0], box[3] - box[1]
    gw, gh = goal[2] - goal[0], goal[3] - goal[1]
    shift = [
        (goal[0] + gw / 2 - box[0] - wide / 2) / wide,
        (goal[1] + gh / 2 - box[1] - high / 2) / high,
        math.log(gw / wide),
        math.log(gh / high),
    ]
    return [one * weight for one, weight in zip(shift, weights, strict=True)]


def textbook_losses(model: MaskRCNN, batch: Batch, features: list[Tensor], rois: Any) -> dict[str, float]:
    """Losses of the three heads, the first on the sampled RoIs; the heads themselves are the model's."""
    head = model.box_head
    assert batch.targets is not None
    objects = [
        [(box, cls) for box, cls, valid in zip(*one, strict=True) if valid]
        for one in zip(
            batch.targets.boxes.tolist(),
            batch.targets.classes.tolist(),
            batch.targets.valid.tolist(),
            strict=True,
        )
    ]
    boxes = [
        [b for b, v in zip(*one, strict=True) if v]
        for one in zip(rois.boxes.tolist(), rois.valid.tolist(), strict=True)
    ]
    losses = {}
    for stage in range(3):
        cls_sum = box_sum = 0.0
        count = sum(map(len, boxes))
        following: list[list[list[float]]] = []
        for image, ours in enumerate(boxes):
            following.append([])
            if not ours:
                continue
            one = [feature[image : image + 1] for feature in features]
            tensor = torch.tensor(ours)[None]
            x = model.pooler(one, tensor, torch.ones(1, len(ours), dtype=torch.bool), head.resolution)
            logits, deltas = head.stages[stage](x)
            logs = logits[0].double().log_softmax(-1).tolist()
            for box, log, delta in zip(ours, logs, deltas[0, :, 0].double().tolist(), strict=True):
                best = max(objects[image], key=lambda one, box=box: overlap(one[0], box), default=None)
                foreground = best is not None and overlap(best[0], box) >= IOUS[stage]
                cls_sum -= log[best[1] if foreground else CLASSES]
                if foreground:
                    goal = delta_of(best[0], box, WEIGHTS[stage])
                    box_sum += sum(abs(a - b) for a, b in zip(delta, goal, strict=True))
                new = moved(delta, box, WEIGHTS[stage], batch.sizes[image].tolist())
                if new[2] > new[0] and new[3] > new[1]:
                    following[-1].append(new)
        losses[f"loss_cls_stage{stage}"] = cls_sum / count
        losses[f"loss_box_reg_stage{stage}"] = box_sum / count
        boxes = following
    return losses


def step(model: MaskRCNN, batch: Batch, seed: int = 0) -> Losses:
    return model(batch, model.draw_keys(batch, torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("counts", [(3, 2), (4, 0)])
def test_losses_are_the_textbooks(counts: tuple[int, int]) -> None:
    model = cascade_model().train()
    batch = random_batch(1, counts)
    keys = model.draw_keys(batch, torch.Generator().manual_seed(0))
    seen = {}
    sampler = model.sampler

    def keep(*args: Any) -> Any:
        seen["rois"] = sampler(*args)
        return seen["rois"]

    keep.foreground_slots = sampler.foreground_slots  # type: ignore[attr-defined]
    model.sampler = keep  # type: ignore[assignment]
    losses = present(model(batch, keys)[0])
    with torch.no_grad():
        want = textbook_losses(model, batch, model.features(batch), seen["rois"])
    assert {name for name in losses if "stage" in name} == set(want)
    assert "loss_cls" not in losses
    assert all(want[f"loss_box_reg_stage{stage}"] > 0 for stage in range(3))
    for name, value in want.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-4, abs=1e-6), name
    total = sum(value.item() for value in losses.values())
    assert step(model, batch).total().item() == pytest.approx(total, rel=1e-5)


def test_boxes_come_from_the_last_head_and_scores_from_all() -> None:
    """Without NMS and threshold, every proposal of a single image comes out for every class."""
    model = cascade_model(score_threshold=0.0, nms_iou=1.0, detections=60).eval()
    batch = random_batch(2, (3,))
    features = model.features(batch)
    boxes = torch.tensor([[[5.0, 5, 60, 70], [20, 30, 90, 120], [0, 0, 40, 40]]])
    proposals = Proposals(boxes, torch.zeros(1, 3), torch.tensor([[True, True, False]]))
    found = model.find_boxes(features, proposals, batch.sizes)
    size = batch.sizes[0].tolist()
    want = []
    for index in range(2):
        box, probabilities = boxes[0, index].tolist(), []
        for stage, head in enumerate(model.box_head.stages):
            one = torch.tensor(box)[None, None]
            logits, deltas = head(model.pooler(features, one, torch.ones(1, 1, dtype=torch.bool), 7))
            probabilities.append(logits[0, 0].double().softmax(-1).tolist())
            box = moved(deltas[0, 0, 0].double().tolist(), box, WEIGHTS[stage], size)
        if box[2] > box[0] and box[3] > box[1]:
            want += [(sum(p[k] for p in probabilities) / 3, k, box) for k in range(CLASSES)]
    want.sort(reverse=True)
    assert int(found.valid.sum()) >= len(want) > 0
    rows = [
        (score, cls, box)
        for score, cls, box in zip(
            found.scores[0].tolist(), found.classes[0].tolist(), found.boxes[0].tolist(), strict=True
        )
        if box[2] > box[0] and box[3] > box[1]
    ]
    for (score, cls, box), (real_score, real_cls, real_box) in zip(rows, want, strict=True):
        assert score == pytest.approx(real_score, abs=1e-5)
        assert cls == real_cls
        assert box == pytest.approx(real_box, abs=1e-2)


def test_a_cascade_of_equal_heads_that_move_nothing_is_one_head() -> None:
    model = cascade_model().eval()
    first = model.box_head.stages[0]
    with torch.no_grad():
        for head in model.box_head.stages:
            head.load_state_dict(first.state_dict())
            head.deltas.weight.zero_()
    batch = random_batch(3, (3, 2))
    features = model.features(batch)
    proposals = model.propose(features, batch)
    x = model.box_features(features, proposals.boxes, proposals.valid)
    alone = model.box_head.stages[2].detect(*model.box_head.stages[2](x), proposals, batch.sizes)
    together = model.find_boxes(features, proposals, batch.sizes)
    torch.testing.assert_close(together.scores, alone.scores, rtol=1e-4, atol=1e-5)


def test_maps_feel_a_third_of_each_heads_gradient() -> None:
    model = cascade_model().train()
    heads = model.box_head
    batch = random_batch(4, (3, 2))
    features = [one.detach().requires_grad_() for one in model.features(batch)]
    with torch.no_grad():
        proposals = model.propose(features, batch)
        keys = model.draw_keys(batch, torch.Generator().manual_seed(0))
        rois = model.sampler(proposals, batch.targets, keys.rois)
    pooled = model.box_features(features, rois.boxes, rois.valid)
    losses, _ = model.box_losses(features, pooled, rois, batch.targets, batch.sizes)
    got = torch.autograd.grad(losses["loss_cls_stage0"], [features[0], heads.stages[0].classes.bias])
    pooled = model.box_features(features, rois.boxes, rois.valid)
    first = heads.stages[0]
    alone = first.losses(*first(pooled), rois, batch.targets)[0]
    want = torch.autograd.grad(alone, [features[0], first.classes.bias])
    torch.testing.assert_close(got[0], want[0] / 3, rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-8)
    # Where a box stands has no gradient: the second head's losses do not reach the first one's deltas.
    pooled = model.box_features(features, rois.boxes, rois.valid)
    losses, _ = model.box_losses(features, pooled, rois, batch.targets, batch.sizes)
    second = losses["loss_cls_stage1"] + losses["loss_box_reg_stage1"]
    assert torch.autograd.grad(second, first.deltas.weight, allow_unused=True) == (None,)


def test_background_in_a_crowd_is_left_out_in_every_stage() -> None:
    model = cascade_model().train()
    batch = random_batch(5, (1,))
    boxes, crowd = batch.targets.boxes.clone(), batch.targets.crowd.clone()
    boxes[0, 3], crowd[0, 3] = torch.tensor([0.0, 0, 96, 128]), True
    targets = batch.targets._replace(boxes=boxes, crowd=crowd)
    inside = torch.tensor([[[1.0, 1, 9, 9], boxes[0, 0].tolist()]])
    labelled = model.box_head._labelled(inside, torch.ones(1, 2, dtype=torch.bool), targets, 0.6)
    assert labelled.valid.tolist() == [[False, True]]
    assert labelled.is_foreground.tolist() == [[False, True]]


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_step_and_detection_are_one_graph_each_and_never_sync(training: bool) -> None:
    model = cascade_model()
    batches = [random_batch(1, (3, 0)), random_batch(2, (0, 5))]
    keys = model.draw_keys(batches[0], torch.Generator().manual_seed(1))
    with NoSync():
        model.train()(batches[0], keys)[0].total().backward()
        model.eval()(batches[0]._replace(targets=None))
    missing = [key for key, p in model.named_parameters() if p.grad is None]
    assert missing == []
    model.train(training)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for batch in batches:
        if training:
            compiled(batch, keys)[0].total().backward()
        else:
            compiled(batch._replace(targets=None))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_settings_that_do_not_go_together_are_refused() -> None:
    for word in ("true", "yes"):
        assert load_config(overrides=[f"model.box_head.cascade={word}"]).model.box_head.class_agnostic
    for more, word in (
        ("model.box_head.class_agnostic=false", "class_agnostic"),
        ("model.architecture=c4", "fpn or c5"),
        ("model.box_head.cascade_ious=[0.6]", "cascade_ious"),
    ):
        with pytest.raises(UserError, match=word):
            load_config(overrides=["model.box_head.cascade=true", more])
