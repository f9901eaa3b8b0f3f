"""timm's own weights of a classifier, in a backbone: from a file, or from the hub's cache."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmrcnn.errors import UserError
from fastmrcnn.model.timm_backbone import TimmBackbone
from fastmrcnn.weights.timm_weights import load_timm_weights

timm = pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))


def backbone(name: str = "convnext_atto") -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(timm, name, norm="bn", frozen_stages=0, drop_path=0.0)


@pytest.fixture(scope="module")
def classifier() -> nn.Module:
    torch.manual_seed(1)
    return timm.create_model("convnext_atto")


def assert_holds(net: TimmBackbone, classifier: nn.Module) -> None:
    own, theirs = net.state_dict(), classifier.state_dict()
    names = net.whole_names()
    assert len(names) > 100
    assert all(torch.equal(own[ours], theirs[key]) for ours, key in names.items())


@pytest.mark.parametrize("kind", ["pt", "nested.pt", "safetensors"])
def test_weights_from_a_file(kind: str, tmp_path: Path, classifier: nn.Module) -> None:
    file, state = tmp_path / f"weights.{kind}", classifier.state_dict()
    if kind == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, file)
    else:
        torch.save({"model": state} if kind.startswith("nested") else state, file)
    net = backbone()
    lines = load_timm_weights(net, str(file))
    assert_holds(net, classifier)
    assert any("124 tensors of timm's convnext_atto" in line for line in lines)
    load_timm_weights(net, str(file), hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    with pytest.raises(UserError, match="is incomplete or another file"):
        load_timm_weights(net, str(file), "0" * 8)


def test_batch_norms_come_with_their_statistics(tmp_path: Path) -> None:
    torch.manual_seed(2)
    whole = timm.create_model("mobilenetv3_small_050", num_classes=7)  # of other classes than ImageNet's
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    state = {key: value for key, value in whole.state_dict().items() if not key.endswith("tracked")}
    torch.save(state, tmp_path / "w.pt")
    net = backbone("mobilenetv3_small_050")
    load_timm_weights(net, str(tmp_path / "w.pt"))
    assert_holds(net, whole)


@pytest.mark.slow
def test_the_authors_names_are_translated_by_timm(tmp_path: Path, classifier: nn.Module) -> None:
    """ConvNeXt's own repository calls stages.0.downsample by the stage before, and so on."""
    torch.manual_seed(3)
    whole = timm.create_model("convnext_atto_ols")
    theirs = {}
    for key, value in whole.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.").replace("head.norm.", "norm.")
        key = key.replace("head.fc.", "head.")
        parts = key.split(".")
        if parts[0] == "stages" and parts[2] == "downsample":
            key = ".".join(["downsample_layers", parts[1], *parts[3:]])
        for ours, other in (
            ("blocks.", ""),
            ("conv_dw", "dwconv"),
            ("mlp.fc1", "pwconv1"),
            ("mlp.fc2", "pwconv2"),
        ):
            key = key.replace(ours, other)
        theirs[key] = value.reshape(value.shape[:2]) if "pwconv" in key and value.dim() == 4 else value
    torch.save({"model": theirs}, tmp_path / "w.pt")
    net = backbone("convnext_atto_ols")
    load_timm_weights(net, str(tmp_path / "w.pt"))
    assert_holds(net, whole)


def test_what_does_not_fit_is_told_and_changes_nothing(tmp_path: Path, classifier: nn.Module) -> None:
    net = backbone()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    good = classifier.state_dict()
    first, *_ = good
    lacking = {key: value for key, value in good.items() if key != "stages.1.blocks.0.gamma"}
    reshaped = {**good, first: torch.zeros(1, 2)}
    files = {
        "lacking": (lacking, "missing (1): stages.1.blocks.0.gamma"),
        "more": ({**good, "stages.9.x": torch.zeros(1)}, "unexpected (1): stages.9.x"),
        "reshaped": (reshaped, "of another shape (1): stem.0.weight (1, 2) in the file"),
        "other": (timm.create_model("resnet18").state_dict(), "is not timm's convnext_atto"),
        "detector": ({"backbone.body.conv1.weight": torch.zeros(1)}, "model.weights instead"),
        "half": ({key: value.half() for key, value in good.items()}, "expected float32"),
    }
    for name, (state, word) in files.items():
        torch.save(state, tmp_path / f"{name}.pt")
        with pytest.raises(UserError) as told:
            load_timm_weights(net, str(tmp_path / f"{name}.pt"))
        assert word in str(told.value), name
        assert f"{name}.pt" in str(told.value)
        assert "\n" not in str(told.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_damaged_safetensors_and_pickled_code_are_refused(tmp_path: Path, classifier: nn.Module) -> None:
    whole = tmp_path / "whole.safetensors"
    pytest.importorskip("safetensors.torch").save_file(classifier.state_dict(), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-1000])
    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 100)
    marker = tmp_path / "ran"

    class Runs:
        def __reduce__(self) -> tuple:
            return Path.touch, (marker,)

    (tmp_path / "code.safetensors").write_bytes(pickle.dumps({"stem.0.weight": Runs()}))
    for name in ("cut", "noise", "code"):
        with pytest.raises(UserError, match=rf"{name}\.safetensors: is incomplete or damaged"):
            load_timm_weights(backbone(), str(tmp_path / f"{name}.safetensors"))
    assert not marker.exists()


def test_pretrained_comes_from_the_hubs_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classifier: nn.Module
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    cache = tmp_path / "hub"
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    net = backbone()
    with pytest.raises(UserError, match=r"timm/convnext_atto.d2_in1k is neither in the hub's cache"):
        load_timm_weights(net, "pretrained")
    repository = cache / "models--timm--convnext_atto.d2_in1k"
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    pytest.importorskip("safetensors.torch").save_file(
        classifier.state_dict(), snapshot / "model.safetensors"
    )
    load_timm_weights(net, "pretrained")
    assert_holds(net, classifier)
