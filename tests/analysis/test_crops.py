"""Crops."""

from __future__ import annotations

import numpy as np
import pytest

from agent.analysis.crops import CropCutter, central_detection, cut_crop, whole_crop
from agent.domain import Box, Detection


def frame(width: int = 60, height: int = 40) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_a_crop_is_square_around_its_box_with_the_margin() -> None:
    pixels = frame()
    crop = cut_crop(pixels, Box(20, 10, 40, 20), 0.2)
    assert crop.shape == (24, 24, 3)
    assert np.array_equal(crop, pixels[3:27, 18:42])


@pytest.mark.parametrize("box", [Box(0, 0, 10, 10), Box(50, 30, 60, 40), Box(0, 0, 60, 40), Box(59, 39, 60, 40)])
def test_outside_the_frame_its_edge_is_repeated(box: Box) -> None:
    pixels = frame()
    crop = cut_crop(pixels, box, 0.5)
    assert crop.shape[0] == crop.shape[1] == max(2, round(max(box.width_px, box.height_px) * 1.5))
    known = {tuple(p) for p in pixels.reshape(-1, 3)}
    assert {tuple(p) for p in crop.reshape(-1, 3)} <= known


def test_a_whole_picture_becomes_a_square_that_holds_it() -> None:
    pixels = frame(30, 50)
    crop = whole_crop(pixels)
    assert crop.shape == (50, 50, 3)
    assert np.array_equal(crop[:, 10:40], pixels)


def test_the_central_cell_is_the_nearest_whose_box_holds_the_middle() -> None:
    wide, near, aside = (
        Detection(box, "WBC", 0.9) for box in (Box(0, 0, 100, 70), Box(40, 40, 62, 62), Box(70, 40, 90, 60))
    )
    red = Detection(Box(45, 45, 55, 55), "RBC", 0.9)
    assert central_detection((wide, near, aside, red), ("WBC", "platelet"), 100, 100) is near
    assert central_detection((aside, red), ("WBC", "platelet"), 100, 100) is None


GROUND = (201.0, 227.0, 253.0)
CELL = Box(24, 16, 36, 28)


def smear(lamp_bgr: tuple[float, float, float]) -> np.ndarray:
    """A dark cell on bright ground under a lamp of this colour, grey levels of the ground."""
    pixels = np.full((80, 80, 3), lamp_bgr, float)
    pixels[16:28, 24:36] *= (0.8, 0.4, 0.6)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("lamp", [(201, 227, 253), (150, 190, 250), (240, 235, 200)])
def test_what_is_classified_has_one_ground_whatever_the_lamp(lamp: tuple[float, float, float]) -> None:
    cutter = CropCutter(smear(lamp), 0.2, GROUND)
    expected = cut_crop(smear(GROUND), CELL, 0.2)
    assert np.abs(cutter.around(CELL).astype(int) - expected).max() <= 3
    assert np.abs(cutter.whole().astype(int) - smear(GROUND)).max() <= 3


def test_without_a_ground_in_the_manifest_the_light_stays_as_it_is() -> None:
    pixels = smear((150, 190, 250))
    cutter = CropCutter(pixels, 0.2, None)
    assert np.array_equal(cutter.around(CELL), cut_crop(pixels, CELL, 0.2))
    assert np.array_equal(cutter.whole(), whole_crop(pixels))
