"""Boxes of the shipped detector beside those of the label files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.camera.decoding import decode_file
from agent.domain import Pixels
from agent.inference.models import Models
from models.common.labels import DETECTOR_CLASSES, FieldImage, read_boxes, read_cells, read_fields, read_published_boxes
from models.common.metrics import FieldBoxes, box_overlaps, detection_figures
from models.evaluation.asking import MAX_MEGAPIXELS, progress
from models.evaluation.names import classify_place

EVALUATION_SCORE = 0.01  # low enough that the precision-recall curve reaches its end
NUCLEATED = DETECTOR_CLASSES[0]
SAME_CELL = 0.3  # overlap from which a box is that of a cell whose class nobody knows


def evaluate_detector(models: Models, data: Path, split: str) -> dict[str, Any]:
    """P, R, mAP50 and mAP50-95 for each source and class."""
    fields = read_fields(data, split)
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
    pairs |= published_pairs({field: measured[field.path] for field in fields if field.source == "bccd"})
    classes = models.manifest.detector.classes
    return {
        "fields": {name: len(found) for name, found in pairs.items()},
        "groups": {
            name: {key: dataclasses.asdict(value) for key, value in detection_figures(found, classes).items()}
            for name, found in pairs.items()
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


def evaluate_eight_classes(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The study's table: each cell one box with one of the eight names, on the PBC fields.

    A box's score is the detector's times the probability of the name. Of the nucleated cells of a field only the one in
    the middle has a known class; boxes of the others are left out of the count. Classes without any box are not there.
    """
    classes = models.manifest.classifier.classes
    named = {cell.path.stem: cell.class_name for cell in read_cells(data, split)}
    fields = [field for field in read_fields(data, split) if field.source == "pbc" and field.path.stem in named]
    measured = [named_boxes(models, field, named[field.path.stem]) for field in progress(fields, "fields")]
    figures = detection_figures(measured, classes)
    return {
        "fields": {"pbc": len(fields)},
        "groups": {"pbc": {name: dataclasses.asdict(f) for name, f in figures.items()}},
    }


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
    for d in models.detector.detect(pixels, EVALUATION_SCORE):
        if d.class_name in manifest.detector.classified:
            answer = classify_place(models, pixels, d.box)
            corners = (d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)
            found.append((classes.index(answer.class_name), d.score * answer.probability, *corners))
    rows = np.array(found, np.float32).reshape(-1, 6)
    unknown = nucleated[order[1:], 1:]
    is_unknown = (box_overlaps(rows[:, 2:], unknown) > SAME_CELL).any(1) if len(unknown) else np.zeros(len(rows), bool)
    return FieldBoxes(rows[~is_unknown], known)
