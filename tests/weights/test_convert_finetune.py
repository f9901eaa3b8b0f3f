"""Fine-tuning on one's own classes, from a converted detector, on a real data set."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from places import ROOT
from real_data import real_data
from tiny import newest_run

from fastmrcnn import convert, train

RECIPE = str(ROOT / "configs" / "nuclei.yaml")
SHORT = ["data.short_side=[128]", "data.short_side_test=128", "data.long_side_max=128", "optim.ema=null"]


def by_size(nuclei: Path, folder: Path) -> Path:
    """The training nuclei as two classes, the smaller half and the larger."""
    tree = json.loads((nuclei / "train.json").read_text(encoding="utf-8"))
    middle = sorted(entry["area"] for entry in tree["annotations"])[len(tree["annotations"]) // 2]
    tree["categories"] = [{"id": 1, "name": "small"}, {"id": 2, "name": "large"}]
    for entry in tree["annotations"]:
        entry["category_id"] = 1 + (entry["area"] > middle)
    path = folder / "by_size.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return path


def sets(nuclei: Path, annotations: Path) -> list[str]:
    return [
        f"data.train.images={nuclei / 'images'}",
        f"data.train.annotations={annotations}",
        f"data.val.images={nuclei / 'images'}",
        f"data.val.annotations={nuclei / 'val.json'}",
    ]


@pytest.mark.slow
def test_nuclei_from_a_converted_detector_of_other_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that went through torchvision's format give a lead that random weights do not have."""
    nuclei = real_data("nuclei")
    two_classes = sets(nuclei, by_size(nuclei, tmp_path))[:2]
    first = [*two_classes, *SHORT, "train.steps=120", f"output={tmp_path / 'by_size'}"]
    train.main(["--config", RECIPE, *first])
    theirs, ours = str(tmp_path / "theirs.pth"), str(tmp_path / "ours.pt")
    convert.main([str(newest_run(tmp_path / "by_size")), theirs, "--to", "torchvision"])
    (tmp_path / "names.txt").write_text("small\nlarge\n", encoding="utf-8")
    convert.main([theirs, ours, "--config", RECIPE, "--classes", str(tmp_path / "names.txt")])

    result = {}
    for name, weights in (("fine-tuned", [f"model.weights={ours}"]), ("from random weights", [])):
        capsys.readouterr()
        changes = [*SHORT, "train.steps=25", "optim.warmup_steps=5", "evaluate.pictures=0", *weights]
        output = f"output={tmp_path / name}"
        train.main(["--config", RECIPE, *sets(nuclei, nuclei / "train.json"), *changes, output])
        printed = capsys.readouterr().out
        assert ("Left out, since the file has 2 classes and this model 1" in printed) == bool(weights)
        lines = (newest_run(tmp_path / name) / "metrics.json").read_text(encoding="utf-8").splitlines()
        result[name] = round(json.loads(lines[-1])["segm/AP50"], 1)
    with capsys.disabled():
        print(f"\nnuclei after 25 steps, mask AP50: {result}")
    assert result["fine-tuned"] > result["from random weights"] + 20
