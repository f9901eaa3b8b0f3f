"""python -m fastmrcnn.convert, and starting from whole detectors."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from test_convert_names import same
from torch import Tensor

from fastmrcnn import convert, evaluate
from fastmrcnn.config.file import load_config, parse_config
from fastmrcnn.config.schema import Config
from fastmrcnn.detection.detector import Detector, load
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.training.optim import build_optimizer
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.checkpoint import read_checkpoint, save_checkpoint
from fastmrcnn.weights.detectors import open_weights
from fastmrcnn.weights.peers.classes import COCO
from fastmrcnn.weights.peers.programs import export_state
from fastmrcnn.weights.start import load_weights
from fastmrcnn.weights.trained import load_trained

NAMES = ["ant", "bee", "cat"]


def tree_of(**changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with frozen batch norm and the given changes of its model section."""
    tree = copy.deepcopy(tiny.TREE)
    tree["model"]["backbone"]["norm"] = "frozen_bn"
    for section, entries in changes.items():
        tree["model"][section] = {**tree["model"].get(section, {}), **entries}
    return tree


def built(num_classes: int = 3, seed: int = 0, **changes: dict[str, Any]) -> tuple[MaskRCNN, Config]:
    config = parse_config(tree_of(**changes), "the test")
    torch.manual_seed(seed)
    model = build_model(config.model, num_classes).eval()
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif "predictor" in name or "classes" in name:
            value.normal_(std=0.3)  # so that there is something to detect
    return model, config


class Folder:
    """A tiny model, its recipe and its class names in files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model, self.config = built()
        self.state = self.model.state_dict()
        (path / "recipe.yaml").write_text(yaml.safe_dump(tree_of()), encoding="utf-8")
        (path / "names.txt").write_text("\n".join(NAMES), encoding="utf-8")
        self.options = ["--config", str(path / "recipe.yaml"), "--classes", str(path / "names.txt")]

    def save(self, tree: Any, name: str = "in.pth") -> Path:
        torch.save(tree, self.path / name)
        return self.path / name

    def export(self, program: str, ids: list[int] | None = None) -> dict[str, Tensor]:
        return export_state(self.state, program, "the test", ids or [1, 2, 3])

    def convert(self, source: Path, name: str, *options: str) -> Path:
        target = self.path / name
        convert.main([str(source), str(target), *options])
        return target

    def refusal(self, *arguments: str) -> str:
        with pytest.raises(UserError) as caught:
            convert.main([*arguments])
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in state.items()}


def test_a_torchvision_file_becomes_a_checkpoint(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder.save(folder.export("torchvision"))
    target = folder.convert(source, "ours.pt", *folder.options)
    said = capsys.readouterr().out
    assert "torchvision, Mask R-CNN resnet18 with a stem of 8 channels-FPN" in said
    assert "classes: ant, bee, cat" in said
    detector = load(target, "cpu")
    card = detector.card
    assert same(detector.model.state_dict(), folder.state)
    assert (card.class_names, card.category_ids) == (NAMES, [1, 2, 3])
    assert card.config.model == folder.config.model
    image = np.random.default_rng(0).integers(0, 255, (50, 60, 3), np.uint8)
    found, expected = detector(image, score=0.05), Detector(folder.model, card)(image, score=0.05)
    assert len(expected) > 0
    assert np.array_equal(found.boxes, expected.boxes)
    assert np.array_equal(found.scores, expected.scores)
    # It is a checkpoint like others: it can be judged with another threshold.
    changed = evaluate.load_overridden(str(target), "cpu", ["model.box_head.score_threshold=0.9"]).model
    assert changed.box_head is not None
    assert changed.box_head.score_threshold == 0.9


@pytest.mark.parametrize("program", ["torchvision", "detectron2"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_there_and_back_changes_no_bit(tmp_path: Path, program: str, norm: str) -> None:
    folder = Folder(tmp_path)
    folder.model, _ = built(backbone={**tiny.TREE["model"]["backbone"], "norm": norm})
    folder.state = folder.model.state_dict()
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree_of(backbone={"norm": norm})), encoding="utf-8")
    theirs = {k: v for k, v in folder.export(program).items() if not k.endswith("num_batches_tracked")}
    if program == "torchvision":  # rows that have no class here
        theirs["roi_heads.box_predictor.bbox_pred.weight"][:4] = 7.0
        theirs["roi_heads.mask_predictor.mask_fcn_logits.bias"][0] = 8.0
    ours = folder.convert(folder.save(theirs), "ours.pt", *folder.options)
    back = torch.load(folder.convert(ours, "back.pth", "--to", program), weights_only=True)
    assert same(back if program == "torchvision" else back["model"], theirs)


def test_cocos_91_labels_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder(tmp_path)
    folder.state = built(90)[0].state_dict()
    theirs = folder.export("torchvision", list(range(1, 91)))
    assert len(theirs["roi_heads.box_predictor.cls_score.bias"]) == 91
    source = folder.save(theirs)
    ours = folder.convert(source, "ours.pt", *folder.options[:2])
    assert "classes: person, bicycle, car, ... (80)" in capsys.readouterr().out
    checkpoint = read_checkpoint(ours)
    assert (checkpoint["class_names"], checkpoint["category_ids"]) == (COCO.names, COCO.ids)
    assert checkpoint["model"]["box_head.classes.bias"].shape == (81,)
    back = folder.convert(ours, "back.pth", "--to", "torchvision")
    assert same(torch.load(back, weights_only=True), theirs)
    assert "num_classes=91" in capsys.readouterr().out
    # On request the ten unused labels stay, and with them the very scores.
    every = read_checkpoint(folder.convert(source, "all.pt", *folder.options[:2], "--all-labels"))
    assert every["category_ids"] == list(range(1, 91))
    assert every["class_names"][11] == "unused 12"
    assert same(every["model"], folder.state)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_what_is_written_for_detectron2(folder: Folder, suffix: str) -> None:
    theirs = folder.export("detectron2")
    ours = folder.convert(folder.save({"model": theirs, "iteration": 3}), "ours.pt", *folder.options)
    written = folder.convert(ours, f"back{suffix}", "--to", "detectron2")
    if suffix == ".pkl":
        with written.open("rb") as stream:
            tree = pickle.load(stream)
        assert tree["__author__"] == "fastmrcnn"
        assert "matching_heuristics" not in tree  # the names are exact
        assert all(isinstance(value, np.ndarray) for value in tree["model"].values())
        state = {key: torch.from_numpy(value) for key, value in tree["model"].items()}
    else:
        state = torch.load(written, weights_only=True)["model"]
    assert same(state, theirs)


def test_a_detectron2_pickle_with_all_that_stands_in_one(folder: Folder) -> None:
    model = arrays(folder.export("detectron2"))
    mean, std = folder.config.model.pixel_mean, folder.config.model.pixel_std
    model |= {"pixel_mean": np.float32(mean)[:, None, None], "pixel_std": np.float32(std)[:, None, None]}
    assert folder.model.rpn is not None
    for level, anchors in enumerate(folder.model.rpn.anchors.base):
        key = f"proposal_generator.anchor_generator.cell_anchors.{level}"
        model[key] = np.float32(anchors)
    source = folder.path / "model_final.pkl"
    tree = {"model": OrderedDict(model), "__author__": "Detectron2 Model Zoo", "matching_heuristics": True}
    source.write_bytes(pickle.dumps(tree, protocol=2))
    target = folder.convert(source, "ours.pt", *folder.options)
    assert same(dict(load_trained(target, "cpu").model.state_dict()), folder.state)
    # The same weights for a model that sees other colours or anchors would be silently wrong.
    model["pixel_std"] = np.ones((3, 1, 1), np.float32)
    model["proposal_generator.anchor_generator.cell_anchors.2"] *= 2
    source.write_bytes(pickle.dumps(tree | {"model": model}, protocol=2))
    text = folder.refusal(str(source), str(folder.path / "x.pt"), *folder.options)
    assert "pixel_std is [1.0, 1.0, 1.0], model.pixel_std gives [58.395, 57.12, 57.375]" in text
    assert "cell_anchors.2 is" in text
    assert "cell_anchors.1" not in text
    assert not (folder.path / "x.pt").exists()


def test_a_detectron2_file_with_scale_and_shift_only(folder: Folder) -> None:
    theirs = {k: v for k, v in folder.export("detectron2").items() if "running_" not in k}
    target = folder.convert(folder.save({"model": theirs}), "ours.pt", *folder.options)
    state = load_trained(target, "cpu").model.state_dict()
    assert state["backbone.bn1.running_mean"].count_nonzero() == 0
    assert state["backbone.layer2.0.downsample.1.running_var"].unique().tolist() == [1.0]
    assert torch.equal(state["backbone.bn1.weight"], folder.state["backbone.bn1.weight"])


@pytest.mark.parametrize("wrapped", ["plain", "model", "state_dict", "module.", "_orig_mod."])
def test_wrappings_of_training_programs_are_taken_off(folder: Folder, wrapped: str) -> None:
    theirs: Any = folder.export("torchvision")
    if wrapped.endswith("."):
        theirs = {wrapped + key: value for key, value in theirs.items()}
    elif wrapped != "plain":
        theirs = {wrapped: theirs, "epoch": 3, "optimizer": {"param_groups": [{"lr": 0.1}]}}
    assert same(open_weights(folder.save(theirs)).imported.state, dict(folder.state))


def test_other_types_are_refused_or_cast(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = folder.export("torchvision")
    half = folder.save({key: value.half() for key, value in theirs.items()})
    text = folder.refusal(str(half), str(folder.path / "x.pt"), *folder.options)
    assert re.search(
        r"in.pth: \d+ of \d+ tensors, backbone.body.conv1.weight first, are float16, expected", text
    )
    target = folder.convert(half, "ours.pt", *folder.options, "--cast")
    for key, value in load_trained(target, "cpu").model.state_dict().items():
        assert torch.equal(value, folder.state[key].half().float()), key
    whole = folder.save({key: value.to(torch.int32) for key, value in theirs.items()})
    assert "of another shape" in folder.refusal(str(whole), str(folder.path / "x.pt"), *folder.options)


def test_weights_that_are_not_on_the_cpu(folder: Folder) -> None:
    away = folder.save({key: value.to("meta") for key, value in folder.export("torchvision").items()})
    with pytest.raises(UserError, match=r"are on another device \(meta\); move the model to the CPU"):
        load_weights(folder.model, str(away))
    odd = folder.save({"backbone.body.conv1.weight": torch.zeros(2, 2).to_sparse()})
    with pytest.raises(UserError, match="sparse, quantised or complex"):
        load_weights(folder.model, str(odd))


def test_mistakes_on_the_command_line(folder: Folder, tmp_path: Path) -> None:
    source = str(folder.save(folder.export("torchvision")))
    out = str(tmp_path / "x.pt")
    assert "no recipe in configs/zoo/; give its configuration as --config" in folder.refusal(source, out)
    config = folder.options[:2]
    (tmp_path / "two.txt").write_text("a\nb", encoding="utf-8")
    two = ["--classes", str(tmp_path / "two.txt")]
    assert "has 3 classes, but 2 names were given" in folder.refusal(source, out, *config, *two)
    assert "has 3 classes, but 2 names" in folder.refusal(source, out, "--to", "detectron2", *two)
    assert "is already there" in folder.refusal(source, source)
    assert "--config is for --to fastmrcnn" in folder.refusal(source, out, "--to", "detectron2", *config)
    assert "invalid choice" in folder.refusal(source, out, "--to", "caffe2")
    assert "no such file" in folder.refusal(str(tmp_path / "none.pth"), out)
    ours = folder.convert(Path(source), "ours.pt", *folder.options)
    assert "say --to torchvision or detectron2" in folder.refusal(str(ours), out)
    assert not Path(out).exists()


def test_classes_without_names_get_numbers(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder.save(folder.export("torchvision"))
    checkpoint = read_checkpoint(folder.convert(source, "ours.pt", *folder.options[:2]))
    assert checkpoint["class_names"] == ["class 1", "class 2", "class 3"]
    assert "does not tell the names of its classes" in capsys.readouterr().out


def test_one_program_to_the_other(folder: Folder) -> None:
    source = folder.save(folder.export("torchvision"))
    target = folder.convert(source, "x.pth", "--to", "detectron2")
    assert same(torch.load(target, weights_only=True)["model"], folder.export("detectron2"))


def test_the_average_is_what_is_converted(folder: Folder) -> None:
    card = ModelCard(folder.config, NAMES, [4, 5, 9])
    average, _ = built(seed=1)
    saved = save_checkpoint(
        folder.path / "run" / "checkpoints",
        step=7,
        model=folder.model,
        optimizer=build_optimizer(folder.model, folder.config.optim),
        ema=average,
        card=card,
        keep=1,
    )
    target = folder.convert(folder.path / "run", "x.pth", "--to", "torchvision")
    expected = export_state(average.state_dict(), "torchvision", "x", [4, 5, 9])
    assert same(torch.load(target, weights_only=True), expected)
    other, _ = built(seed=2)
    load_weights(other, str(saved))
    assert same(other.state_dict(), average.state_dict())


PREDICTORS = {
    f"{owner}.{leaf}"
    for owner in ("box_head.classes", "box_head.deltas", "mask_head.predictor")
    for leaf in ("weight", "bias")
}


@pytest.mark.parametrize("program", ["torchvision", "detectron2"])
def test_with_other_classes_all_but_the_last_predictors_loads(folder: Folder, program: str) -> None:
    source = folder.save(folder.export(program))
    model, _ = built(num_classes=5, seed=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    lines = load_weights(model, str(source))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in PREDICTORS else folder.state[key]), key
    total = len(before)
    assert f"{total - 6} of {total} tensors" in lines[0]
    assert lines[1].startswith("Left out, since the file has 3 classes and this model 5: ")
    listed = re.findall(r"(\w+\.\w+)\.\{weight, bias\}", lines[1])
    assert sorted(listed) == ["box_head.classes", "box_head.deltas", "mask_head.predictor"]
    assert len(lines) == 2


def unchanged_by(model: MaskRCNN, source: Path, **options: Any) -> str:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(model, str(source), **options)
    assert same(model.state_dict(), before)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_listed_in_groups_or_left_out(folder: Folder) -> None:
    theirs = folder.export("torchvision")
    del theirs["roi_heads.box_head.fc6.weight"], theirs["roi_heads.box_head.fc6.bias"]
    theirs["rpn.head.bbox_pred.weight"] = torch.zeros(24, 8, 1, 1)
    theirs["roi_heads.mask_head.1.0.bias"] = torch.zeros(8)
    source = folder.save(theirs)
    model, _ = built(seed=1)
    text = unchanged_by(model, source)
    assert "missing (2): box_head.fc1.{weight, bias}" in text
    assert "unexpected (1): roi_heads.mask_head.1.0.bias" in text
    assert "rpn.head.deltas.weight (24, 8, 1, 1) in the file, (12, 8, 1, 1) in the model" in text
    assert "model.weights_strict=false" in text
    theirs["roi_heads.extra.weight"] = torch.zeros(1)
    source = folder.save(theirs)
    assert "that no model here has (1 tensors): roi_heads.extra.weight" in unchanged_by(model, source)
    lines = load_weights(model, str(source), strict=False)
    assert "missing (2): box_head.fc1.{weight, bias}" in lines[1]
    assert lines[2] == "Left out, since no model here has them: roi_heads.extra.weight"
    left = {"box_head.fc1.weight", "box_head.fc1.bias", "rpn.head.deltas.weight"}
    fresh = built(seed=1)[0].state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, fresh[key] if key in left else folder.state[key]), key


def test_another_architecture_is_named(folder: Folder) -> None:
    source = folder.save(folder.export("torchvision"))
    deeper, _ = built(backbone={"name": "resnet34"})
    text = unchanged_by(deeper, source)
    assert "holds a Mask R-CNN resnet18 with a stem of 8 channels-FPN (torchvision), but" in text
    assert "builds a Mask R-CNN resnet34 with a stem of 8 channels-FPN" in text
    without, _ = built(mask_head={"enabled": False})
    assert "builds a Faster R-CNN" in unchanged_by(without, source)
    assert "missing" not in text


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_half_a_download(folder: Folder, suffix: str, share: float) -> None:
    source = folder.save(folder.export("detectron2"))
    if suffix == ".pkl":
        source = folder.path / "in.pkl"
        source.write_bytes(pickle.dumps({"model": arrays(folder.export("detectron2")), "__author__": "x"}))
    content = source.read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    assert "is incomplete or damaged" in unchanged_by(folder.model, source)


def test_hashes_in_names_are_checked(folder: Folder) -> None:
    source = folder.path / "model_final_abcdef.pkl"
    source.write_bytes(pickle.dumps({"model": arrays(folder.export("detectron2")), "__author__": "x"}))
    assert re.search("its md5 begins with [0-9a-f]{6}, expected abcdef", unchanged_by(folder.model, source))
    other = folder.save(folder.export("torchvision"), "model-0123abcd.pth")
    assert "its sha256 begins with" in unchanged_by(folder.model, other)
    assert "model.weights_sha256: expected 8 to 64" in unchanged_by(folder.model, other, sha256="x")


def test_a_backbone_is_not_a_detector(folder: Folder) -> None:
    bare = {k.removeprefix("backbone."): v for k, v in folder.state.items() if k.startswith("backbone.")}
    assert "give it as model.backbone.weights" in unchanged_by(folder.model, folder.save(bare))


def test_training_starts_from_a_detector_and_goes_on_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Folder(tmp_path)
    source = folder.save(folder.export("torchvision"))
    data = tiny.TinyData(tmp_path)
    data.recipe.write_text(yaml.safe_dump(tree_of(backbone={"frozen_stages": 5})), encoding="utf-8")
    data.run(tmp_path / "runs", f"model.weights={source}", "train.steps=2", "train.checkpoint_every=1")
    assert "Left out, since the file has 3 classes and this model" in capsys.readouterr().out
    run = tiny.newest_run(tmp_path / "runs")
    state = read_checkpoint(run)["model"]
    for key, value in state.items():  # what is frozen has stayed what it was
        if key.startswith("backbone."):
            assert torch.equal(value, folder.state[key]), key
    source.unlink()
    tiny.train.main(["--resume", str(run), "train.steps=3"])
    assert read_checkpoint(run)["step"] == 3
    # A dry run says the same, before anything is trained.
    with pytest.raises(UserError, match=r"in.pth: no such file"):
        tiny.train.main(data.arguments(tmp_path / "runs", f"model.weights={source}", "--dry-run"))


def test_a_recipe_with_weights_is_judged_in_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny.TinyData(tmp_path)
    names = [c["name"] for c in json.loads(Path(data.paths["val_annotations"]).read_text())["categories"]]
    model, _ = built(len(names))
    torch.save(export_state(model.state_dict(), "detectron2", "x", range(len(names))), tmp_path / "w.pth")
    folder = Folder(tmp_path)
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    ours = folder.convert(tmp_path / "w.pth", "ours.pt", *folder.options)
    capsys.readouterr()
    recipe = ["--config", str(tmp_path / "recipe.yaml"), *data.val, "evaluate.pictures=0"]
    out = tmp_path / "judged"
    evaluate.main([*recipe, f"model.weights={ours}", "--output", str(out)])
    assert (out / evaluate.RESULTS).exists()
    assert "classes: " in capsys.readouterr().out
    evaluate.main([*recipe, f"model.weights={ours}", f"output={tmp_path / 'runs'}"])
    assert (tmp_path / "runs" / "evaluation_001" / evaluate.RESULTS).exists()
    for arguments, message in (
        (recipe, "names no model.weights"),
        ([*recipe, "--checkpoint", str(ours)], "give either --checkpoint or --config"),
        (data.val, "give either --checkpoint or --config"),
        (["--checkpoint", str(ours), "model.weights=x"], "model.weights goes with --config"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments)


def test_converted_weights_are_no_run_to_go_on_with(folder: Folder) -> None:
    checkpoints = folder.path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    source = folder.save(folder.export("torchvision"))
    folder.convert(source, "run/checkpoints/step_0000000.pt", *folder.options)
    data = tiny.TinyData(folder.path)
    arguments = ["--resume", str(checkpoints / "step_0000000.pt"), *data.train, "model.backbone.norm=bn"]
    with pytest.raises(UserError, match=r"without an optimizer's state.*start a new run from it"):
        tiny.train.main(arguments)


def test_load_config_knows_the_weights() -> None:
    config = load_config(None, ["model.weights=x.pth", "model.weights_strict=false"])
    assert (config.model.weights, config.model.weights_strict) == ("x.pth", False)


def test_settings_that_the_other_program_has_to_be_told(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = folder.convert(folder.save(folder.export("torchvision")), "ours.pt", *folder.options)
    capsys.readouterr()
    folder.convert(ours, "back.pth", "--to", "torchvision")
    said = capsys.readouterr().out
    assert "Build its model with num_classes=4; label 0 is the background" in said
    assert "roi.aligned is True, there False" in said
    assert "anchors.stride_rule is nominal, there grid" in said
    assert "pixel_mean" not in said
    folder.convert(ours, "back.pkl", "--to", "detectron2")
    said = capsys.readouterr().out
    assert "channel_order is rgb, there bgr" in said
    assert "roi.aligned" not in said
