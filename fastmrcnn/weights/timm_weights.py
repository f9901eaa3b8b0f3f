"""timm's own weights of a classifier, in the network of timm that is a backbone."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmrcnn.config.timm_models import load_timm
from fastmrcnn.errors import UserError
from fastmrcnn.model.timm_backbone import TimmBackbone
from fastmrcnn.weights.peers.programs import program_of
from fastmrcnn.weights.sources import find_weights, read_weights
from fastmrcnn.weights.states import as_state, compare_states, describe_mismatch, with_counters

PRETRAINED = "pretrained"
_KEY = "model.backbone.weights"


def load_timm_weights(backbone: TimmBackbone, source: str, sha256: str | None = None) -> list[str]:
    """Copy the weights of timm's classifier into a backbone, its classifier left out.

    Args:
        source: a file or URL of torch.save or safetensors; or `pretrained`, what timm publishes.
        sha256: expected hash or its first digits.
    Returns:
        Lines that say what was loaded.
    Raises:
        UserError: it cannot be had, or is not of this network. The backbone is unchanged then.
    """
    if source == PRETRAINED:
        path = find_weights(_published(backbone), sha256, _KEY)
    else:
        path = find_weights(source, sha256, _KEY)
    given, lines = as_state(read_weights(path), path)
    program = program_of(given)
    if program in ("fastmrcnn", "torchvision", "detectron2"):
        raise UserError(f"{path}: holds a whole detector; give it as model.weights instead")
    whole = backbone.whole_network(load_timm())
    own = backbone.state_dict()
    names = backbone.whole_names()
    state, theirs = given, whole.state_dict()
    if not theirs.keys() <= given.keys():
        state = _in_timms_names(given, whole, path)
    if not state.keys() & theirs.keys():
        start = ", ".join(list(given)[:3]) or "none"
        raise UserError(f"{path}: is not timm's {backbone.name}; its first keys are {start}")

    wanted = {key: own[name] for name, key in names.items()}
    # What the classifier has beyond the maps is not needed, whatever its shape.
    spare = {key for key in theirs if key not in wanted} | set(_classifier(whole, state))
    state = with_counters({key: value for key, value in state.items() if key not in spare}, wanted)
    if mismatch := compare_states(state, wanted):
        text = describe_mismatch(mismatch, state, wanted)
        raise UserError(f"{path}: does not fit timm's {backbone.name}: {text}")
    backbone.load_state_dict({**own, **{name: state[key] for name, key in names.items()}})
    return [*(f"{path}: {line}" for line in lines), f"{path}: {len(names)} tensors of timm's {backbone.name}"]


def _published(backbone: TimmBackbone) -> str:
    """The file, or the URL, of what timm publishes for the network."""
    config = load_timm().get_pretrained_cfg(backbone.name)
    hub, url = getattr(config, "hf_hub_id", None), getattr(config, "url", None)
    if config is None or getattr(config, "custom_load", False) or not (hub or url):
        raise UserError(
            f"{_KEY}=pretrained: timm publishes no weights of {backbone.name} that can be read; give a file"
        )
    if not hub:
        return str(url)
    import huggingface_hub  # comes with timm
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    given = getattr(config, "hf_hub_filename", None)
    file_names = [given] if given else ["model.safetensors", "pytorch_model.bin"]
    for file_name in file_names:
        try:
            return str(huggingface_hub.hf_hub_download(hub, file_name))
        except LocalEntryNotFoundError:  # it could not be asked for
            break
        except EntryNotFoundError:
            continue
        except Exception:  # its kinds of errors are many and change
            break
    raise UserError(
        f"{_KEY}=pretrained: {file_names[0]} of {hub} is neither in the hub's cache "
        f"({huggingface_hub.constants.HF_HUB_CACHE}) nor can it be fetched; give {_KEY}=FILE"
    )


def _in_timms_names(state: dict[str, Tensor], whole: Any, path: Path) -> dict[str, Tensor]:
    """A file of the network's authors under timm's names, by timm's own function, if it has one."""
    convert = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), whole))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError):
        return state  # it is of another network, which is told by its keys


def _classifier(whole: Any, state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the classifier's last layer, which may have been made for other classes."""
    names = (getattr(whole, "pretrained_cfg", None) or {}).get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    return [key for key in state if key.rpartition(".")[0] in names]
