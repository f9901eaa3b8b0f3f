"""The whole suite runs on all cores, anything less in one process; what needs torchvision is skipped without
it."""

from __future__ import annotations

import os
import signal

import pytest

DEFAULT = "not slow and not gpu"
IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

if IS_WORKER:  # before torch is imported: processes and threads would compete
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# What is started in the background inherits signals that are ignored, and leaves them so; tests send some.
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(
            getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
        )


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks at its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    # A worker is started with the same command line: were it to share its tests out too, there would be no
    # end of workers.
    if IS_WORKER:
        return
    # Tests that were named, slow ones and benchmarks want the machine for themselves.
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == DEFAULT
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = os.cpu_count() or 1
        config.option.dist = "worksteal"


@pytest.hookimpl(tryfirst=True)  # before the fixtures are set up
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torchvision") is not None:
        from with_torchvision import torchvision

        if torchvision is None:
            pytest.skip("torchvision is not here")


@pytest.fixture(autouse=True)
def float32_is_float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: by default cuDNN rounds what convolutions read to TF32, of 10 bits."""
    if request.node.get_closest_marker("gpu") is not None:
        import torch  # here: a worker sets its threads before torch is imported

        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
