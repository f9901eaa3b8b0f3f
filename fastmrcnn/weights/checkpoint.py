"""Checkpoints: a run at one step, in one file that needs nothing else to be used.

A checkpoint is a plain dict of tensors and containers, read with `weights_only=True`, so that one
from a stranger runs no code. `checkpoints/last_checkpoint` holds the name of the newest whole one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch
from torch import Tensor, nn

from fastmrcnn.errors import UserError
from fastmrcnn.files import TEMPORARY_SUFFIX, expanded, replacing, write_text
from fastmrcnn.weights.archives import objects_in, refuse_code
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.seal import Sealing
from fastmrcnn.weights.states import copy_state
from fastmrcnn.weights.whole import FORMAT, is_checkpoint, newest_whole, read_whole, steps_in

FORMAT_VERSION = 1
LAST = "last_checkpoint"
_KEYS = ("step", "model", "optimizer", "scaler", "ema", "config", "class_names", "category_ids", "extra")


class HasState(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: HasState | None = None,
    ema: nn.Module | None = None,
    card: ModelCard,
    extra: dict[str, Any] | None = None,
    keep: int,
) -> Path:
    """Write `folder/step_0000100.pt`, point `folder/last_checkpoint` at it, remove old ones.

    Each file is written under a temporary name, flushed and renamed: whenever the process is
    killed, `last_checkpoint` names a whole file.

    Args:
        folder: the checkpoints of one run; made if it is not there.
        step: number of steps done.
        scaler: of the gradients, or whatever else gates the update.
        ema: the model with averaged weights.
        extra: anything else to carry: tensors, numbers, text, and containers of these.
        keep: how many to keep, this one included. Those of later steps are never touched.

    Raises:
        UserError: the file cannot be written. What was there before is still there.
        TypeError: `extra` or a state holds what could not be read back.
    """
    folder = Path(folder)
    payload = pack(
        step=step, model=model, optimizer=optimizer, scaler=scaler, ema=ema, card=card, extra=extra
    )
    _require_plain(payload, "checkpoint")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror})") from error
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):  # of a run that was killed here
        leftover.unlink(missing_ok=True)

    path = folder / f"step_{step:07d}.pt"
    write_tensors(path, payload)
    write_text(folder / LAST, path.name + "\n")

    steps = steps_in(folder)
    for old in sorted(s for s in steps if s <= step)[:-keep]:
        steps[old].unlink(missing_ok=True)
    return path


def pack(
    *,
    step: int,
    model: nn.Module,
    card: ModelCard,
    optimizer: torch.optim.Optimizer | None = None,
    scaler: HasState | None = None,
    ema: nn.Module | None = None,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What stands in a checkpoint. Without an optimizer a run can start from it, but not go on."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "fastmrcnn_version": _version(),
        "torch_version": str(torch.__version__),
        "step": step,
        "model": dict(model.state_dict()),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "ema": None if ema is None else dict(ema.state_dict()),
        "config": card.config.model_dump(mode="json"),
        "class_names": list(card.class_names),
        "category_ids": list(card.category_ids),
        "keypoints": None if card.keypoints is None else card.keypoints._asdict(),
        "extra": extra or {},
    }


def write_tensors(path: Path, tree: Any) -> None:
    """torch.save to a file that is whole or not there, sealed. Raises UserError if it cannot be written."""
    with replacing(path) as stream:
        sealing = Sealing(stream)
        try:
            torch.save(tree, cast(IO[bytes], sealing))
            sealing.seal()
        except RuntimeError as error:
            # On a full disk torch reports its own bookkeeping, and the reason as the context.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or the last one of a run or checkpoints folder.

    Of a folder of runs it is the run that saved last.

    Raises:
        UserError: there is none.
    """
    path = expanded(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint file or run folder")
    for folder in (path, path / "checkpoints"):
        if (folder / LAST).is_file():
            name = (folder / LAST).read_text(encoding="utf-8", errors="replace").strip()
            if name and Path(name).name == name and (folder / name).is_file():
                return folder / name
            there = ", ".join(sorted(file.name for file in steps_in(folder).values())) or "none"
            raise UserError(
                f"{folder / LAST}: names '{name}', which is not there; checkpoints there: {there}"
            )
    runs = sorted(path.glob(f"*/checkpoints/{LAST}"), key=lambda file: file.stat().st_mtime_ns)
    if runs:
        return find_checkpoint(runs[-1].parent)
    raise UserError(f"{path}: holds no {LAST}, nor does its folder checkpoints; name a checkpoint file")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint, tensors on the CPU. `path` is as in `find_checkpoint`.

    Returns:
        step, model, optimizer, scaler, ema, config (a dict), class_names, category_ids, extra, and
        format, format_version, fastmrcnn_version, torch_version.

    Raises:
        UserError: missing, incomplete, not a checkpoint of this program, of a newer format, or with
            objects that only running code could restore.
    """
    file = find_checkpoint(path)
    tree = read_whole(file)
    if not is_checkpoint(tree):
        raise UserError(
            f"{file}: is not a fastmrcnn checkpoint; those are written by training, to "
            "RUN/checkpoints/step_*.pt"
        )
    return check_format(tree, file)


def find_whole_checkpoint(path: str | Path) -> tuple[Path, list[str]]:
    """As `find_checkpoint`, but of a folder the newest one that is whole, as `newest_whole` gives it.

    Raises:
        UserError: there is none. A file that `path` names is given as it is: reading it tells what is wrong.
    """
    newest = find_checkpoint(path)
    return (newest, []) if expanded(path).is_file() else newest_whole(newest)


def checkpoint_of_step(path: str | Path, step: int) -> tuple[Path | None, list[int]]:
    """The checkpoint of so many steps in the run or folder that `path` means; and the steps there are.

    Raises:
        UserError: as `find_checkpoint`.
    """
    there = steps_in(find_checkpoint(path).parent)
    return there.get(step), sorted(there)


def check_format(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """The same tree; UserError if its format is newer, a part is not there, or one would run code."""
    version = tree.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(
            f"{file}: has format {version}, written by fastmrcnn {tree.get('fastmrcnn_version')}; this "
            f"version ({_version()}) reads up to {FORMAT_VERSION}: upgrade fastmrcnn"
        )
    if absent := [key for key in _KEYS if key not in tree]:
        raise UserError(f"{file}: lacks {', '.join(absent)}; it is not whole")
    if found := next(objects_in(tree), None):
        raise refuse_code(file, found)
    return tree


def judged_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict that detects: the average if the run kept one, else the weights of its last step."""
    state: dict[str, Tensor] = checkpoint["model"] if checkpoint["ema"] is None else checkpoint["ema"]
    return state


def require_optimizer(checkpoint: Mapping[str, Any]) -> None:
    """UserError if a run cannot go on from a checkpoint, but only start."""
    if checkpoint["optimizer"] is None:
        raise UserError(
            f"{_called(checkpoint)}: holds weights without an optimizer's state (it was converted); start a "
            "new run from it with model.weights=FILE"
        )


def restore(
    checkpoint: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: HasState | None = None,
    ema: nn.Module | None = None,
) -> int:
    """Put a run back where `read_checkpoint` found it; returns the number of steps done.

    The optimizer's state comes from the checkpoint, its options (such as the decay) do not. An
    average that the checkpoint does not have starts from its weights.

    Args:
        ema: the model with averaged weights.
    Raises:
        UserError: the weights or the optimizer's state belong to another model.
    """
    source = _called(checkpoint)
    require_optimizer(checkpoint)
    saved = checkpoint["optimizer"]
    copy_state(model, checkpoint["model"], source)
    if ema is not None:
        copy_state(ema, judged_weights(checkpoint), f"{source}, ema")
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    if [group.keys() for group in saved["param_groups"]] != [g.keys() for g in optimizer.param_groups]:
        raise UserError(f"{source}: its optimizer state does not fit optim.name and model.backbone.norm")
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        raise UserError(f"{source}: its optimizer state does not fit the model ({error})") from None
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            # A fused update wants what belongs to a weight in its memory format, which is the device's.
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)
    for group, own in zip(optimizer.param_groups, options, strict=True):
        group.update(own)  # decay and such come from the configuration, and lr is a tensor on the device
    if scaler is not None and checkpoint["scaler"] is not None:
        scaler.load_state_dict(checkpoint["scaler"])
    return int(checkpoint["step"])


def _called(checkpoint: Mapping[str, Any]) -> str:
    return f"checkpoint of step {checkpoint['step']}"


def _require_plain(value: Any, place: str) -> None:
    """TypeError unless `weights_only=True` can read `value` back."""
    if type(value) in (dict, OrderedDict):
        for key, inner in value.items():
            _require_plain(key, f"a key of {place}")
            _require_plain(inner, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, inner in enumerate(value):
            _require_plain(inner, f"{place}[{index}]")
    elif not isinstance(value, Tensor) and type(value) not in (int, float, bool, str, type(None)):
        raise TypeError(f"{place} is a {type(value).__name__}, which a checkpoint cannot carry")


def _version() -> str:
    try:
        return metadata.version("fastmrcnn")
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return "unknown"
