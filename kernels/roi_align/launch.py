"""How the kernels of RoIAlign are launched: block sizes by dtype, and the arguments that they share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Target, coded
from ..common.library import interpreting
from ..common.pooling import Pooling, is_channels_last
from ..level_assign.reference import first_threshold

TILE = 8  # bins or pixels along a side; tl.dot multiplies TILE**2 of each
ADAPTIVE_SLOTS = 4
BUFFERS = 3  # of tiles that the loop loads ahead


class Config(NamedTuple):
    dtype: Any  # of geometry and sums
    dot_dtype: Any
    precision: str
    weight_scale: float
    block_c: int
    num_warps: int
    options: dict[str, Any]  # of the compiler


def configure(dtype: torch.dtype, channels: int, vectors: bool, target: Target) -> Config:
    """How to multiply, by the dtype of the features.

    `vectors` says that channels lie side by side, so that a thread loads many at once; otherwise it needs
    more registers for addresses, and gets fewer channels. float32 in three products needs more too, and
    AMD has less shared memory. Weights are at most 1; in float16 they are scaled up, so that those of large
    bins keep their bits.
    """
    hip = target.backend == "hip"
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    most = {torch.float64: 32, torch.float32: 32}.get(dtype, 256 if vectors and not hip else 128)
    most = most if vectors else most // 2
    block_c = max(16, min(most, triton.next_power_of_2(channels)))
    blocks: tuple[int, int, dict[str, Any]] = (block_c, 8 if vectors and not hip else 4, {})
    if interpreting():  # bf16 arithmetic of the interpreter is wrong
        return Config(wide, wide, "ieee", 1.0, *blocks)
    if dtype == torch.bfloat16:
        return Config(wide, tl.bfloat16, "ieee", 1.0, *blocks)
    if dtype == torch.float16:
        return Config(wide, tl.float16, "ieee", 4096.0, *blocks)
    three_products = dtype == torch.float32 and not hip
    return Config(wide, wide, "tf32x3" if three_products else "ieee", 1.0, *blocks)


def two_programs(config: Config, target: Target, stages: int) -> Config:
    """For channels_last in half precision on NVIDIA: room for two programs on a multiprocessor.

    While one computes weights the other loads. Two of 8 warps have 128 registers a thread, and each has
    three buffers of a tile, which `stages` must be such that the compiler makes, beside its weights. Where
    that is too much shared memory, half the channels; so too where sums are kept in tensor memory, all of
    which 256 channels take.
    """
    fits = 2 * _shared(config.block_c) <= target.shared and not target.tensor_memory
    return config._replace(
        block_c=config.block_c if fits else min(config.block_c, 128),
        options={"num_stages": stages, "maxnreg": 128},
    )


def _shared(block_c: int) -> int:
    """Bytes, in half precision; and 1 KiB that the system takes for each program."""
    return 2 * TILE**2 * (TILE**2 + BUFFERS * block_c) + 1024


def parts_of(how: Pooling) -> int:
    """Of the bins of an RoI."""
    oh, ow = how.output_size
    return triton.cdiv(oh, _part(oh)) * triton.cdiv(ow, _part(ow))


def _part(bins: int) -> int:
    """Equal parts of at most TILE."""
    return triton.cdiv(bins, triton.cdiv(bins, TILE))


def box_arguments(boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None) -> dict[str, Any]:
    return {
        "boxes_ptr": boxes,
        "batch_ptr": batch_index,
        "valid_ptr": None if valid is None else valid.contiguous().view(torch.uint8),
        "stride_roi": boxes.stride(0),
        "stride_coordinate": boxes.stride(1),
        "stride_batch": 0 if batch_index is None else batch_index.stride(0),
        "HAS_BATCH": batch_index is not None,
        "HAS_VALID": valid is not None,
    }


def size_arguments(sizes: list[tuple[int, int]]) -> dict[str, Any]:
    return {"heights": coded(height for height, _ in sizes), "widths": coded(width for _, width in sizes)}


def first_tiles(num_images: int, sizes: list[tuple[int, int]]) -> tuple[tuple[int, ...], int]:
    """The first tile of each level, coded, and how many tiles there are.

    The coarsest level has the tiles with the most RoIs: they start first.
    """
    tiles = [num_images * triton.cdiv(h, TILE) * triton.cdiv(w, TILE) for h, w in sizes]
    return coded(sum(tiles[level + 1 :]) for level in range(len(tiles))), sum(tiles)


def stride_arguments(features: list[Tensor], layout: str) -> dict[str, Any]:
    """Where the layout is known strides follow from sizes, and a kernel is told none."""
    strides = [coded(f.stride(i) for f in features) for i in range(4)]
    names = ("map_n", "map_c", "map_y", "map_x")
    return dict.fromkeys(names) if layout != "strided" else dict(zip(names, strides, strict=True))


def bin_arguments(how: Pooling, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    oh, ow = how.output_size
    return {
        **size_arguments(sizes),
        "OH": oh,
        "OW": ow,
        "PART_H": _part(oh),
        "PART_W": _part(ow),
        "SAMPLES": how.sampling_ratio,
        "TILE": TILE,
    }


def level_arguments(how: Pooling) -> dict[str, Any]:
    return {
        "SCALES": tuple(how.spatial_scales),
        "AREA": first_threshold(how.k_min, how.canonical_size, how.canonical_level),
        "ALIGNED": how.aligned,
    }


def slots_of(how: Pooling) -> int:
    """Samples of a bin and axis that may touch a line, or more of them."""
    return triton.next_power_of_2(how.sampling_ratio) if how.sampling_ratio > 0 else ADAPTIVE_SLOTS


def product_arguments(config: Config) -> dict[str, Any]:
    return {
        "DTYPE": config.dtype,
        "DOT_DTYPE": config.dot_dtype,
        "WEIGHT_SCALE": config.weight_scale,
        "PRECISION": config.precision,
        "BLOCK_C": config.block_c,
    }


def layout_of(features: list[Tensor]) -> str:
    if all(is_channels_last(f) for f in features):
        # Offsets within a tile are of 32 bits there.
        within = max(TILE * f.shape[3] * f.shape[1] for f in features)
        return "channels_last" if within < 2**31 else "strided"
    if all(f.is_contiguous() for f in features):
        return "contiguous"
    return "strided"
