"""The RPN trained by itself, its proposals in a file, and heads trained on that file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TinyData, record, refusal

from fastmrcnn import evaluate, propose
from fastmrcnn.data.coco import read_coco
from fastmrcnn.data.loader import EvalLoader, TrainLoader
from fastmrcnn.data.proposals import attach_proposals, read_proposals, write_proposals
from fastmrcnn.data.records import ImageProposals
from fastmrcnn.data.transforms import Augment
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.proposals import proposal_recall
from fastmrcnn.predict import main as predict_command

RPN_ALONE = ("model.box_head.enabled=false", "model.mask_head.enabled=false")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return TinyData(tmp_path_factory.mktemp("proposals"))


def one(boxes: list[list[float]], scores: list[float]) -> ImageProposals:
    return ImageProposals(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32))


def where(data: TinyData, split: str) -> list[str]:
    images, annotations = data.paths[f"{split}_images"], data.paths[f"{split}_annotations"]
    return ["--images", str(images), "--annotations", str(annotations)]


def test_file_gives_back_what_was_written_best_first(tmp_path: Path) -> None:
    file = tmp_path / "p.npz"
    write_proposals(file, {7: one([[0, 0, 1, 1], [0, 0, 2, 2]], [0.1, 0.9]), 3: one([], [])})
    found = read_proposals(file)
    assert list(found) == [7, 3]
    assert found[7].scores.tolist() == pytest.approx([0.9, 0.1])
    assert found[7].boxes.tolist() == [[0, 0, 2, 2], [0, 0, 1, 1]]
    assert found[3].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"image_ids": np.array([1])}, "lacks counts, boxes, scores"),
        (
            {
                "image_ids": np.array([1]),
                "counts": np.array([3]),
                "boxes": np.zeros((2, 4)),
                "scores": np.zeros(2),
            },
            "do not go together",
        ),
        (
            {
                "image_ids": np.array([1]),
                "counts": np.array([1]),
                "boxes": np.full((1, 4), np.nan),
                "scores": np.zeros(1),
            },
            "1 proposals are not finite",
        ),
        ({"image_ids": np.array([{"a": 1}], dtype=object)}, "is not a file of proposals|lacks"),
    ],
)
def test_bad_files(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    file = tmp_path / "p.npz"
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=words):
        read_proposals(file)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file of proposals"):
        read_proposals(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("boxes")
    with pytest.raises(UserError, match="is not a file of proposals"):
        read_proposals(tmp_path / "text.npz")


def test_proposals_move_with_the_image(data: TinyData, tmp_path: Path) -> None:
    """A proposal that is an object's own box stays on it under resizing, turns and flips."""
    dataset = read_coco(data.paths["train_images"], data.paths["train_annotations"])
    own = {
        r.image_id: one([list(o.box) for o in r.objects][:4], [1.0, 0.9, 0.8, 0.7][: len(r.objects)])
        for r in dataset.records
    }
    write_proposals(tmp_path / "p.npz", own)
    few = dict(list(own.items())[:1])
    write_proposals(tmp_path / "few.npz", few)
    with pytest.raises(UserError, match=r"has no proposals for 5 images of .* and 1 more"):
        attach_proposals(dataset, tmp_path / "few.npz", 3)
    dataset = attach_proposals(dataset, tmp_path / "p.npz", 3)
    changes = Augment(flip_horizontal=0.5, flip_vertical=0.5, rotate90=0.5)
    loader = TrainLoader(dataset, batch=2, short_sides=[96], long_side_max=96, augment=changes, steps=6)
    for loaded in loader:
        proposals, targets = loaded.batch.proposals, loaded.batch.targets
        assert proposals is not None
        assert targets is not None
        assert proposals.boxes.shape == (2, 3, 4)
        for image in range(2):
            count = min(3, int(targets.valid[image].sum()))
            assert proposals.valid[image].tolist() == [True] * count + [False] * (3 - count)
            torch.testing.assert_close(proposals.boxes[image, :count], targets.boxes[image, :count])
    for loaded in EvalLoader(dataset, batch=4, short_side=64, long_side_max=64):
        assert loaded.batch.proposals is not None
        assert loaded.batch.proposals.valid.any(1).all()


def test_recall_of_the_objects_themselves_is_whole(data: TinyData) -> None:
    dataset = read_coco(data.paths["val_images"], data.paths["val_annotations"])
    own = {r.image_id: one([list(o.box) for o in r.objects], [1.0] * len(r.objects)) for r in dataset.records}
    values = proposal_recall(dataset.annotations, own, show=False)
    assert values == {f"box_proposals/AR@{limit}": pytest.approx(100.0) for limit in (100, 300, 1000)}
    far = {key: ImageProposals(value.boxes * 0 + [0, 0, 1, 1], value.scores) for key, value in own.items()}
    assert proposal_recall(dataset.annotations, far, show=False)["box_proposals/AR@100"] == 0
    none = {key: one([], []) for key in own}
    assert proposal_recall(dataset.annotations, none, show=False)["box_proposals/AR@1000"] == 0


def test_rpn_then_heads(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rpn = data.run(tmp_path / "rpn", *RPN_ALONE, val=True)
    rows = record(rpn)
    assert {"loss_rpn_cls", "loss_rpn_loc"} <= {*rows[0]}
    assert not {"loss_cls", "loss_mask"} & {*rows[0]}
    assert rows[-1]["box_proposals/AR@100"] > 0
    assert "fastmrcnn.propose --checkpoint" in capsys.readouterr().out
    files = {}
    for split in ("train", "val"):
        files[split] = tmp_path / f"{split}.npz"
        propose.main(["--checkpoint", str(rpn), *where(data, split), "--output", str(files[split])])
    assert "AR@100" in capsys.readouterr().out
    assert len(read_proposals(files["train"])) == 6
    assert files["val"].read_bytes() != files["train"].read_bytes()
    again = np.load(rpn / "evaluation" / "proposals.npz")
    np.testing.assert_array_equal(again["boxes"], np.load(files["val"])["boxes"])

    given = [f"data.{split}.proposals={files[split]}" for split in files]
    heads = data.run(tmp_path / "heads", "model.rpn.enabled=false", *given, val=True)
    rows = record(heads)
    assert {"loss_cls", "loss_box_reg", "loss_mask"} <= {*rows[0]}
    assert "loss_rpn_cls" not in rows[0]
    assert "segm/AP" in rows[-1]
    evaluate.main(["--checkpoint", str(heads), "--output", str(tmp_path / "judged")])
    assert (tmp_path / "judged" / "metrics.json").exists()

    monkeypatch.setattr("sys.argv", ["predict"])
    for run in (rpn, heads):
        image = next(data.paths["val_images"].glob("*"))
        with pytest.raises(UserError, match="half a detector"):
            predict_command([str(image), "--checkpoint", str(run), "--output", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
    arguments = [*where(data, "val"), "--output", str(tmp_path / "x.npz")]
    with pytest.raises(UserError, match="has no RPN"):
        propose.main(["--checkpoint", str(heads), *arguments])
    arguments[-1] = str(files["val"])
    with pytest.raises(UserError, match="is there already"):
        propose.main(["--checkpoint", str(rpn), *arguments])
    arguments[-1] = str(tmp_path / "nowhere" / "x.npz")  # before the work that would be lost
    with pytest.raises(UserError, match=r"x\.npz: its folder .*nowhere is not there"):
        propose.main(["--checkpoint", "none", *arguments])


def test_proposals_and_rpn_exclude_each_other(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for change in ("model.rpn.enabled=false", "data.train.proposals=p.npz"):
        line = refusal(data.arguments(tmp_path / "out", change), capsys, monkeypatch)
        assert "data.train.proposals goes with model.rpn.enabled=false" in line
    assert not (tmp_path / "out").exists()
