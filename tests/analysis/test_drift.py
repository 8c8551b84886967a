"""What is watched on a device, by slide, and what is said when it moves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.drift import (
    FEWEST_FIELDS,
    FEWEST_NUCLEATED,
    MOST_FIELDS,
    DriftMemory,
    DriftPlan,
    drift_plan,
    drift_words,
    follow_end,
    follow_field,
    from_text,
    read_drift,
    to_text,
)
from agent.config import Config, loads
from agent.domain import (
    Box,
    Cell,
    CellStatus,
    ClockReading,
    Detection,
    FieldResult,
    Frame,
    FrameColour,
    FrameQuality,
    ModelIdentity,
    Provenance,
    SampleState,
)

AT = datetime(2026, 11, 27, 8, 30, tzinfo=timezone.utc)
WHO = Provenance("0", ModelIdentity("d", "1", "a" * 64), ModelIdentity("c", "1", "b" * 64), "r", "none", "c" * 64)
CLASSES = ("round", "lobed")
COLOUR = FrameColour((200.0, 220.0, 240.0), (0.1, 0.2, 0.15))


def make_plan(text: str = "drift: {slides: 5}", who: Provenance = WHO) -> DriftPlan:
    plan = drift_plan(loads(text, "test", environment={}), who, CLASSES)
    assert plan is not None
    return plan


def make_field(
    cells: Mapping[str, int] | None = None,
    *,
    focus: float = 50.0,
    colour: FrameColour | None = COLOUR,
    probability: float = 0.9,
    is_counted: bool | None = None,
) -> FieldResult:
    """A field with so many cells by class; `unidentified` and `artefact` are no classes."""
    listed = []
    for name, count in (cells or {"round": 13, "lobed": 6, UNIDENTIFIED: 1}).items():
        status = {UNIDENTIFIED: CellStatus.UNIDENTIFIED, "artefact": CellStatus.ARTEFACT}.get(name, CellStatus.ACCEPTED)
        found = Detection(Box(0, 0, 1, 1), "white", 0.9)
        listed += [Cell("s-1", found, name, probability, None, status, is_counted=is_counted)] * count
    frame = Frame(1, np.zeros((1, 1, 3), np.uint8), AT, 0, "0" * 64, "test")
    quality = FrameQuality(True, (), focus, 0.0, colour)
    return FieldResult(frame, quality, tuple(listed), {}, {}, 0, {}, WHO, ClockReading(True))


def see_slides(memory: DriftMemory, plan: DriftPlan, number: int, **field: Any) -> DriftMemory:
    """So many finished slides of four such fields; a little restless, as slides are."""
    for index in range(number):
        sample = SampleState(f"s-{index}")
        for turn in range(4):
            one = make_field(**{"focus": 50.0 * (1 + 0.02 * ((index + turn) % 3)), **field})
            memory = follow_field(memory, plan, one, sample)
        memory = follow_end(memory, plan, replace(sample, phase="finished"))
    return memory


def moved(memory: DriftMemory, plan: DriftPlan) -> set[str]:
    return {name for name, figure in read_drift(memory, plan).figures.items() if figure.moved}


@pytest.fixture
def plan() -> DriftPlan:
    return make_plan()


@pytest.fixture
def learnt(plan: DriftPlan) -> DriftMemory:
    return see_slides(DriftMemory(), plan, 6)


def test_the_usual_is_learnt_from_so_many_slides_and_then_watched(plan: DriftPlan) -> None:
    memory = see_slides(DriftMemory(), plan, 5)
    assert (read_drift(memory, plan).slides, read_drift(memory, plan).of_slides) == (5, 5)
    assert read_drift(memory, plan).figures == {}
    reading = read_drift(see_slides(memory, plan, 1), plan)
    assert set(reading.figures) == set(plan.figures())
    share = reading.figures["share-lobed"]
    assert share.usual == pytest.approx(100 * 6 / 19, abs=0.3)
    assert share.low < share.usual < share.high
    assert reading.figures["ground-red"].usual == pytest.approx(240 / 220)
    assert reading.figures["stain-density"].usual == pytest.approx(0.2)
    assert reading.figures["stain-hue"].usual == pytest.approx(0.15 / 0.2)
    assert reading.figures["confidence"].usual == pytest.approx(90)
    assert reading.figures[UNIDENTIFIED].usual == pytest.approx(5, abs=0.5)
    assert drift_words(reading) is None


@pytest.mark.parametrize(
    ("figure", "change"),
    [
        ("focus", {"focus": 20.0}),
        ("ground-red", {"colour": replace(COLOUR, ground_bgr=(200.0, 220.0, 270.0))}),
        ("ground-blue", {"colour": replace(COLOUR, ground_bgr=(170.0, 220.0, 240.0))}),
        ("stain-density", {"colour": replace(COLOUR, stain_od_bgr=(0.15, 0.3, 0.225))}),
        ("stain-hue", {"colour": replace(COLOUR, stain_od_bgr=(0.1, 0.2, 0.21))}),
        ("confidence", {"probability": 0.8}),
        (UNIDENTIFIED, {"cells": {"round": 11, "lobed": 5, UNIDENTIFIED: 24}}),
        ("share-lobed", {"cells": {"round": 0, "lobed": 25, UNIDENTIFIED: 1}}),
    ],
)
def test_each_figure_that_moves_is_told_with_from_what_to_what_and_what_to_look_at(
    learnt: DriftMemory, plan: DriftPlan, figure: str, change: dict[str, Any]
) -> None:
    after = see_slides(learnt, plan, 8, **change)
    assert figure in moved(after, plan)
    assert moved(after, plan) <= {figure, "share-round"}
    reading = read_drift(after, plan)
    one = reading.figures[figure]
    assert not one.low <= one.now <= one.high
    words = drift_words(reading) or ""
    assert f"{plan.figures()[figure].words} moved from {one.usual:.3g}" in words
    assert "since 2026-11-27T08:30:00Z: " in words
    assert plan.figures()[figure].look_at in words
    assert words.endswith("`hematovision ask relearn`")


def test_the_words_stay_while_the_shift_lasts_and_go_when_it_is_over(learnt: DriftMemory, plan: DriftPlan) -> None:
    warm = {"colour": replace(COLOUR, ground_bgr=(200.0, 220.0, 270.0))}
    memory = see_slides(learnt, plan, 8, **warm)
    words = drift_words(read_drift(memory, plan))
    assert words is not None
    assert drift_words(read_drift(see_slides(memory, plan, 3, **warm), plan)) == words
    assert drift_words(read_drift(see_slides(memory, plan, 12), plan)) is None


def test_two_odd_patients_are_no_drift(learnt: DriftMemory, plan: DriftPlan) -> None:
    odd = see_slides(learnt, plan, 1, cells={"round": 0, "lobed": 40})
    assert moved(odd, plan) == set()
    assert moved(see_slides(see_slides(odd, plan, 3), plan, 1, cells={"round": 0, "lobed": 40}), plan) == set()


def test_a_slide_with_few_cells_or_fields_says_nothing(learnt: DriftMemory, plan: DriftPlan) -> None:
    sample = SampleState("s-few")
    memory = learnt
    for _ in range(FEWEST_FIELDS - 1):
        few = make_field({"lobed": (FEWEST_NUCLEATED - 1) // (FEWEST_FIELDS - 1)}, focus=1.0)
        memory = follow_field(memory, plan, few, sample)
    assert follow_end(memory, plan, replace(sample, phase="finished")).charts == learnt.charts


def test_a_slide_that_was_thrown_over_says_nothing(learnt: DriftMemory, plan: DriftPlan) -> None:
    sample = SampleState("s-bad")
    memory = learnt
    for _ in range(4):
        memory = follow_field(memory, plan, make_field(focus=1.0), sample)
    assert follow_end(memory, plan, replace(sample, phase="aborted")) == learnt
    assert follow_end(memory, plan, replace(sample, phase="paused")) == memory
    assert follow_end(memory, plan, replace(sample, phase="finished")).charts != learnt.charts


def test_a_slide_without_end_is_taken_for_another_one_now_and_then(plan: DriftPlan) -> None:
    memory = DriftMemory()
    for _ in range(2 * MOST_FIELDS + 1):
        memory = follow_field(memory, plan, make_field(), SampleState("s-1"))
    assert read_drift(memory, plan).slides == 2


def test_a_view_that_was_counted_before_and_dirt_are_not_counted_again(plan: DriftPlan) -> None:
    field = make_field({"round": 1, "artefact": 7, "platelet": 9})
    seen_again = make_field({"round": 5}, is_counted=False)
    sample = SampleState("s-1")
    memory = follow_field(follow_field(DriftMemory(), plan, field, sample), plan, seen_again, sample)
    assert memory.slide.cells == {"round": 1}


def test_a_slide_that_was_replaced_unfinished_counts_when_the_next_begins(learnt: DriftMemory, plan: DriftPlan) -> None:
    memory = learnt
    for _ in range(4):
        memory = follow_field(memory, plan, make_field(focus=25.0), SampleState("s-a"))
    after = follow_field(memory, plan, make_field(), SampleState("s-b"))
    assert after.charts["focus"].average < learnt.charts["focus"].average
    assert (after.slide.sid, after.slide.seen) == ("s-b", 1)


def test_what_is_known_survives_a_restart_in_the_middle_of_a_slide(learnt: DriftMemory, plan: DriftPlan) -> None:
    warm = {"colour": replace(COLOUR, ground_bgr=(200.0, 220.0, 270.0))}
    memory = see_slides(learnt, plan, 8, **warm)
    memory = follow_field(memory, plan, make_field(**warm), SampleState("s-open"))
    again = from_text(to_text(memory))
    assert again == memory
    assert moved(again, plan) == {"ground-red"}


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", "7", '{"basis": "x"}', '{"basis":"x","charts":{"a":1},"slide":{}}']
)
def test_a_memory_that_cannot_be_read_begins_anew(text: str | None) -> None:
    assert from_text(text) == DriftMemory()


def test_a_baseline_belongs_to_models_thresholds_preprocessing_and_camera() -> None:
    usb = "drift: {slides: 5}\ncamera: {kind: usb}"
    others = {
        make_plan("drift: {slides: 5}").basis,
        make_plan(usb + "\npreprocessing: {white_balance: true}").basis,
        make_plan("drift: {slides: 5}\ncamera: {kind: usb, usb: {device: 1}}").basis,
        make_plan("drift: {slides: 5}\ncamera: {kind: usb, um_per_px: 0.1}").basis,
        make_plan(usb, replace(WHO, detector=ModelIdentity("d", "2", "d" * 64))).basis,
        make_plan(usb, replace(WHO, classifier=ModelIdentity("c", "2", "d" * 64))).basis,
    }
    assert len(others | {make_plan(usb).basis}) == 7
    same = "drift: {slides: 9, limit: 3}\ncamera: {kind: usb, queue_frames: 3, usb: {read_timeout_s: 9}}\nsite: other"
    assert make_plan(same).basis == make_plan(usb).basis


def test_with_other_models_another_baseline_is_begun(learnt: DriftMemory) -> None:
    other = make_plan(who=replace(WHO, detector=ModelIdentity("d", "2", "d" * 64)))
    assert read_drift(learnt, other).figures == {}
    assert see_slides(learnt, other, 1).charts["focus"].values == 1


def test_nothing_is_watched_where_it_is_switched_off_or_pictures_come_from_anywhere() -> None:
    once = "camera: {kind: folder, folder: {path: /x}}"
    for text in ("drift: {enabled: false}", once):
        assert drift_plan(loads(text, "test", environment={}), WHO, CLASSES) is None
    assert make_plan("camera: {kind: folder, folder: {path: /x, watch: true}}").how.learn == Config().drift.slides


def test_an_alarm_of_everything_fits_into_a_message(learnt: DriftMemory, plan: DriftPlan) -> None:
    bad = FrameColour((120.0, 220.0, 150.0), (0.1, 0.4, 0.6))
    cells = {"round": 0, "lobed": 20, UNIDENTIFIED: 60}
    after = see_slides(learnt, plan, 8, focus=5.0, colour=bad, probability=0.76, cells=cells)
    words = drift_words(read_drift(after, plan)) or ""
    assert "4 more in health" in words
    assert len(words) < 2000


def test_the_memory_stays_small(learnt: DriftMemory) -> None:
    assert len(to_text(learnt)) < 4000
    assert json.loads(to_text(learnt))["slide"]["seen"] == 0
