"""How much of what is no cell of the eight classes gets a name all the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.analysis.crops import CropCutter
from agent.camera.decoding import decode_file
from agent.domain import Box, Pixels
from agent.inference.models import Models
from models.common import debris
from models.common.labels import FieldImage, read_boxes, read_complete_fields, require_some
from models.common.metrics import area_under_roc, box_overlaps
from models.evaluation.asking import MAX_MEGAPIXELS, progress
from models.evaluation.names import SeenField

Corners = NDArray[np.float32]
"""(boxes, 4), or (4,) of one: x_min, y_min, x_max, y_max in px."""

KINDS = (
    "cell",
    "red cell",
    "overlapping red cells",
    "background",
    "cut cell",
    "ruined cell",
    "smeared cell",
    *debris.KINDS,
)
RUIN_SHARE = 0.055
"""Sigma of the blur that takes a cell its name, as a share of the crop's side: 7 px of 128."""
SMEAR_SHARE = 0.5
"""Length of the streaks into which a cell is drawn out, as a share of the crop's side."""
ASIDE = 0.75
"""How far the middle of a cut cell lies from the crop's, in sides of its box: a quarter of it is left in the box."""
PIECES = 3
"""Of debris in a field."""
OTHERS = 0.02
"""Overlap (IoU) with a nucleated cell up to which a place shows none."""


def evaluate_no_cell(models: Models, data: Path, split: str) -> dict[str, Any]:
    """How much of what is no cell gets a name all the same: as crops, and as debris in fields, both models heard."""
    fields = require_some(read_complete_fields(data, split), data, split)
    return {"kinds": named_crops(models, fields), "in_fields": named_debris(models, fields)}


def named_crops(models: Models, fields: Sequence[FieldImage]) -> dict[str, dict[str, Any]]:
    """By kind the crops, the share that gets a name, and how well the cell probability tells them from cells."""
    rules = models.naming_rules()
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    accepted: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    rng = np.random.default_rng(11)
    for field in progress(fields, "fields"):
        pixels = decode_file(field.path, MAX_MEGAPIXELS)
        cutter = models.cutter(pixels, models.detector.detect(pixels))
        for kind, crop in kinds_of_crops(pixels, field, cutter, rng):
            answer = models.classifier.classify(crop)
            scores[kind].append(answer.cell_probability)
            accepted[kind].append(rules.believes(answer))
    cells = np.array(scores["cell"])
    return {
        kind: {
            "n": len(scores[kind]),
            "named": float(np.mean(accepted[kind])),
            "auroc": None if kind == "cell" else area_under_roc(cells, np.array(scores[kind])),
        }
        for kind in KINDS
        if scores[kind]
    }


def named_debris(models: Models, fields: Sequence[FieldImage]) -> dict[str, dict[str, float]]:
    """By kind of debris the pieces that were drawn between the cells of fields, the share that the detector boxes as
    what is to be named, and the share that the agent would count.
    """
    kinds = list(debris.KINDS.items())
    found: dict[str, list[tuple[bool, bool]]] = {kind: [] for kind, _ in kinds}
    rng = np.random.default_rng(12)
    for index, field in enumerate(progress(fields, "fields with debris")):
        kind, draw = kinds[index % len(kinds)]
        pixels = decode_file(field.path, MAX_MEGAPIXELS)
        boxes = read_boxes(field, pixels.shape[1], pixels.shape[0])[:, 1:]
        rgb = np.ascontiguousarray(pixels[..., ::-1])
        places = []
        for _ in range(PIECES):
            if place := debris.free_place(boxes, *rgb.shape[:2], int(rng.uniform(30, 120)), rng):
                debris.draw_at(rgb, place, draw, rng)
                places.append(place)
                left, top, side = place
                boxes = np.vstack((boxes, (left, top, left + side, top + side)))
        seen = SeenField.of(models, np.ascontiguousarray(rgb[..., ::-1]))
        found[kind] += [is_taken(seen, place) for place in places]
    return {
        kind: {
            "n": len(taken),
            "boxed": float(np.mean([t[0] for t in taken])),
            "named": float(np.mean([t[1] for t in taken])),
        }
        for kind, taken in found.items()
        if taken
    }


def is_taken(seen: SeenField, place: debris.Place) -> tuple[bool, bool]:
    """Whether a box of what is to be named has its middle where a piece lies, and whether the agent trusts the name."""
    left, top, side = place
    classified = seen.models.manifest.detector.classified
    for detection in seen.detections:
        x, y = detection.box.centre_px
        if detection.class_name in classified and 0 <= x - left < side and 0 <= y - top < side:
            return True, seen.models.naming_rules().believes(seen.name(detection.box))
    return False, False


def kinds_of_crops(
    pixels: Pixels, field: FieldImage, cutter: CropCutter, rng: np.random.Generator
) -> Iterator[tuple[str, Pixels]]:
    """Nucleated cells of a field, the same ruined in three ways, two red cells, two pairs of them, an empty place, and
    each kind of debris drawn there.
    """
    height, width = pixels.shape[:2]
    boxes = read_boxes(field, width, height)
    nucleated, red = boxes[boxes[:, 0] == 0, 1:], boxes[boxes[:, 0] == 1, 1:]
    for corners in nucleated:
        crop = cutter.around(box_of(corners))
        yield "cell", crop
        yield "ruined cell", np.asarray(cv2.GaussianBlur(crop, (0, 0), crop.shape[0] * RUIN_SHARE), np.uint8)
        yield "smeared cell", debris.smeared(crop, SMEAR_SHARE, rng.uniform(0, 180))
        beside = moved_aside(corners, rng)
        others = nucleated[(nucleated != corners).any(1)]
        if shows_none(beside, others) and is_inside(beside, width, height):
            yield "cut cell", cutter.around(box_of(beside))
    for corners in [box for box in rng.permutation(red) if shows_none(box, nucleated)][:2]:
        yield "red cell", cutter.around(box_of(corners))
    for corners in [box for box in rng.permutation(unions(red)) if shows_none(box, nucleated)][:2]:
        yield "overlapping red cells", cutter.around(box_of(corners))
    for _ in range(50):
        side = rng.uniform(30, 120)
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
        place = np.array([x, y, x + side, y + side], np.float32)
        if shows_none(place, boxes[:, 1:], 0.01):
            crop = cutter.around(box_of(place))
            yield "background", crop
            for kind, draw in debris.KINDS.items():
                drawn = draw(np.ascontiguousarray(crop[..., ::-1]), rng)
                yield kind, np.ascontiguousarray(drawn[..., ::-1])
            return


def box_of(corners: Corners) -> Box:
    return Box(*(float(value) for value in corners))


def shows_none(place: Corners, boxes: Corners, most: float = OTHERS) -> bool:
    """Whether none of the boxes overlaps a place, (4,), by more."""
    return float(box_overlaps(place[None], boxes).max(initial=0)) <= most


def is_inside(place: Corners, width_px: int, height_px: int) -> bool:
    return bool((place >= 0).all() and (place <= (width_px, height_px) * 2).all())


def moved_aside(corners: Corners, rng: np.random.Generator) -> Corners:
    """The box beside a cell's, along x or y, that a quarter of the cell reaches into."""
    away = np.zeros(2, np.float32)
    axis = int(rng.integers(2))
    away[axis] = rng.choice((-ASIDE, ASIDE)) * (corners[2 + axis] - corners[axis])
    moved: Corners = corners + np.tile(away, 2)
    return moved


def unions(red: Corners) -> Corners:
    """The boxes around each two red cells whose boxes overlap, (pairs, 4)."""
    first, second = np.nonzero(np.triu(box_overlaps(red, red) > OTHERS, 1))
    low, high = np.minimum(red[first, :2], red[second, :2]), np.maximum(red[first, 2:], red[second, 2:])
    found: Corners = np.hstack((low, high))
    return found
