"""`python -m fastmrcnn.train` for torchrun, in which a process is killed at a step of the first start.

Usage: dying.py RANK STEP ARGUMENTS...
"""

from __future__ import annotations

import os
import signal
import sys

import pytest
from tiny import at_step

from fastmrcnn import train
from fastmrcnn.errors import run_main

rank, step = sys.argv[1:3]
sys.argv[1:3] = []
with pytest.MonkeyPatch.context() as patch:
    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at_step(patch, int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
    run_main(train.main)
