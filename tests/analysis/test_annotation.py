"""A picture of a field with its cells marked."""

from __future__ import annotations

import numpy as np

from agent.analysis.annotation import MIN_WIDTH_PX, annotate
from agent.domain import Box, Cell, CellStatus, Classification, Detection

CLASSES = ("round", "oval", "tiny")
A_BOX = Box(20, 30, 60, 80)


def make_cell(
    class_name: str = "round",
    box: Box = A_BOX,
    status: CellStatus = CellStatus.ACCEPTED,
    is_named: bool = True,
) -> Cell:
    classification = Classification(class_name, 0.9, {class_name: 0.9}) if is_named else None
    return Cell("s-1", Detection(box, "cell", 0.8), class_name, 0.9, classification, status)


def blank(width_px: int = 200, height_px: int = 100) -> np.ndarray:
    pixels = np.full((height_px, width_px, 3), 255, np.uint8)
    pixels.flags.writeable = False
    return pixels


def test_a_small_frame_is_enlarged_and_gets_a_legend_below():
    picture = annotate(blank(), [make_cell()], CLASSES, "footer")
    assert picture.dtype == np.uint8
    assert picture.shape[1] == MIN_WIDTH_PX
    assert picture.shape[0] > 100 * MIN_WIDTH_PX / 200


def test_a_large_frame_keeps_its_size():
    assert annotate(blank(1000, 500), [], CLASSES, "footer").shape[1] == 1000


def test_the_box_is_drawn_where_the_cell_is_and_the_frame_stays_as_it_was():
    frame = blank()
    picture = annotate(frame, [make_cell(is_named=False)], CLASSES, "footer")
    scale = MIN_WIDTH_PX // 200
    assert (picture[50 * scale, 20 * scale] != 255).any()  # left side
    assert (picture[50 * scale, 40 * scale] == 255).all()  # inside
    assert (frame == 255).all()


def test_a_class_has_the_same_colour_in_every_picture():
    def side_colour(cells: list[Cell]) -> tuple[int, ...]:
        return tuple(annotate(blank(1000, 500), cells, CLASSES, "f")[50, 20])

    other = make_cell("tiny", Box(500, 300, 600, 400))
    assert side_colour([make_cell(is_named=False)]) == side_colour([other, make_cell(is_named=False)])
    assert side_colour([make_cell(is_named=False)]) != side_colour([make_cell("oval", is_named=False)])


def test_words_at_the_edge_stay_inside_and_unknown_classes_and_many_of_them_are_drawn():
    cells = [make_cell(f"class-{number}", Box(0, 0, 10, 10), CellStatus.EDGE) for number in range(30)]
    cells.append(make_cell(box=Box(150, 90, 199, 99), status=CellStatus.UNIDENTIFIED))
    few = annotate(blank(), [make_cell()], CLASSES, "footer")
    many = annotate(blank(), cells, CLASSES, "footer")
    assert many.shape[0] > few.shape[0]  # the legend takes more rows
