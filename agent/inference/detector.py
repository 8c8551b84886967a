"""The detector: YOLOv10n's six raw maps to boxes of cells.

Thresholds are applied on the stored numbers; box distances are decoded only for the survivors, in float. The maps are
those of the one-to-many head, so boxes of one cell are merged: docs/decisions/0003-boxes-of-one-cell-are-merged.md.
Source: Wang et al. 2024 (arXiv 2405.14458) for the net, Li et al. 2020 (arXiv 2006.04388) for the distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.analysis.crops import surrounded
from agent.domain import Box, Detection, ModelIdentity, Pixels
from agent.errors import ModelError
from agent.inference.interpreter import Interpreter, Runtime
from agent.inference.letterbox import Placement, letterbox
from agent.inference.manifest import DetectorEntry, OutputTensor
from agent.inference.merging import best_of_each, vote
from agent.inference.quantization import PixelTable, dequantize, quantize
from agent.inference.second_look import (
    CLOSE_UP,
    SURROUNDINGS,
    cut_at,
    find_in_tiles,
    is_close_up,
    measure_red_cells,
    plan_tiles,
    put_large_right,
    shifted,
)

Floats = NDArray[np.float32]

HINT = 0.2
"""Least score of a box that has a say in where a cell's sides are, and in how large the cells of a frame are."""

SAME_CELL_OF_TILES = 0.5
"""IoU of two boxes of one cell from two tiles, where the manifest has no other."""


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What one run of the net shows of a picture, before boxes of one cell are merged.

    size_px: width and height of the picture. boxes: (boxes, 4) x_min..y_max in pixels of the square; scores, classes:
    (boxes,). stored: the number in the score map that says how sure it is, (boxes,); maps: which map, (boxes,).
    """

    size_px: tuple[int, int]
    placement: Placement
    boxes: Floats
    scores: Floats
    classes: NDArray[np.intp]
    stored: NDArray[np.integer[Any]]
    maps: NDArray[np.intp]


class Detector:
    """Finds the cells of a frame. Owned by one thread.

    most_tiles: into how many a large frame of small cells may be cut (see `agent.inference.second_look`); 1 = every
    frame is looked at once, as a whole.
    """

    def __init__(
        self, runtime: Runtime, content: bytes, entry: DetectorEntry, threads: int, most_tiles: int = 1
    ) -> None:
        self.entry = entry
        self._most_tiles = most_tiles
        self._interpreter = Interpreter(runtime, content, entry, threads)
        self._to_input = PixelTable(entry.input)
        self._maps = _pair_maps(entry)

    @property
    def identity(self) -> ModelIdentity:
        return self.entry.identity

    @property
    def last_input(self) -> bytes:
        """The stored numbers that went into the last run."""
        return self._interpreter.last_input.tobytes()

    @property
    def last_outputs(self) -> bytes:
        """The stored numbers that came out of it."""
        return self._interpreter.all_outputs()

    @property
    def delegate(self) -> str:
        return self._interpreter.delegate

    def detect(self, pixels_bgr: Pixels, min_score: float | None = None) -> tuple[Detection, ...]:
        """The cells of a frame, best score first; boxes in frame pixels, cut at the frame's edge.

        pixels_bgr: uint8, (height, width, 3), B G R; not modified. min_score: 0 to 1; None = the manifest's.
        """
        thresholds = self.entry.thresholds
        least = thresholds.min_score if min_score is None else min_score
        first = self._look(pixels_bgr, least)
        found = self._found(first, least)
        if self._most_tiles > 1:
            found = self._at_its_size(pixels_bgr, first, found, least)
        return found[: thresholds.max_cells]

    def _at_its_size(
        self, pixels_bgr: Pixels, first: Look, whole: tuple[Detection, ...], least: float
    ) -> tuple[Detection, ...]:
        """The cells of a frame, looked at once more where they are too small or too large for the square.

        first: the look at the frame as a whole; whole: what was found in it. Whether there is a second look must not
        hang on the score that was asked for.
        """
        size_px, side_px = first.size_px, self.entry.input.shape[1]
        classified, sure = self.entry.classified, self.entry.thresholds.min_score

        def detect(part: Box, least: float = least) -> tuple[Detection, ...]:
            x_min, y_min, x_max, y_max = (int(v) for v in (part.x_min, part.y_min, part.x_max, part.y_max))
            found = self._found(self._look(pixels_bgr[y_min:y_max, x_min:x_max], least), least)
            return tuple(replace(d, box=shifted(d.box, x_min, y_min)) for d in found)

        certain = whole if least == sure else self._found(first, sure)
        red_cell_px = measure_red_cells(certain, lambda part: detect(part, sure), classified, size_px, side_px)
        if red_cell_px is not None and (tiles := plan_tiles(size_px, red_cell_px, side_px, self._most_tiles)):
            return self._merge(find_in_tiles(whole, detect, tiles, red_cell_px, size_px, side_px))
        if not self._may_be_close_up(first) or not is_close_up(self._found(first, HINT), classified, size_px):
            return whole
        width_px = round(SURROUNDINGS * max(size_px))
        around = self._found(self._look(surrounded(pixels_bgr, width_px), least), least)
        moved = (replace(d, box=cut_at(shifted(d.box, -width_px, -width_px), size_px)) for d in around)
        return put_large_right(
            whole, [d for d in moved if min(d.box.width_px, d.box.height_px) > 0], classified, size_px
        )

    def _may_be_close_up(self, look: Look) -> bool:
        """False for nearly every frame, and soon said: merged boxes are no wider than those that they are made of."""
        is_hint = self._is_above(look, HINT)
        wanted = is_hint & np.isin(look.classes, [self.entry.classes.index(name) for name in self.entry.classified])
        scale = (look.placement.scale_x, look.placement.scale_y)
        sides_px = (look.boxes[wanted, 2:] - look.boxes[wanted, :2]) / np.array(scale, np.float32)
        return not is_hint.any() or bool((sides_px > CLOSE_UP * max(look.size_px)).any())

    def _look(self, pixels_bgr: Pixels, least: float) -> Look:
        """Run the net on a picture, which goes into the square as a whole. least: score from which boxes are wanted."""
        placement = self._invoke(pixels_bgr)
        return Look((pixels_bgr.shape[1], pixels_bgr.shape[0]), placement, *self._decode(min(least, HINT)))

    def _found(self, look: Look, least: float) -> tuple[Detection, ...]:
        """The cells of a look, best score first."""
        chosen = np.flatnonzero(self._is_above(look, least))
        boxes, scores, classes = look.boxes[chosen], look.scores[chosen], look.classes[chosen]
        order = np.argsort(-scores, kind="stable")
        if self.entry.thresholds.same_cell_iou is not None:
            order = best_of_each(boxes, order, self.entry.thresholds.same_cell_iou)
            voters = self._is_above(look, HINT)
            voices = look.boxes[voters], look.scores[voters], look.classes[voters]
            boxes[order] = vote(boxes[order], classes[order], voices)
        boxes = _to_frame(boxes, look.placement, *look.size_px)
        return tuple(
            Detection(Box(*(float(v) for v in boxes[k])), self.entry.classes[classes[k]], float(scores[k]))
            for k in order
            if (boxes[k, 2:] > boxes[k, :2]).all()
        )

    def _is_above(self, look: Look, least: float) -> NDArray[np.bool_]:
        """Which boxes of a look have at least this score, as the stored numbers say it, (boxes,)."""
        logit = _logit(least)
        limits = np.array([quantize(logit, score_map) for _, score_map in self._maps])
        above: NDArray[np.bool_] = look.stored >= limits[look.maps]
        return above

    def _merge(self, found: Sequence[Detection]) -> tuple[Detection, ...]:
        """Each cell once, best score first: overlapping tiles show cells twice, whatever the net does."""
        boxes = np.array([(d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max) for d in found], np.float32)
        order = np.argsort([-d.score for d in found], kind="stable")
        overlap = self.entry.thresholds.same_cell_iou or SAME_CELL_OF_TILES
        return tuple(found[k] for k in best_of_each(boxes.reshape(-1, 4), order, overlap))

    def _invoke(self, pixels_bgr: Pixels) -> Placement:
        rule = self.entry.input.letterbox
        assert rule is not None  # _pair_maps has refused a detector without it
        square, placement = letterbox(pixels_bgr, self.entry.input.shape[1], rule.fill)
        if self.entry.input.colour_order == "RGB":
            square = square[..., ::-1]
        self._interpreter.run(self._to_input(square)[None])
        return placement

    def _decode(
        self, least: float
    ) -> tuple[Floats, Floats, NDArray[np.intp], NDArray[np.integer[Any]], NDArray[np.intp]]:
        """What a `Look` holds of the last run, from this score on."""
        logit = _logit(least)
        found = []
        for index, (box_map, score_map) in enumerate(self._maps):
            stored = self._interpreter.output(score_map.name)[0]  # (rows, columns, classes)
            best = stored.max(-1)
            rows, columns = np.nonzero(best >= quantize(logit, score_map))
            distances = self._interpreter.output(box_map.name)[0][rows, columns]  # (cells, 4 * bins)
            centres = np.stack((columns, rows), 1) + np.float32(0.5)
            boxes = _boxes(dequantize(distances, box_map), centres) * np.float32(score_map.stride_px or 0)
            chosen = best[rows, columns]
            scores, classes = _sigmoid(dequantize(chosen, score_map)), stored[rows, columns].argmax(-1)
            found.append((boxes, scores, classes, chosen, np.full(len(rows), index)))
        boxes, scores, classes, chosen, maps = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return boxes, scores, classes, chosen, maps


def _pair_maps(entry: DetectorEntry) -> tuple[tuple[OutputTensor, OutputTensor], ...]:
    """Box and score map of each stride. Errors: `ModelError` where one of a pair is missing."""
    by_kind = {
        kind: {output.stride_px: output for output in entry.outputs if output.kind == kind}
        for kind in ("box_distances", "class_scores")
    }
    strides = set(by_kind["box_distances"]) | set(by_kind["class_scores"])
    if (
        entry.input.letterbox is None
        or not strides
        or None in strides
        or any(set(m) != strides for m in by_kind.values())
    ):
        raise ModelError(
            f"{entry.file}: the manifest must give a detector `letterbox` and, for each stride_px, one output of"
            " kind box_distances and one of kind class_scores"
        )
    return tuple(
        (by_kind["box_distances"][s], by_kind["class_scores"][s]) for s in sorted(strides, key=lambda s: s or 0)
    )


def _boxes(distances: Floats, centres: NDArray[np.float32]) -> Floats:
    """Boxes in strides, (cells, 4): each side's distance is the mean of its distribution over the bins."""
    bins = distances.reshape(len(distances), 4, distances.shape[-1] // 4)
    weights = np.exp(bins - bins.max(-1, keepdims=True))
    sides = (weights @ np.arange(bins.shape[-1], dtype=np.float32)) / weights.sum(-1)  # left, top, right, bottom
    boxes: Floats = np.concatenate((centres - sides[:, :2], centres + sides[:, 2:]), 1, dtype=np.float32)
    return boxes


def _to_frame(boxes: Floats, placement: Placement, width_px: int, height_px: int) -> Floats:
    offset = np.array([placement.offset_x_px, placement.offset_y_px] * 2, np.float32)
    scale = np.array([placement.scale_x, placement.scale_y] * 2, np.float32)
    limit = np.array([width_px, height_px] * 2, np.float32)
    inside: Floats = np.clip((boxes - offset) / scale, 0, limit).astype(np.float32)
    return inside


def _logit(score: float) -> float:
    return math.log(max(score, 1e-9) / max(1 - score, 1e-9))


def _sigmoid(values: Floats) -> Floats:
    shares: Floats = (1 / (1 + np.exp(-values))).astype(np.float32)
    return shares
