"""Boxes of two overlapping fields: which show one cell, cut by an edge or not."""

from __future__ import annotations

import numpy as np

from agent.analysis.field_boxes import boxes_agree, match_boxes
from agent.analysis.registration import Shift

SIZE_PX = (640, 480)


def test_cells_bear_witness_to_a_shift_or_against_it() -> None:
    rng = np.random.default_rng(2)
    corners = rng.uniform(20, (540, 380), (30, 2))
    old = np.concatenate((corners, corners + 60), axis=1)
    new = old - (500, 0, 500, 0)
    new = new[new[:, 2] > 5].clip((0, 0, 0, 0))
    assert boxes_agree(new, SIZE_PX, old, SIZE_PX, Shift(500, 0)) is True
    assert boxes_agree(old, SIZE_PX, old + 45.0, SIZE_PX, Shift(0, 0)) is False
    assert boxes_agree(old[:2], SIZE_PX, old[:2], SIZE_PX, Shift(0, 0)) is None
    assert boxes_agree(old, SIZE_PX, old, SIZE_PX, Shift(640, 0)) is None


def test_a_small_cell_on_a_large_one_is_not_the_large_one() -> None:
    old = np.asarray([[100.0, 100, 180, 180]])
    new = np.asarray([[101.0, 100, 180, 181], [150, 150, 170, 170]])
    assert match_boxes(new, SIZE_PX, old, SIZE_PX, Shift(0, 0)) == [(0, 0)]


def test_a_cell_that_only_one_of_two_fields_can_show_is_none_of_the_other() -> None:
    """Where a strip ends lies a cell of the one; level with it, but far beyond the strip, one of the other."""
    beside = Shift(SIZE_PX[0] * 0.8, 0)
    at_the_end = np.asarray([(SIZE_PX[0] - 90, 100, SIZE_PX[0], 190.0)])
    beyond = np.asarray([(SIZE_PX[0] - 150, 110, SIZE_PX[0] - 60, 185.0)])
    assert match_boxes(beyond, SIZE_PX, at_the_end, SIZE_PX, beside) == []


def test_a_corner_of_one_cell_within_another_that_ends_elsewhere_is_not_that_cell() -> None:
    beside = Shift(-SIZE_PX[0] * 0.8, 0)
    strip = SIZE_PX[0] * 0.8
    # Of the new field's cell the old one shows four pixels, on which a cell lies that goes on to the right.
    corner, other = np.asarray([(strip - 170, 130, strip + 4, 270.0)]), np.asarray([(0, 60, 160, 220.0)])
    assert match_boxes(corner, SIZE_PX, other, SIZE_PX, beside) == []
    # What the old field shows of the same cell ends with it.
    assert match_boxes(corner, SIZE_PX, np.asarray([(0, 150, 5, 220.0)]), SIZE_PX, beside) == [(0, 0)]
