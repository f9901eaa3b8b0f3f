"""Whether an exported file finds what the model finds: the same images through both, and what differs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrcnn.deployment.graph import highest_places, take_ties_by_index
from fastmrcnn.detection.paste import paste_to_host
from fastmrcnn.model.box_head import BoxHead
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.structures import Batch
from fastmrcnn.weights.exported import Arrays, Runner

Inputs = tuple[NDArray[np.uint8], NDArray[np.int32]]


class Tolerances(NamedTuple):
    """How far a detection may differ that is there in both."""

    boxes: float  # pixels of the input
    scores: float
    mask_bits: float  # pixels that differ, of those that belong to an object
    keypoints: float  # pixels of the input
    missing: float  # share of the detections that one has and the other has not


FULL = Tolerances(boxes=1e-2, scores=1e-4, mask_bits=1e-4, keypoints=1e-1, missing=0.0)
# fp16 has 11 bits: a rounding of 1 in 2,000 in each of some fifty layers.
HALF = Tolerances(boxes=1.0, scores=1e-2, mask_bits=2e-2, keypoints=4.0, missing=2e-2)


@dataclass
class Parity:
    """What was compared, and the largest differences."""

    tolerances: Tolerances
    images: int = 0
    matched: int = 0
    missing: int = 0  # detections of the model that the file lacks
    added: int = 0  # and of the file that the model lacks
    at_the_edge: int = 0  # such ones, but as near to the least score as the tolerance: either way is right
    swapped: int = 0  # matched, but in another place of the order
    boxes: float = 0.0
    scores: float = 0.0
    keypoints: float = 0.0
    mask_bits: int = 0
    mask_pixels: int = 0
    kinds: set[str] = field(default_factory=set)

    @property
    def mask_share(self) -> float:
        return self.mask_bits / max(self.mask_pixels, 1)

    @property
    def missing_share(self) -> float:
        return max(self.missing, self.added) / max(self.matched + self.missing, 1)

    def faults(self) -> list[str]:
        """What is out of tolerance."""
        most = self.tolerances
        found = []
        if self.missing_share > most.missing:
            found.append(f"{self.missing} detections are missing and {self.added} added")
        if not self.boxes <= most.boxes:
            found.append(f"boxes differ by {self.boxes:.3g} pixels, {most.boxes:g} are allowed")
        if not self.scores <= most.scores:
            found.append(f"scores differ by {self.scores:.3g}, {most.scores:g} is allowed")
        if not self.mask_share <= most.mask_bits:
            found.append(f"{self.mask_share:.3g} of the mask pixels differ, {most.mask_bits:g} is allowed")
        if not self.keypoints <= most.keypoints:
            found.append(f"keypoints differ by {self.keypoints:.3g} pixels, {most.keypoints:g} are allowed")
        return found

    def lines(self) -> list[str]:
        """The report."""
        most = self.tolerances
        lines = [
            f"{self.matched} detections in {self.images} images have the same class in both; "
            f"{self.missing} missing, {self.added} added (allowed: {most.missing:.0%})",
            f"boxes differ by {self.boxes:.2g} pixels at most (allowed: {most.boxes:g})",
            f"scores differ by {self.scores:.2g} at most (allowed: {most.scores:g})",
        ]
        if "masks" in self.kinds:
            lines.append(
                f"{self.mask_bits} of {self.mask_pixels} mask pixels differ (allowed: 1 in "
                f"{1 / most.mask_bits:,.0f})"
            )
        if "keypoints" in self.kinds:
            lines.append(
                f"keypoints differ by {self.keypoints:.2g} pixels at most (allowed: {most.keypoints:g})"
            )
        if self.at_the_edge:
            lines.append(f"{self.at_the_edge} detections as near to the least score are in one alone")
        if self.swapped:
            lines.append(f"{self.swapped} stand in another place: their scores are equal but for rounding")
        return lines


def compare(
    model: MaskRCNN, run: Runner, batches: Sequence[Inputs], tolerances: Tolerances, mask_threshold: float
) -> Parity:
    """Both on the same inputs. The model runs eagerly, in fp32, where it is, and takes equal scores by index.

    A detection and one of the other's with its class belong together if their scores are within the
    tolerance; of several the one whose box is nearest. So where scores tie either order is right.
    """
    parity = Parity(tolerances)
    take_ties_by_index(model)
    least = max(head.score_threshold for head in model.modules() if isinstance(head, BoxHead))
    for pixels, sizes in batches:
        ours, theirs = eager(model, pixels, sizes), run(pixels, sizes)
        for image in range(len(pixels)):
            one, other = ({key: value[image] for key, value in found.items()} for found in (ours, theirs))
            compare_image(parity, one, other, sizes[image].tolist(), least, mask_threshold)
    return parity


def eager(model: MaskRCNN, pixels: NDArray[np.uint8], sizes: NDArray[np.int32]) -> Arrays:
    """What the model gives, under the names of an exported file."""
    device = next(model.parameters()).device
    batch = Batch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).to(device), torch.from_numpy(sizes).long().to(device)
    )
    with torch.no_grad():
        found = model(batch)
        outputs = {name: getattr(found, name) for name in ("boxes", "scores", "classes", "valid")}
        if found.masks is not None:
            outputs["masks"] = found.masks
        if found.heatmaps is not None:
            outputs["keypoints"] = highest_places(found.heatmaps, found.boxes)
    return {name: value.cpu().numpy() for name, value in outputs.items()}


def median_times(calls: Mapping[str, Callable[[], Any]], repeats: int = 5) -> dict[str, float]:
    """Milliseconds of each call, taken in turns after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(own) for name, own in times.items()}


def compare_image(
    parity: Parity,
    ours: Arrays,
    theirs: Arrays,
    size: tuple[int, int],
    least_score: float,
    mask_threshold: float,
) -> None:
    """Add what one image tells; its arrays are without an axis of images.

    Args:
        size: its height and width, to which masks are pasted.
    """
    parity.images += 1
    parity.kinds |= {"masks", "keypoints"} & ours.keys()
    most = parity.tolerances
    (own,), (left,) = np.nonzero(ours["valid"]), np.nonzero(theirs["valid"])
    # Where the places are all taken, what is below the last one has none.
    full = [found["scores"].min() for found in (ours, theirs) if found["valid"].all()]
    edge = max([least_score, *full]) + most.scores
    remaining = set(left.tolist())
    pairs = []
    for row in own.tolist():
        candidates = [
            other
            for other in remaining
            if theirs["classes"][other] == ours["classes"][row]
            and abs(theirs["scores"][other] - ours["scores"][row]) <= most.scores
        ]
        box = ours["boxes"][row]
        distances = {other: np.abs(theirs["boxes"][other] - box).max() for other in candidates}
        # Two boxes further apart than half a side are not one object's.
        side = min(box[2] - box[0], box[3] - box[1])
        candidates = [other for other in candidates if distances[other] <= max(side / 2, most.boxes)]
        nearest = min(candidates, key=lambda other: distances[other], default=None)
        if nearest is None:
            edgy = ours["scores"][row] <= edge
            parity.at_the_edge += edgy
            parity.missing += not edgy
            continue
        remaining.remove(nearest)
        pairs.append((row, nearest))
        parity.swapped += row != nearest
    edgy = sum(bool(theirs["scores"][other] <= edge) for other in remaining)
    parity.at_the_edge += edgy
    parity.added += len(remaining) - edgy
    parity.matched += len(pairs)
    if not pairs:
        return
    rows, others = (np.array(column) for column in zip(*pairs, strict=True))

    def largest(name: str, end: int | None = None) -> float:
        return float(np.abs(ours[name][rows] - theirs[name][others])[..., :end].max())

    parity.boxes = max(parity.boxes, largest("boxes"))
    parity.scores = max(parity.scores, largest("scores"))
    if "keypoints" in parity.kinds:
        parity.keypoints = max(parity.keypoints, largest("keypoints", 2))
    if "masks" in parity.kinds:
        bits = [
            paste_to_host(
                torch.from_numpy(found["masks"][chosen]),
                torch.from_numpy(found["boxes"][chosen]),
                *size,
                mask_threshold,
            )
            for found, chosen in ((ours, rows), (theirs, others))
        ]
        parity.mask_bits += int((bits[0] != bits[1]).sum())
        parity.mask_pixels += int(bits[0].sum())
