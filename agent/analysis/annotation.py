"""A picture of a field with its cells marked, for people."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from agent.domain import Cell, CellStatus, Pixels

Colour = tuple[int, int, int]

MIN_WIDTH_PX = 800
"""px; smaller frames are enlarged to this, so that the words can be read."""

# B G R; distinct on the pink, violet and grey of a Giemsa stain, and by brightness for colour-blind eyes. Wong 2011
# (Nature Methods 8:441) and some more.
_COLOURS: tuple[Colour, ...] = (
    (178, 114, 0),
    (0, 94, 213),
    (115, 158, 0),
    (0, 0, 0),
    (233, 180, 86),
    (0, 159, 230),
    (0, 0, 170),
    (120, 0, 120),
    (0, 110, 110),
    (90, 60, 0),
)
_GREY: Colour = (128, 128, 128)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_LINE_PX = 24


def annotate(pixels_bgr: Pixels, cells: Sequence[Cell], class_names: Sequence[str], footer: str) -> Pixels:
    """The frame, enlarged where it is small, with a box for each cell and a legend with counts below it.

    class_names: in the manifest's order, so that a class has one colour in all pictures. Cells named by the classifier
    carry their class and probability; those named by the detector alone only their colour, which the legend explains.
    Returns a new array, uint8, B G R.
    """
    scale = max(1, math.ceil(MIN_WIDTH_PX / pixels_bgr.shape[1]))
    enlarged = cv2.resize(pixels_bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    picture: Pixels = np.array(enlarged, np.uint8)
    colours = {name: _COLOURS[index % len(_COLOURS)] for index, name in enumerate(class_names)}
    for cell in cells:
        _draw_box(picture, cell, scale, colours)
    for cell in cells:  # after all boxes, so that no word lies under one
        _draw_name(picture, cell, scale, colours)
    return np.vstack((picture, _legend(picture.shape[1], cells, colours, footer)))


def _colour(cell: Cell, colours: Mapping[str, Colour]) -> Colour:
    return _GREY if cell.status is CellStatus.UNIDENTIFIED else colours.get(cell.class_name, _GREY)


def _draw_box(picture: Pixels, cell: Cell, scale: int, colours: Mapping[str, Colour]) -> None:
    box = cell.detection.box
    left, top, right, bottom = (round(edge * scale) for edge in (box.x_min, box.y_min, box.x_max, box.y_max))
    thickness_px = 1 if cell.classification is None else 3
    cv2.rectangle(picture, (left, top), (right, bottom), _colour(cell, colours), thickness_px, cv2.LINE_AA)


def _draw_name(picture: Pixels, cell: Cell, scale: int, colours: Mapping[str, Colour]) -> None:
    if cell.classification is None:
        return
    words = f"{cell.class_name}{'?' if cell.status is CellStatus.UNIDENTIFIED else ''} {cell.probability:.2f}"
    box = cell.detection.box
    _write_on_plate(picture, words, round(box.x_min * scale), round(box.y_min * scale), _colour(cell, colours))


def _write_on_plate(picture: Pixels, words: str, left: int, bottom: int, colour: Colour) -> None:
    """White words on a plate of the cell's colour, moved so that it lies inside the picture."""
    (width, height), _ = cv2.getTextSize(words, _FONT, 0.5, 1)
    left = max(0, min(left, picture.shape[1] - width - 6))
    bottom = max(height + 8, bottom)
    cv2.rectangle(picture, (left, bottom - height - 8), (left + width + 6, bottom), colour, cv2.FILLED)
    cv2.putText(picture, words, (left + 3, bottom - 4), _FONT, 0.5, (255, 255, 255), 1, cv2.LINE_AA)


def _legend(width_px: int, cells: Sequence[Cell], colours: Mapping[str, Colour], footer: str) -> Pixels:
    """White rows with a word and a count for each class that is there, and the footer; (height, width_px, 3)."""
    is_counted = (CellStatus.ACCEPTED, CellStatus.EDGE)
    counts = {
        name: sum(cell.class_name == name and cell.status in is_counted for cell in cells)
        for name in dict.fromkeys((*colours, *(cell.class_name for cell in cells)))
    }
    words = [(f"{name} {count}", colours.get(name, _GREY)) for name, count in counts.items() if count]
    if unidentified := sum(cell.status is CellStatus.UNIDENTIFIED for cell in cells):
        words.append((f"unidentified {unidentified}", _GREY))
    rows: list[list[tuple[str, Colour, int]]] = [[]]
    left = 10
    for text, colour in words:
        length = cv2.getTextSize(text, _FONT, 0.55, 1)[0][0] + 40
        if rows[-1] and left + length > width_px:
            rows.append([])
            left = 10
        rows[-1].append((text, colour, left))
        left += length
    strip = np.full(((len(rows) + 1) * _LINE_PX + 8, width_px, 3), 255, np.uint8)
    for number, row in enumerate(rows, start=1):
        for text, colour, start in row:
            cv2.rectangle(strip, (start, number * _LINE_PX - 14), (start + 14, number * _LINE_PX), colour, cv2.FILLED)
            cv2.putText(strip, text, (start + 20, number * _LINE_PX - 1), _FONT, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(strip, footer, (10, len(strip) - 10), _FONT, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return strip
