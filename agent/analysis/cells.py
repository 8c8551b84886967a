"""From what the models said to cells and their counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from agent.domain import Box, Cell, CellStatus, Classification, Detection

UNIDENTIFIED = CellStatus.UNIDENTIFIED.value
"""Key of `counts` for cells that are counted without a class."""

EDGE_PX = 1.0
"""A box that comes this near to the frame's edge shows a cut cell: boxes end within a pixel of the edge there."""


def name_cell(
    cell_id: str,
    detection: Detection,
    classification: Classification | None,
    frame_size_px: tuple[int, int],
    min_probability: float,
    agreeing: Mapping[str, tuple[str, ...]],
    slide_um: tuple[float, float] | None = None,
) -> Cell:
    """One cell with its class and status.

    classification: None for what the detector names alone. frame_size_px: width, height. agreeing: by detector class
    the classes that do not contradict it; a contradicted or improbable name makes the cell `unidentified`. slide_um:
    its place on the slide, where that is known.
    """
    if classification is None:
        name, probability, is_trusted = detection.class_name, detection.score, True
    else:
        name, probability = classification.class_name, classification.probability
        agrees = name in agreeing.get(detection.class_name, (name,))
        is_trusted = agrees and probability >= min_probability
    status = CellStatus.UNIDENTIFIED
    if is_trusted:
        status = CellStatus.EDGE if _touches_edge(detection, frame_size_px) else CellStatus.ACCEPTED
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


def count_cells(cells: Iterable[Cell]) -> Mapping[str, int]:
    """How many cells of each class, `edge` ones included, and under `unidentified` those without a trusted class."""
    counts: Counter[str] = Counter()
    for cell in cells:
        if cell.status in (CellStatus.ACCEPTED, CellStatus.EDGE):
            counts[cell.class_name] += 1
        elif cell.status is CellStatus.UNIDENTIFIED:
            counts[UNIDENTIFIED] += 1
    return MappingProxyType(dict(sorted(counts.items())))


def _touches_edge(detection: Detection, frame_size_px: tuple[int, int]) -> bool:
    width, height = frame_size_px
    box = detection.box
    return min(box.x_min, box.y_min) < EDGE_PX or box.x_max > width - EDGE_PX or box.y_max > height - EDGE_PX
