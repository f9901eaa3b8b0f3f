"""Each operator has one definition, in its folder, which its tests and its benchmark compare with."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
from places import ROOT

from fastmrcnn import kernels

OPERATORS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/op.py"))
BENCHES = sorted(name for name in OPERATORS if (ROOT / "bench" / f"bench_{name}.py").exists())


def definition(operator: str) -> str:
    """`naive` where CPU tensors run something faster, else `reference`."""
    names = {path.stem for path in (ROOT / "kernels" / operator).glob("*.py")}
    found = names & {"naive", "reference", "cpu"}
    assert found in ({"naive", "cpu"}, {"reference"}), f"{operator} has {sorted(found)}"
    return "naive" if "naive" in found else "reference"


def imports(path: Path) -> set[str]:
    """The modules and names that a file imports, as it calls them: `..level_assign.reference`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module} | {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_definition_covers_the_public_functions_and_the_tests_read_it(operator: str) -> None:
    name = definition(operator)
    module = importlib.import_module(f"fastmrcnn.kernels.{operator}.{name}")
    for public in vars(kernels).values():
        if inspect.isfunction(public) and public.__module__ == f"fastmrcnn.kernels.{operator}.op":
            assert inspect.isfunction(getattr(module, public.__name__, None)), public.__name__
    tests = imports(Path(__file__).with_name(f"test_{operator}.py"))
    assert f"fastmrcnn.kernels.{operator}.{name}" in tests


@pytest.mark.parametrize("operator", BENCHES)
def test_a_benchmark_defines_nothing_of_its_own(operator: str) -> None:
    """What it compares with at training shapes, where a loop takes hours, is what CPU tensors run."""
    name = "cpu" if definition(operator) == "naive" else "reference"
    assert f"fastmrcnn.kernels.{operator}.{name}" in imports(ROOT / "bench" / f"bench_{operator}.py")


def test_definitions_stand_alone() -> None:
    """No operator runs a naive.py, and none of them reads what it is to judge.

    Matching alone may, within `by_reference`: its cpu.py, a few objects at a time, is no baseline.
    """
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        last = {name.split(".")[-1] for name in imports(path) if name.startswith(".")}
        if path.name == "naive.py":
            assert not last & {"cpu", "kernel", "op"}, path
        elif path != ROOT / "kernels" / "matcher" / "op.py":
            assert "naive" not in last, path
