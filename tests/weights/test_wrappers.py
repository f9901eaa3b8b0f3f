"""Files of other training programs: the weights are found in them, and nothing in them is run."""

from __future__ import annotations

import argparse
import contextlib
import enum
import functools
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_convert import Folder, arrays
from test_convert_names import same
from test_convert_pickle import CALLS, armed
from test_weights import backbone, imagenet_state
from torch import Tensor, nn

from fastmrcnn import convert
from fastmrcnn.detection.detector import load
from fastmrcnn.errors import UserError
from fastmrcnn.weights.archives import Left, read_archive
from fastmrcnn.weights.checkpoint import read_checkpoint
from fastmrcnn.weights.detectors import open_weights
from fastmrcnn.weights.sources import read_weights
from fastmrcnn.weights.start import load_weights
from fastmrcnn.weights.states import load_backbone


class Options(dict[str, Any]):
    """As Lightning keeps hyper-parameters."""


class Schedule:
    def __init__(self, length: int) -> None:
        self.length = length


class Colour(enum.Enum):
    RED = 1


OBJECTS = {
    "options": Options(lr=0.1, path=Path("x")),
    "schedule": [Schedule(3), {"inner": Schedule(4)}],
    "colour": Colour.RED,
    "partial": functools.partial(int, base=2),
    "class": Schedule,
    "numpy": np.float64(0.5),
    "default": defaultdict(list, a=[1]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def averaged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * 1.5 if value.is_floating_point() else value for key, value in state.items()}


def opened(folder: Folder, tree: Any) -> tuple[dict[str, Tensor], list[str]]:
    file = open_weights(folder.save(tree))
    return file.imported.state, file.lines


def refusal(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_weights(source)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torchvisions_reference_script_saves(folder: Folder, zipped: bool) -> None:
    args = argparse.Namespace(lr=0.02, data_path="coco", device="cuda", lr_steps=[16, 22], aspect=None)
    tree = {
        "model": OrderedDict(folder.export("torchvision")),
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.02}]},
        "lr_scheduler": {"milestones": {16: 1, 22: 1}},
        "args": args,
        "epoch": 25,
        "scaler": {"scale": 65536.0},
    }
    path = folder.path / "model_25.pth"
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    file = open_weights(path)
    assert same(file.imported.state, dict(folder.state))
    assert file.lines == []
    ours = folder.convert(path, "ours.pt", *folder.options)
    assert same(load(ours, "cpu").model.state_dict(), folder.state)


def test_a_pickle_of_arrays_with_options(folder: Folder) -> None:
    tree = {"model": arrays(folder.export("detectron2")), "args": argparse.Namespace(lr=0.1)}
    (folder.path / "x.pkl").write_bytes(pickle.dumps(tree, protocol=2))
    assert same(open_weights(folder.path / "x.pkl").imported.state, dict(folder.state))


def test_a_lightning_checkpoint(folder: Folder) -> None:
    tree = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in folder.export("torchvision").items()},
        "hyper_parameters": Options(net=Schedule(2), lr=0.1),
        "hparams_name": "kwargs",
        "callbacks": {"ModelCheckpoint": {"best_model_path": "x", "best": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
    }
    state, lines = opened(folder, tree)
    assert same(state, dict(folder.state))
    assert lines == [
        "Left out, since only running code from the file could restore it: hyper_parameters "
        "(test_wrappers.Options)"
    ]
    # A criterion beside the model has weights of its own.
    tree["state_dict"] |= {"criterion.weight": torch.ones(2), "metric.total": torch.ones(1)}
    state, lines = opened(folder, tree)
    assert same(state, dict(folder.state))
    assert lines[0] == "The weights under 'model.' are taken; 2 others are left out (criterion.weight, ...)"


@pytest.mark.parametrize(
    "key",
    ["state_dict", "model_state_dict", "model", "net", "network", "weights", "module", "params", "detector"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.model."])
def test_usual_keys_and_prefixes(folder: Folder, key: str, prefix: str) -> None:
    theirs = {prefix + name: value for name, value in folder.export("detectron2").items()}
    state, lines = opened(folder, {"epoch": 3, key: theirs, "optimizer": {"param_groups": [{"lr": 0.1}]}})
    assert same(state, dict(folder.state))
    assert lines == []


@pytest.mark.parametrize("others", [{}, {"loss.weight": torch.ones(2), "step": torch.tensor(3)}])
def test_a_prefix_that_no_program_is_known_for(folder: Folder, others: dict[str, Tensor]) -> None:
    theirs = {f"student.{name}": value for name, value in folder.export("detectron2").items()}
    state, lines = opened(folder, {"model": theirs | others})
    assert same(state, dict(folder.state))
    told = "The weights under 'student.' are taken; 2 others are left out (loss.weight, ...)"
    assert lines == ([told] if others else [])
    twice = theirs | {name.replace("student", "teacher"): value for name, value in theirs.items()}
    text = refusal(folder.save(twice))
    assert "holds several models (student., teacher.); save the state_dict() of one alone" in text


def test_wrappings_within_wrappings(folder: Folder) -> None:
    theirs = folder.export("torchvision")
    assert same(opened(folder, {"model": {"state_dict": theirs, "step": 3}})[0], dict(folder.state))


@pytest.mark.parametrize("key", ["model_ema", "ema", "ema_state_dict", "state_dict_ema"])
@pytest.mark.parametrize("kind", ["plain", "module", "swa", "nested"])
def test_averaged_weights_are_preferred(folder: Folder, key: str, kind: str) -> None:
    theirs = folder.export("torchvision")
    average: dict[str, Any] = averaged(theirs)
    if kind in ("module", "swa"):
        average = {f"module.{name}": value for name, value in average.items()}
    if kind == "swa":
        average["n_averaged"] = torch.tensor(7)
    if kind == "nested":
        average = {"state_dict": average, "decay": 0.999, "updates": 12}
    state, lines = opened(folder, {"model": theirs, key: average, "epoch": 1})
    assert same(state, averaged(dict(folder.state)))
    assert lines == [f"The averaged weights ({key}) are taken"]
    state, lines = opened(folder, {"checkpoint": 1, "state_dict": {"model": theirs, key: average}})
    assert same(state, averaged(dict(folder.state)))


def test_an_average_of_the_parameters_alone(folder: Folder) -> None:
    theirs = folder.export("torchvision")
    buffers = {key for key in theirs if "running_" in key}
    assert buffers
    average = {key: value for key, value in averaged(theirs).items() if key not in buffers}
    state, lines = opened(folder, {"model": theirs, "ema": {"decay": 0.9, "shadow": average}})
    assert lines == [
        f"The averaged weights (ema) are taken, and {len(buffers)} tensors that have no average as they are"
    ]
    for key, value in state.items():
        own = folder.state[key]
        assert torch.equal(value, own if "running_" in key else own * 1.5), key


def test_an_average_within_the_state_dict(folder: Folder) -> None:
    theirs = folder.export("torchvision")
    both = {f"model.{k}": v for k, v in theirs.items()}
    both |= {f"ema_model.{k}": v for k, v in averaged(theirs).items()}
    state, lines = opened(folder, {"state_dict": both})
    assert same(state, averaged(dict(folder.state)))
    assert lines[0].startswith(
        f"The weights under 'ema_model.' are taken; {len(theirs)} others are left out (m"
    )


def test_an_average_that_only_code_could_restore(folder: Folder) -> None:
    state, lines = opened(folder, {"model": folder.export("torchvision"), "ema": nn.Linear(2, 2)})
    assert same(state, dict(folder.state))
    assert lines == [
        "Left out, since only running code from the file could restore it: ema "
        "(torch.nn.modules.linear.Linear)"
    ]


def test_two_models_in_a_file(folder: Folder) -> None:
    theirs = folder.export("torchvision")
    source = folder.save({"student": theirs, "teacher": theirs})
    assert "holds several dicts of tensors (student, teacher); save the one of the model" in refusal(source)


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_beside_the_weights_are_left_out(folder: Folder, name: str) -> None:
    state, lines = opened(folder, {"model": folder.export("torchvision"), "meta": {name: OBJECTS[name]}})
    assert same(state, dict(folder.state))
    assert len(lines) == 1
    assert "restore it: meta (" in lines[0]
    state, lines = opened(folder, {"meta": OBJECTS, "model": folder.export("torchvision")})
    assert same(state, dict(folder.state))


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith("torch")])
@pytest.mark.parametrize("protocol", [2, 4])
def test_calls_do_not_run(folder: Folder, name: str, protocol: int) -> None:
    mark = folder.path / "mark"
    call = armed(CALLS[name], mark)
    theirs = folder.export("torchvision")
    source = folder.path / "x.pth"
    torch.save({"model": theirs, "meta": [{"a": call}]}, source, pickle_protocol=protocol)
    file = open_weights(source)
    assert same(file.imported.state, dict(folder.state))
    assert "restore it: meta (" in file.lines[0]
    torch.save({"model": {**theirs, "backbone.body.conv1.weight": call}}, source, pickle_protocol=protocol)
    assert re.search(r"holds pickled code \([\w.]+\) besides tensors and is not read", refusal(source))
    torch.save({"model": call}, source, pickle_protocol=protocol)
    assert "holds pickled code" in refusal(source)
    torch.save(call, source, pickle_protocol=protocol)
    assert "holds pickled code" in refusal(source)
    assert not mark.exists()


def test_a_whole_model_is_refused(folder: Folder) -> None:
    for tree in (nn.Linear(2, 2), {"model": nn.Linear(2, 2)}, {"net": {"inner": nn.Linear(2, 2)}}):
        text = refusal(folder.save(tree))
        assert "holds pickled code (torch.nn.modules.linear.Linear) besides tensors" in text


def test_our_own_checkpoints_hold_no_objects(folder: Folder) -> None:
    ours = folder.convert(folder.save(folder.export("torchvision")), "ours.pt", *folder.options)
    tree = torch.load(ours, weights_only=True)
    folder.save(tree | {"extra": {"a": Schedule(1)}}, "ours.pt")
    for read in (read_checkpoint, load, open_weights):
        with pytest.raises(UserError, match=r"holds pickled code \(test_wrappers.Schedule\)"):
            read(ours)


TENSORS = {
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "slice": torch.arange(20.0)[3:17:2],
    "expanded": torch.ones(1, 3).expand(4, 3),
    "scalar": torch.tensor(3),
    "empty": torch.empty(0, 3),
    "parameter": nn.Parameter(torch.rand(2)),
    "bfloat16": torch.rand(3).bfloat16(),
    **{
        str(t): torch.ones(2, 3).to(t)
        for t in (torch.float64, torch.half, torch.bool, torch.int8, torch.long)
    },
    "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


def test_tensors_are_those_that_torch_reads(tmp_path: Path) -> None:
    shared = torch.arange(10.0)
    tree = {
        **TENSORS,
        "head": shared[:4],
        "tail": shared[4:],
        "objects": OBJECTS,
        "list": [(shared, 1.5, None)],
    }
    torch.save(tree, tmp_path / "x.pth")
    found = read_archive(tmp_path / "x.pth")
    for key, value in {**TENSORS, "head": shared[:4], "tail": shared[4:], "": shared}.items():
        own = found[key] if key else found["list"][0][0]
        assert own.dtype == value.dtype, key
        assert own.stride() == value.stride(), key
        assert torch.equal(own, value), key
    assert found["list"][0][1:] == (1.5, None)
    assert isinstance(found["objects"]["schedule"][0], Left)
    assert isinstance(found["objects"]["class"], Left)


def view_call(offset: Any, size: Any, stride: Any) -> Any:
    """A tensor of eight numbers' storage, as a pickle asks for it."""

    class Forged:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

        def __reduce__(self) -> Any:
            function, (storage, *_, grad, hooks) = self.tensor.__reduce_ex__(2)
            return function, (storage, offset, size, stride, grad, hooks)

    return Forged(torch.arange(8.0))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (1, (8,), (1,)),
        (0, (3, 3), (3, 1)),
        (0, (2**40,), (1,)),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (8, (2,), (-1,)),
        (0, (2,), (1, 1)),
        (0, ("2",), (1,)),
        (0, [2], [1]),
        (0.0, (2,), (1,)),
    ],
)
def test_forged_tensors_are_refused(tmp_path: Path, offset: Any, size: Any, stride: Any) -> None:
    torch.save({"model": {"w": view_call(offset, size, stride)}, "x": Schedule(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="is incomplete or damaged"):
        read_archive(tmp_path / "x.pth")


def test_a_storage_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.arange(8.0), "x": Schedule(1)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as old, zipfile.ZipFile(tmp_path / "y.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:16] if name.endswith("data/0") else old.read(name))
    with pytest.raises(UserError, match="is incomplete or damaged"):
        read_archive(tmp_path / "y.pth")


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_noise_in_the_pickle_gives_no_other_error(
    tmp_path_factory: pytest.TempPathFactory, place: int, noise: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.pth"
    torch.save({"w": torch.arange(8.0), "x": Schedule(1), "n": OBJECTS}, path)
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, content in parts.items():
            if name.endswith("data.pkl"):
                at = place % len(content)
                content = content[:at] + noise + content[at + len(noise) :]
            new.writestr(name, content)
    with contextlib.suppress(UserError):
        read_weights(path)  # whatever the noise, nothing else is raised


def test_containers_that_hold_themselves(tmp_path: Path) -> None:
    loop: list[Any] = [Schedule(1)]
    loop += [loop, loop, {"again": loop}]
    torch.save({"w": torch.ones(1), "loop": loop}, tmp_path / "x.pth")
    assert torch.equal(read_archive(tmp_path / "x.pth")["w"], torch.ones(1))


def test_a_backbone_in_a_training_programs_file(tmp_path: Path) -> None:
    state = imagenet_state()
    average = {f"module.{key}": value for key, value in averaged(state).items()}
    tree = {"model": state, "model_ema": {**average, "n_averaged": torch.tensor(3)}, "args": Schedule(1)}
    torch.save(tree, tmp_path / "x.pth")
    model = backbone()
    assert load_backbone(model, str(tmp_path / "x.pth")) == [
        f"{tmp_path / 'x.pth'}: The averaged weights (model_ema) are taken",
        f"{tmp_path / 'x.pth'}: Left out, since only running code from the file could restore it: args "
        "(test_wrappers.Schedule)",
    ]
    assert torch.equal(model.conv1.weight, state["conv1.weight"] * 1.5)


def test_what_was_chosen_is_said(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = folder.export("torchvision")
    source = folder.save({"model": theirs, "model_ema": averaged(theirs)})
    line = "The averaged weights (model_ema) are taken"
    assert load_weights(folder.model, str(source))[1] == line
    for options in (folder.options, ["--to", "detectron2"]):
        convert.main([str(source), str(folder.path / f"{len(options)}.pt"), *options])
        assert line in capsys.readouterr().out.splitlines()
