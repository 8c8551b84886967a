"""Boxes of the shipped detector beside those of the label files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.camera.decoding import decode_file
from agent.domain import Pixels
from agent.inference.models import Models
from models.common.labels import (
    DETECTOR_CLASSES,
    NUCLEATED,
    FieldImage,
    clip_boxes,
    mistakes,
    put_right,
    read_boxes,
    read_cells,
    read_complete_fields,
    read_fields,
    read_published_boxes,
    require_some,
)
from models.common.metrics import FieldBoxes, box_overlaps, detection_figures
from models.evaluation.asking import MAX_MEGAPIXELS, progress
from models.evaluation.names import SAME_CELL

EVALUATION_SCORE = 0.01  # low enough that the precision-recall curve reaches its end


def evaluate_detector(models: Models, data: Path, split: str) -> dict[str, Any]:
    """P, R, mAP50 and mAP50-95 for each source and class."""
    fields = require_some(read_fields(data, split), data, split)
    groups = {
        "complete": [field for field in fields if field.is_complete],
        **{
            f"complete, {source}": [field for field in fields if field.is_complete and field.source == source]
            for source in sorted({field.source for field in fields})
        },
        "rbc-incomplete": [field for field in fields if not field.is_complete],
    }
    measured = {field.path: boxes_of(models, field) for field in progress(fields, "fields")}
    pairs = {name: [measured[field.path] for field in group] for name, group in groups.items() if group}
    wrong = mistakes(data, split)
    if any(field.path in wrong for field in groups["complete"]):
        pairs["complete, labels put right"] = [
            FieldBoxes(measured[f.path].found, put_right(measured[f.path].true, wrong.get(f.path)))
            for f in groups["complete"]
        ]
    pairs |= published_pairs({field: measured[field.path] for field in fields if field.source == "bccd"})
    return by_group(pairs, models.manifest.detector.classes)


def by_group(pairs: Mapping[str, Sequence[FieldBoxes]], classes: Sequence[str]) -> dict[str, Any]:
    """How many fields each group has, and the figures of its classes; a group without any has none."""
    return {
        "fields": {name: len(found) for name, found in pairs.items()},
        "groups": {
            name: {key: dataclasses.asdict(value) for key, value in detection_figures(found, classes).items()}
            for name, found in pairs.items()
            if found
        },
    }


def published_pairs(measured: Mapping[FieldImage, FieldBoxes]) -> dict[str, list[FieldBoxes]]:
    """BCCD with the labels that its authors published, which leave about half of the red cells out.

    Beside the detector's boxes stand, as the most that anybody can reach who finds every cell, those of the new labels.
    """
    published, perfect = [], []
    for field, (found, true) in ((field, (m.found, m.true)) for field, m in measured.items()):
        height, width = decode_file(field.path, MAX_MEGAPIXELS).shape[:2]
        labelled = read_published_boxes(field, width, height)
        published.append(FieldBoxes(found, labelled))
        if field.is_complete:
            sure = np.insert(true, 1, 1.0, axis=1)
            perfect.append(FieldBoxes(sure, labelled))
    named = {"bccd, published labels": published, "bccd, published labels against complete ones": perfect}
    return {name: found for name, found in named.items() if found}


def boxes_of(models: Models, field: FieldImage) -> FieldBoxes:
    """What the shipped detector finds in a field, and what the label file says."""
    return field_boxes(models, decode_file(field.path, MAX_MEGAPIXELS), field)


def field_boxes(models: Models, pixels: Pixels, field: FieldImage) -> FieldBoxes:
    """The same for pixels of that field, which may have been changed since."""
    true = read_boxes(field, pixels.shape[1], pixels.shape[0])
    return FieldBoxes(found_boxes(models, pixels, EVALUATION_SCORE), true)


def found_boxes(models: Models, pixels: Pixels, min_score: float) -> NDArray[np.float32]:
    """What the shipped detector finds, (found, 6): class, score, x_min, y_min, x_max, y_max in px; best first."""
    classes = models.manifest.detector.classes
    found = [
        (classes.index(d.class_name), d.score, d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)
        for d in models.detector.detect(pixels, min_score)
    ]
    return np.array(found, np.float32).reshape(-1, 6)


def evaluate_large_frames(models: Models, data: Path, split: str) -> dict[str, Any]:
    """Complete fields of one source side by side as one frame: small cells in a picture of several megapixels."""
    fields = require_some(read_complete_fields(data, split), data, split)
    pairs = {}
    for source in sorted({field.source for field in fields}):
        same = [field for field in fields if field.source == source]
        for across in MOSAICS:
            sheets = [same[k : k + across**2] for k in range(0, len(same) - across**2 + 1, across**2)]
            name = f"{source}, {across} x {across}"
            pairs[name] = [boxes_of_sheet(models, sheet, across) for sheet in progress(sheets, name)]
    return by_group(pairs, models.manifest.detector.classes)


def evaluate_close_ups(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The middles of complete fields as frames of their own: cells that fill half of a picture and more."""
    pairs: dict[str, list[FieldBoxes]] = {}
    for field in progress(require_some(read_complete_fields(data, split), data, split), "fields"):
        pixels = decode_file(field.path, MAX_MEGAPIXELS)
        for share in CLOSE_UPS:
            name = f"{field.source}, {share:g} of each side"
            pairs.setdefault(name, []).append(boxes_of_middle(models, pixels, field, share))
    return by_group(dict(sorted(pairs.items())), models.manifest.detector.classes)


CLOSE_UPS = (0.6, 0.4)


def boxes_of_middle(models: Models, pixels: Pixels, field: FieldImage, share: float) -> FieldBoxes:
    """What is found in the middle of a field, and what the label file says of it."""
    height, width = pixels.shape[:2]
    true = read_boxes(field, width, height)
    wide, high = round(share * width), round(share * height)
    left, top = (width - wide) // 2, (height - high) // 2
    true[:, 1:] -= np.array([left, top] * 2, np.float32)
    middle = np.ascontiguousarray(pixels[top : top + high, left : left + wide])
    return FieldBoxes(found_boxes(models, middle, EVALUATION_SCORE), clip_boxes(true, wide, high))


MOSAICS = (3, 4)


def boxes_of_sheet(models: Models, fields: Sequence[FieldImage], across: int) -> FieldBoxes:
    """What is found in fields side by side, all at the size of the first, and what the label files say."""
    pictures = [decode_file(field.path, MAX_MEGAPIXELS) for field in fields]
    height, width = pictures[0].shape[:2]
    resized = [cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA) for pixels in pictures]
    rows = [np.hstack(resized[k : k + across]) for k in range(0, len(resized), across)]
    true = []
    for k, field in enumerate(fields):
        boxes = read_boxes(field, width, height)
        boxes[:, 1:] += np.array([k % across * width, k // across * height] * 2, np.float32)
        true.append(boxes)
    sheet: Pixels = np.vstack(rows)
    return FieldBoxes(found_boxes(models, sheet, EVALUATION_SCORE), np.concatenate(true))


def evaluate_eight_classes(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The study's table: each cell one box with one of the eight names, on the PBC fields.

    A box's score is the detector's times the probability of the name. Of the nucleated cells of a field only the one in
    the middle has a known class; boxes of the others are left out of the count. Classes without any box are not there.
    """
    classes = models.manifest.classifier.classes
    named = {cell.path.stem: cell.class_name for cell in read_cells(data, split)}
    fields = [field for field in read_fields(data, split) if field.source == "pbc" and field.path.stem in named]
    require_some(fields, data, split)
    measured = [named_boxes(models, field, named[field.path.stem]) for field in progress(fields, "fields")]
    return by_group({"pbc": measured}, classes)


def named_boxes(models: Models, field: FieldImage, class_name: str) -> FieldBoxes:
    """Boxes of the classifier's classes in a field whose middle cell is known, and what the two models say together."""
    pixels = decode_file(field.path, MAX_MEGAPIXELS)
    manifest = models.manifest
    classes = manifest.classifier.classes
    labelled = read_boxes(field, pixels.shape[1], pixels.shape[0])
    nucleated, platelets = (
        labelled[labelled[:, 0] == DETECTOR_CLASSES.index(name)] for name in (NUCLEATED, "platelet")
    )
    middle = np.array([pixels.shape[1] / 2, pixels.shape[0] / 2])
    away_px = np.linalg.norm((nucleated[:, 1:3] + nucleated[:, 3:]) / 2 - middle, axis=1)
    order = np.argsort(away_px)
    known = np.concatenate((nucleated[order[:1]], platelets))
    known[:, 0] = classes.index("platelet")
    known[: len(order[:1]), 0] = classes.index(class_name)
    found = []
    detections = models.detector.detect(pixels, EVALUATION_SCORE)
    sure = [d for d in detections if d.score >= manifest.detector.thresholds.min_score]
    cutter, rules = models.cutter(pixels, sure), models.naming_rules()
    for d in detections:
        if d.class_name in manifest.detector.classified:
            answer = rules.weigh(models.classifier.classify(cutter.around(d.box)), d)
            corners = (d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)
            found.append((classes.index(answer.class_name), d.score * answer.probability, *corners))
    rows = np.array(found, np.float32).reshape(-1, 6)
    unknown = nucleated[order[1:], 1:]
    is_unknown = (box_overlaps(rows[:, 2:], unknown) > SAME_CELL).any(1) if len(unknown) else np.zeros(len(rows), bool)
    return FieldBoxes(rows[~is_unknown], known)
