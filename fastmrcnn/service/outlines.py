"""Masks as polygons along the sides of their pixels, from which the same pixels come back."""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

Ring = list[int]  # numbers of corners, in order


def outlines(mask: NDArray[np.bool_]) -> list[list[float]]:
    """COCO's polygons of a bitmap: one for each group of pixels that touch by their sides.

    A hole is joined to what surrounds it by a cut of no width, since COCO takes the polygons of an object
    together and knows no holes. pycocotools makes the same bitmap of them again.

    Args:
        mask: (h, w).
    Returns:
        [x0, y0, x1, y1, ...] of each, in whole pixels from the left and the top.
    """
    if not mask.any():
        return []
    top, left = (int(np.flatnonzero(mask.any(axis))[0]) for axis in (1, 0))
    bottom, right = (int(np.flatnonzero(mask.any(axis))[-1]) + 1 for axis in (1, 0))
    padded = np.pad(mask[top:bottom, left:right], 1)
    corners = _Corners(padded)
    rings = corners.rings()
    outer = [ring for ring in rings if not corners.is_hole(ring)]
    owner = {corner: ring for ring in outer for corner in ring}
    for hole in (ring for ring in rings if corners.is_hole(ring)):  # from the top, as rings are found
        anchor, points = corners.way_up(hole[0])
        ring = owner[anchor]
        # The first time that the ring comes there: later ones are ways back from other holes.
        place = ring.index(anchor) + (not points)
        # The other way round, as for programs that count how often a place is gone around.
        ring[place:place] = [*points, hole[0], *reversed(hole), *(points or [anchor])]
        for corner in hole:
            owner[corner], corners.leads[corner] = ring, not corners.leads[corner]
    shift = left, top
    return [
        [float(side + way) for corner in ring for side, way in zip(corners.place(corner), shift, strict=True)]
        for ring in outer
    ]


class _Corners:
    """Where the outline of a bitmap turns, row by row. Where it touches itself there are two."""

    def __init__(self, padded: NDArray[np.bool_]) -> None:
        self.padded = padded
        nw, ne = padded[:-1, :-1], padded[:-1, 1:]
        sw, se = padded[1:, :-1], padded[1:, 1:]
        crossing = (nw == se) & (ne == sw) & (nw != ne)
        turning = (nw ^ ne ^ sw ^ se) | crossing
        rows, columns = np.nonzero(turning)
        copies = 1 + crossing[rows, columns]
        self.y: list[int] = np.repeat(rows, copies).tolist()
        self.x: list[int] = np.repeat(columns, copies).tolist()
        self.order = list(zip(self.y, self.x, strict=True))
        # Side by side in a row, corners come in pairs, and so they do in a column. The two at a place where
        # pixels touch by their corners alone are parted so that each stays with one pixel: the first has the
        # side to the left, and the one above if the pixel up there is the one on the left.
        count = len(self.y)
        self.beside = [number ^ 1 for number in range(count)]
        second = np.zeros(count, dtype=np.int64)
        twice = np.flatnonzero(copies == 2)
        first = np.cumsum(copies)[twice] - 2
        left_above = nw[rows[twice], columns[twice]]
        second[first], second[first + 1] = ~left_above, left_above
        down = np.lexsort((second, self.y, self.x))
        self.above = np.empty(count, dtype=np.int64)
        self.above[down] = down[np.arange(count) ^ 1]
        self.leads = [False] * count  # of the two beside each other the one that is met first

    def rings(self) -> list[Ring]:
        """Each from its topmost corner, of these the leftmost, first along its row."""
        above, beside, seen = self.above.tolist(), self.beside, [False] * len(self.y)
        found = []
        for start in range(len(seen)):
            if seen[start]:
                continue
            ring, corner = [], start
            while not seen[corner]:
                other = beside[corner]
                seen[corner] = seen[other] = self.leads[corner] = True
                ring += [corner, other]
                corner = above[other]
            found.append(ring)
        return found

    def is_hole(self, ring: Ring) -> bool:
        corner = ring[0]
        return not self.padded[self.y[corner] + 1, self.x[corner] + 1]

    def place(self, corner: int) -> tuple[int, int]:
        return self.x[corner], self.y[corner]

    def way_up(self, corner: int) -> tuple[int, list[int]]:
        """From a hole's first corner straight up to the next outline.

        Returns:
            A corner of that outline, and the place that is met, as a new corner before it; none if it is
            that corner itself.
        """
        x, y = self.place(corner)
        free = self.padded[:y, x] & self.padded[:y, x + 1]
        row = int(np.flatnonzero(~free)[-1])
        last = bisect_right(self.order, (row, x)) - 1
        if self.x[last] == x:
            return last, []
        self.x.append(x)
        self.y.append(row)
        return self.beside[last] if self.leads[last] else last, [len(self.x) - 1]
