"""These kernels as a repository for Hugging Face's Hub, which its `kernels` library loads.

    python -m fastmrcnn.kernels.hub OUT_DIR [--repo-id OWNER/NAME]

Writes what kernel-builder builds: `build.toml` and `flake.nix`, the sources under `torch-ext/`, tests, a
benchmark and the card. Nothing of it needs a compiler (the builder's "noarch" form), so that what is built is
known too, and lies under `build/`: the `kernels` library loads it from OUT_DIR as it is.

The sources are this folder's, without its commands, byte for byte. There is one exception: `_ops.py`, which
gives the operators' namespace. The builder writes its own into `torch-ext/`, where it wants none before.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import hub_files

REPO_ID = "fastmrcnn/fastmrcnn-kernels"
VERSION = 0  # on the Hub: the interface may still change
LICENSE = "Apache-2.0"
BACKENDS = ("cpu", "cuda", "rocm")
OPS = "_ops.py"
COMMANDS = {"check.py", "hub.py", "hub_files.py", "report.py"}  # `python -m` finds no package of the Hub


def repository(repo_id: str = REPO_ID) -> dict[str, bytes]:
    """Every file of the repository, by its path in it.

    Args:
        repo_id: OWNER/NAME on the Hub. NAME is of lower-case letters, digits and dashes; the package bears it
            too, with underscores for dashes.

    Raises:
        ValueError: `repo_id` is not of that form.
    """
    found = re.fullmatch(r"[A-Za-z0-9][\w.-]*/([a-z][a-z0-9-]*[a-z0-9])", repo_id)
    if found is None:
        raise ValueError(
            "a repository is called OWNER/NAME, where NAME has a-z, 0-9 and, within, dashes, and begins with "
            f"a letter; got {repo_id!r}"
        )
    name = found[1]
    texts = hub_files.texts(name, repo_id, VERSION, LICENSE, BACKENDS)
    files = {path: text.encode() for path, text in texts.items()}
    code = sources()
    package = name.replace("-", "_")
    files |= {f"torch-ext/{package}/{path}": data for path, data in code.items() if path != OPS}
    for backend in BACKENDS:
        metadata = json.dumps(describe(name, backend, code), indent=2) + "\n"
        built = code | {"metadata.json": metadata.encode()}
        files |= {f"build/torch-{backend}/{path}": data for path, data in built.items()}
    return files


def sources() -> dict[str, bytes]:
    """The modules of this folder that are not commands, by their path in it."""
    folder = Path(__file__).parent
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    return {name: path.read_bytes() for name, path in paths.items() if name not in COMMANDS}


def describe(name: str, backend: str, code: Mapping[str, bytes]) -> dict[str, object]:
    """The metadata of a build, as kernel-builder writes it.

    The package is imported under its `id`, which has to be another for other sources, since operators are
    registered under it.
    """
    hashes = {path: hashlib.sha256(data).digest() for path, data in code.items()}
    of_all = hashlib.sha256(b"".join(path.encode() + hashes[path] for path in sorted(hashes)))
    return {
        "name": name,
        "id": f"_{name.replace('-', '_')}_{backend}_{of_all.hexdigest()[:7]}",
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {path: base64.b64encode(hashes[path]).decode() for path in sorted(hashes)},
        },
    }


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files into a new or empty folder: all of them, or none.

    Raises:
        FileExistsError: there is something in the folder, or it is none.
        OSError: it cannot be written to.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already, and not an empty folder: name another")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as unfinished:
        for name, data in files.items():
            path = Path(unfinished, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        for path in Path(unfinished).iterdir():
            path.rename(folder / path.name)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.hub",
        description="Write these kernels as a repository for Hugging Face's Hub and its kernel-builder.",
    )
    parser.add_argument("folder", type=Path, metavar="OUT_DIR", help="new or empty")
    parser.add_argument("--repo-id", default=REPO_ID, metavar="OWNER/NAME", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        files = repository(args.repo_id)
        write(files, args.folder)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{args.folder}: {len(files)} files of {args.repo_id}, version {VERSION}")
    print(f"to load it: kernels.get_local_kernel(pathlib.Path({str(args.folder)!r}))")
    return 0


if __name__ == "__main__":
    sys.exit(main())
