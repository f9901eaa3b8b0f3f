"""What Inductor compiled, kept for the next run for as long as it is still true."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.compiler.config

PACKAGE = Path(__file__).parents[1]


def keep_compile_cache() -> None:
    """Let Inductor's cache outlive the machine's temporary files, unless the user has put it elsewhere.

    To be called before anything is compiled. What other sources or other versions have left there is not
    taken: a graph is looked up by the names of its operators, not by the code of their gradients (the
    functions of `register_autograd`) and fakes, so that a corrected one would not run.
    """
    # Imported here: it takes seconds, which a run that compiles nothing can do without.
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    key = "TORCHINDUCTOR_CACHE_DIR"
    # Importing torch._dynamo writes torch's own default there, which is not the user's choice.
    if os.environ.get(key) in (None, os.path.abspath(default_cache_dir())):
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        os.environ[key] = str(Path(home) / "fastmrcnn" / "inductor")
    config, own = torch.compiler.config, sources_tag()
    if not config.cache_key_tag.endswith(own):
        config.cache_key_tag += own  # after the user's, if there is one


@functools.cache
def sources_tag() -> str:
    """A word that changes with the sources of this package and with the versions of torch and Triton."""
    digest = hashlib.sha256()
    for path in _modules():
        digest.update(f"{path.relative_to(PACKAGE)}\n".encode())
        digest.update(path.read_bytes())
    for package in ("torch", "triton"):
        digest.update(f"{package} {_version(package)}\n".encode())
    return f"fastmrcnn-{digest.hexdigest()[:16]}"


def _modules() -> Iterator[Path]:
    """Of the package and of its kernels, which in a clone are behind a symbolic link."""
    for folder, folders, names in os.walk(PACKAGE, followlinks=True):
        folders.sort()
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # Triton, other than on Linux
