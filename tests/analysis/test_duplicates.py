"""Each cell once: by place and look, over edges, revisits, better views, dirt, and a restart in the middle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest

from agent.analysis import placing
from agent.analysis.duplicates import Observation, SlideMap, map_from_traces
from agent.analysis.traces import trace_from_text, trace_to_text
from agent.domain import Box, Cell, CellStatus, Detection, Frame
from tests.proofs.count_once import BOUNDS, PerfectScan, scan_perfect, scans
from tests.proofs.scanning import (
    TrueCell,
    Window,
    World,
    after_a_jump,
    meander,
    perfect_cells,
    simulated_world,
    take,
    truth_in,
    with_revisits,
)

SIZE_PX = (640, 480)
WORLD_PX = (1700, 1300)


@pytest.fixture(scope="module")
def world() -> World:
    return simulated_world(41, *WORLD_PX)


def make_cell(
    number: int,
    box: tuple[float, float, float, float],
    name: str = "RBC",
    status: CellStatus = CellStatus.ACCEPTED,
    probability: float = 0.9,
) -> Cell:
    return Cell(f"s-{number}", Detection(Box(*box), name, 0.9), name, probability, None, status)


CELLS = tuple(make_cell(100 + n, (60 * n + 5, 50, 60 * n + 45, 90)) for n in range(5))


class Stage:
    """Fields of a world, each with the cells that the test puts there; the stage tells its place."""

    def __init__(self, world: World | None = None) -> None:
        self.slide = SlideMap("s")
        self.totals: Counter[str] = Counter()
        self.texts: list[str] = []
        self._world = world
        self._number = 0

    def visit(self, x: float, y: float, cells: Iterable[Cell], *, tells_place: bool = True) -> Observation:
        rng = np.random.default_rng(self._number)
        self._number += 1
        known = {"um_per_px": 1.0, "stage_um": (x, y)} if tells_place else {}
        if self._world is None:
            pixels = np.full((480, 640, 3), 200, np.uint8)
            now = datetime(2026, 11, 25, tzinfo=timezone.utc)
            frame = Frame(self._number, pixels, now, 0, f"{self._number:064x}", "test", **known)
        else:
            frame = take(self._world, Window(x, y), SIZE_PX, rng, self._number, **known)
        observed = self.slide.observe(frame, tuple(cells))
        self.texts.append(trace_to_text(observed.trace))
        self.slide.add(observed.trace)
        self.totals.update(observed.unique_counts)
        return observed


def test_a_cell_seen_again_in_an_overlapping_field_is_a_duplicate_of_the_first_view() -> None:
    stage = Stage()
    first = stage.visit(0, 0, [make_cell(1, (400, 100, 480, 180))])
    again = stage.visit(200, 0, [make_cell(2, (202, 101, 281, 180)), make_cell(3, (500, 300, 580, 380))])
    assert (first.unique_counts, first.cells[0].is_counted) == ({"RBC": 1}, True)
    assert again.unique_counts == {"RBC": 1}
    assert (again.cells[0].status, again.cells[0].duplicate_of) == (CellStatus.DUPLICATE, "s-1")
    assert again.duplicates == 1
    assert again.new_share == pytest.approx(200 / 640, abs=0.05)


def test_a_duplicate_of_a_duplicate_names_the_view_that_stands() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (500, 100, 580, 180))])
    stage.visit(200, 0, [make_cell(2, (300, 100, 380, 180))])
    third = stage.visit(400, 0, [make_cell(3, (100, 100, 180, 180))])
    assert third.cells[0].duplicate_of == "s-1"


@pytest.mark.parametrize(
    ("box", "is_counted"),
    [
        ((0, 100, 40, 180), True),
        ((100, 0, 180, 40), True),
        ((600, 100, 640, 180), False),
        ((100, 440, 180, 480), False),
        ((0, 440, 40, 480), False),
    ],
)
def test_cells_cut_by_the_edge_follow_the_two_sides_rule(
    box: tuple[float, float, float, float], is_counted: bool
) -> None:
    observed = Stage().visit(0, 0, [make_cell(1, box, status=CellStatus.EDGE)])
    assert observed.unique_counts == ({"RBC": 1} if is_counted else {})
    assert (observed.cells[0].status, observed.cells[0].is_counted) == (CellStatus.EDGE, is_counted)


def test_a_cell_across_two_fields_that_only_touch_is_counted_once() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (600, 100, 640, 180), status=CellStatus.EDGE)])
    stage.visit(640, 0, [make_cell(2, (0, 100, 40, 180), status=CellStatus.EDGE)])
    assert stage.totals == {"RBC": 1}


def test_a_cut_cell_is_taken_from_the_neighbour_that_shows_it_whole() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (590, 100, 640, 180), "unknown", CellStatus.EDGE)])
    whole = stage.visit(400, 0, [make_cell(2, (190, 100, 270, 180), "neutrophil")])
    assert stage.totals == {"neutrophil": 1}
    assert (whole.cells[0].status, whole.cells[0].supersedes) == (CellStatus.ACCEPTED, ())


def test_a_sliver_at_the_edge_is_the_cell_that_its_neighbour_shows_whole() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (321, 100, 401, 180))])
    sliver = stage.visit(400, 0, [make_cell(2, (0, 120, 2, 160), status=CellStatus.EDGE)])
    assert (sliver.cells[0].duplicate_of, stage.totals) == ("s-1", {"RBC": 1})


def test_a_cut_cell_that_the_neighbour_does_not_see_though_it_shows_more_of_it_is_none() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (100, 100, 180, 180))])
    beside = stage.visit(400, 0, [make_cell(2, (0, 300, 40, 380), status=CellStatus.EDGE)])
    assert (beside.cells[0].is_counted, beside.cells[0].status) == (False, CellStatus.EDGE)
    above = stage.visit(400, -400, [make_cell(3, (0, 100, 40, 180), status=CellStatus.EDGE)])
    assert above.cells[0].is_counted  # beyond this edge nobody has looked


def test_two_views_that_a_third_shows_to_be_one_cell_count_once() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (300, 100, 345, 180))])
    stage.visit(10, 0, [make_cell(2, (335, 100, 370, 180), probability=0.8)])
    assert stage.totals == {"RBC": 2}
    third = stage.visit(20, 0, [make_cell(3, (280, 100, 360, 180))])
    assert (third.cells[0].status, third.cells[0].duplicate_of) == (CellStatus.DUPLICATE, "s-1")
    assert third.cells[0].supersedes == ("s-2",)
    again = stage.visit(30, 0, [make_cell(4, (315, 100, 350, 180))])
    assert again.cells[0].duplicate_of == "s-1"
    assert stage.totals == {"RBC": 1}


def test_cells_that_one_field_shows_beside_each_other_are_never_made_one() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (302, 100, 382, 180)), make_cell(2, (344, 100, 424, 180))])
    stage.visit(10, 0, [make_cell(3, (286, 100, 366, 180)), make_cell(4, (328, 100, 408, 180))])
    assert stage.totals == {"RBC": 2}
    between = stage.visit(20, 0, [make_cell(5, (300, 100, 380, 180))])  # more like the one, and more like the other
    assert (between.cells[0].status, between.cells[0].supersedes) == (CellStatus.DUPLICATE, ())
    assert stage.totals == {"RBC": 2}


def test_a_picture_that_does_not_fit_is_lost_whatever_the_stage_says(world: World) -> None:
    stage = Stage(world)
    stage.visit(100, 100, ())
    rng = np.random.default_rng(9)
    told = {"um_per_px": 1.0, "stage_um": (120.0, 100.0)}
    assert not stage.slide.places.is_lost(take(world, Window(120, 100), SIZE_PX, rng, 7, **told))
    assert stage.slide.places.is_lost(take(world, Window(900, 700), SIZE_PX, rng, 8, **told))
    assert not SlideMap("s").places.is_lost(take(world, Window(120, 100), SIZE_PX, rng, 9, **told))


def test_the_errors_of_a_long_way_do_not_add_up_where_rows_lie_side_by_side(world: World) -> None:
    slide = SlideMap("s")
    rng = np.random.default_rng(3)
    windows = meander(world, SIZE_PX, 0.4)
    for number, window in enumerate(windows * 2, start=1):
        observed = slide.observe(take(world, window, SIZE_PX, rng, number), ())
        slide.add(observed.trace)
        at = observed.place.shift
        off = np.hypot(at.x - (window.x - windows[0].x), at.y - (window.y - windows[0].y))
        assert (observed.place.part, off < 6) == (1, True), (number, off)


def test_a_field_that_has_nothing_in_common_with_the_one_before_is_found_by_the_row_beside(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bubble in the oil hides the strip that it shares with the field before; with the row above it shares 30 px."""
    monkeypatch.setattr(placing, "SEARCH_BEST", 0)  # on a slide of more than six fields others look more alike
    bubble = world.pixels_bgr.copy()
    bubble[450:930, 535:640] = world.pixels_bgr[450:930, 900:1005]
    places = ((0, 0), (535, 0), (1050, 0), (1050, 450), (535, 450), (0, 450))
    slide, rng = SlideMap("s"), np.random.default_rng(3)
    for number, (x, y) in enumerate(places, start=1):
        shown = replace(world, pixels_bgr=bubble) if number == len(places) else world
        cells = perfect_cells(truth_in(world, Window(x, y), SIZE_PX), 100 * number, rng, 1.0)
        observed = slide.observe(take(shown, Window(x, y), SIZE_PX, rng, number), cells)
        slide.add(observed.trace)
    at = observed.place
    assert (at.source, at.part) == ("registered", 1)
    assert np.hypot(at.shift.x, at.shift.y - 450) < 6


def test_a_better_view_takes_the_place_of_the_one_that_was_counted() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (0, 100, 40, 180), "lymphocyte", CellStatus.EDGE)])
    better = stage.visit(-400, 0, [make_cell(2, (360, 100, 440, 180), "monocyte")])
    assert better.unique_counts == {"lymphocyte": -1, "monocyte": 1}
    assert (better.cells[0].is_counted, better.cells[0].supersedes) == (True, ("s-1",))
    later = stage.visit(-300, 0, [make_cell(3, (260, 100, 340, 180), "lymphocyte", probability=0.95)])
    assert later.unique_counts == {}
    assert later.cells[0].duplicate_of == "s-2"
    assert +stage.totals == {"monocyte": 1}


def test_what_a_person_has_named_stands_against_better_views() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (300, 200, 340, 240), "neutrophil", probability=0.6)])
    stage.slide.hold("s-1")
    stage.slide.hold("s-99")  # a cell that is not on the map
    better = stage.visit(100, 0, [make_cell(2, (200, 200, 240, 240), "neutrophil", probability=0.95)])
    assert (better.cells[0].status, better.cells[0].duplicate_of) == (CellStatus.DUPLICATE, "s-1")
    assert stage.totals == {"neutrophil": 1}


def test_a_name_takes_the_place_of_unidentified_and_never_the_reverse() -> None:
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (400, 100, 480, 180), "monocyte", CellStatus.UNIDENTIFIED, 0.4)])
    stage.visit(100, 0, [make_cell(2, (300, 100, 380, 180), "monocyte", probability=0.8)])
    stage.visit(200, 0, [make_cell(3, (200, 100, 280, 180), "monocyte", CellStatus.UNIDENTIFIED, 0.4)])
    assert +stage.totals == {"monocyte": 1}


def test_fields_without_a_place_say_so_and_count_by_the_two_sides_rule(world: World) -> None:
    stage = Stage(world)
    first = stage.visit(0, 0, [make_cell(1, (10, 10, 90, 90))], tells_place=False)
    second = stage.visit(900, 700, [make_cell(2, (10, 10, 90, 90))], tells_place=False)
    assert [first.place.source, second.place.source] == ["unknown", "unknown"]
    assert first.place.part != second.place.part
    assert second.place.confidence == 0
    assert stage.totals == {"RBC": 2}


def test_dirt_on_the_sensor_is_an_artefact_from_its_third_appearance_and_is_taken_back() -> None:
    world = simulated_world(43, *WORLD_PX)
    stage = Stage()
    rng = np.random.default_rng(1)
    observed = []
    for number in range(5):
        frame = take(world, Window(150.0 * number, 100), SIZE_PX, rng, number + 1)
        pixels = frame.pixels_bgr.copy()
        pixels[300:324, 200:224] //= 3
        dirty = replace(frame, pixels_bgr=pixels, um_per_px=1.0, stage_um=(150.0 * number, 100.0))
        observed.append(stage.slide.observe(dirty, (make_cell(number + 1, (200, 300, 224, 324), "platelet"),)))
        stage.slide.add(observed[-1].trace)
        stage.totals.update(observed[-1].unique_counts)
    assert [one.cells[0].status.value for one in observed] == ["accepted"] * 2 + ["artefact"] * 3
    assert observed[2].cells[0].supersedes == ("s-1", "s-2")
    assert +stage.totals == {}


@pytest.mark.parametrize("is_dirt_first", [True, False])
@pytest.mark.parametrize(("name", "probability"), [("platelet", 0.7), ("neutrophil", 0.95)])
def test_a_cell_that_dirt_has_hidden_is_counted_once_when_the_dirt_is_taken_back(
    name: str, probability: float, *, is_dirt_first: bool
) -> None:
    world = simulated_world(43, *WORLD_PX)
    stage = Stage()
    rng = np.random.default_rng(1)
    for number in range(3):
        frame = take(world, Window(150.0 * number, 100), SIZE_PX, rng, number + 1)
        pixels = frame.pixels_bgr.copy()
        pixels[300:324, 200:224] //= 3
        dirty = replace(frame, pixels_bgr=pixels, um_per_px=1.0, stage_um=(150.0 * number, 100.0))
        cells = [make_cell(10 * number + 1, (200, 300, 224, 324), "platelet", probability=0.7)]
        if number == 2:  # where the dirt lay in the second field, and lies no more
            cells.append(make_cell(22, (50, 300, 74, 324), name, probability=probability))
        observed = stage.slide.observe(dirty, cells if is_dirt_first else cells[::-1])
        stage.slide.add(observed.trace)
        stage.texts.append(trace_to_text(observed.trace))
        stage.totals.update(observed.unique_counts)
    assert {counted: number for counted, number in stage.totals.items() if number} == {name: 1}
    assert map_from_traces("s", stage.texts)._standing.keys() == stage.slide._standing.keys()


def test_cells_that_a_microscope_brings_to_the_same_place_of_each_field_are_no_dirt(world: World) -> None:
    stage = Stage(world)
    for number in range(5):
        stage.visit(250.0 * number, 300, [make_cell(number + 1, (280, 200, 360, 280), "neutrophil")])
    assert stage.totals == {"neutrophil": 5}


def test_parts_that_fields_show_to_be_one_are_joined_and_their_cells_are_counted_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = after_a_jump(meander(world, SIZE_PX, 0.35))
    scan = PerfectScan(SIZE_PX, np.random.default_rng(3))
    texts: list[str] = []
    add = scan.slide.add
    monkeypatch.setattr(scan.slide, "add", lambda trace: (texts.append(trace_to_text(trace)), add(trace)))
    true_once = {true.identifier: true.class_name for window in windows for true in scan.visit(world, window)}
    # What two fields of different parts show before the join stays counted twice: strips too narrow to know them by.
    assert 0 <= sum(scan.score.unique.values()) - len(true_once) <= 1
    traces = list(scan.slide.places.fields.values())
    assert [trace.join.part for trace in traces if trace.join] == [2], "one jump, one join"
    for trace, window in zip(traces, windows, strict=True):
        at = trace.place.shift
        off = np.hypot(at.x - window.x + windows[0].x, at.y - window.y + windows[0].y)
        assert (trace.place.part, off < 6) == (1, True), (window, off)
    again = map_from_traces("s", texts)
    assert [trace.place for trace in again.places.fields.values()] == [trace.place for trace in traces]


def test_a_field_that_only_looks_like_another_one_begins_a_part_of_its_own(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the pictures fit and there are cells enough to ask, these must fit too."""
    scan = PerfectScan(SIZE_PX, np.random.default_rng(3))
    for x in (43, 443, 843):
        scan.visit(world, Window(x, 43))
    monkeypatch.setattr(placing, "boxes_agree", lambda *_: None)
    observed = [
        scan.slide.observe(take(world, Window(60, 50), SIZE_PX, np.random.default_rng(9), 9), cells)
        for cells in ((), CELLS)
    ]
    assert [one.place.source for one in observed] == ["registered", "unknown"]


def test_fields_of_different_slides_are_never_joined() -> None:
    scan = PerfectScan(SIZE_PX, np.random.default_rng(3))
    for seed in (41, 42, 43):
        world = simulated_world(seed, *WORLD_PX)
        for window in meander(world, SIZE_PX, 0.3):
            scan.visit(world, window)
    assert [trace.join for trace in scan.slide.places.fields.values() if trace.join] == []
    assert len({trace.place.part for trace in scan.slide.places.fields.values()}) >= 3


def test_one_field_that_shows_another_part_joins_it_only_when_the_next_one_says_the_same(world: World) -> None:
    scan = PerfectScan(SIZE_PX, np.random.default_rng(3))
    upper, lower = [(1000, 43)], [(250, 750), (600, 750), (1000, 750)]
    between = [(1000, 420), (900, 420)]
    for x, y in (*upper, *lower, *between):
        scan.visit(world, Window(x, y))
    traces = list(scan.slide.places.fields.values())
    assert [trace.hint is not None for trace in traces] == [False, False, False, False, True, False]
    assert [trace.join is not None for trace in traces] == [False, False, False, False, False, True]
    assert {trace.place.part for trace in traces} == {1}


def test_the_map_made_again_from_its_traces_goes_on_like_the_one_before(world: World) -> None:
    rng = np.random.default_rng(2)
    windows = list(with_revisits(meander(world, SIZE_PX, 0.3), rng, 0.3))
    whole = scan_perfect(world, windows, SIZE_PX, seed=4)
    stage = Stage(world)
    for index, window in enumerate(windows[:6]):
        stage.visit(window.x, window.y, [make_cell(index + 1, (100, 100, 180, 180))], tells_place=False)
    again = map_from_traces("s", stage.texts)
    frame = take(world, windows[7], SIZE_PX, np.random.default_rng(8), 8)
    cells = (make_cell(100, (300, 200, 380, 280)),)
    first, second = stage.slide.observe(frame, cells), again.observe(frame, cells)
    assert (first.place, first.cells, first.unique_counts) == (second.place, second.cells, second.unique_counts)
    assert trace_to_text(first.trace) == trace_to_text(second.trace)
    assert whole.fields == len(windows)


def test_a_map_remembers_the_newest_fields_only_and_still_finds_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 8)
    monkeypatch.setattr(placing, "SEARCH_BLOCK", 4)
    stage = Stage(world)
    places = [(160.0 * n, 0.0) for n in range(7)] + [(160.0 * n, 800.0) for n in range(7)]
    for number, (x, y) in enumerate(places, start=1):
        stage.visit(x, y, [make_cell(number, (200, 200, 240, 240))], tells_place=False)
    slide = stage.slide
    assert (slide.places.count, len(slide.places.fields), len(slide.places._search)) == (14, 8, 2)
    assert sum(map(len, slide.places._grid.values())) == 8
    # A leap back: to a field that is remembered, found by its picture, and to one that is not.
    assert stage.visit(320.0, 800.0, [make_cell(15, (200, 200, 240, 240))], tells_place=False).duplicates == 1
    forgotten = stage.visit(0.0, 0.0, [make_cell(16, (200, 200, 240, 240))], tells_place=False)
    assert (forgotten.place.source, forgotten.duplicates) == ("unknown", 0)
    # Nor are parts of which nothing is left.
    assert slide.places._fields_of_part.keys() == {trace.place.part for trace in slide.places.fields.values()} == {2, 3}


def test_the_newest_fields_are_looked_for_however_many_there_were(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 5)
    monkeypatch.setattr(placing, "SEARCH_BLOCK", 2)
    stage = Stage(world)
    for number in range(1, 13):
        stage.visit(90.0 * number, 0.0, [make_cell(number, (200, 200, 240, 240))], tells_place=False)
        view = stage.slide.places.view(stage.slide.places.count - 1)
        assert stage.slide.places._look_alikes(view)[0] == stage.slide.places.count - 1
        assert set(stage.slide.places._look_alikes(view)) <= set(stage.slide.places.fields)


def test_the_map_made_again_from_the_newest_traces_alone_goes_on_like_the_one_before(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cells whose first view is forgotten, parts that are gone, usual steps of long ago: all that still counts."""
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 8)
    monkeypatch.setattr(placing, "SEARCH_BLOCK", 4)
    rng = np.random.default_rng(5)
    windows = after_a_jump(meander(world, SIZE_PX, 0.6))
    windows = [*list(with_revisits(windows, np.random.default_rng(6), 0.3)), *windows[-6:], *windows[-6:]]
    live, texts, first_views = SlideMap("s"), [], 0
    for number, window in enumerate(windows, start=1):
        frame = take(world, window, SIZE_PX, rng, number)
        cells = perfect_cells(truth_in(world, window, SIZE_PX), 1000 * number, rng, 1.0)
        observed = live.observe(frame, cells)
        if number > 8:
            again = map_from_traces("s", texts[-8:])
            assert trace_to_text(again.observe(frame, cells).trace) == trace_to_text(observed.trace), number
            known = [(places.count, places._parts, places._steps) for places in (again.places, live.places)]
            assert known[0] == known[1], number
        first_views += sum(root < 1000 * (number - 8) for root in observed.trace.roots)
        texts.append(trace_to_text(observed.trace))
        live.add(observed.trace)
    assert first_views > 10, "cells were seen again whose first view is forgotten"
    shown = {live._find_root(root) for trace in live.places.fields.values() for root in trace.roots}
    assert set(live._standing) <= shown, "nothing is kept of cells that no remembered field shows"


def test_what_a_person_has_named_stands_after_its_first_view_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 4)
    stage = Stage()
    stage.visit(0, 0, [make_cell(1, (300, 200, 340, 240), "neutrophil", CellStatus.UNIDENTIFIED, 0.3)])
    stage.visit(0, 0, [make_cell(2, (300, 200, 340, 240), "neutrophil", probability=0.5)])
    for number in range(3, 8):
        stage.visit(0, 0, [make_cell(number, (300, 200, 340, 240), "neutrophil", CellStatus.UNIDENTIFIED, 0.3)])
    again = map_from_traces("s", stage.texts[-4:])
    again.hold("s-2")
    stage.slide = again
    better = stage.visit(100, 0, [make_cell(8, (200, 200, 240, 240), "monocyte", probability=0.99)])
    assert (better.cells[0].status, better.cells[0].duplicate_of) == (CellStatus.DUPLICATE, "s-2")
    assert +stage.totals == {"neutrophil": 1}
    assert map_from_traces("s", stage.texts[-4:])._merit(1) == float("inf"), "the trace says so too"


def test_looking_at_a_field_changes_nothing_until_it_is_stored(world: World) -> None:
    slide = SlideMap("s")
    frame = take(world, Window(100, 100), SIZE_PX, np.random.default_rng(0), 1)
    cells = (make_cell(1, (300, 200, 380, 280)),)
    first, second = slide.observe(frame, cells), slide.observe(frame, cells)
    assert slide.places.count == 0
    assert first.unique_counts == second.unique_counts == {"RBC": 1}


def test_a_very_narrow_field_is_remembered_like_any_other() -> None:
    slide = SlideMap("s")
    pixels = np.full((48, 2048, 3), 200, np.uint8)
    for number in (1, 2):
        frame = Frame(number, pixels, datetime(2026, 11, 25, tzinfo=timezone.utc), 0, f"{number:064x}", "test")
        observed = slide.observe(frame, [make_cell(number, (100, 4, 140, 44))])
        slide.add(observed.trace)
    assert observed.place.source == "unknown"
    assert map_from_traces("s", [trace_to_text(observed.trace)]).places.count == 2


def test_a_text_that_is_no_trace_is_refused() -> None:
    for text in ("", "{}", "[]", '{"place": 3}'):
        with pytest.raises(ValueError, match=r"trace|JSON|Expecting"):
            trace_from_text(text)


def test_a_trace_is_small(world: World) -> None:
    stage = Stage(world)
    cells: Sequence[Cell] = [make_cell(n, (n * 10.0, 50, n * 10.0 + 70, 120)) for n in range(1, 31)]
    stage.visit(300, 300, cells)
    assert len(stage.texts[0]) < 8000


def test_the_true_box_of_a_sliver_is_restless_and_stays_a_box() -> None:
    """A box inside out, as the proof once drew it, matched with cells far away."""
    sliver = TrueCell(1, "RBC", Box(100.3, 474.6, 190.4, 570.2))
    seen = truth_in(World(np.zeros((600, 640, 3), np.uint8), (sliver,)), Window(0, 0), SIZE_PX)
    boxes = [perfect_cells(seen, 1, np.random.default_rng(seed), 3.0)[0].detection.box for seed in range(200)]
    assert len({box.y_min for box in boxes}) > 20
    assert min(box.height_px for box in boxes) >= 1
    assert {box.y_max for box in boxes} == {480.0}


def test_a_small_simulated_slide_is_counted_once_within_the_bounds() -> None:
    world = simulated_world(45, 1900, 1400)
    chosen = ("overlap 0 %", "overlap 10 %", "overlap 20 %", "two passes, second turned 2 degrees", "all at once")
    wrong: Counter[str] = Counter()
    true: Counter[str] = Counter()
    for way, windows in scans(world, SIZE_PX, np.random.default_rng(5)).items():
        if way in chosen:
            score = scan_perfect(world, windows, SIZE_PX, seed=3)
            for kind in BOUNDS:
                wrong[kind] += abs(score.unique[kind] - score.truth[kind])
                true[kind] += score.truth[kind]
    assert wrong["nucleated"] <= max(1, BOUNDS["nucleated"] * true["nucleated"])
    assert wrong["red"] <= BOUNDS["red"] * true["red"]
