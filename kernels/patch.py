"""Run another library's calls on these kernels, reversibly.

torchvision's operators are overridden at PyTorch's dispatcher, below every Python name they are bound to,
so that whatever calls them comes along: torchvision's models, detectron2, TorchScript, your own code.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .common.library import require_triton
from .nms.op import nms
from .roi_align.op import _roi_align_backward as _backward
from .roi_align.op import roi_align

# Per device the keys of its kernel, of autograd and of autocast.
_KEYS = {"cuda": ("CUDA", "AutogradCUDA", "AutocastCUDA"), "cpu": ("CPU", "AutogradCPU", "AutocastCPU")}

_patched: dict[str, torch.library.Library] = {}  # by device


class Patch:
    """What `patch` returns: as a context manager, it puts back at its end what `patch` found."""

    def __init__(self, library: str, before: frozenset[str], during: frozenset[str]) -> None:
        self.library = library
        self.devices = during
        self._before = before

    def __enter__(self) -> Patch:
        _apply(self.devices)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _apply(self._before)

    def __repr__(self) -> str:
        return f"Patch({self.library!r}, devices={sorted(self.devices)})"


def patch(library: str, *, devices: str | Iterable[str] = "cuda") -> Patch:
    """Let `torchvision.ops.roi_align` and `nms`, and all that calls them, run these kernels.

    Overrides torchvision's operators `roi_align`, its backward, and `nms` at the dispatcher, with and
    without autocast; under autocast features keep their dtype instead of being cast to float32. Under
    `torch.use_deterministic_algorithms` the kernels run too, in place of torchvision's slow path. Results
    have torchvision's dtype, shape and memory format.

    `patch` lasts until `unpatch`, or until the end of the block in `with patch("torchvision"):`, also if
    the block raises. To patch twice is to patch once; another device is added to those patched. The end
    of a block puts back what stood before its `patch`, so blocks nest. Patch before `torch.compile` traces:
    what is compiled keeps the autograd and autocast rules that it was traced with.

    Args:
        library: "torchvision". detectron2 calls its operators, so that it comes along.
        devices: "cuda", "cpu" or both. CPU tensors run PyTorch, or Triton's interpreter if
            TRITON_INTERPRET=1: for tests, not for speed.

    Returns:
        A context manager; it need not be kept.

    Raises:
        ValueError: the library or a device is not one of those above.
        ImportError: torchvision is missing, or its operators do not load beside this torch.
        RuntimeError: a GPU is there, but Triton cannot work (the message says what it lacks).
    """
    _check_library(library)
    wanted = frozenset([devices] if isinstance(devices, str) else devices)
    if not wanted or not wanted <= _KEYS.keys():
        raise ValueError(f"devices must be among {', '.join(_KEYS)}, got {devices!r}")
    _import_torchvision()
    if "cuda" in wanted and torch.cuda.is_available():
        require_triton()
    before = frozenset(_patched)
    _apply(before | wanted)
    return Patch(library, before, before | wanted)


def unpatch(library: str) -> None:
    """Put the library's own operators back, on all devices; no effect if they are there already.

    Raises:
        ValueError: the library is not one that `patch` knows.
    """
    _check_library(library)
    _apply(frozenset())


def _check_library(library: str) -> None:
    if library == "torchvision":
        return
    hint = ' (detectron2 and mmcv call torchvision: patch("torchvision"))'
    raise ValueError(
        f'the only library that can be patched is "torchvision", got {library!r}'
        + (hint if library in ("detectron2", "mmcv", "mmdet") else "")
    )


def _import_torchvision() -> None:
    try:
        import torchvision.extension
        import torchvision.ops
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ImportError(f'patch("torchvision"): torchvision cannot be imported: {error}') from None
    if not torchvision.extension._has_ops():
        raise ImportError(
            f'patch("torchvision"): the operators of torchvision {torchvision.__version__} do not load '
            f"beside torch {torch.__version__}; install versions that belong together"
        )


def _apply(devices: frozenset[str]) -> None:
    """Make `devices` those that are patched."""
    for device in _patched.keys() - devices:
        _patched.pop(device)._destroy()
    for device in devices - _patched.keys():
        _patched[device] = _override(device)
    if _patched:
        _SlowPath.cover()
    else:
        _SlowPath.uncover()


def _override(device: str) -> torch.library.Library:
    library = torch.library.Library("torchvision", "IMPL")
    for name, function, keys in (
        # At autograd's key too: torchvision's own formula has no second derivative, and its rule for
        # torch.compile wants features and boxes of one dtype.
        ("roi_align", _roi_align, _KEYS[device]),
        ("_roi_align_backward", _roi_align_backward, _KEYS[device][:1]),
        ("nms", _nms, _KEYS[device]),
    ):
        for key in keys:  # torchvision registers some of them from Python itself, hence allow_override
            with warnings.catch_warnings():  # that a kernel is overridden, which is what was asked for
                warnings.filterwarnings("ignore", message="(?s).*verriding a previously registered kernel")
                library.impl(name, function, key, allow_override=True)
    return library


def _roi_align(
    input: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    size = (pooled_height, pooled_width)
    # Contiguous as torchvision's, for who calls `view` on it, and for graphs compiled around it.
    return roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned).contiguous()


def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """Called by torchvision's own autograd formula: where the forward pass ran before `patch`."""
    (gradient,) = _backward(
        grad,
        rois[:, 1:],
        rois[:, 0],
        None,
        batch_size,
        [height],
        [width],
        False,
        [pooled_height, pooled_width],
        [spatial_scale],
        max(sampling_ratio, 0),
        aligned,
        224.0,  # these three choose among levels, and there is one
        4,
        0,
    )
    return gradient


def _nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return nms(dets, scores, iou_threshold)


class _SlowPath:
    """torchvision's `roi_align` in Python, which it takes under deterministic algorithms.

    `torchvision.ops.roi_align` is bound by name in many places (its poolers, its models, detectron2), but
    each looks up the slow path in its own module when called: replaced there, it is replaced for all.
    """

    original: Any = None

    @classmethod
    def cover(cls) -> None:
        module = sys.modules["torchvision.ops.roi_align"]
        if getattr(module, "_roi_align", _deterministic_roi_align) is not _deterministic_roi_align:
            cls.original = module._roi_align
            module._roi_align = _deterministic_roi_align  # type: ignore[attr-defined]

    @classmethod
    def uncover(cls) -> None:
        module = sys.modules.get("torchvision.ops.roi_align")
        if module is not None and getattr(module, "_roi_align", None) is _deterministic_roi_align:
            module._roi_align = cls.original  # type: ignore[attr-defined]


def _deterministic_roi_align(input: Tensor, rois: Tensor, *how: Any) -> Tensor:
    if input.device.type in _patched:
        return torch.ops.torchvision.roi_align(input, rois, *how)
    return _SlowPath.original(input, rois, *how)
