"""What is drawn for dirt, grains of stain, fibres, bubbles and smeared cells."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.random import Generator

from models.common import debris
from models.common.labels import Rgb

GLASS = (235, 220, 225)


def glass(side: int) -> Rgb:
    return np.full((side, side, 3), GLASS, np.uint8)


def changed(pixels: Rgb) -> np.ndarray:
    """Where glass is glass no more."""
    found: np.ndarray = (np.abs(pixels.astype(int) - GLASS) > 12).any(2)
    return found


@pytest.mark.parametrize("draw", debris.KINDS.values(), ids=debris.KINDS.keys())
@pytest.mark.parametrize("side", [12, 128])
def test_each_piece_lies_on_the_glass_and_the_picture_that_is_given_stays(
    draw: Callable[[Rgb, Generator], Rgb], side: int
) -> None:
    shares = []
    for seed in range(10):
        before = glass(side)
        after = draw(before, np.random.default_rng(seed))
        assert after.shape == before.shape
        assert after.dtype == np.uint8
        assert (before == glass(side)).all()
        assert (after == draw(before, np.random.default_rng(seed))).all()
        shares.append(float(changed(after).mean()))
    assert min(shares) > 0
    assert max(shares) < 0.85
    assert len(set(shares)) > 5


def test_debris_on_a_field_leaves_its_cells_to_be_seen() -> None:
    cells = np.array([(20, 20, 120, 120), (150, 60, 190, 100)], np.float32)
    drawn = 0
    for seed in range(30):
        after = debris.littered(glass(300), cells, np.random.default_rng(seed))
        mask = changed(after)
        drawn += mask.any()
        for x_min, y_min, x_max, y_max in cells.astype(int):
            assert mask[y_min:y_max, x_min:x_max].mean() < 4 * debris.MOST_HIDDEN
    assert drawn == 30


def test_a_field_full_of_cells_gets_none() -> None:
    everywhere = np.array([(0, 0, 300, 300)], np.float32)
    small_only = debris.share_hidden(everywhere, 0, 0, 90)
    assert small_only == pytest.approx(0.09)
    assert debris.share_hidden(everywhere[:0], 0, 0, 90) == 0
    tiny = np.array([(x, y, x + 10, y + 10) for x in range(0, 300, 10) for y in range(0, 300, 10)], np.float32)
    assert (debris.littered(glass(300), tiny, np.random.default_rng(1)) == glass(300)).all()


def test_a_smeared_cell_is_drawn_out_along_one_line() -> None:
    crop = np.full((100, 100, 3), 200, np.uint8)
    crop[45:55, 45:55] = 40
    drawn = debris.smeared(crop, 0.4, 0) < 195
    assert drawn[..., 0].any(1).sum() <= 12
    assert 45 <= drawn[..., 0].any(0).sum() <= 55
