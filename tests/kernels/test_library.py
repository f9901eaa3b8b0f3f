"""What Triton needs, and how it is said in one line where that is missing."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastmrcnn.kernels.common.library import require_interpreter, require_triton


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """One with Triton, a C compiler and the headers of Python, which are in the folder returned."""
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    for name in ("CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    for function in (require_triton, require_interpreter):
        function.cache_clear()
    yield tmp_path
    for function in (require_triton, require_interpreter):
        function.cache_clear()


def test_nothing_is_missing(machine: Path) -> None:
    require_triton()


def test_no_triton(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^fastmrcnn\.kernels: .* need triton: pip install"):
        require_triton()


def test_no_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"^fastmrcnn\.kernels: .* C compiler .* set CC$"):
        require_triton()


@pytest.mark.parametrize("name", ["CPATH", "C_INCLUDE_PATH"])
def test_no_headers(name: str, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless they are where the compiler looks too."""
    elsewhere = machine / "elsewhere"
    elsewhere.mkdir()
    (machine / "Python.h").rename(elsewhere / "Python.h")
    with pytest.raises(
        RuntimeError, match=rf"no Python\.h in {machine}; install them \(python3-dev"
    ) as error:
        require_triton()
    assert "\n" not in str(error.value)
    monkeypatch.setenv(name, f"/nowhere:{elsewhere}")
    require_triton()


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.3.5", True),
        ("3.6.0", "2.4.0", False),
        ("3.6.1", "2.10.1rc1", False),
        ("3.7.1", "2.4.6", True),
    ],
)
def test_the_interpreter_and_numpy(
    triton: str, numpy: str, works: bool, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__version__=versions[name]))
    if works:
        require_interpreter()
        return
    with pytest.raises(RuntimeError, match=rf"triton {triton} does not work with numpy {numpy}: pip install"):
        require_interpreter()
