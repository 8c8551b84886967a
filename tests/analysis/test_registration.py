"""Registration: finds the overlap of two fields, and says so where there is none."""

from __future__ import annotations

import math

import numpy as np
import pytest

from agent.analysis.registration import Shift, from_jpeg, register, take_view, to_jpeg
from tests.proofs.scanning import Window, World, simulated_world, take

SIZE_PX = (640, 480)
CORNERS = np.asarray([[0.0, 0.0], [640.0, 0.0], [0.0, 480.0], [640.0, 480.0]])


@pytest.fixture(scope="module")
def world() -> World:
    return simulated_world(31, 2000, 1500)


def view_at(world: World, x: float, y: float, turn: float = 0.0, blur_px: float = 0.0):
    rng = np.random.default_rng(round(x + 7 * y))
    return take_view(take(world, Window(x, y, turn, blur_px), SIZE_PX, rng, 1).pixels_bgr)


def furthest_miss(found: Shift, truth: Shift) -> float:
    """px; of any corner of the frame."""
    return float(np.hypot(*(found.apply_all(CORNERS) - truth.apply_all(CORNERS)).T).max())


@pytest.mark.parametrize(("x", "y"), [(448, 20), (-448, -20), (15, 336), (-320, 240), (512, 0)])
def test_fields_that_overlap_by_a_fifth_and_more_are_found_to_a_few_pixels(world: World, x: float, y: float) -> None:
    old, new = view_at(world, 700, 500), view_at(world, 700 + x, 500 + y)
    found = register(new, old)
    assert found is not None
    assert furthest_miss(found, Shift(x, y)) < 6
    assert found.agreement > 0.85


def test_most_strips_of_seven_percent_are_found_where_the_cells_bear_witness(world: World) -> None:
    rng = np.random.default_rng(6)
    alone, witnessed = 0, 0
    for number in range(16):
        x, y = rng.uniform((50, 50), (650, 480))
        truth = Shift(594, rng.uniform(-15, 15)) if number % 2 else Shift(rng.uniform(-15, 15), 446)
        old, new = view_at(world, x, y), view_at(world, x + truth.x, y + truth.y)
        found = register(new, old, witness=lambda shift, truth=truth: furthest_miss(shift, truth) < 30)
        witnessed += found is not None
        alone += register(new, old) is not None
    assert witnessed >= 12
    assert alone < witnessed


def test_what_the_cells_contradict_is_no_common_place(world: World) -> None:
    old, new = view_at(world, 700, 500), view_at(world, 900, 500)
    assert register(new, old) is not None
    assert register(new, old, [Shift(200, 0)], witness=lambda _shift: False) is None


def test_a_turn_of_two_degrees_and_another_focus_are_followed(world: World) -> None:
    old, new = view_at(world, 700, 500), view_at(world, 900, 560, math.radians(2), blur_px=3)
    found = register(new, old)
    assert found is not None
    assert found.turn == pytest.approx(math.radians(2), abs=math.radians(0.4))
    assert furthest_miss(found, Shift(200, 60, math.radians(2))) < 8


def test_fields_apart_have_no_shift(world: World) -> None:
    views = [view_at(world, x, y) for x, y in ((0, 0), (660, 0), (1330, 0), (0, 500), (660, 500), (1330, 990))]
    assert not [(a, b) for a in range(6) for b in range(a) if register(views[a], views[b]) is not None]


def test_a_proposal_that_is_nearly_right_is_enough_for_a_narrow_strip(world: World) -> None:
    old, new = view_at(world, 700, 500), view_at(world, 700 + 590, 500)
    found = register(new, old, [Shift(600, 8)], searches=False)
    assert found is not None
    assert furthest_miss(found, Shift(590, 0)) < 15
    assert register(new, old, [Shift(200, 100)], searches=False) is None


def test_dust_on_the_sensor_does_not_hold_a_moving_slide(world: World) -> None:
    rng = np.random.default_rng(5)
    spots = rng.uniform((0, 0), SIZE_PX, (25, 2)).astype(int)

    def dusty(x: float) -> np.ndarray:
        pixels = take(world, Window(x, 500), SIZE_PX, rng, 1).pixels_bgr.copy()
        for spot_x, spot_y in spots:
            pixels[max(0, spot_y - 5) : spot_y + 5, max(0, spot_x - 5) : spot_x + 5] //= 2
        return pixels

    found = register(take_view(dusty(1000)), take_view(dusty(700)))
    assert found is not None
    assert furthest_miss(found, Shift(300, 0)) < 6


def test_bare_glass_and_frames_of_another_size_are_not_registered(world: World) -> None:
    glass = take_view(np.full((480, 640, 3), 210, np.uint8))
    field = view_at(world, 700, 500)
    assert register(glass, glass) is None
    assert register(glass, field) is None
    assert register(take_view(np.full((48, 64, 3), 210, np.uint8)), field) is None
    assert register(take_view(np.full((1, 9, 3), 210, np.uint8)), take_view(np.full((1, 9, 3), 9, np.uint8))) is None


def test_a_stored_view_registers_like_a_fresh_one_and_is_small(world: World) -> None:
    old, new = view_at(world, 700, 500), view_at(world, 1000, 600)
    coded = to_jpeg(old)
    assert len(coded) < 5000
    found = register(new, from_jpeg(coded, old.factor))
    assert found is not None
    assert furthest_miss(found, Shift(300, 100)) < 6


def test_shifts_can_be_followed_and_turned_back() -> None:
    first, second = Shift(10, -5, 0.03), Shift(-200, 80, -0.01)
    there = np.asarray(second.apply(*first.apply(33, 44)))
    assert np.allclose(first.then(second).apply(33, 44), there)
    assert np.allclose(first.then(second).inverse().apply(*there), (33, 44))
    assert np.allclose(first.apply_all(np.asarray([[33.0, 44.0]])), [first.apply(33, 44)])
