"""The repository for Hugging Face's Hub: what is in it, the rules of its builder, and that it loads."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from places import ROOT

from fastmrcnn.kernels import hub

KERNELS = ROOT / "kernels"
REPO_ID = "somebody/roi-kernels"
PACKAGE = "roi_kernels"
BUILT = ("build/torch-cpu", "build/torch-cuda", "build/torch-rocm")
REGISTRATIONS = {
    "custom_op",
    "register_fake",
    "register_kernel",
    "register_torch_dispatch",
    "register_vmap",
    "triton_op",
}

# What is needed of Hugging Face's `kernels`, where that is not installed.
STAND_IN = """
import importlib.util, json, pathlib, sys

def get_kernel(*_, **__):
    folder = pathlib.Path(FOLDER)
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""

# What the builder writes into torch-ext.
OPS = """
import torch

_OPS_NAME = "_roi_kernels_cpu_0123456"
ops = getattr(torch.ops, _OPS_NAME)

def add_op_namespace_prefix(op_name: str) -> str:
    return f"{_OPS_NAME}::{op_name}"
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "new" / "repository"
    assert hub.main([str(folder), "--repo-id", REPO_ID]) == 0
    return folder


def python(*words: str, folder: Path, path: Path | None = None, **variables: str) -> None:
    """Run where our `kernels/` cannot be taken for the library of that name."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", **variables}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def stand_in(repository: Path, tmp_path: Path) -> Path:
    """A folder to be imported from, with what stands in for the library."""
    package = tmp_path / "kernels"
    package.mkdir()
    folder = repository / "build" / "torch-cpu"
    (package / "__init__.py").write_text(f"FOLDER = {str(folder)!r}\n{STAND_IN}", encoding="utf-8")
    (package / "benchmark.py").write_text("class Benchmark:\n    seed = None\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def library() -> None:
    try:
        metadata.distribution("kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("Hugging Face's kernels is not installed")


def test_the_sources_are_this_folders_byte_for_byte(repository: Path) -> None:
    commands = {"check.py", "report.py", "hub.py", "hub_files.py"}
    ours = {path.relative_to(KERNELS).as_posix(): path.read_bytes() for path in KERNELS.rglob("*.py")}
    ours = {name: data for name, data in ours.items() if name not in commands}
    assert len(ours) > 50
    for place in (*BUILT, f"torch-ext/{PACKAGE}"):
        folder = repository / place
        there = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        if place in BUILT:
            del there["metadata.json"]
            assert there == ours
        else:  # the builder writes this one, and does not write over one that is there
            assert there == {name: data for name, data in ours.items() if name != "_ops.py"}


def test_the_builder_is_told_what_to_build(repository: Path) -> None:
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    told = tomllib.loads((repository / "build.toml").read_text(encoding="utf-8"))
    assert told == {
        "general": {
            "name": "roi-kernels",
            "version": 0,
            "edition": 5,
            "license": "Apache-2.0",
            "backends": ["cpu", "cuda", "rocm"],
            "hub": {"repo-id": REPO_ID},
        },
        "torch-noarch": {},
    }
    wanted = {".gitignore", "CARD.md", "benchmarks", "build", "build.toml", "flake.nix", "tests", "torch-ext"}
    assert {path.name for path in repository.iterdir()} == wanted
    assert not list(repository.rglob(".unfinished*"))
    texts = [path.read_text(encoding="utf-8") for path in repository.rglob("*") if path.is_file()]
    assert not [text for text in texts if re.search(r"@[A-Z_]+@", text)]


def test_a_build_is_described(repository: Path) -> None:
    names = set()
    for place in BUILT:
        folder = repository / place
        told = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        backend = place.rpartition("-")[2]
        assert told["backend"] == {"type": backend}
        assert re.fullmatch(rf"_{PACKAGE}_{backend}_[0-9a-f]{{7}}", told["id"])
        names.add(told["id"])
        assert told["digest"]["algorithm"] == "sha256"
        assert told["digest"]["files"] == {
            path.relative_to(folder).as_posix(): base64.b64encode(
                hashlib.sha256(path.read_bytes()).digest()
            ).decode()
            for path in folder.rglob("*.py")
        }
    assert len(names) == len(BUILT)


def test_other_sources_get_another_id() -> None:
    code = {"__init__.py": b"", "nms/op.py": b"one"}
    first = hub.describe("a-b", "cpu", code)["id"]
    assert first == hub.describe("a-b", "cpu", dict(reversed(code.items())))["id"]
    assert first != hub.describe("a-b", "cpu", {**code, "nms/op.py": b"two"})["id"]
    assert first != hub.describe("a-b", "cpu", {"__init__.py": b"", "nms/of.py": b"one"})["id"]


def misplaced(text: str) -> list[int]:
    """Lines where an operator is registered under a name that is not of the namespace of the build.

    Decorators of functions and classes are what the builder looks at; operators that are made by a call must
    keep the rule too.
    """

    def callee(node: ast.AST) -> str | None:
        function = node.func if isinstance(node, ast.Call) else None
        return getattr(function, "attr", getattr(function, "id", None))

    def registrations(tree: ast.Module) -> Iterator[ast.Call]:
        for node in ast.walk(tree):
            for decorator in getattr(node, "decorator_list", []):
                if callee(decorator) in REGISTRATIONS and decorator.args:
                    yield decorator
            if callee(node) in {"custom_op", "triton_op"}:
                yield node

    calls = registrations(ast.parse(text))
    return sorted({call.lineno for call in calls if callee(call.args[0]) != "add_op_namespace_prefix"})


def test_operators_are_registered_as_the_builder_asks(repository: Path) -> None:
    paths = list(repository.rglob("*.py"))
    assert len(paths) > 200
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    wrong = [f"{path}:{line}" for path, text in texts.items() for line in misplaced(text)]
    assert not wrong, "\n".join(wrong)
    registering = [path for path, text in texts.items() if "custom_op(" in text and "torch-ext" in str(path)]
    assert len(registering) >= 5


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("@torch.library.custom_op('ours::f', mutates_args=())", True),
        ("@custom_op(f'{NAMESPACE}::f', mutates_args=())", True),
        ("@torch.library.register_fake('ours::f')", True),
        ("@torch.library.custom_op(prefix('f'), mutates_args=())", True),
        ("@torch.library.custom_op(add_op_namespace_prefix('f'), mutates_args=())", False),
        ("@torch.library.triton_op(_ops.add_op_namespace_prefix('f'), mutates_args=())", False),
        ("@_f.register_fake", False),
    ],
)
def test_the_rule_bites(line: str, found: bool) -> None:
    assert misplaced(f"import torch\n\n{line}\ndef f(x): return x\n") == ([3] if found else [])
    assert misplaced("f = torch.library.custom_op('ours::f', f, mutates_args=())\n") == [1]


def test_the_card_finds_functions_and_layers(repository: Path) -> None:
    """The builder reads both from the source: `__all__`, a list of strings, and the classes of `layers`."""
    package = repository / "torch-ext" / PACKAGE
    (names,) = (
        node.value
        for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__"
    )
    assert isinstance(names, ast.List)
    listed = [name.value for name in names.elts if isinstance(name, ast.Constant)]
    assert len(listed) == len(names.elts)
    assert listed == importlib.import_module("fastmrcnn.kernels").__all__
    assert "layers" in listed
    layers = ast.parse((package / "layers.py").read_text(encoding="utf-8")).body
    assert [node.name for node in layers if isinstance(node, ast.ClassDef)] == [
        "RoIAlign",
        "MultiScaleRoIAlign",
    ]
    card = (repository / "CARD.md").read_text(encoding="utf-8")
    assert set(re.findall(r"{{ (\w+) }}", card)) == {"repo_id", "version", "license", "function", "layer"}


def test_its_tests_pass(repository: Path, stand_in: Path) -> None:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests")
    python(*words, folder=repository, path=stand_in)


def test_it_works_with_the_namespace_that_the_builder_gives(repository: Path, tmp_path: Path) -> None:
    """torch-ext, and the one file that is not written into it."""
    package = tmp_path / "some_package"
    package.symlink_to(repository / "torch-ext" / PACKAGE, target_is_directory=True)
    code = f"""
import importlib.util, sys, types
ops = types.ModuleType("some_package._ops")
exec({OPS!r}, vars(ops))
sys.modules[ops.__name__] = ops
import some_package, torch
kept = some_package.nms(torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 2), torch.tensor([0.5, 0.7]), 0.5)
assert kept.tolist() == [1], kept
assert torch.ops._roi_kernels_cpu_0123456.nms
assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("some_package")]
"""
    python("-c", code, folder=tmp_path, path=tmp_path)


@pytest.mark.torchvision
def test_its_benchmark_agrees_with_torchvision(repository: Path, stand_in: Path) -> None:
    code = """
import runpy, torch, kernels
benchmark = runpy.run_path("benchmarks/benchmark.py")["Detection"]
loads = [name.removeprefix("benchmark_") for name in dir(benchmark) if name.startswith("benchmark_")]
assert len(loads) == 3
for load in loads:
    torch.manual_seed(benchmark.seed)
    one = benchmark()
    one.kernel, one.device = kernels.get_kernel(), "cpu"
    getattr(one, f"setup_{load}")()
    getattr(one, f"benchmark_{load}")()
    expected = getattr(one, f"verify_{load}")()
    assert one.out.numel() > 0 and torch.allclose(one.out, expected, atol=1e-2), load
"""
    python("-c", code, folder=repository, path=stand_in)


@pytest.mark.usefixtures("library")
def test_its_tests_pass_with_the_library(repository: Path) -> None:
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", "tests")
    python(*words, folder=repository, LOCAL_KERNELS=f"{REPO_ID}={repository}")


@pytest.mark.usefixtures("library")
def test_the_library_puts_its_layers_on_a_model(repository: Path) -> None:
    code = """
import pathlib, torch, kernels
here = pathlib.Path(".").resolve()
detection = kernels.get_local_kernel(here)
assert detection.__name__.startswith("_roi_kernels_")

@kernels.use_kernel_forward_from_hub("RoIAlign")
class RoIAlign(torch.nn.Module):
    output_size, spatial_scale, sampling_ratio, aligned = 2, 0.5, 2, False
    def forward(self, input, rois):
        raise NotImplementedError

model = torch.nn.ModuleList([RoIAlign()])
layer = kernels.LocalLayerRepository(here, layer_name="RoIAlign")
with kernels.use_kernel_mapping({"RoIAlign": {"cpu": layer}}):
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    model = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=kernels.KernelizeFallback.NONE)
maps, rois = torch.rand(1, 2, 8, 8), torch.tensor([[0.0, 1.0, 1.0, 9.0, 12.0]])
assert torch.equal(model[0](maps, rois), detection.roi_align(maps, rois, 2, 0.5, 2, False))
"""
    python("-c", code, folder=repository)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert hub.main(list(words)) == 2
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert str(tmp_path) in refused(capsys, str(tmp_path))
    assert str(tmp_path / "mine") in refused(capsys, str(tmp_path / "mine"))
    refused(capsys, str(tmp_path / "mine" / "below"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["kernels", "me/Kernels", "me/roi_kernels", "me/1x", "me/x", "me/x-", "/xy", "a/b/cd", "me/xy\n"]
)
def test_names_that_the_hub_would_not_take(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert repr(name) in refused(capsys, str(tmp_path / "out"), "--repo-id", name)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.main(["."]) == 0
    assert (tmp_path / "build.toml").is_file()


def test_nothing_is_left_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, left = Path.write_bytes, 20

    def fill_up(path: Path, data: bytes) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", fill_up)
    assert "No space left" in refused(capsys, str(tmp_path))
    assert not list(tmp_path.iterdir())
