"""Boxes of one cell made one: the surest stands, and the others say where exactly."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SAME_PLACE: Final = 0.65
"""IoU from which another box of the same class has a say in where a cell's sides are."""


def best_of_each(boxes: Floats, order: NDArray[np.intp], most_overlap: float) -> NDArray[np.intp]:
    """Of boxes that overlap more than `most_overlap` (IoU) the first in `order` stands."""
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    for index in order:
        others = boxes[kept]
        low, high = np.maximum(others[:, :2], boxes[index, :2]), np.minimum(others[:, 2:], boxes[index, 2:])
        shared = np.clip(high - low, 0, None).prod(1)
        if not (shared > most_overlap * (areas[kept] + areas[index] - shared)).any():
            kept.append(int(index))
    return np.array(kept, np.intp)


def box_overlaps(first: Floats, second: Floats) -> Floats:
    """IoU of all pairs of boxes, (len(first), len(second))."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    shared = np.clip(high - low, 0, None).prod(2)
    areas, others = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second))
    found: Floats = (shared / (areas[:, None] + others[None] - shared + 1e-9)).astype(np.float32)
    return found


def vote(boxes: Floats, classes: NDArray[np.intp], voters: tuple[Floats, Floats, NDArray[np.intp]]) -> Floats:
    """Each box where the voters at its place see it: their mean, weighted by the squares of their scores.

    boxes: (cells, 4) and their classes, (cells,). voters: boxes (n, 4), scores (n,), classes (n,). A box for which
    nobody votes stays. Source: box voting, Gidaris & Komodakis 2015 (arXiv 1505.01749), section 5.
    """
    others, scores, names = voters
    weights = np.where(box_overlaps(boxes, others) >= SAME_PLACE, scores[None] ** 2, np.float32(0))
    weights = np.where(classes[:, None] == names[None], weights, np.float32(0))
    total = weights.sum(1, keepdims=True)
    voted: Floats = np.where(total > 0, weights @ others / np.maximum(total, 1e-9), boxes).astype(np.float32)
    return voted
