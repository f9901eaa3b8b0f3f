"""From padded detections, where the model left them, to objects on the host: one copy, and one wait for it.

Everything is on its way before the host looks at any of it. So it can begin the next batch in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn.detection.heatmaps import decode_heatmaps
from fastmrcnn.detection.objects import Objects
from fastmrcnn.detection.paste import compressed, on_accelerator, runs_of_slots, runs_of_windows
from fastmrcnn.graphs import beside
from fastmrcnn.structures import Detections, pinned, to_device, tree_map


class Fetched:
    """Detections of a batch on their way to the host.

    Args:
        detections: not to be written over before `objects` has been called.
        input_to_image: (n, 2, 3) on the CPU, (x, y, 1) in input pixels -> (x, y) in pixels of the original
            image; a scale and a shift. Images of the batch beyond the first n are padding.
        sizes: height and width of the n original images.
        score: detections below it are dropped, as are those whose box has no area within the image.
        encode: threshold at which masks on an accelerator are encoded there; None: they stay probabilities,
            on their device.
    """

    def __init__(
        self,
        detections: Detections,
        input_to_image: Tensor,
        sizes: Sequence[tuple[int, int]],
        score: float = 0.0,
        *,
        encode: float | None = None,
    ) -> None:
        device = detections.boxes.device
        self.sizes = [(int(height), int(width)) for height, width in sizes]
        self.detections = found = tree_map(lambda tensor: tensor[: len(sizes)], detections)
        maps = input_to_image[: len(sizes)].detach().float()
        limits = torch.from_numpy(np.array([(w, h) for h, w in self.sizes], np.float32).reshape(-1, 2))
        # (n, 3, 4): scale, shift and limit of x, y, x, y.
        self.moves = torch.stack((maps.diagonal(dim1=1, dim2=2), maps[:, :, 2], limits), 1).repeat(1, 1, 2)
        scale, shift, limit = to_device(pinned(self.moves, device), device)[:, :, None].unbind(1)
        boxes = torch.minimum((found.boxes * scale + shift).clamp(min=0), limit)
        some = (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
        keep = found.valid & some & (found.scores >= score)
        self.encode = encode if found.masks is not None and on_accelerator(found.masks) else None
        parts = [found.classes.long(), found.cut.long(), boxes, found.scores.float(), found.boxes, keep]
        if self.encode is not None:
            assert found.masks is not None
            runs, count = runs_of_slots(found.masks, boxes, keep, self.sizes, self.encode)
            parts[-1:-1] = [count, runs]
        self.layout = [(part.shape, part.dtype) for part in parts]
        self._arrive = send_back(packed(parts))
        self._host: list[Tensor] | None = None

    @property
    def cut(self) -> NDArray[np.int64]:
        """(n,): class scores above the threshold that did not go into NMS. The host waits."""
        return self._read()[1].numpy()

    def objects(self) -> list[Objects]:
        """Of each image. The host waits."""
        classes, _, boxes, scores, input_boxes, *encoded, keep = self._read()
        kept = keep.flatten().nonzero()[:, 0]
        counts = keep.sum(1).tolist()
        probabilities = self._probabilities(kept, counts)
        keypoints = self._keypoints(input_boxes, keep, kept, counts)
        found = []
        for index, (height, width) in enumerate(self.sizes):
            own = keep[index]
            one = Objects(
                height,
                width,
                boxes[index][own].numpy(),
                classes[index][own].numpy(),
                scores[index][own].numpy(),
                probabilities=probabilities[index],
                rles=self._rles(index, own, boxes[index], *encoded) if encoded else None,
                keypoints=keypoints[index],
            )
            found.append(one)
        return found

    def _read(self) -> list[Tensor]:
        if self._host is None:
            self._host = unpacked(self._arrive(), self.layout)
        return self._host

    def _probabilities(self, kept: Tensor, counts: list[int]) -> Sequence[Tensor | None]:
        """Those of the kept objects, of all images at once. They are large, and stay where they are."""
        masks = self.detections.masks
        if masks is None or self.encode is not None:
            return [None] * len(counts)
        some = to_device(pinned(kept, masks.device), masks.device)
        return masks.flatten(0, 1).index_select(0, some).float().split(counts)

    def _keypoints(
        self, input_boxes: Tensor, keep: Tensor, kept: Tensor, counts: list[int]
    ) -> Sequence[NDArray[np.float32] | None]:
        """Heatmaps are read where they are, then the places of all images come in one more copy."""
        heatmaps = self.detections.heatmaps
        if heatmaps is None:
            return [None] * len(counts)
        boxes = [input_boxes[index][keep[index]] for index in range(len(counts))]
        with beside(heatmaps.device):
            some = to_device(pinned(kept, heatmaps.device), heatmaps.device)
            own = heatmaps.flatten(0, 1).index_select(0, some).split(counts)
            decoded = [decode_heatmaps(*pair) for pair in zip(own, boxes, strict=True)]
            places = [one[..., [0, 1, 3]] for one in torch.cat(decoded).cpu().split(counts)]
        for one, (scale, shift, _) in zip(places, self.moves, strict=True):
            one[..., :2] = one[..., :2] * scale[:2] + shift[:2]
        return [one.numpy() for one in places]

    def _rles(
        self, index: int, own: Tensor, boxes: Tensor, count: Tensor, runs: Tensor
    ) -> tuple[dict[str, Any], ...]:
        height, width = self.sizes[index]
        assert self.encode is not None
        assert self.detections.masks is not None
        lengths = []
        for slot in own.nonzero()[:, 0].tolist():
            number = int(count[index, slot])
            if number <= runs.shape[2]:
                lengths.append(runs[index, slot, :number].numpy())
            else:  # there was no room for all of them
                one = slice(slot, slot + 1)
                masks = self.detections.masks[index, one]
                lengths += runs_of_windows(masks, boxes[one], height, width, self.encode)
        return tuple(compressed(lengths, height, width))


def split_detections(
    detections: Detections, input_to_image: Tensor, sizes: Sequence[tuple[int, int]], score: float = 0.0
) -> list[Objects]:
    """Take a padded batch apart. Arguments are those of `Fetched`; the host waits."""
    return Fetched(detections, input_to_image, sizes, score).objects()


def send_back(buffer: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to the host; what is returned waits for it, in any thread, and gives it."""
    if buffer.device.type != "cuda":
        return buffer.cpu
    host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
    host.copy_(buffer, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(buffer.device))

    def arrive() -> Tensor:
        arrived.synchronize()
        return host

    return arrive


def packed(parts: Sequence[Tensor]) -> Tensor:
    """Tensors as bytes, end to end; the larger types come first, so that each lies where its type may lie."""
    assert [part.element_size() for part in parts] == sorted((p.element_size() for p in parts), reverse=True)
    return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])


def unpacked(buffer: Tensor, layout: Sequence[tuple[torch.Size, torch.dtype]]) -> list[Tensor]:
    """Views of what was packed."""
    sizes = [shape.numel() * dtype.itemsize for shape, dtype in layout]
    pieces = zip(buffer.split(sizes), layout, strict=True)
    return [piece.view(dtype).view(shape) for piece, (shape, dtype) in pieces]
