"""What operators refuse, and how they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmrcnn.kernels.common.checks import require, require_at_least

BOXES = torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("tensor", "shape", "kind"),
    [
        (BOXES, ("R", 4), "floating point"),
        (BOXES, (6, 4), torch.float32),
        (BOXES[:0], ("R", 4), "real"),
        (BOXES, ("...", 4), None),
        (BOXES[0], ("...", 4), None),
        (BOXES[:4], ("M", "M"), None),
        (BOXES.bool(), [(1, 4), ("R", 4)], "real"),
        (BOXES.byte(), ("R", 4), "integer"),
        (None, (1,), "integer"),
    ],
)
def test_accepts(tensor: Any, shape: Any, kind: Any) -> None:
    require("boxes", tensor, shape, kind, ("features", BOXES))
    torch.compiler.reset()
    torch.compile(require, backend="eager", fullgraph=True)("boxes", tensor, shape, kind, ("features", BOXES))


@pytest.mark.parametrize(
    ("tensor", "shape", "kind", "says"),
    [
        (BOXES, ("R", 5), None, "boxes must be (R, 5), got (6, 4)"),
        (BOXES, (6,), None, "boxes must be (6,), got (6, 4)"),
        (BOXES[0, 0], ("...", 4), None, "boxes must be (..., 4), got ()"),
        (BOXES, ("M", "M"), None, "boxes must be (M, M) with M at least 1, got (6, 4)"),
        (BOXES[:0], ("K", "C"), None, "boxes must be (K, C) with K and C at least 1, got (0, 4)"),
        (BOXES, [(1, 4), ("R", 4, 4)], None, "boxes must be (1, 4) or (R, 4, 4), got (6, 4)"),
        (BOXES.int(), ("R", 4), "floating point", "boxes must be floating point, got torch.int32"),
        (BOXES, ("R", 4), "integer", "boxes must be of an integer dtype, got torch.float32"),
        (BOXES.bool(), ("R", 4), "integer", "boxes must be of an integer dtype, got torch.bool"),
        (BOXES + 1j, ("R", 4), "real", "boxes must be real, got torch.complex64"),
        (BOXES, ("R", 4), torch.bool, "boxes must be bool, got torch.float32"),
    ],
)
def test_refuses(tensor: torch.Tensor, shape: Any, kind: Any, says: str) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        require("boxes", tensor, shape, kind)
    assert str(error.value) == says


def test_says_what_the_tensor_belongs_to() -> None:
    with pytest.raises(ValueError, match=r"^valid must be \(6,\) for boxes \(6, 4\), got \(5,\)$"):
        require("valid", BOXES[1:, 0], (6,), like=("boxes", BOXES))
    for like, verb in (("boxes", "are"), ("weight", "is")):
        with pytest.raises(ValueError, match=f"^bias must be on meta as {like} {verb}, got cpu$"):
            require("bias", BOXES, (6, 4), like=(like, BOXES.to("meta")))


def test_numbers_have_a_least() -> None:
    require_at_least("side", 1, 1)
    for wrong in (0, float("nan")):
        with pytest.raises(ValueError, match=f"^side must be at least 1, got {wrong}$"):
            require_at_least("side", wrong, 1)
