"""Programs of torch.export and packages of AOTInductor find what the model finds, with PyTorch alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_models import images, trained
from places import ROOT
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export.passes import move_to_device_pass
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fastmrcnn.deployment.graph import ServingGraph
from fastmrcnn.deployment.lowering import PlainPyTorch, foreign_operators
from fastmrcnn.deployment.pt2 import as_compiled, as_program, trace
from fastmrcnn.errors import UserError
from fastmrcnn.weights.pt2_file import DEVICE, METADATA, is_compiled, pt2_runner, read_metadata

CPU = torch.device("cpu")
ADAPTIVE: dict[str, Any] = {"roi": {"sampling_ratio": 0}}
KEYPOINTS: dict[str, Any] = {"keypoint_head": {"enabled": True, "convs": 1, "channels": 8}}
ALONE = """
import sys
sys.modules["fastmrcnn"] = None  # an import of it fails
import numpy, torch
kind, file, inputs, outputs = sys.argv[1:]
given = [torch.from_numpy(array) for array in numpy.load(inputs).values()]
if kind == "program":
    call = torch.export.load(file).module()
else:
    call = torch._inductor.aoti_load_package(file)
with torch.no_grad():
    numpy.savez(outputs, *[value.numpy() for value in call(*given)])
"""


def run_alone(kind: str, content: bytes, inputs: tuple[Tensor, ...], folder: Path) -> list[np.ndarray]:
    """The outputs of a file in a process that has PyTorch, and nothing of ours."""
    (folder / "model.pt2").write_bytes(content)
    np.savez(folder / "inputs.npz", *[value.numpy() for value in inputs])
    files = [str(folder / name) for name in ("model.pt2", "inputs.npz", "outputs.npz")]
    command = [sys.executable, "-c", ALONE, kind, *files]
    subprocess.run(command, check=True, cwd=folder, env={"PATH": "/usr/bin:/bin"}, timeout=300)
    return list(np.load(folder / "outputs.npz").values())


def check_same(found: Mapping[str, Any], graph: ServingGraph, inputs: tuple[Tensor, ...]) -> None:
    """One to one, since nothing of the order of the sums is another."""
    expected = dict(zip(graph.outputs, graph(*inputs), strict=True))
    assert found.keys() == expected.keys()
    assert expected["valid"].sum() > 10
    for name, value in expected.items():
        ours = torch.as_tensor(found[name])
        assert ours.dtype == value.dtype
        if not value.is_floating_point() and name != "bits":
            assert ours.equal(value)
        elif name == "bits":
            assert (ours != value).float().mean() < 1e-4
        else:
            torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-2 if name == "boxes" else 1e-4)


@pytest.fixture(scope="module")
def program() -> tuple[ServingGraph, bytes]:
    graph = ServingGraph(trained(), paste=True)
    return graph, as_program(graph, 2, (128, 96), {"about": "a test"})


def test_a_program_finds_what_the_model_finds(program: tuple[ServingGraph, bytes]) -> None:
    graph, content = program
    assert not is_compiled(content)
    assert read_metadata(content)["about"] == "a test"
    inputs = images()
    check_same(pt2_runner(content, CPU)(*(value.numpy() for value in inputs)), graph, inputs)


def test_a_program_runs_with_pytorch_alone(program: tuple[ServingGraph, bytes], tmp_path: Path) -> None:
    graph, content = program
    inputs = images()
    outputs = run_alone("program", content, inputs, tmp_path)
    check_same(dict(zip(graph.outputs, outputs, strict=True)), graph, inputs)


def test_a_program_is_one_graph_of_fixed_shapes(program: tuple[ServingGraph, bytes], tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(program[1])
    loaded = torch.export.load(tmp_path / "model.pt2")
    assert not foreign_operators(loaded.graph_module)
    assert not loaded.range_constraints, "a shape depends on data"
    loops = [node for node in loaded.graph.nodes if str(node.target) == "while_loop"]
    assert len(loops) == 2, "one for each NMS"
    shapes = [node.meta["val"].shape for node in loaded.graph.nodes if node.op == "placeholder"][-2:]
    assert shapes == [(2, 128, 96, 3), (2, 2)]
    assert all(isinstance(side, int) for shape in shapes for side in shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ADAPTIVE,
        {"architecture": "c4", "anchors": {"sizes": [[32, 64, 128]]}, "rpn": {"post_nms_top_n_test": 50}},
        {"architecture": "c5", "anchors": {"sizes": [[32, 64, 128]]}, **KEYPOINTS},
        {
            "mask_head": {"kind": "mlp", "hidden": 16, "class_agnostic": True},
            "backbone": {"norm": "bn"},
            "roi": {"op": "pool", "mode": "max"},
        },
        {
            "mask_head": {"loss": "softmax"},
            "box_head": {"class_agnostic": True, "convs": 1, "norm": "gn"},
            "roi": {"op": "warp", "mode": "avg"},
        },
        {"roi": {"op": "align", "mode": "max", "aligned": False}},
    ],
    ids=["adaptive", "c4", "c5 and keypoints", "mlp and pool", "softmax and warp", "max"],
)
def test_every_family(model: dict[str, Any]) -> None:
    graph = ServingGraph(trained(**model))
    inputs = images()
    content = as_program(graph, 2, (128, 96), {})
    check_same(pt2_runner(content, CPU)(*(value.numpy() for value in inputs)), graph, inputs)


@pytest.mark.slow
def test_half(tmp_path: Path) -> None:
    graph = ServingGraph(trained(), half=True)
    inputs = images()
    content = as_program(graph, 2, (128, 96), {})
    found = pt2_runner(content, CPU)(*(value.numpy() for value in inputs))
    expected = dict(zip(graph.outputs, graph(*inputs), strict=True))
    assert [value.dtype for value in found.values()] == [value.numpy().dtype for value in expected.values()]
    assert np.abs(found["scores"] - expected["scores"].numpy()).max() < 2e-2


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.pt2"

    def refused(message: str, device: torch.device = CPU) -> None:
        with pytest.raises(UserError, match=message) as caught:
            pt2_runner(file, device)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)

    refused("no such file")
    file.write_bytes(b"nothing")
    refused("is damaged, or no file of torch.export")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/data.pkl", "")
    refused("is no file of torch.export or AOTInductor")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("model/models/model.json", "{}")
    refused("does not tell its outputs")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(f"model/extra/{METADATA}", '{"outputs": "boxes"}')
    refused("cannot open it")
    with zipfile.ZipFile(file, "w") as archive:
        told = '{"outputs": "boxes", "AOTI_DEVICE_KEY": "cuda"}'
        archive.writestr("model/data/aotinductor/model/x.wrapper_metadata.json", told)
    refused("is compiled for cuda and cannot run on cpu")


def test_a_program_of_someone_else_has_no_outputs_to_tell(tmp_path: Path) -> None:
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "other.pt2")
    assert read_metadata(tmp_path / "other.pt2") == {}


def test_devices_are_moved_everywhere_in_a_program() -> None:
    """As for a GPU, here to the device that has no data: no tensor is made on the one it came from."""
    moved = move_to_device_pass(trace(ServingGraph(trained()), 1, (64, 64)), torch.device("meta"))
    for module in moved.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            places = [node.kwargs.get("device"), *(a for a in node.args if isinstance(a, torch.device))]
            assert {str(place) for place in places if place is not None} <= {"meta"}, node.format_node()


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch knows no CUDA")
@pytest.mark.parametrize("model", [ADAPTIVE, KEYPOINTS], ids=["masks", "keypoints"])
def test_all_of_the_graph_is_on_the_gpu_of_its_inputs(model: dict[str, Any]) -> None:
    """With tensors that have a device and no data, so that no GPU is needed."""
    graph = ServingGraph(trained(**model), paste=True)
    with FakeTensorMode(shape_env=ShapeEnv()), PlainPyTorch(), torch.no_grad():
        for module in graph.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
        pixels, sizes = (value.shape for value in images())
        found = graph(
            torch.empty(pixels, dtype=torch.uint8, device="cuda"),
            torch.empty(sizes, dtype=torch.int32, device="cuda"),
        )
    assert {value.device.type for value in found} == {"cuda"}


@pytest.fixture(scope="module")
def package() -> tuple[ServingGraph, bytes]:
    graph = ServingGraph(trained(**ADAPTIVE), paste=True)
    return graph, as_compiled(graph, 1, (128, 96), {"about": "a test"})


@pytest.mark.slow
def test_a_package_finds_what_the_model_finds_with_pytorch_alone(
    package: tuple[ServingGraph, bytes], tmp_path: Path
) -> None:
    graph, content = package
    assert is_compiled(content)
    told = read_metadata(content)
    assert told["about"] == "a test"
    assert told[DEVICE] == "cpu"
    inputs = images(1)
    outputs = run_alone("package", content, inputs, tmp_path)
    check_same(dict(zip(graph.outputs, outputs, strict=True)), graph, inputs)
    check_same(pt2_runner(content, CPU)(*(value.numpy() for value in inputs)), graph, inputs)
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2"))
    assert loaded.get_metadata()["about"] == "a test"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_a_package_runs_in_cpp(package: tuple[ServingGraph, bytes], tmp_path: Path) -> None:
    graph, content = package
    root = Path(torch.__path__[0])
    flags = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}"]
    flags += [f"-Wl,-rpath,{root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    source, program = ROOT / "docs" / "find_objects.cpp", tmp_path / "find_objects"
    subprocess.run(["g++", "-std=c++20", str(source), "-o", str(program), *flags], check=True)

    (tmp_path / "model.pt2").write_bytes(content)
    pixels, sizes = images(1)
    (tmp_path / "pixels.rgb").write_bytes(pixels.numpy().tobytes())
    files = [str(tmp_path / name) for name in ("model.pt2", "pixels.rgb")]
    done = subprocess.run([str(program), *files, "128", "96"], check=True, capture_output=True, text=True)
    found = np.array([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    boxes, scores, classes, valid, *_ = graph(pixels, sizes)
    assert len(found) == valid.sum() > 10
    assert found[:, 0].tolist() == classes[valid].tolist()
    assert found[:, 1] == pytest.approx(scores[valid].numpy(), abs=1e-4)
    assert found[:, 2:] == pytest.approx(boxes[valid].numpy(), abs=1e-2)
    done = subprocess.run([str(program), *files, "1280", "96"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pixels.rgb: has fewer than 368640 bytes" in done.stderr
