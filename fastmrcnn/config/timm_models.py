"""What timm knows of a network before one is built: its name and the pixel statistics it was trained with."""

from __future__ import annotations

import difflib
from types import ModuleType

from fastmrcnn.errors import UserError

TIMM = "timm:"
"""How model.backbone.name begins for a network of timm."""


def load_timm() -> ModuleType:
    """The library; UserError if it is not installed, or not for the torch that is."""
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise UserError(f"timm cannot be imported ({error}); pip install 'fastmrcnn[timm]'") from None
        raise UserError(
            "model.backbone.name=timm:... needs timm, which is not installed: pip install 'fastmrcnn[timm]'"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:  # of a torchvision that was built for another torch
        reason = str(error).strip().split("\n")[-1]
        raise UserError(
            f"timm cannot be imported ({reason}); its torchvision may be for another torch than "
            "the one installed: pip install --force-reinstall torch torchvision, from one place"
        ) from None
    return timm


def check_name(timm: ModuleType, name: str) -> None:
    """UserError with the nearest names unless timm has a network of this name.

    Args:
        name: with or without the tag of its weights, such as convnext_tiny.fb_in22k.
    """
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() has them"
        raise UserError(f"model.backbone.name: timm knows no network '{architecture}' ({hint})")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        known = ", ".join(difflib.get_close_matches(tag, tags, n=3, cutoff=0.0)) or "none"
        raise UserError(f"model.backbone.name: timm has no weights '{tag}' of {architecture} (some: {known})")


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels that timm's weights of a network were trained with, RGB in 0..255.

    Raises:
        UserError: as `load_timm` and `check_name`.
    """
    timm = load_timm()
    check_name(timm, name)
    found = timm.get_pretrained_cfg(name, allow_unregistered=False)
    mean, std = found.mean, found.std
    return tuple(round(255 * one, 4) for one in mean), tuple(round(255 * one, 4) for one in std)
