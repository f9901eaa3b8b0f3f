"""`pytest bench/ --benchmark-only`: at training shapes on CUDA, at small ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Contest, measure, prepare
from record import write
from workload import SMALL, TRAINING, Workload

from fastmrcnn.speed.environment import environment
from fastmrcnn.speed.timing import copy_bandwidth, wait

FOUND: pytest.StashKey[list[dict[str, Any]]] = pytest.StashKey()
RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastmrcnn")
    group.addoption("--record", action="store_true", help="write bench/results/<gpu>.json")
    group.addoption("--commit", help="of the code, where there is no git repository to ask")
    group.addoption("--seconds", type=float, help="how long to repeat each contestant")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FOUND] = []
    if config.getoption("--record") and not torch.cuda.is_available():
        raise pytest.UsageError("--record needs a CUDA device: times of a CPU are not kept")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def load(device: torch.device) -> Workload:
    return TRAINING if device.type == "cuda" else SMALL


@pytest.fixture(scope="session")
def bandwidth(device: torch.device) -> float | None:
    """Of the device's memory. At the small shapes of a CPU everything is in its caches: None."""
    return copy_bandwidth(device) if device.type == "cuda" else None


@pytest.fixture
def run(
    benchmark: Any, device: torch.device, bandwidth: float | None, pytestconfig: pytest.Config
) -> Callable[..., dict[str, Any]]:
    """Measure a pass of a contest. pytest-benchmark's own columns are ours by the clock, wait included."""

    def run(contest: Contest, which: str, **extra: Any) -> dict[str, Any]:
        seconds = pytestconfig.getoption("--seconds") or (1.0 if device.type == "cuda" else 0.02)
        found = {**measure(contest, which, device, seconds, bandwidth), **extra}
        call = prepare(contest.ours, contest.make_inputs(device), which)

        def waited() -> None:
            call()
            wait(device)

        benchmark.group = f"{contest.title}, {which}"
        benchmark.extra_info.update(found)
        benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
        pytestconfig.stash[FOUND].append(found)
        return found

    return run


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    if not config.getoption("--record"):
        return
    if exitstatus != 0 or not config.stash[FOUND]:
        print("\nnothing recorded: not every benchmark passed")
        return
    facts = environment(torch.device("cuda"), config.getoption("--commit"))
    print(f"\nwrote {write(RESULTS, facts, config.stash[FOUND])}")
