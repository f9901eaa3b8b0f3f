"""The folder of kernels, copied into another project."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

KERNELS = ROOT / "kernels"
ALLOWED = sys.stdlib_module_names | {"torch", "triton"}
PATCHES_TORCHVISION = {"patch.py", "check.py"}  # torchvision is what they are for; imported when called

EXERCISE = """
import torch

def exercise(kernels):
    random = torch.Generator().manual_seed(0)
    features = [torch.randn(1, 3, 16 // s, 16 // s, generator=random, requires_grad=True) for s in (1, 2)]
    boxes = torch.tensor([[[0.0, 1.0, 30.0, 40.0], [8.0, 8.0, 60.0, 50.0], [9.0, 8.0, 60.0, 52.0]]])
    index, valid = kernels.padded_nms(boxes, torch.tensor([[0.3, 0.9, 0.8]]), None, None, 0.5, 3)
    pooled = kernels.multilevel_roi_align(features, boxes, 4, spatial_scales=[1 / 4, 1 / 8], valid=valid)
    loss = kernels.mask_loss(
        pooled[0], torch.tensor([0, 1, 2]), torch.ones(3, 4, 4, dtype=torch.bool), valid[0]
    )
    loss.backward()
    levels = kernels.assign_levels(boxes, k_max=3)
    return [index, valid, pooled.detach(), loss.detach(), levels, *(f.grad for f in features)]
"""


def run(code: str, *paths: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", EXERCISE + code],
        cwd=paths[0],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A project with the copy at their_detector/layers/fast_ops."""
    package = tmp_path / "their_detector" / "layers"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package.parent / "__init__.py").touch()
    shutil.copytree(KERNELS, package / "fast_ops", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_nothing_but_torch_triton_and_the_standard_library_is_imported() -> None:
    files = sorted(KERNELS.rglob("*.py"))
    assert len(files) > 10
    for path in files:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        outermost = {id(node) for node in tree.body}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = len(path.relative_to(KERNELS).parents)
                assert node.level <= above, f"{path}:{node.lineno} leaves the folder"
                names = [] if node.level else [node.module or ""]
            else:
                continue
            for name in names:
                top = name.split(".")[0]
                of_patch = (
                    top == "torchvision" and path.name in PATCHES_TORCHVISION and id(node) not in outermost
                )
                assert top in ALLOWED or of_patch, f"{path}:{node.lineno} imports {name}"


def test_a_copy_works_where_nothing_else_can_be_imported(copied: Path) -> None:
    """Every module is imported, and whatever the folder's own code asks for is written down."""
    triton_is_here = importlib.util.find_spec("triton") is not None
    code = f"""
import builtins, importlib, pkgutil, sys
sys.modules["fastmrcnn"] = None
real, asked = builtins.__import__, set()

def record(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and (globals or {{}}).get("__name__", "").startswith("their_detector"):
        asked.add(name.split(".")[0])
    return real(name, globals, locals, fromlist, level)

builtins.__import__ = record
import their_detector.layers.fast_ops as kernels
assert "torchvision" not in sys.modules
for module in pkgutil.walk_packages(kernels.__path__, kernels.__name__ + "."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name == "triton" and not {triton_is_here}
exercise(kernels)
print(*sorted(asked))
"""
    asked = set(run(code, copied).split())
    assert "torch" in asked
    assert asked <= ALLOWED


def test_a_copy_works_beside_the_original(copied: Path) -> None:
    code = """
import fastmrcnn.kernels as original
import their_detector.layers.fast_ops as copy
ours, theirs = exercise(original), exercise(copy)
assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
assert hasattr(torch.ops.fastmrcnn_kernels, "roi_align")
assert hasattr(torch.ops.their_detector_layers_fast_ops, "roi_align")
assert copy.roi_align is not original.roi_align
"""
    run(code, copied, ROOT)


@pytest.mark.torchvision
def test_a_copy_and_the_original_patch_torchvision_in_any_order(copied: Path) -> None:
    code = """
import fastmrcnn.kernels as original
import their_detector.layers.fast_ops as copy
from torchvision import ops

def runs():
    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    name = type(ops.roi_align(maps, torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]]), 2).grad_fn).__name__
    return next((k for k in ("fastmrcnn_kernels", "fast_ops", "torchvision") if k in name), name)

dump = lambda: torch._C._dispatch_dump("torchvision::roi_align")
before = dump()
for first, second in ((original, copy), (copy, original)):
    original.patch("torchvision", devices="cpu")
    copy.patch("torchvision", devices="cpu")
    assert runs() == "fast_ops", runs()
    first.unpatch("torchvision")
    assert runs() == ("fast_ops" if first is original else "fastmrcnn_kernels"), runs()
    second.unpatch("torchvision")
    assert runs() == "torchvision", runs()
    assert dump() == before
"""
    run(code, copied, ROOT)
