"""The whole suite runs on all cores; anything less runs in one process."""

from __future__ import annotations

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: processes and threads would compete
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("xdist"):  # pyproject.toml gives these to every run
        parser.addoption("--numprocesses", help="needs pytest-xdist")
        parser.addoption("--dist", help="needs pytest-xdist")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process where tests were named, and where they use all cores or the GPU themselves."""
    by_itself = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    return 0 if by_itself or config.option.markexpr != DEFAULT else os.cpu_count() or 1


DEFAULT = "not slow and not gpu"
