"""Large frames of small cells, part by part: the detector learnt cells of a certain size in its square.

    frame --detect--> whole --red cells too small?--> tiles --detect--> found --join--> cells of the frame

A frame of a large sensor, shrunk into the square, shows red cells of twenty pixels and platelets of five, and the
platelets are lost. Then the frame is looked at once more in overlapping tiles in which a red cell has the size that the
detector knows. Red cells are the measure, as they are for haematologists: they are there in hundreds and all alike.

Pure. Sizes are in frame pixels unless said; a `Box` here has whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from agent.analysis.cells import typical_red_cell_px
from agent.domain import Box, Detection

SMALLEST_PX: Final = 40.0
"""Pixels of the square. Fields of three microscopes show red cells of 57 and more; at half of it platelets are lost."""

WANTED_PX: Final = 56.0
"""Pixels of the square that a red cell gets in a tile."""

OVERLAP: Final = 2.5
"""Red cells: a monocyte is not wider, so that each cell is whole in some tile."""

CUT_PX: Final = 2.0
"""Pixels of the square: a box that ends so near to the inner edge of its tile shows a part of a cell."""

PROBES: Final = 2
"""Times that the middle of a frame is looked at twice as large where no red cells are seen at all."""

Detect = Callable[[Box], tuple[Detection, ...]]
"""The cells of a part of the frame, in the frame's pixels."""


def find_in_parts(
    whole: tuple[Detection, ...],
    detect: Detect,
    classified: Sequence[str],
    size_px: tuple[int, int],
    side_px: int,
    most_tiles: int,
) -> tuple[list[Detection], bool]:
    """All boxes of a frame, those of one cell side by side, and whether tiles were needed.

    whole: what was found in the frame as a whole. classified: the detector's classes that are not red cells. size_px:
    width and height of the frame. side_px: of the detector's square.
    """
    red_cell_px = typical_red_cell_px(whole, classified, size_px)
    if red_cell_px is None:
        red_cell_px = probe(detect, classified, size_px, side_px)
    tiles = () if red_cell_px is None else plan_tiles(size_px, red_cell_px, side_px, most_tiles)
    if len(tiles) < 2 or red_cell_px is None:
        return list(whole), False
    # What is wider than the overlap may be cut in every tile; the frame as a whole shows it well.
    found = [d for d in whole if max(d.box.width_px, d.box.height_px) > OVERLAP * red_cell_px]
    for tile in tiles:
        cut_px = CUT_PX * max(tile.width_px, tile.height_px) / side_px
        found += [d for d in detect(tile) if is_whole(d.box, tile, size_px, cut_px)]
    return found, True


def plan_tiles(size_px: tuple[int, int], red_cell_px: float, side_px: int, most: int) -> tuple[Box, ...]:
    """Tiles, row by row, that show red cells at WANTED_PX; none where the frame as a whole shows them large enough.

    Where that needs more than `most` tiles they are as small as so many allow.
    """
    longest = max(size_px)
    if red_cell_px * side_px / longest >= SMALLEST_PX:
        return ()
    tile_px = max(side_px * red_cell_px / WANTED_PX, 1.5 * OVERLAP * red_cell_px)
    overlap_px = OVERLAP * red_cell_px
    while True:
        starts = [places(length, tile_px, overlap_px) for length in size_px]
        if len(starts[0]) * len(starts[1]) <= most or tile_px >= longest:
            break
        tile_px *= 1.05
    sides = [min(length, math.ceil(tile_px)) for length in size_px]
    return tuple(Box(x, y, x + sides[0], y + sides[1]) for y in starts[1] for x in starts[0])


def places(length_px: int, tile_px: float, overlap_px: float) -> list[int]:
    """Where tiles begin along a side: evenly, the first at 0, the last ending at the end."""
    side = min(length_px, math.ceil(tile_px))
    count = 1 if side == length_px else math.ceil((length_px - overlap_px) / (side - overlap_px))
    return [round(k * (length_px - side) / max(1, count - 1)) for k in range(count)]


def probe(detect: Detect, classified: Sequence[str], size_px: tuple[int, int], side_px: int) -> float | None:
    """Size of the red cells in the middle of a frame in which none were seen; None where there are none either."""
    width, height = size_px
    for step in range(1, PROBES + 1):
        part = (width >> step, height >> step)
        if max(part) < side_px:
            return None
        left, top = (width - part[0]) // 2, (height - part[1]) // 2
        middle = Box(left, top, left + part[0], top + part[1])
        moved = [replace(d, box=shifted(d.box, -left, -top)) for d in detect(middle)]
        if (found := typical_red_cell_px(moved, classified, part)) is not None:
            return found
    return None


def is_whole(box: Box, tile: Box, size_px: tuple[int, int], cut_px: float) -> bool:
    """Whether a box keeps away from the edges of its tile, but for those that are the frame's own."""
    return (
        (tile.x_min == 0 or box.x_min > tile.x_min + cut_px)
        and (tile.y_min == 0 or box.y_min > tile.y_min + cut_px)
        and (tile.x_max == size_px[0] or box.x_max < tile.x_max - cut_px)
        and (tile.y_max == size_px[1] or box.y_max < tile.y_max - cut_px)
    )


def shifted(box: Box, x_px: float, y_px: float) -> Box:
    return Box(box.x_min + x_px, box.y_min + y_px, box.x_max + x_px, box.y_max + y_px)
