"""The compile cache: kept between runs, and never taken from other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

from fastmrcnn.training.compile_cache import keep_compile_cache, sources_tag

# An operator of the package, with a gradient that is corrected from one process to the next.
OPERATOR = """
import torch

@torch.library.custom_op("fastmrcnn_kernels::tripled", mutates_args=())
def tripled(x: torch.Tensor) -> torch.Tensor:
    return 3 * x

tripled.register_fake(torch.empty_like)
tripled.register_autograd(lambda ctx, grad: FACTOR * grad)
"""
COMPILE = """
import torch
from torch._dynamo.utils import counters
from fastmrcnn.kernels.tripled import tripled
from fastmrcnn.training.compile_cache import keep_compile_cache

def gradient():
    torch._dynamo.reset()
    x = torch.ones(2, requires_grad=True)
    torch.compile(tripled, fullgraph=True, dynamic=False)(x).sum().backward()
    return x.grad[0].item()

def hits():
    return counters["aot_autograd"]["autograd_cache_hit"]

untagged = gradient()
counters.clear()
keep_compile_cache()
print(untagged, gradient(), hits(), gradient(), hits())
"""


@pytest.mark.slow
def test_a_corrected_gradient_runs_though_the_cache_has_the_wrong_one(tmp_path: Path) -> None:
    """A key that leaves the sources out gives the wrong one: torch's own, until it has them in."""
    package = tmp_path / "fastmrcnn"
    shutil.copytree(ROOT / "fastmrcnn", package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
    }

    def run(factor: int) -> list[str]:
        text = OPERATOR.replace("FACTOR", str(factor))
        (package / "kernels" / "tripled.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    # While the sources stay, the cache is used: the second time.
    assert run(-1) == ["-1.0", "-1.0", "0", "-1.0", "1"]
    assert run(3) == ["-1.0", "3.0", "0", "3.0", "1"]


def test_the_users_tag_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "anywhere")
    config = torch.compiler.config
    with config.patch(cache_key_tag="theirs-"):
        for _ in range(2):
            keep_compile_cache()
            assert config.cache_key_tag == "theirs-" + sources_tag()


def test_the_compile_cache_is_where_it_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compile_cache()
    assert cache_dir() == str(tmp_path / "fastmrcnn" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as torch sets it
    keep_compile_cache()
    assert cache_dir() == str(tmp_path / "fastmrcnn" / "inductor")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    keep_compile_cache()
    assert cache_dir() == str(tmp_path / "mine")
