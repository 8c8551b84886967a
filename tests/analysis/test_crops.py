"""Crops."""

from __future__ import annotations

import numpy as np
import pytest

from agent.analysis.crops import CropCutter, central_detection, cut_crop, shown_detection, whole_crop
from agent.analysis.preprocessing import Look, Relook, look_lab
from agent.analysis.quality import ground_colour
from agent.domain import Box, Detection, Pixels


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


def test_where_none_holds_the_middle_the_largest_sure_cell_is_shown_and_a_cut_one_counts_half() -> None:
    whole, cut, small = Box(60, 60, 90, 90), Box(60, 0.5, 99.5, 30), Box(5, 5, 20, 20)
    found = [Detection(box, "WBC", 0.6) for box in (small, whole, cut)]
    red = Detection(Box(1, 55, 45, 99), "RBC", 0.9)

    def shown(*detections: Detection) -> Box | None:
        answer = shown_detection(detections, ("WBC", "platelet"), 100, 100, 0.5)
        return None if answer is None else answer.box

    assert shown(red, *found) == whole
    assert shown(red, found[0], found[2]) == cut
    assert shown(red, Detection(whole, "WBC", 0.4)) is None
    faint = Detection(Box(40, 40, 60, 60), "platelet", 0.1)
    assert shown(*found, faint) == faint.box


CELL = Box(24, 16, 36, 28)


def smear(lamp_bgr: tuple[float, float, float], cell_bgr: tuple[float, float, float] = (0.8, 0.4, 0.6)) -> Pixels:
    """A stained cell on bright ground. lamp_bgr: grey levels of the ground. cell_bgr: what the cell lets through."""
    pixels = np.full((80, 80, 3), lamp_bgr, float)
    pixels[16:28, 24:36] *= cell_bgr
    return pixels.astype(np.uint8)


TAUGHT = smear((201, 227, 253))
LOOK = Look(ground_colour(TAUGHT), look_lab(TAUGHT))


@pytest.mark.parametrize("lamp", [(201, 227, 253), (150, 190, 250), (240, 235, 200)])
@pytest.mark.parametrize("cell", [(0.8, 0.4, 0.6), (0.85, 0.5, 0.7)])
def test_what_is_classified_has_one_light_and_stain_whatever_the_laboratorys(
    lamp: tuple[float, float, float], cell: tuple[float, float, float]
) -> None:
    crop = CropCutter(smear(lamp, cell), 0.2, LOOK).around(CELL)
    assert np.abs(crop.astype(int) - cut_crop(TAUGHT, CELL, 0.2)).max() <= 8


def test_of_a_picture_that_one_cell_fills_the_stain_is_left_as_it_is() -> None:
    picture = smear((150, 190, 250), (0.85, 0.5, 0.7))[10:34, 18:42]
    lit = smear((201, 227, 253), (0.85, 0.5, 0.7))[10:34, 18:42]
    cutter = CropCutter(picture, 0.2, LOOK)
    assert np.abs(cutter.around(Box(2, 2, 22, 22)).astype(int) - cut_crop(lit, Box(2, 2, 22, 22), 0.2)).max() <= 3
    assert np.abs(cutter.whole().astype(int) - lit).max() <= 3


def test_a_large_frame_has_the_look_of_the_same_frame_when_it_is_small() -> None:
    small = smear((150, 190, 250))
    large = np.kron(small, np.ones((20, 20, 1), np.uint8))
    shrunk, whole = Relook.of(large, LOOK), Relook.of(small, LOOK)
    assert shrunk.gains_bgr == pytest.approx(whole.gains_bgr, rel=0.02)
    assert np.ravel(shrunk.stain) == pytest.approx(np.ravel(whole.stain), abs=1.5)


def test_without_a_look_in_the_manifest_light_and_stain_stay_as_they_are() -> None:
    pixels = smear((150, 190, 250))
    cutter = CropCutter(pixels, 0.2, None)
    assert np.array_equal(cutter.around(CELL), cut_crop(pixels, CELL, 0.2))
    assert np.array_equal(cutter.whole(), whole_crop(pixels))
