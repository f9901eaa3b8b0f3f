"""A step whose loss was not finite, run again from what the run saved of it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyData, at_step, newest_run, refusal
from torch import Tensor

from fastmrcnn import train
from fastmrcnn.errors import UserError
from fastmrcnn.model.mask_head import FcnMaskHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.checkpoint import read_checkpoint


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("replay"))


def replay(run: Path, step: int, capsys: pytest.CaptureFixture[str], *changes: str) -> tuple[int, str]:
    """Exit code, and the paragraph on one line. Nothing in the folder may change."""
    before = contents(run)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        train.main(["--resume", str(run), "--replay", str(step), *changes])
    assert contents(run) == before
    assert isinstance(ended.value.code, int)
    return ended.value.code, capsys.readouterr().out.replace("\n", " ")


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stopped(data: TinyData, folder: Path, *changes: str) -> tuple[Path, str]:
    """A run that a bad loss ends; its folder and its last line."""
    with pytest.raises(UserError) as caught:
        data.run(folder, "train.log_every=6", "train.checkpoint_every=100", *changes)
    return newest_run(folder), str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["runtime.precision=fp16", "optim.ema=0.9"],
        ["data.workers=2", "data.augment.rotate90=0.5", "train.accumulate=2"],
    ],
    ids=["fp32", "fp16", "augmented-2-workers-accumulated"],
)
def test_weights_that_overflow(
    changes: list[str],
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of one convolution, before step 3: its product with an input above 1 is beyond float32."""
    models: list[MaskRCNN] = []
    real = train.new_model

    def new_model(*arguments: Any) -> MaskRCNN:
        models.append(real(*arguments))
        return models[-1]

    def spoil() -> None:
        assert models[0].rpn is not None
        with torch.no_grad():
            next(models[0].rpn.head.parameters()).fill_(3e38)

    with monkeypatch.context() as patch:
        patch.setattr(train, "new_model", new_model)
        at_step(patch, 3, spoil)
        run, line = stopped(data, tmp_path, *changes)
    ids = re.findall(r"not finite at step 3 \(image ids (\[.*?\])\)", line)
    assert line.endswith(f"--resume {run} --replay 3 names the operation")
    assert read_checkpoint(run)["extra"] == {"bad_step": {"seed": 0, "step": 3}}
    code, text = replay(run, 3, capsys)
    assert code == 0
    precision = "fp16" if changes and "fp16" in changes[0] else "fp32"
    assert text.startswith(f"Step 3, seed 0, image ids {ids[0]}, {precision} on cpu: loss_rpn_cls ")
    assert "The loss is not finite; it began with aten." in text
    # In fp16 it is not the product that overflows, but the weights on their way there.
    operation = "aten._to_copy.default" if precision == "fp16" else r"aten\.convolution\.default"
    assert re.search(rf"{operation} in rpn\.head\S*, at fastmrcnn/model/\w+\.py:\d+ in \w+, ", text)
    assert "of 3e+38" in text


def test_a_loss_that_divides_by_nothing(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = FcnMaskHead.loss_of_rois
    seen: list[float] = []

    def loss_of_rois(self: FcnMaskHead, x: Tensor, *others: Any) -> Tensor:
        loss = real(self, x, *others)
        seen.append(loss.item())
        return loss / (len(seen) - 3) if len(seen) <= 3 else loss

    monkeypatch.setattr(FcnMaskHead, "loss_of_rois", loss_of_rois)
    run, _ = stopped(data, tmp_path)
    seen[:] = [0.0, 0.0]
    code, text = replay(run, 2, capsys)
    assert code == 0
    assert "The loss is not finite; it began with aten.div.Tensor in mask_head" in text
    assert f"() float32 of {seen[2]:.4g}" in text


def test_a_step_that_is_finite_this_time(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data.run(tmp_path)
    code, text = replay(run, 4, capsys)
    assert code == 1
    assert "The loss is finite. Its gradient is finite, with a norm of " in text
    code, passes = replay(run, 4, capsys, "train.accumulate=2")
    assert code == 1
    assert (text.count("loss_cls"), passes.count("loss_cls")) == (1, 2)
    assert passes.split(", fp32")[0] == text.split(", fp32")[0]  # the same images


def test_a_gradient_alone(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with a loss scale it ends no run."""
    real = FcnMaskHead.loss_of_rois

    def loss_of_rois(self: FcnMaskHead, x: Tensor, *others: Any) -> Tensor:
        loss = real(self, x, *others)
        return loss + (loss - loss.detach()).square().sqrt()

    run = data.run(tmp_path / "good")
    scaled = data.run(tmp_path / "scaled", "runtime.precision=fp16")
    monkeypatch.setattr(FcnMaskHead, "loss_of_rois", loss_of_rois)
    code, text = replay(run, 4, capsys)
    assert code == 0
    assert re.search(
        r"The loss is finite\. The gradient of \S+, and of \d+ others, is not finite; it began with "
        r"aten\.div\.Tensor, in the backward pass \(SqrtBackward0\) of what is in mask_head",
        text,
    )
    code, text = replay(scaled, 4, capsys)
    assert code == 1
    assert re.search(r"With a loss scale of \d+ \(fp16\) that only skips the update\.", text)


def test_what_cannot_be_replayed(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = data.run(tmp_path)
    line = refusal(["--resume", str(run), "--replay", "5"], capsys, monkeypatch)
    assert line.endswith("steps that can be replayed here: 4, 8")
    assert "goes with --resume" in refusal(["--replay", "5"], capsys, monkeypatch)
