"""Frames into the square and back."""

from __future__ import annotations

import numpy as np
import pytest

from agent.inference.letterbox import letterbox


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (416, 416), (33, 1000), (1, 2), (5000, 3000)])
def test_a_frame_of_any_shape_keeps_its_proportions(width: int, height: int) -> None:
    square, placement = letterbox(np.zeros((height, width, 3), np.uint8), 416, 114)
    assert square.shape == (416, 416, 3)
    rows, columns = np.nonzero((square == 0).all(2))
    assert (columns.min(), rows.min()) == (placement.offset_x_px, placement.offset_y_px)
    assert columns.max() + 1 - columns.min() == pytest.approx(width * placement.scale_x)
    assert rows.max() + 1 - rows.min() == pytest.approx(height * placement.scale_y)
    assert max(columns.max() + 1 - columns.min(), rows.max() + 1 - rows.min()) == 416


def test_what_the_frame_does_not_cover_is_filled() -> None:
    square, placement = letterbox(np.zeros((100, 200, 3), np.uint8), 416, 114)
    assert (square[: placement.offset_y_px] == 114).all()
    assert placement.offset_y_px == 104
