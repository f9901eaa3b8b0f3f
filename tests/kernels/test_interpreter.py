"""The operators' tests once more, with Triton's kernels in place of what CPU tensors run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent
OPERATORS = sorted(path.parent.name for path in (HERE.parents[1] / "kernels").glob("*/kernel.py"))


@pytest.mark.parametrize("operator", OPERATORS)
def test_with_triton_interpreted(operator: str) -> None:
    """In a process of its own, since Triton decides when a kernel is decorated."""
    files = map(str, [HERE / f"test_{operator}.py", *HERE.glob(f"test_{operator}_*.py")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
