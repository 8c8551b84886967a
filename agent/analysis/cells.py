"""From what the models said to cells and their counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from types import MappingProxyType

from agent.domain import Box, Cell, CellStatus, Classification, Detection

UNIDENTIFIED = CellStatus.UNIDENTIFIED.value
"""Key of `counts` for cells that are counted without a class."""

EDGE_PX = 1.0
"""A box that comes this near to the frame's edge shows a cut cell: boxes end within a pixel of the edge there."""


@dataclass(frozen=True, slots=True)
class NamingRules:
    """When a name is believed, from the manifest and the configuration.

    min_probability, min_cell_probability: 0 to 1. agreeing: by detector class the classes that do not contradict it.
    contradicted: by detector class the share, 0 to 1, of cells of the other names that get it all the same.
    largest_in_red_cells: for classes for which, where red cells are in sight, size decides instead, the largest one in
    sides of a typical red cell: platelets measure 2 to 4 um, giant ones up to 10, red cells 7 to 8.
    """

    min_probability: float
    agreeing: Mapping[str, tuple[str, ...]]
    largest_in_red_cells: Mapping[str, float] = field(default_factory=dict)
    min_cell_probability: float = 0.0
    contradicted: Mapping[str, float] = field(default_factory=dict)

    def agrees(self, name: str, detection: Detection, red_cell_px: float | None) -> bool:
        """Whether the detector's class, or the size where that decides, leaves room for a name."""
        if name in self.largest_in_red_cells and red_cell_px is not None:
            return _size_px(detection.box) < self.largest_in_red_cells[name] * red_cell_px
        return name in self.agreeing.get(detection.class_name, (name,))

    def weigh(
        self, classification: Classification, detection: Detection, red_cell_px: float | None = None
    ) -> Classification:
        """What both models say together: names that do not agree weigh as much less as the detector is right.

        Bayes' rule, the two models' mistakes taken for independent. red_cell_px: from `typical_red_cell_px`.
        """
        weight = self.contradicted.get(detection.class_name, 1.0)
        weighed = {
            name: share if self.agrees(name, detection, red_cell_px) else share * weight
            for name, share in classification.probabilities.items()
        }
        total = sum(weighed.values())
        if weighed == classification.probabilities or not total:
            return classification
        shares = {name: share / total for name, share in weighed.items()}
        best = max(shares, key=shares.__getitem__)
        return replace(
            classification, class_name=best, probability=shares[best], probabilities=MappingProxyType(shares)
        )

    def believes(self, classification: Classification) -> bool:
        """Whether what the classifier says is probable enough, whatever the detector says."""
        is_cell = classification.cell_probability >= self.min_cell_probability
        return is_cell and classification.probability >= self.min_probability


def cell_number(cell_id: str) -> int:
    """The number of a cell in its sample, from 1: ids are `{sample}-{number}`."""
    return int(cell_id.rsplit("-", 1)[1])


def name_cell(
    cell_id: str,
    detection: Detection,
    classification: Classification | None,
    frame_size_px: tuple[int, int],
    rules: NamingRules,
    red_cell_px: float | None = None,
    slide_um: tuple[float, float] | None = None,
) -> Cell:
    """One cell with its class and status.

    classification: what the classifier says of the crop, for itself; None for what the detector names alone.
    frame_size_px: width, height. red_cell_px: from `typical_red_cell_px`. A contradicted or improbable name makes the
    cell `unidentified`. slide_um: its place on the slide, where that is known.
    """
    if classification is None:
        name, probability, is_trusted = detection.class_name, detection.score, True
    else:
        classification = rules.weigh(classification, detection, red_cell_px)
        name, probability = classification.class_name, classification.probability
        is_trusted = rules.agrees(name, detection, red_cell_px) and rules.believes(classification)
    status = CellStatus.UNIDENTIFIED
    if is_trusted:
        status = CellStatus.EDGE if touches_edge(detection.box, frame_size_px) else CellStatus.ACCEPTED
    return Cell(cell_id, detection, name, probability, classification, status, slide_um)


def place_on_slide(
    box: Box, um_per_px: float | None, stage_um: tuple[float, float] | None
) -> tuple[float, float] | None:
    """The middle of a box on the slide in um; None without a calibrated camera and a stage that tells its place.

    stage_um: place of the frame's upper left corner.
    """
    if um_per_px is None or stage_um is None:
        return None
    x, y = box.centre_px
    return stage_um[0] + x * um_per_px, stage_um[1] + y * um_per_px


def typical_red_cell_px(
    detections: Iterable[Detection], classified: Collection[str], frame_size_px: tuple[int, int]
) -> float | None:
    """Median size in px (root of the box's area) of the whole red cells of a field; None where they are fewer than 3.

    classified: the detector's classes that are not red cells.
    """
    sizes = [
        _size_px(detection.box)
        for detection in detections
        if detection.class_name not in classified and not touches_edge(detection.box, frame_size_px)
    ]
    return median(sizes) if len(sizes) >= 3 else None


def count_cells(cells: Iterable[Cell]) -> Mapping[str, int]:
    """How many cells of each class, `edge` ones included, and under `unidentified` those without a trusted class."""
    counts: Counter[str] = Counter()
    for cell in cells:
        if cell.status in (CellStatus.ACCEPTED, CellStatus.EDGE):
            counts[cell.class_name] += 1
        elif cell.status is CellStatus.UNIDENTIFIED:
            counts[UNIDENTIFIED] += 1
    return MappingProxyType(dict(sorted(counts.items())))


def touches_edge(box: Box, frame_size_px: tuple[int, int]) -> bool:
    """Whether a box shows a cell that the frame's edge cuts. frame_size_px: width, height."""
    width, height = frame_size_px
    return min(box.x_min, box.y_min) < EDGE_PX or box.x_max > width - EDGE_PX or box.y_max > height - EDGE_PX


def _size_px(box: Box) -> float:
    return math.sqrt(box.width_px * box.height_px)
