"""Frames whose cells are too small or too large: tiles that lose nothing at their edges, close-ups put right."""

from __future__ import annotations

import numpy as np
import pytest

from agent.camera.simulated import render_training_field
from agent.config import ModelsSection
from agent.domain import Box, Detection
from agent.inference.merging import box_overlaps
from agent.inference.models import open_models
from agent.inference.second_look import (
    OVERLAP,
    cut_at,
    find_in_tiles,
    is_close_up,
    is_whole,
    measure_red_cells,
    places,
    plan_tiles,
    put_large_right,
)

SIDE_PX = 416
CLASSIFIED = ("WBC", "platelet")


def red(x: float, y: float, size_px: float = 30) -> Detection:
    return Detection(Box(x, y, x + size_px, y + size_px), "RBC", 0.9)


def test_a_frame_that_shows_its_cells_large_is_looked_at_as_a_whole() -> None:
    assert plan_tiles((640, 480), 90, SIDE_PX, 16) == ()
    assert plan_tiles((1920, 1440), 250, SIDE_PX, 16) == ()


@pytest.mark.parametrize("size_px", [(1920, 1080), (2592, 1944), (1000, 3000)])
def test_every_cell_is_whole_in_some_tile(size_px: tuple[int, int]) -> None:
    red_cell_px = 70.0
    tiles = plan_tiles(size_px, red_cell_px, SIDE_PX, 64)
    assert len(tiles) > 3
    widest = int(OVERLAP * red_cell_px) - 1
    rng = np.random.default_rng(1)
    for x, y in rng.integers(0, np.array(size_px) - widest, (500, 2)):
        cell = Box(x, y, x + widest, y + widest)
        inside = [t for t in tiles if t.x_min <= x and t.y_min <= y and cell.x_max <= t.x_max and cell.y_max <= t.y_max]
        assert inside, cell


def test_where_a_single_tile_is_allowed_there_is_none() -> None:
    assert plan_tiles((4000, 3000), 40, SIDE_PX, 1) == ()


@pytest.mark.parametrize("most", [4, 9, 16])
def test_there_are_never_more_tiles_than_allowed_and_they_reach_every_edge(most: int) -> None:
    tiles = plan_tiles((4000, 3000), 40, SIDE_PX, most)
    assert 1 <= len(tiles) <= most
    assert (min(t.x_min for t in tiles), min(t.y_min for t in tiles)) == (0, 0)
    assert (max(t.x_max for t in tiles), max(t.y_max for t in tiles)) == (4000, 3000)


def test_tiles_are_spread_evenly() -> None:
    assert places(1000, 400, 100) == [0, 300, 600]
    assert places(300, 400, 100) == [0]


@pytest.mark.parametrize(
    ("box", "is_kept"),
    [
        (Box(101, 120, 150, 150), False),
        (Box(110, 199, 130, 200), False),
        (Box(110, 0, 130, 20), True),
        (Box(110, 120, 130, 150), True),
    ],
)
def test_a_box_at_an_inner_edge_of_its_tile_is_a_part_of_a_cell(box: Box, is_kept: bool) -> None:
    assert is_whole(box, Box(100, 0, 200, 200), (300, 400), cut_px=2) == is_kept


def test_what_is_too_wide_for_the_overlap_is_taken_from_the_whole_frame_and_small_cells_from_tiles() -> None:
    whole = (*(red(200 * k, 300) for k in range(1, 8)), Detection(Box(500, 500, 620, 620), "WBC", 0.8))
    tiles = (Box(0, 0, 600, 600), Box(400, 0, 1000, 600))

    def detect(tile: Box) -> tuple[Detection, ...]:
        return (red(tile.x_min + 50, tile.y_min + 50), red(tile.x_max - 30, tile.y_min + 50))

    found = find_in_tiles(whole, detect, tiles, 30, (1000, 600), SIDE_PX)
    assert [(d.class_name, d.box.x_min) for d in found] == [("WBC", 500), ("RBC", 50), ("RBC", 450), ("RBC", 970)]


def test_cells_too_small_to_be_seen_at_all_are_looked_for_in_the_middle() -> None:
    asked: list[Box] = []

    def detect(tile: Box) -> tuple[Detection, ...]:
        asked.append(tile)
        if tile.width_px > 1000:
            return ()
        return tuple(red(tile.x_min + 100 + 60 * k, tile.y_min + 100, 20) for k in range(3))

    assert measure_red_cells((), detect, CLASSIFIED, (3000, 2000), SIDE_PX) == 20
    assert [tile.width_px for tile in asked] == [1500, 750]


def test_an_empty_small_frame_is_not_looked_at_closer() -> None:
    def detect(_tile: Box) -> tuple[Detection, ...]:
        raise AssertionError("looked again")

    assert measure_red_cells((), detect, CLASSIFIED, (640, 480), SIDE_PX) is None


@pytest.mark.parametrize(
    ("hints", "is_one"),
    [
        ((Detection(Box(0, 0, 60, 40), "WBC", 0.3),), True),
        ((Detection(Box(0, 0, 40, 40), "WBC", 0.9),), False),
        ((Detection(Box(0, 0, 60, 40), "RBC", 0.9),), False),
        ((), True),
    ],
)
def test_a_close_up_is_a_frame_that_a_white_cell_fills_or_in_which_nothing_is_seen(
    hints: tuple[Detection, ...], is_one: bool
) -> None:
    assert is_close_up(hints, CLASSIFIED, (100, 80)) == is_one


def test_in_a_close_up_the_whole_cell_takes_the_place_of_its_nucleus() -> None:
    nucleus, far = Detection(Box(30, 30, 70, 70), "WBC", 0.9), red(80, 80, 15)
    cell, cut_red = Detection(Box(10, 10, 90, 90), "WBC", 0.6), red(60, 0, 40)
    assert put_large_right((nucleus, far), (cell, cut_red), CLASSIFIED, (100, 100)) == (far, cell)


@pytest.mark.parametrize(
    ("box", "cut"), [(Box(-5, 10, 20, 120), Box(0, 10, 20, 80)), (Box(-9, -9, -1, -1), Box(0, 0, 0, 0))]
)
def test_what_reaches_over_the_frame_is_cut_at_its_edge(box: Box, cut: Box) -> None:
    assert cut_at(box, (100, 80)) == cut


def test_a_frame_of_nine_fields_is_found_to_hold_their_cells_each_once() -> None:
    rng = np.random.default_rng(6)
    fields = [render_training_field(rng, 480, 360) for _ in range(9)]
    rows = [np.hstack([pixels for pixels, _ in fields[k : k + 3]]) for k in (0, 3, 6)]
    frame = np.ascontiguousarray(np.vstack(rows))
    wanted = sum(len(truth) for _, truth in fields)
    counts = {}
    for most in (1, 16):
        models = open_models(ModelsSection(most_tiles=most))
        detections = models.detector.detect(frame)
        counts[most] = len(detections)
        assert [d.score for d in detections] == sorted((d.score for d in detections), reverse=True)
        boxes = np.array([(d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max) for d in detections], np.float32)
        assert (np.triu(box_overlaps(boxes, boxes), 1) <= models.manifest.detector.thresholds.same_cell_iou).all()
    assert abs(counts[16] - wanted) < abs(counts[1] - wanted)
    assert counts[16] == pytest.approx(wanted, rel=0.12)
