"""A loss that is not finite never reaches the weights of a run, whatever comes after it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyData, assert_same_state, record

from fastmrcnn import train
from fastmrcnn.errors import UserError
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch
from fastmrcnn.training.step import TrainingStep
from fastmrcnn.weights.checkpoint import read_checkpoint

BAD = 3
BN_SGD = ["optim.name=sgd", "optim.lr=0.01", "model.backbone.norm=bn", "model.fpn.norm=bn"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("bad_loss"))


def poison(monkeypatch: pytest.MonkeyPatch, bad_step: int, value: float) -> list[list[int]]:
    """One pixel of batch number `bad_step` becomes `value`; the batches before and after are good."""
    seen: list[list[int]] = []
    real, real_loader = TrainingStep.upload, train.train_loader

    def upload(make_step: TrainingStep, batch: Batch) -> Batch:
        batch = real(make_step, batch)
        if len(seen) - 1 == bad_step:
            pixels = batch.pixels.float()
            pixels[1, 0, 5, 5] = value
            batch = batch._replace(pixels=pixels)
        return batch

    def loader(*arguments: Any, **options: Any) -> Any:
        for loaded in real_loader(*arguments, **options):
            seen.append(loaded.image_ids)
            yield loaded

    monkeypatch.setattr(TrainingStep, "upload", upload)
    monkeypatch.setattr(train, "train_loader", loader)
    return seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(["optim.ema=0.9"], id="adamw-ema"),
        pytest.param(BN_SGD, id="sgd-bn"),
        pytest.param([*BN_SGD, "runtime.precision=fp16", "optim.clip_norm=1.0"], id="fp16-bn"),
    ],
)
def test_a_run_stops_with_the_weights_before_the_bad_step(
    changes: list[str], value: float, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = read_checkpoint(data.run(tmp_path / "good", *changes, f"train.steps={BAD}"))
    with monkeypatch.context() as patch:
        seen = poison(patch, BAD, value)
        with pytest.raises(UserError) as caught:
            data.run(tmp_path / "bad", *changes, "train.log_every=6", "train.checkpoint_every=100")
    assert len(seen) == 6  # two more steps until the host looked
    folder = tmp_path / "bad" / "run_001"
    saved = folder / "checkpoints" / f"step_{BAD:07d}.pt"
    message = str(caught.value)
    assert "\n" not in message
    assert f"not finite at step {BAD} (image ids {seen[BAD]})" in message
    assert re.findall(r"saved in (\S+);", message) == [str(saved)]
    bad = read_checkpoint(saved)
    assert bad["step"] == BAD
    assert_same_state(good, bad)  # and all of it is finite
    assert record(folder) == []
    train.main(["--resume", str(saved), "train.log_every=2"])
    assert [row["iteration"] for row in record(folder)] == [3, 5, 7]


def test_no_checkpoint_is_written_past_a_bad_step(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host looks before it saves, however rarely it reads otherwise."""
    poison(monkeypatch, BAD, float("nan"))
    with pytest.raises(UserError, match=f"not finite at step {BAD} "):
        data.run(tmp_path, "train.log_every=100", "train.checkpoint_every=2")
    names = sorted(path.name for path in (tmp_path / "run_001" / "checkpoints").glob("*.pt"))
    assert names == ["step_0000002.pt", "step_0000003.pt"]


def test_a_bad_parameter_is_named_too(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the images' fault: the first step is bad, and what is saved is what was there."""
    real = train.new_model

    def new_model(*arguments: Any) -> MaskRCNN:
        model = real(*arguments)
        assert model.rpn is not None
        with torch.no_grad():
            model.rpn.head.objectness.bias[0] = float("nan")
        return model

    monkeypatch.setattr(train, "new_model", new_model)
    with pytest.raises(UserError, match="not finite at step 0 "):
        data.run(tmp_path)
