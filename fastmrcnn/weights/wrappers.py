"""What training programs wrap around a state dict: a dict with other things in it, and prefixes of names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmrcnn.errors import UserError
from fastmrcnn.weights.archives import Left, is_plain_object, objects_in, refuse_code
from fastmrcnn.weights.peers.programs import program_of

_AVERAGED = (
    "model_ema",
    "ema",
    "ema_state_dict",
    "state_dict_ema",
    "ema_model",
    "model_ema_state_dict",
    "ema_model_state_dict",
)
_USUAL = (
    "model",
    "state_dict",
    "model_state_dict",
    "blobs",
    "net",
    "network",
    "weights",
    "module",
    "params",
    "shadow",
)
# Of DistributedDataParallel, torch.compile, Lightning and whoever keeps a model in an attribute.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
_AVERAGED_PREFIXES = ("model_ema.", "ema_model.", "ema.")
_COUNTERS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
_DEEPEST = 4


def unwrap(tree: Any, path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """The state dict in what a file holds, its names without what was put before all of them.

    Averaged weights (EMA) are preferred; where they are of the parameters alone, the rest comes from the
    model's own.

    Returns:
        Tensors by name, and lines that say what was chosen and what was left out.
    Raises:
        UserError: there is none, or it could be several, or it has objects in it that only running code
            could restore.
    """
    notes: list[str] = []
    plain = _find(tree)
    key, averaged = _averaged(tree)
    if plain is None and averaged is None:
        plain = _only_one(tree, path)
    state: dict[str, Any] = {}
    if plain is not None:
        state = _without_prefixes(plain, path, notes)
    if averaged is not None:
        own = _without_prefixes(averaged, path, notes)
        line = f"The averaged weights ({key}) are taken"
        if own.keys() < state.keys():
            line += f", and {len(state) - len(own)} tensors that have no average as they are"
            own = {**state, **own}
        state = own
        notes.append(line)
    odd = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if found := next((state[name] for name in odd if isinstance(state[name], Left)), None):
        raise refuse_code(path, found)
    if odd:
        raise UserError(f"{path}: expected a dict of tensors by name; not a tensor: {', '.join(odd)}")
    lost = {
        str(key): list(dict.fromkeys(left.name for left in objects_in(value) if not is_plain_object(left)))
        for key, value in (tree.items() if isinstance(tree, Mapping) else ())
        if value is not plain
    }
    if parts := [f"{key} ({', '.join(names[:3])})" for key, names in lost.items() if names]:
        notes.append(f"Left out, since only running code from the file could restore it: {', '.join(parts)}")
    return state, notes


def _find(tree: Any, depth: int = 0) -> Mapping[Any, Any] | None:
    """The innermost dict with tensors in it that usual keys lead to."""
    if not isinstance(tree, Mapping) or depth > _DEEPEST:
        return None
    for key in _USUAL:
        if (found := _find(tree.get(key), depth + 1)) is not None:
            return found
    return tree if any(isinstance(value, Tensor) for value in tree.values()) else None


def _averaged(tree: Any, depth: int = 0) -> tuple[str, Mapping[Any, Any] | None]:
    """Averaged weights, and the key that they stand under."""
    if not isinstance(tree, Mapping) or depth > _DEEPEST:
        return "", None
    for key in _AVERAGED:
        if (found := _find(tree.get(key))) is not None:
            return key, found
    for key in _USUAL:
        name, found = _averaged(tree.get(key), depth + 1)
        if found is not None:
            return name, found
    return "", None


def _only_one(tree: Any, path: str | Path) -> Mapping[Any, Any]:
    """The state dict under a key that no program is known to use, if there is but one."""
    if not isinstance(tree, Mapping):
        if isinstance(tree, Left):
            raise refuse_code(path, tree)
        raise UserError(f"{path}: expected a dict of tensors by name, got a {type(tree).__name__}")
    for key in (*_AVERAGED, *_USUAL):
        if found := next(objects_in(tree.get(key)), None):
            raise refuse_code(path, found)
    states = {
        str(key): value
        for key, value in tree.items()
        if isinstance(value, Mapping) and value and all(isinstance(one, Tensor) for one in value.values())
    }
    if len(states) > 1:
        raise UserError(
            f"{path}: holds several dicts of tensors ({', '.join(states)}); save the one of the model alone"
        )
    if states:
        return next(iter(states.values()))
    if found := next(objects_in(tree), None):
        raise refuse_code(path, found)
    return tree


def _without_prefixes(state: Mapping[Any, Any], path: str | Path, notes: list[str]) -> dict[str, Any]:
    own = _stripped({str(key): value for key, value in state.items() if key not in _COUNTERS})
    if program_of(own) is not None:
        return own
    firsts = dict.fromkeys(f"{key.partition('.')[0]}." for key in own if "." in key)
    models = {first: inner for first in firsts if program_of(inner := _within(own, first)) is not None}
    prefix = next((known for known in (*_AVERAGED_PREFIXES, *_PREFIXES) if known in models), None)
    if prefix is None and len(models) > 1:
        raise UserError(
            f"{path}: holds several models ({', '.join(models)}); save the state_dict() of one alone"
        )
    if prefix is None:
        prefix = next(iter(models), None)
    if prefix is None:
        return own
    if others := [key for key in own if not key.startswith(prefix)]:
        notes.append(
            f"The weights under '{prefix}' are taken; {len(others)} others are left out ({others[0]}, ...)"
        )
    return models[prefix]


def _within(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return _stripped({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


def _stripped(state: dict[str, Any]) -> dict[str, Any]:
    """Names without the prefixes that all of them have."""
    for _ in range(_DEEPEST):
        for prefix in (*_AVERAGED_PREFIXES, *_PREFIXES):
            if state and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
