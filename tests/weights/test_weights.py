"""ImageNet weights: read from a file or a URL, checked before anything is copied."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastmrcnn.errors import UserError
from fastmrcnn.model.backbone import ResNet
from fastmrcnn.model.norms import make_norm
from fastmrcnn.weights.sources import read_tensors, read_weights
from fastmrcnn.weights.states import backbone_of, copy_state, load_backbone


def backbone(name: str = "resnet18", norm: str = "frozen_bn", width: int = 8) -> ResNet:
    return ResNet(name, make_norm(norm), width=width, stride_in_1x1=False, stages=4, frozen_stages=0)


def imagenet_state(name: str = "resnet18", width: int = 8) -> dict[str, Tensor]:
    """What torchvision publishes: batch norm with its counters, and a classifier."""
    generator = torch.Generator().manual_seed(1)
    state = backbone(name, "bn", width).state_dict()
    state = {
        key: torch.rand(value.shape, generator=generator) if value.is_floating_point() else torch.tensor(7)
        for key, value in state.items()
    }
    return {**state, "fc.weight": torch.rand(1000, 8), "fc.bias": torch.rand(1000)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(imagenet_state(), path)
    return path


def digits(path: Path, count: int = 8) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:count]


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_every_tensor_arrives(saved: Path, norm: str) -> None:
    model = backbone(norm=norm)
    load_backbone(model, str(saved))
    state = torch.load(saved, weights_only=True)
    own = model.state_dict()
    assert {key for key in state if key not in own} == {"fc.weight", "fc.bias"} | {
        key for key in state if key.endswith("num_batches_tracked") and norm == "frozen_bn"
    }
    for key, value in own.items():
        assert torch.equal(value, state[key]), key


def test_counters_may_be_absent(saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved, weights_only=True)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    model = backbone(norm="bn")
    load_backbone(model, str(tmp_path / "old.pth"))
    assert torch.equal(model.conv1.weight, state["conv1.weight"])
    assert model.bn1.num_batches_tracked == 0


def caffe2_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A bottleneck network's state dict as detectron2's R-50.pkl spells it."""
    leaves = {"weight": "gamma", "bias": "beta"}
    found = {}
    for key, value in state.items():
        *owner, leaf = key.split(".")
        if leaf == "num_batches_tracked":
            continue
        if owner == ["fc"]:
            name = f"fc1000_{leaf[0]}"
        elif owner in (["conv1"], ["bn1"]):
            name = "conv1_w" if owner == ["conv1"] else f"res_conv1_bn_{leaves.get(leaf, leaf)}"
        else:
            stage, block, part = int(owner[0].removeprefix("layer")) + 1, owner[1], owner[2]
            branch = "1" if part == "downsample" else "2" + "abc"[int(part[-1]) - 1]
            ending = "w" if part.startswith("conv") or owner[-1] == "0" else f"bn_{leaves.get(leaf, leaf)}"
            name = f"res{stage}_{block}_branch{branch}_{ending}"
        found[name] = value
    return found


@pytest.mark.parametrize("wrapped", ["detectron2", "Detectron"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_r50_pickles_of_detectron2(tmp_path: Path, norm: str, wrapped: str) -> None:
    state = imagenet_state("resnet50", 4)
    arrays = {key: value.numpy() for key, value in caffe2_names(state).items()}
    arrays["conv1_b"] = arrays["res_conv1_bn_beta"]  # which MSRA's files have, and detectron2 leaves out
    tree: dict[str, object] = {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
    if wrapped == "Detectron":
        tree = {"blobs": {**arrays, "conv1_w_momentum": arrays["conv1_w"]}}
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(tree, protocol=2))
    model = backbone("resnet50", norm, 4)
    load_backbone(model, str(tmp_path / "R-50.pkl"))
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, state[key]), key


def test_folded_batch_norm_does_not_go_into_group_norm(tmp_path: Path) -> None:
    arrays = {key: value.numpy() for key, value in caffe2_names(imagenet_state("resnet50", 8)).items()}
    folded = {
        key.replace("_gamma", "_s").replace("_beta", "_b"): value
        for key, value in arrays.items()
        if "running" not in key
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(folded, protocol=2))
    model = backbone("resnet50", "frozen_bn", 8)
    load_backbone(model, str(tmp_path / "R-50.pkl"))
    assert model.state_dict()["layer3.1.bn2.running_var"].unique().tolist() == [1.0]
    with pytest.raises(UserError, match="trained with batch normalisation"):
        load_backbone(backbone("resnet50", "gn", 8), str(tmp_path / "R-50.pkl"))


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "resnext101_32x8d"]
)
def test_architecture_is_recognised(name: str) -> None:
    with torch.device("meta"):
        assert backbone_of(backbone(name, width=64).state_dict()) == name
        assert backbone_of(backbone(name, width=32).state_dict()) == f"{name} with a stem of 32 channels"


def test_architecture_of_something_else() -> None:
    assert backbone_of({}) is None
    assert backbone_of({"conv1.weight": torch.zeros(3), "layer1.0.conv2.weight": torch.zeros(3)}) is None


def unchanged_by(source: str, message: str, sha256: str | None = None, norm: str = "frozen_bn") -> str:
    """The error of loading `source`, which must match `message` and leave the backbone alone."""
    model = backbone(norm=norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(model, source, sha256)
    assert "\n" not in str(caught.value)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return str(caught.value)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(imagenet_state("resnet50"), path)
    text = unchanged_by(str(path), "holds a resnet50 with a stem of 8 channels, but")
    assert "is a resnet18 with a stem of 8 channels" in text
    assert str(path) in text


def test_every_mismatch_is_listed_in_groups(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    state = imagenet_state()
    del state["bn1.weight"], state["bn1.bias"], state["layer2.0.downsample.0.weight"]
    state["layer9.extra"] = torch.zeros(2)
    state["layer3.1.conv1.weight"] = torch.zeros(3, 4)
    torch.save(state, path)
    text = unchanged_by(str(path), "does not fit")
    assert "missing (3): bn1.{weight, bias}, layer2.0.downsample.0.weight" in text
    assert "unexpected (1): layer9.extra" in text
    shapes = "layer3.1.conv1.weight (3, 4) in the file, (32, 32, 3, 3) in the model"
    assert f"of another shape (1): {shapes}" in text


def test_batch_norm_weights_do_not_go_into_group_norm(saved: Path) -> None:
    unchanged_by(str(saved), "trained with batch normalisation", norm="gn")


def test_a_whole_detector_is_not_a_backbone(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({f"backbone.body.{key}": value for key, value in imagenet_state().items()}, path)
    unchanged_by(str(path), "holds a whole detector; give it as model.weights")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_half_a_download(tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "w.pth"
    torch.save(imagenet_state(), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    unchanged_by(str(path), f"^{re.escape(str(path))}: is incomplete or damaged")


def test_an_image_is_called_one(tmp_path: Path) -> None:
    Image.new("RGB", (3, 3)).save(tmp_path / "picture.png")
    with pytest.raises(UserError, match=r"picture\.png: is an image, not a file of weights"):
        read_weights(tmp_path / "picture.png")


@pytest.mark.parametrize("content", [b"<html>404</html>", b'{"a": 1}', b"PK", b"\x80"])
def test_not_a_file_of_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    unchanged_by(str(path), "is incomplete or damaged")


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"model": nn.Linear(2, 2)}, path)
    unchanged_by(str(path), r"holds pickled code \(torch.nn.modules.linear.Linear\)")


def test_not_tensors(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save([1, 2], path)
    unchanged_by(str(path), "expected a dict of tensors by name, got a list")
    torch.save({"epoch": 3, "conv1.weight": torch.zeros(2)}, path)
    unchanged_by(str(path), "not a tensor: epoch")


def test_no_such_file(tmp_path: Path) -> None:
    unchanged_by(str(tmp_path / "none.pth"), "no such file")
    unchanged_by(str(tmp_path), "is a folder")


def test_hash_in_the_name_is_checked(saved: Path, tmp_path: Path) -> None:
    good = tmp_path / f"resnet18-{digits(saved)}.pth"
    saved.rename(good)
    load_backbone(backbone(), str(good))
    bad = tmp_path / "resnet18-0123abcd.pth"
    good.rename(bad)
    unchanged_by(str(bad), f"its sha256 begins with {digits(bad)}, expected 0123abcd")


def test_hash_that_is_asked_for_is_checked(saved: Path) -> None:
    load_backbone(backbone(), str(saved), digits(saved, 64).upper())
    unchanged_by(str(saved), "expected 00000000", sha256="00000000")
    for wrong in ("", "abc", "wxyzwxyz", "0" * 65):
        unchanged_by(str(saved), "expected 8 to 64 hexadecimal digits", sha256=wrong)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def test_url_is_fetched_once(saved: Path, tmp_path: Path, hub: Path) -> None:
    served = tmp_path / f"resnet18-{digits(saved)}.pth"
    saved.rename(served)
    model = backbone()
    load_backbone(model, served.as_uri())
    served.unlink()
    again = backbone()
    load_backbone(again, served.as_uri())
    assert torch.equal(again.conv1.weight, model.conv1.weight)
    assert [file.name for file in hub.iterdir()] == [served.name]

    # Somebody else's half download in the cache.
    cached = hub / served.name
    cached.write_bytes(cached.read_bytes()[:1000])
    unchanged_by(served.as_uri(), f"^{re.escape(str(cached))}: is incomplete or another file.*delete it")


def test_url_with_the_wrong_content(saved: Path, tmp_path: Path, hub: Path) -> None:
    served = tmp_path / "resnet18-0123abcd.pth"
    saved.rename(served)
    unchanged_by(served.as_uri(), "incomplete or not what its name says")
    assert list(hub.iterdir()) == []


def test_url_that_is_not_there(tmp_path: Path, hub: Path) -> None:
    unchanged_by((tmp_path / "none.pth").as_uri(), "cannot be fetched into .*none.pth")


def test_copy_state_keeps_dtype_and_takes_all_or_nothing() -> None:
    layer = nn.Linear(2, 2)
    copy_state(layer, {"weight": torch.ones(2, 2, dtype=torch.float16), "bias": torch.zeros(2)}, "here")
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight.data, torch.ones(2, 2))
    with pytest.raises(UserError, match=r"^here: does not fit the model: missing \(1\): bias$"):
        copy_state(layer, {"weight": torch.zeros(2, 2)}, "here")
    assert torch.equal(layer.weight.data, torch.ones(2, 2))


def test_read_tensors_gives_plain_containers(tmp_path: Path) -> None:
    tree = {"a": torch.arange(3), "b": [1, 2.5, None, "x", (True,)]}
    torch.save(tree, tmp_path / "t.pt")
    back = read_tensors(tmp_path / "t.pt")
    assert torch.equal(back.pop("a"), tree["a"])
    assert back == {"b": [1, 2.5, None, "x", (True,)]}
