"""Real data sets, which are too large for the repository: tests of them run where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from places import ROOT


def real_data(name: str) -> Path:
    """Folder of a data set, in $FASTMRCNN_DATA or beside the checkout; skips the test if it is not there."""
    beside = ROOT.parent / "shared" / "data"
    folder = Path(os.environ.get("FASTMRCNN_DATA", beside)) / name
    if not folder.is_dir():
        pytest.skip(f"the data set {name} is not here; FASTMRCNN_DATA names the folder that has it")
    return folder
