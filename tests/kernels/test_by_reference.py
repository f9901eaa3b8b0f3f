"""The switch from kernels to plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastmrcnn import kernels
from fastmrcnn.kernels import by_reference

OURS = "fastmrcnn_kernels::"
BOXES = torch.tensor([[0.0, 1, 9, 12], [3, 2, 11, 8], [40, 40, 41, 60]])
FIRST = torch.zeros(3, dtype=torch.int64)
ONE = torch.tensor([[0]], dtype=torch.int32)
AFFINE = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
TRIANGLE = torch.tensor([[1.0, 1], [10, 2], [4, 11]], dtype=torch.float64)


def match_boxes() -> Any:
    valid = torch.tensor([[True, False, True]])
    return kernels.match_boxes(
        BOXES[None], BOXES[None] + 1, valid, low_quality=True, gt_crowd=~valid, crowd_overlap=0.5
    )


def mask_targets() -> Tensor:
    bitmap = (torch.arange(144) % 5 < 3).to(torch.uint8)
    window = torch.tensor([[[0, 0, 12, 12]]])
    size = torch.tensor([[12, 12]])
    tables = (bitmap, ONE.long(), window, AFFINE, size)
    return kernels.mask_targets(
        BOXES, FIRST, FIRST, *tables, image_sizes=size, image_shape=(64, 64), resolution=6
    )


def mask_loss() -> tuple[Tensor, Tensor]:
    logits = torch.linspace(-3, 3, 3 * 2 * 4 * 4).view(3, 2, 4, 4).requires_grad_()
    loss = kernels.mask_loss(logits, torch.tensor([0, 1, 1]), logits.detach()[:, 0] > 0, torch.ones(3))
    return loss, torch.autograd.grad(loss, logits)[0]


EXAMPLES: dict[str, Callable[[], Any]] = {
    "assign_levels": lambda: kernels.assign_levels(30 * BOXES),
    "decode_boxes": lambda: kernels.decode_boxes(
        BOXES[None] / 50, BOXES[None], torch.tensor([[50, 50]]), scores=BOXES[None, :, 0], score_threshold=1.0
    ),
    "mask_loss": mask_loss,
    "mask_targets": mask_targets,
    "match_boxes": match_boxes,
    "paste_masks": lambda: kernels.paste_masks(torch.linspace(0, 1, 75).view(3, 5, 5), BOXES, 20, 30),
    "polygon_mask_targets": lambda: kernels.polygon_mask_targets(
        BOXES, FIRST, FIRST, TRIANGLE, torch.tensor([0, 3], dtype=torch.int32), ONE, ONE + 1,
        AFFINE.double(), torch.arange(3), resolution=8,
    ),
}  # fmt: skip


class Ours(TorchDispatchMode):
    """Collects the operators of ours that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith(OURS):
            self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], Any]) -> set[str]:
    with Ours() as ours:
        run()
    return ours.seen


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with (
        pytest.raises(ValueError, match=r"knows (.*); got 'nms', 'match'$") as error,
        by_reference("match_boxes", "nms", "match"),
    ):
        pass
    listed = str(error.value).split("knows ")[1].split(";")[0].split(", ")
    assert listed == sorted(EXAMPLES)
    assert operators(match_boxes)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_operator_of_ours_runs_and_the_numbers_stay(name: str) -> None:
    run = EXAMPLES[name]
    expected = run()
    assert f"{OURS}{name}" in operators(run)
    with by_reference(name):
        assert not operators(run)
        found = run()
        assert all(operators(other) for key, other in EXAMPLES.items() if key != name)
    assert operators(run)
    for ours, plain in zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(plain, ours)


def test_blocks_nest_and_end_with_an_exception() -> None:
    names = ("match_boxes", "assign_levels")

    def on() -> list[bool]:
        return [not operators(EXAMPLES[name]) for name in names]

    with by_reference(names[0]):
        with by_reference(names[1]):
            assert on() == [True, True]
        assert on() == [True, False]
        with pytest.raises(RuntimeError, match="within"), by_reference(*names):  # noqa: PT012
            assert on() == [True, True]
            raise RuntimeError("within")
        assert on() == [True, False]
    assert on() == [False, False]


def test_autocast_changes_nothing() -> None:
    with by_reference("mask_targets"):
        expected = mask_targets()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mask_targets(), expected)


def test_what_is_compiled_asks_when_it_is_traced() -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(str(graph.code))
        return graph.forward

    compiled = torch.compile(match_boxes, backend=keep, fullgraph=True)
    first = compiled()
    with by_reference("match_boxes"):
        second = compiled()
    compiled()
    assert ["fastmrcnn_kernels" in code for code in graphs] == [True, False]
    for ours, plain in zip(first, second, strict=True):
        torch.testing.assert_close(plain, ours)
