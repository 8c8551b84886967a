"""Names that the shipped classifier gives: to PBC pictures and to cells of other microscopes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.analysis.cells import NamingRules, typical_red_cell_px
from agent.camera.decoding import decode_file
from agent.domain import Attribute, Box, Classification, Detection, Pixels
from agent.inference.models import Models
from models.common.labels import (
    CellImage,
    DataUnfit,
    NamedBox,
    read_cells,
    read_field_platelets,
    read_foreign_cells,
    read_known_attributes,
    require_some,
)
from models.common.metrics import (
    accuracy_at_coverage,
    box_overlaps,
    class_figures_by_name,
    expected_calibration_error,
)
from models.evaluation.asking import MAX_MEGAPIXELS, progress

COVERAGES = (1.0, 0.98, 0.95, 0.9, 0.8)


def evaluate_classifier(models: Models, data: Path, split: str, random_seed: int | None = None) -> dict[str, Any]:
    """Names, calibration, the reject option and, where the folder has any, the attributes on the PBC pictures."""
    attributes = read_known_attributes(data)
    require_known(attributes, models)
    named = name_pictures(models, data, split, random_seed)
    pairs = zip(named.cells, named.answers, strict=True)
    told = [(attributes[cell.key], answer.morphology) for cell, answer in pairs if cell.key in attributes]
    return {
        **class_figures_by_name(named.pairs, models.manifest.classifier.classes),
        **confidence_figures(named, models.manifest.classifier.thresholds.temperature),
        "morphology": morphology_figures(told),
    }


def require_known(attributes: Mapping[str, Mapping[str, str]], models: Models) -> None:
    """Raises DataUnfit where the pictures have an attribute that the classifier, which has some, does not tell."""
    morphology = models.manifest.classifier.morphology
    if morphology is None:
        return
    if strange := sorted({name for row in attributes.values() for name in row} - set(morphology.attributes)):
        known = ", ".join(morphology.attributes)
        raise DataUnfit(f"attributes.csv: {', '.join(strange)} is no attribute of the model: {known}")


@dataclasses.dataclass(frozen=True, slots=True)
class NamedPictures:
    """PBC pictures and what `hematovision classify` answers to each."""

    cells: Sequence[CellImage]
    answers: Sequence[Classification]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """True and given name of each."""
        return [(cell.class_name, answer.class_name) for cell, answer in zip(self.cells, self.answers, strict=True)]

    @property
    def is_right(self) -> NDArray[np.bool_]:
        return np.array([true == given for true, given in self.pairs])

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Of the given name, (pictures,), 0 to 1."""
        return np.array([answer.probability for answer in self.answers])

    @property
    def confidences(self) -> NDArray[np.float64]:
        """Of the given name and of being a cell at all, (pictures,), 0 to 1: what the reject option goes by."""
        return self.probabilities * np.array([answer.cell_probability for answer in self.answers])


def name_pictures(models: Models, data: Path, split: str, random_seed: int | None = None) -> NamedPictures:
    """Each PBC picture of a split as `hematovision classify` takes it. random_seed: as in `read_cells`."""
    classes = models.manifest.classifier.classes
    cells = require_named(read_cells(data, split, random_seed), classes, data, split)
    answers = [models.name_central_cell(decode_file(c.path, MAX_MEGAPIXELS)) for c in progress(cells, "pictures")]
    return NamedPictures(cells, answers)


def require_named(cells: Sequence[CellImage], classes: Sequence[str], data: Path, split: str) -> Sequence[CellImage]:
    """The cells, if there are any. Raises DataUnfit, also where one is of none of a classifier's classes."""
    if strange := sorted({cell.class_name for cell in cells} - set(classes)):
        raise DataUnfit(f"{data / 'pbc.csv'}: {', '.join(strange)} is no class of the model: {', '.join(classes)}")
    return require_some(cells, data, split)


def confidence_figures(named: NamedPictures, temperature: float) -> dict[str, Any]:
    """Calibration error before and after the temperature, and accuracy of the more confident part."""
    raw = np.array([list(answer.probabilities.values()) for answer in named.answers]) ** temperature
    before = (raw / raw.sum(1, keepdims=True)).max(1)
    return {
        "calibration_error": {
            "before": expected_calibration_error(before, named.is_right),
            "after": expected_calibration_error(named.probabilities, named.is_right),
        },
        "accuracy_at_coverage": accuracy_at_coverage(named.confidences, named.is_right, COVERAGES),
    }


def morphology_figures(told: Sequence[tuple[Mapping[str, str], Mapping[str, Attribute]]]) -> dict[str, Any] | None:
    """Accuracy and macro-F1 of each attribute, and their means; None where the model does not describe cells."""
    told = [pair for pair in told if pair[1]]
    if not told:
        return None
    figures = {}
    for name in told[0][0]:
        pairs = [(true[name], given[name].value) for true, given in told]
        by_value = class_figures_by_name(pairs, sorted({true for true, _ in pairs}))
        figures[name] = {key: by_value[key] for key in ("accuracy", "macro_f1")}
    means = {f"mean_{key}": float(np.mean([f[key] for f in figures.values()])) for key in ("accuracy", "macro_f1")}
    return {"n": len(told), **means, "attributes": figures}


def evaluate_microscopes(models: Models, data: Path, split: str) -> dict[str, Any]:
    """Names of nucleated cells from other microscopes, which `models/data/README.md` tells of, and of the platelets of
    all fields, by source.
    """
    cells = require_some(cells_of_fields(data, split), data, split)
    by_source: dict[str, list[tuple[NamedBox, Classification]]] = {}
    for cell, answer in answer_in_fields(models, cells):
        by_source.setdefault(cell.source, []).append((cell, answer))
    classes = models.manifest.classifier.classes
    sources = {}
    for source, pairs in by_source.items():
        names = [(str(cell.class_name), answer.class_name) for cell, answer in pairs]
        by_class = class_figures_by_name(names, classes)["classes"]
        sources[source] = {
            **trust_in(pairs, models.naming_rules()),
            "classes": {name: f for name, f in by_class.items() if f["n"]},
        }
    return {"sources": sources}


def named_cells(data: Path, splits: Sequence[str]) -> list[NamedBox]:
    """Nucleated cells of other microscopes that we named by eye."""
    return [cell for cell in read_foreign_cells(data, splits) if cell.class_name is not None]


def cells_of_fields(data: Path, split: str) -> list[NamedBox]:
    """Nucleated cells that we named by eye, and the platelets of the label files under a source of their own."""
    named = named_cells(data, (split,))
    platelets = read_field_platelets(data, (split,))
    return named + [dataclasses.replace(cell, source=f"{cell.source}, platelets") for cell in platelets]


def evaluate_framings(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The same cells as pictures that people cut, from too tight to most of the field, as `classify` takes them."""
    cells = require_some(named_cells(data, (split,)), data, split)
    rules = models.naming_rules()
    framings: dict[str, list[tuple[bool, bool]]] = {f"{width:g}": [] for width in FRAMINGS}
    for cell in progress(cells, "cells"):
        pixels = decode_file(cell.path, MAX_MEGAPIXELS)
        for width in FRAMINGS:
            answer = models.name_central_cell(cut_picture(pixels, cell.box, width))
            framings[f"{width:g}"].append((answer.class_name == cell.class_name, rules.believes(answer)))
    return {"framings": {width: trust_figures(*np.array(found).T) for width, found in framings.items()}}


FRAMINGS = (0.9, 1.0, 1.2, 1.6, 2.2, 3.0, 5.0)
"""Sides of the pictures, in sides of the cell's box."""


def trust_in(pairs: Sequence[tuple[NamedBox, Classification]], rules: NamingRules) -> dict[str, Any]:
    """`trust_figures` of cells and the answers to them."""
    is_right = np.array([cell.class_name == answer.class_name for cell, answer in pairs])
    return trust_figures(is_right, np.array([rules.believes(answer) for _, answer in pairs]))


def trust_figures(is_right: NDArray[np.bool_], accepted: NDArray[np.bool_]) -> dict[str, Any]:
    """is_right, accepted: (cells,), whether each is named rightly and whether its name is believed."""
    return {
        "n": len(is_right),
        "accuracy": float(is_right.mean()),
        "accepted": float(accepted.mean()),
        "accuracy_of_accepted": float(is_right[accepted].mean()) if accepted.any() else None,
    }


def cut_picture(pixels: Pixels, box: tuple[float, float, float, float], width: float) -> Pixels:
    """The part of a field around a box that is `width` times as wide as its longer side; less at the field's edge."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    reach = max(box[2] - box[0], box[3] - box[1]) * width / 2
    left, top = max(0, round(x - reach)), max(0, round(y - reach))
    return np.ascontiguousarray(pixels[top : max(top + 2, round(y + reach)), left : max(left + 2, round(x + reach))])


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class SeenField:
    """A decoded field and what the detector finds in it: asked once, however many of its cells are named."""

    models: Models
    pixels: Pixels
    detections: Sequence[Detection]

    @classmethod
    def of(cls, models: Models, pixels: Pixels) -> SeenField:
        return cls(models, pixels, models.detector.detect(pixels))

    def classify(self, box: Box) -> Classification:
        """The classifier's own answer, the cell cut as the agent cuts it."""
        return self.models.classifier.classify(self.models.cutter(self.pixels, self.detections).around(box))

    def name(self, box: Box) -> Classification:
        """What the agent would say if it had cut there, both models heard."""
        answer = self.classify(box)
        classified = self.models.manifest.detector.classified
        found = [d for d in self.detections if d.class_name in classified]
        overlaps = box_overlaps(corners_of([box]), corners_of([d.box for d in found]))[0]
        if overlaps.max(initial=0) < SAME_CELL:
            return answer
        height, width = self.pixels.shape[:2]
        red_cell_px = typical_red_cell_px(self.detections, classified, (width, height))
        return self.models.naming_rules().weigh(answer, found[int(overlaps.argmax())], red_cell_px)


def answer_in_fields(
    models: Models,
    cells: Sequence[NamedBox],
    ask: Callable[[SeenField, Box], Classification] = SeenField.name,
) -> list[tuple[NamedBox, Classification]]:
    """Each labelled cell and the answer to it, field by field."""
    answers = []
    for path, found in progress(by_field(cells).items(), "fields"):
        field = SeenField.of(models, decode_file(path, MAX_MEGAPIXELS))
        answers += [(cell, ask(field, Box(*cell.box))) for cell in found]
    return answers


def by_field(cells: Sequence[NamedBox]) -> dict[Path, list[NamedBox]]:
    """Labelled cells by the path of their field."""
    found: dict[Path, list[NamedBox]] = {}
    for cell in cells:
        found.setdefault(cell.path, []).append(cell)
    return found


SAME_CELL = 0.3
"""Overlap from which a box that is found is that of a labelled cell."""


def corners_of(boxes: Sequence[Box]) -> NDArray[np.float32]:
    """(boxes, 4): x_min, y_min, x_max, y_max in px."""
    return np.array([(b.x_min, b.y_min, b.x_max, b.y_max) for b in boxes], np.float32).reshape(-1, 4)
