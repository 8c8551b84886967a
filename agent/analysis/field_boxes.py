"""The boxes that two overlapping fields give: which of them show one cell.

A box that a field's edge cuts is a piece of its cell's box; in a narrow strip all that two fields have in common may be
pieces. Pure geometry; a `Shift` says where one field lies on the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from agent.analysis.cells import EDGE_PX
from agent.analysis.registration import Shift
from agent.domain import Cell

Boxes = NDArray[np.float64]
"""(n, 4): x_min, y_min, x_max, y_max in frame pixels."""

SAME_WHOLE: Final = 0.4
"""Intersection over union from which two whole boxes at one place are one cell. Boxes of one cell from two fields reach
0.7 and more, those of two touching cells 0.1."""

SAME_PIECE: Final = 0.6
"""The same for what a narrow strip shows of a cell, of WITNESSES cells and more."""
WITNESSES: Final = 3

SAME_CUT: Final = 0.6
"""Share of a cut box that must lie in the other one."""

SIDE_PX: Final = 8.0
SIDE_SHARE: Final = 0.35
"""Of the shorter of two boxes: how far apart the two may see one side of a cell; SIDE_PX at least."""

LEAST_SEEN_PX: Final = 3.0
"""px; of a cell less of which lies in both fields its box says nothing."""
SLACK_PX: Final = np.asarray([-4.0, -4.0, 4.0, 4.0])
"""px, to each side: how far boxes and places are off."""


def boxes_of(cells: Sequence[Cell]) -> Boxes:
    """The boxes of a field's cells."""
    boxes = [cell.detection.box for cell in cells]
    return np.asarray([(box.x_min, box.y_min, box.x_max, box.y_max) for box in boxes], np.float64).reshape(-1, 4)


def is_whole(box: NDArray[np.float64], size_px: tuple[int, int]) -> bool:
    """Whether no edge of the field cuts it."""
    return bool(min(box[0], box[1]) >= EDGE_PX and box[2] <= size_px[0] - EDGE_PX and box[3] <= size_px[1] - EDGE_PX)


def may_count(box: NDArray[np.float64], size_px: tuple[int, int]) -> bool:
    """Two-sides rule: cut at the left or the upper edge counts, at the right or the lower one it does not."""
    return bool(box[2] <= size_px[0] - EDGE_PX and box[3] <= size_px[1] - EDGE_PX)


def match_boxes(
    new: Boxes, new_size_px: tuple[int, int], old: Boxes, old_size_px: tuple[int, int], shift: Shift
) -> list[tuple[int, int]]:
    """Pairs (new, old) that show one cell: at the same place within what both fields show; each box once."""
    if not len(new) or not len(old):
        return []
    moved = _moved(old, shift.inverse())
    region = _common(new_size_px, old_size_px, shift)
    if region is None:
        return []
    a, b = _cut(new, *region), _cut(moved, *region)
    size_a, size_b = _area(a), _area(b)
    both, overlap = _overlaps(a, b)
    is_cut_a = (size_a < 0.98 * _area(new)) | _touches(new, new_size_px)
    is_cut_b = (size_b < 0.98 * _area(old)) | _touches(old, old_size_px)
    # A cut box must lie in the other, which shows more of the cell; a sliver's box does not tell the cell's height.
    in_b = np.where(is_cut_a[:, None], both / np.maximum(size_a[:, None], 1e-6), 0)
    in_a = np.where(is_cut_b[None], both / np.maximum(size_b[None], 1e-6), 0)
    contained = np.maximum(
        np.where(size_a[:, None] <= 1.3 * size_b, in_b, 0), np.where(size_b <= 1.3 * size_a[:, None], in_a, 0)
    )
    score = np.where(overlap >= SAME_WHOLE, 1 + overlap, np.where(contained >= SAME_CUT, contained * 0.5 + overlap, 0))
    is_thin_a, is_thin_b = (_thickness(boxes) < LEAST_SEEN_PX for boxes in (a, b))
    score = np.where(is_thin_a[:, None] | is_thin_b[None], 0, score)
    # A sliver at an edge: what of the other box lies within a pixel or two of it, beside it, is the same cell.
    wide_a, wide_b = (_cut(boxes + SLACK_PX, *region) for boxes in (new, moved))
    for is_sliver, within in (
        ((is_thin_a & is_cut_a)[:, None], _inside(a, wide_b)),
        ((is_thin_b & is_cut_b)[None], _inside(b, wide_a).T),
    ):
        score = np.where(is_sliver & (within >= SAME_CUT), np.maximum(score, 0.1 * within), score)
    is_there = _reaches(new, region)[:, None] & _reaches(moved, region)[None]
    is_one = _sides_agree(new, _shown(new, new_size_px), moved, _shown(old, old_size_px), region)
    score = np.where(is_there & is_one, score, 0)
    pairs: list[tuple[int, int]] = []
    while True:
        index = int(score.argmax())
        row, column = divmod(index, score.shape[1])
        if score[row, column] <= 0:
            return pairs
        pairs.append((row, column))
        score[row], score[:, column] = 0, 0


def _sides_agree(
    new: Boxes,
    shown_new: NDArray[np.bool_],
    old: Boxes,
    shown_old: NDArray[np.bool_],
    region: tuple[float, float, float, float],
) -> NDArray[np.bool_]:
    """Of each pair whether the sides that both fields show lie at one place: (n, m). Both in the new frame.

    Only along an axis on which the region cuts one of the two: there the corner of one cell may lie within another one,
    and yet they end elsewhere. Across that axis a sliver's box does not tell where its cell ends.
    """
    agree = np.ones((len(new), len(old)), bool)
    for low, high in ((0, 2), (1, 3)):
        cut_new, cut_old = (
            (boxes[:, low] < region[low] + EDGE_PX) | (boxes[:, high] > region[high] - EDGE_PX) for boxes in (new, old)
        )
        shorter = np.minimum((new[:, high] - new[:, low])[:, None], (old[:, high] - old[:, low])[None])
        for side in (low, high):
            is_told = (cut_new[:, None] | cut_old[None]) & shown_new[:, side][:, None] & shown_old[:, side][None]
            away = np.abs(new[:, side][:, None] - old[:, side][None])
            agree &= ~is_told | (away <= np.maximum(SIDE_PX, SIDE_SHARE * shorter))
    return agree


def _shown(boxes: Boxes, size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Of each box which sides are its cell's, (n, 4): not cut by the frame's edge, which a cut box hardly misses."""
    return np.asarray((boxes > SIDE_PX) & (boxes < np.asarray(size_px * 2) - SIDE_PX))


def boxes_agree(
    new: Boxes, new_size_px: tuple[int, int], old: Boxes, old_size_px: tuple[int, int], shift: Shift
) -> bool | None:
    """Whether the cells that two fields should have in common are there; None where they are too few to say.

    In a narrow strip most of them are cut by an edge: compared is what of each lies in the strip.
    """
    if not len(new) or not len(old):
        return None
    region = _common(new_size_px, old_size_px, shift)
    if region is None:
        return None
    a, b = (_seen_in(boxes, region) for boxes in (new, _moved(old, shift.inverse())))
    fewer = min(len(a), len(b))
    if fewer < WITNESSES:
        return None
    _, overlap = _overlaps(a, b)
    met = min(int((overlap.max(axis=axis) >= SAME_PIECE).sum()) for axis in (0, 1))
    if met >= max(WITNESSES, 0.6 * fewer):
        return True
    return False if met < 0.25 * fewer else None


def _common(
    new_size_px: tuple[int, int], old_size_px: tuple[int, int], shift: Shift
) -> tuple[float, float, float, float] | None:
    """left, top, right, bottom in the new frame of what both show; None where that is nearly nothing."""
    width, height = old_size_px
    corners = shift.inverse().apply_all(np.asarray([[0, 0], [width, 0], [0, height], [width, height]], float))
    left, top = (max(0.0, float(np.sort(corners[:, axis])[1])) for axis in (0, 1))
    right, bottom = (min(float(new_size_px[axis]), float(np.sort(corners[:, axis])[2])) for axis in (0, 1))
    return None if min(right - left, bottom - top) < LEAST_SEEN_PX else (left, top, right, bottom)


def _seen_in(boxes: Boxes, region: tuple[float, float, float, float]) -> Boxes:
    """What of the boxes lies in a region, without those of which nearly nothing does."""
    cut = _cut(boxes, *region)
    return cut[_thickness(cut) >= LEAST_SEEN_PX]


def _overlaps(a: Boxes, b: Boxes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Intersection, px², and intersection over union of each with each: (len(a), len(b))."""
    width = np.minimum(a[:, None, 2], b[None, :, 2]) - np.maximum(a[:, None, 0], b[None, :, 0])
    height = np.minimum(a[:, None, 3], b[None, :, 3]) - np.maximum(a[:, None, 1], b[None, :, 1])
    both = np.clip(width, 0, None) * np.clip(height, 0, None)
    union = _area(a)[:, None] + _area(b)[None] - both
    return both, both / np.maximum(union, 1e-6)


def _moved(boxes: Boxes, shift: Shift) -> Boxes:
    """The boxes in another frame; turned by their middle, for a turn of 2 degrees leaves their sides what they are."""
    middles = shift.apply_all((boxes[:, :2] + boxes[:, 2:]) / 2)
    half = (boxes[:, 2:] - boxes[:, :2]) / 2
    return np.concatenate((middles - half, middles + half), axis=1)


def _cut(boxes: Boxes, left: float, top: float, right: float, bottom: float) -> Boxes:
    return np.stack(
        [
            np.clip(boxes[:, 0], left, right),
            np.clip(boxes[:, 1], top, bottom),
            np.clip(boxes[:, 2], left, right),
            np.clip(boxes[:, 3], top, bottom),
        ],
        axis=1,
    )


def _thickness(boxes: Boxes) -> NDArray[np.float64]:
    return np.asarray(np.minimum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]))


def _reaches(boxes: Boxes, region: tuple[float, float, float, float]) -> NDArray[np.bool_]:
    """Whether boxes come to a region, but for the slack."""
    wide = boxes + SLACK_PX
    return np.asarray(((wide[:, :2] <= region[2:]) & (wide[:, 2:] >= region[:2])).all(axis=1))


def _inside(a: Boxes, b: Boxes) -> NDArray[np.float64]:
    """Share of each of a that lies in each of b, also where a has no width or no height: (len(a), len(b))."""
    share = np.ones((len(a), len(b)))
    for low, high in ((0, 2), (1, 3)):
        length = np.maximum(a[:, None, high] - a[:, None, low], 1e-6)
        both = np.minimum(a[:, None, high], b[None, :, high]) - np.maximum(a[:, None, low], b[None, :, low])
        share *= np.clip(np.where(length > 1e-5, both / length, both >= 0), 0, 1)
    return share


def _area(boxes: Boxes) -> NDArray[np.float64]:
    return np.asarray((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


def _touches(boxes: Boxes, size_px: tuple[int, int]) -> NDArray[np.bool_]:
    low = boxes[:, :2].min(axis=1) < EDGE_PX
    return np.asarray(low | (boxes[:, 2] > size_px[0] - EDGE_PX) | (boxes[:, 3] > size_px[1] - EDGE_PX))
