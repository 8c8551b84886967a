"""Frames whose cells are too small or too large for the detector, which learnt cells of a certain size in its square.

    frame --detect--> whole --red cells too small?--> tiles --detect--> with the whole's widest boxes
                        `-----a cell fills it?------> with surroundings --detect--> with the whole's other boxes

A frame of a large sensor, shrunk into the square, shows red cells of twenty pixels and platelets of five, and the
platelets are lost. Then the frame is looked at once more in overlapping tiles in which a red cell has the size that the
detector knows. Red cells are the measure, as they are for haematologists: they are there in hundreds and all alike.
In a close-up the nucleus is boxed in place of its cell; then it is looked at with surroundings, its edge repeated.

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

CLOSE_UP: Final = 0.5
"""Share of the frame's longer side from which a box makes it a close-up."""

SURROUNDINGS: Final = 0.3
"""Width of what is put around a close-up, as a share of its longer side."""

LARGE: Final = 0.35
"""Share of a close-up's longer side from which a box is taken from the picture with surroundings."""

INSIDE: Final = 0.7
"""Share of a box that lies in a larger one of its class, from which it is a part of that cell."""

Detect = Callable[[Box], tuple[Detection, ...]]
"""The cells of a part of the frame, in the frame's pixels."""


def measure_red_cells(
    certain: Sequence[Detection],
    detect_certain: Detect,
    classified: Sequence[str],
    size_px: tuple[int, int],
    side_px: int,
) -> float | None:
    """Size of the red cells of a frame, px; None where there are none.

    certain: what is beyond doubt of what the frame as a whole shows; where that is too little, its middle is looked at
    closer. classified: the detector's classes that are not red cells. size_px: width and height of the frame. side_px:
    of the detector's square.
    """
    if (found := typical_red_cell_px(certain, classified, size_px)) is not None:
        return found
    width, height = size_px
    for step in range(1, PROBES + 1):
        part = (width >> step, height >> step)
        if max(part) < side_px:
            return None
        left, top = (width - part[0]) // 2, (height - part[1]) // 2
        middle = Box(left, top, left + part[0], top + part[1])
        moved = [replace(d, box=shifted(d.box, -left, -top)) for d in detect_certain(middle)]
        if (found := typical_red_cell_px(moved, classified, part)) is not None:
            return found
    return None


def find_in_tiles(
    whole: Sequence[Detection],
    detect: Detect,
    tiles: Sequence[Box],
    red_cell_px: float,
    size_px: tuple[int, int],
    side_px: int,
) -> list[Detection]:
    """All boxes of a frame of small cells, those of one cell side by side. The others: as in `measure_red_cells`.

    whole: what was found in the frame as a whole. What is wider than the overlap may be cut in every tile, and is taken
    from there.
    """
    found = [d for d in whole if longer_side(d.box) > OVERLAP * red_cell_px]
    for tile in tiles:
        cut_px = CUT_PX * longer_side(tile) / side_px
        found += [d for d in detect(tile) if is_whole(d.box, tile, size_px, cut_px)]
    return found


def is_close_up(hints: Sequence[Detection], classified: Sequence[str], size_px: tuple[int, int]) -> bool:
    """Whether a cell fills the frame, or nothing is seen in it at all. hints: what was found in it as a whole."""
    longest_px = max(size_px)
    return not hints or any(d.class_name in classified and longer_side(d.box) > CLOSE_UP * longest_px for d in hints)


def put_large_right(
    whole: Sequence[Detection], around: Sequence[Detection], classified: Sequence[str], size_px: tuple[int, int]
) -> tuple[Detection, ...]:
    """The boxes of a close-up, best score first: those of the cells that fill it from the picture with surroundings.

    around: what was found with surroundings, in the frame's pixels. Red cells stay as they were: at the frame's edge
    the repeated pixels make them longer than they are.
    """
    longest_px = max(size_px)
    large = [d for d in around if d.class_name in classified and longer_side(d.box) > LARGE * longest_px]
    rest = (d for d in whole if not any(d.class_name == o.class_name and is_inside(d.box, o.box) for o in large))
    return tuple(sorted((*large, *rest), key=lambda d: -d.score))


def longer_side(box: Box) -> float:
    """Pixels."""
    return max(box.width_px, box.height_px)


def is_inside(box: Box, other: Box) -> bool:
    """Whether most of a box lies in another one."""
    width = min(box.x_max, other.x_max) - max(box.x_min, other.x_min)
    height = min(box.y_max, other.y_max) - max(box.y_min, other.y_min)
    return max(0.0, width) * max(0.0, height) >= INSIDE * box.width_px * box.height_px


def plan_tiles(size_px: tuple[int, int], red_cell_px: float, side_px: int, most: int) -> tuple[Box, ...]:
    """Tiles, row by row, that show red cells at WANTED_PX; none where the frame as a whole shows them large enough.

    Where that needs more than `most` tiles they are as small as so many allow; with too few allowed there are none.
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
    if len(starts[0]) * len(starts[1]) == 1:
        return ()
    sides = [min(length, math.ceil(tile_px)) for length in size_px]
    return tuple(Box(x, y, x + sides[0], y + sides[1]) for y in starts[1] for x in starts[0])


def places(length_px: int, tile_px: float, overlap_px: float) -> list[int]:
    """Where tiles begin along a side: evenly, the first at 0, the last ending at the end."""
    side = min(length_px, math.ceil(tile_px))
    count = 1 if side == length_px else math.ceil((length_px - overlap_px) / (side - overlap_px))
    return [round(k * (length_px - side) / max(1, count - 1)) for k in range(count)]


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


def cut_at(box: Box, size_px: tuple[int, int]) -> Box:
    """The part of a box that lies in a frame of this size; empty where none does."""
    (x_min, x_max), (y_min, y_max) = (
        (min(max(low, 0.0), float(side)), min(max(high, 0.0), float(side)))
        for low, high, side in ((box.x_min, box.x_max, size_px[0]), (box.y_min, box.y_max, size_px[1]))
    )
    return Box(x_min, y_min, x_max, y_max)
