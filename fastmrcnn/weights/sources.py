"""Files of weights: fetched, checked by hash, and read without running code from them."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

import torch

from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded
from fastmrcnn.weights.archives import read_archive
from fastmrcnn.weights.pickles import read_pickle

# How torch.save began its files before they were zip archives: its magic number, as a pickle.
_LEGACY_TORCH = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)


class Digits(NamedTuple):
    """First hexadecimal digits of a file's hash."""

    algorithm: str  # sha256 | md5
    text: str


def find_weights(source: str | Path, sha256: str | None = None, key: str = "weights") -> Path:
    """The file that `source` means, its hash checked.

    Args:
        source: a file, or a URL that is fetched once into torch.hub's cache.
        sha256: expected hash or its first digits (8 or more). None: what the file's name says of its
            hash, as in resnet50-0676ba61.pth (torchvision) or model_final_f10217.pkl (detectron2).
        key: of the configuration, for messages.

    Raises:
        UserError: it cannot be fetched, or has another hash.
    """
    source = str(source)
    expected = _expected_digits(source, sha256, key)
    path = _fetch(source, expected) if is_url(source) else expanded(source)
    _check_digits(path, expected)
    return path


def read_weights(path: Path) -> Any:
    """What stands in a file of torch.save, safetensors or a pickle of numpy arrays: tensors and plain values.

    In what torch.save wrote there may be a `Left` in place of an object that only running code could
    restore.

    Raises:
        UserError: missing, incomplete, or a pickle with anything else in it.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_LEGACY_TORCH))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a file of weights") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read (no permission)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # A zip archive begins with PK even if its end, by which zipfile knows it, has not arrived.
    if start.startswith(b"PK") or start == _LEGACY_TORCH or not start:
        return read_tensors(path, leave_objects=True)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")):
        raise UserError(f"{path}: is an image, not a file of weights")
    return read_pickle(path)


def read_tensors(path: Path, *, leave_objects: bool = False) -> Any:
    """What `torch.save` wrote, as tensors and plain containers on the CPU; no code of the file runs.

    Args:
        leave_objects: put a `Left` in place of other objects.
    Raises:
        UserError: missing, incomplete, not written by torch.save, or with objects other than those.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused below in one line
            # Options of a command line are plain data, which torchvision's scripts save with the weights.
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a file of weights") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read (no permission)") from None
    except Exception as error:  # of every kind: it is torch's reader alone that ran, over what may be noise
        whole = zipfile.is_zipfile(path) and "TorchScript" not in str(error)
        if leave_objects and whole and isinstance(error, pickle.UnpicklingError):
            return read_archive(path)
        # torch's own text advises to load it all the same; nobody should.
        foreign = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        # Only of an archive is it known that it is whole, and the name not one that was cut off.
        if foreign and zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: holds pickled code ({foreign[1]}) besides tensors and is not read; save its "
                "state_dict() alone"
            ) from None
        if "TorchScript" in str(error):
            raise UserError(f"{path}: is a TorchScript program; save its state_dict() instead") from None
        raise UserError(
            f"{path}: is incomplete or damaged, or not tensors written by torch.save; fetch or copy it again"
        ) from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError:
        raise UserError(f"{path}: needs safetensors to be read: pip install safetensors") from None
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: is incomplete or damaged, or not tensors written by safetensors ({error}); fetch or "
            "copy it again"
        ) from None


def is_url(source: str) -> bool:
    return urlparse(source).scheme in {"http", "https", "file"}


def _expected_digits(source: str, sha256: str | None, key: str) -> Digits | None:
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
            raise UserError(f"{key}_sha256: expected 8 to 64 hexadecimal digits, got {sha256!r}")
        return Digits("sha256", sha256.lower())
    name = Path(urlparse(source).path if is_url(source) else source).name
    if found := re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt)$", name):
        return Digits("sha256", found[1])
    if found := re.fullmatch(r"model_final_([0-9a-f]{6})\.pkl", name):
        return Digits("md5", found[1])
    return None


def _fetch(url: str, expected: Digits | None) -> Path:
    """The URL's file in torch.hub's cache, fetched if it is not there."""
    name = Path(urlparse(url).path).name
    if not name:
        raise UserError(f"{url}: names no file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    prefix = expected.text if expected is not None and expected.algorithm == "sha256" else None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary name, checks the hash, renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
    except RuntimeError as error:
        raise UserError(f"{url}: what came is incomplete or not what its name says ({error})") from None
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise UserError(
            f"{url}: cannot be fetched into {path} ({error}); without a network, put the file there"
        ) from None
    return path


def _check_digits(path: Path, expected: Digits | None) -> None:
    if expected is None or not path.is_file():
        return
    digest = hashlib.new(expected.algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if not digest.hexdigest().startswith(expected.text):
        raise UserError(
            f"{path}: is incomplete or another file: its {expected.algorithm} begins with "
            f"{digest.hexdigest()[: len(expected.text)]}, expected {expected.text}; delete it and fetch it "
            "again"
        )
