"""Another slide under the microscope ends the sample and begins the next, where that is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agent.analysis.differential import Rules
from agent.config import SampleSection
from agent.delivery.outbox import Outbox
from agent.desk import NO_SAMPLE_YET
from agent.domain import SampleState
from agent.errors import OutboxError
from agent.pipeline import NO_SAMPLE
from tests.counting.running import KINDS, Place
from tests.frames import make_bench, make_frame

EMPTY = np.full((480, 640, 3), 225, np.uint8)


def each_slide(outbox: Outbox, sample: SampleState = NO_SAMPLE_YET) -> Place:
    bench = replace(make_bench(), counting=Rules(KINDS), absence_s=15.0)
    return Place(outbox, sample, section=SampleSection(start="each-slide"), bench=bench)


def test_another_slide_ends_the_sample_and_begins_the_next_one(outbox: Outbox) -> None:
    place = each_slide(outbox)
    place.do("start", sample="s-1")
    place.give(1, 2)
    assert place.frames.put_waiting(replace(make_frame(3), pixels_bgr=EMPTY, sha256="e" * 64), 5)
    place.give(40, 41)
    place.run_a_while(lambda: place.pipeline.sample.sid != "s-1" and place.pipeline.sample.fields == 2)
    (report,) = place.messages("differential")
    assert (report["sample"], report["status"], report["fields"]) == ("s-1", "final", 2)
    second = place.pipeline.sample.sid
    assert [field["sample"] for field in place.messages("field")] == ["s-1", "s-1", second, second]
    assert [e["kind"] for e in place.messages("event")] == ["sample-opened", "sample-finished", "sample-opened"]
    documents = place.documents()
    assert documents["differential/s-1"]["status"] == "final"
    assert documents["sample/s-1"] is None
    assert documents[f"sample/{second}"]["phase"] == "running"
    assert place.do("amend", "t-9", sample="s-1", cell_id="s-1-1", by="dr-1", **{"class": "lobed"})["status"] == "ok"


def test_a_move_to_an_unknown_place_without_an_absence_is_no_other_slide(outbox: Outbox) -> None:
    place = each_slide(outbox)
    place.do("start", sample="s-1")
    place.give(1, 10, 20, 30)
    place.run_a_while(lambda: place.pipeline.sample.fields == 4)
    assert place.pipeline.sample.sid == "s-1"


def test_after_a_sample_that_stopped_by_itself_the_next_slide_begins_one(outbox: Outbox) -> None:
    place = each_slide(outbox)
    place.do("start", sample="s-1", stop_at_cells=2)
    place.give(1, 2, 3)  # the third one comes too late, on the slide that still lies there
    place.give(40)
    place.run_a_while(lambda: place.pipeline.sample.sid != "s-1")
    assert place.health.snapshot().dropped[NO_SAMPLE] == 1
    assert [report["sample"] for report in place.messages("differential")] == ["s-1"]
    assert place.pipeline.sample.fields == 1
    assert place.pipeline.sample.target_cells is None


def test_that_each_slide_begins_a_sample_can_be_switched_on_while_the_agent_runs(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", sample="s-1")
    place.pipeline.use_bench(replace(place.bench, absence_s=15.0))
    place.give(1, 40)
    place.run_a_while(lambda: place.pipeline.sample.sid != "s-1")


def restarted(before: Place) -> Place:
    """The agent after a restart, with what the outbox holds and nothing else."""
    return each_slide(before.outbox, before.outbox.sample_state() or NO_SAMPLE_YET)


def switch_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.counting.slide_in_view.read_kernel_boot", lambda: "the next morning")


@pytest.mark.parametrize("target", [None, 2])
def test_a_slide_that_was_changed_while_the_computer_was_off_begins_a_sample(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch, target: int | None
) -> None:
    evening = each_slide(outbox)
    monkeypatch.setattr(evening.pipeline, "remember", lambda *_note: None)  # the power goes: there is no orderly end
    evening.do("start", sample="s-1", stop_at_cells=target)
    evening.give(1, 2)
    evening.run_a_while(lambda: evening.pipeline.sample.fields == 2)
    assert evening.phase == ("running" if target is None else "finished")
    switch_off_and_on(monkeypatch)
    morning = restarted(evening)
    morning.give(3, 4)
    morning.run_a_while(lambda: morning.pipeline.sample.fields == 2 and morning.pipeline.sample.sid != "s-1")
    second = morning.pipeline.sample.sid
    assert [field["sample"] for field in morning.messages("field")] == ["s-1", "s-1", second, second]
    assert [report["sample"] for report in morning.messages("differential")] == ["s-1"]


def test_the_slide_that_still_lies_there_in_the_morning_goes_on(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    evening = each_slide(outbox)
    evening.do("start", sample="s-1")
    evening.give(1, 2)
    evening.run_a_while(lambda: evening.pipeline.sample.fields == 2)
    switch_off_and_on(monkeypatch)
    morning = restarted(evening)
    morning.give(1, 3)
    morning.run_a_while(lambda: morning.pipeline.sample.fields == 4)
    assert morning.pipeline.sample.sid == "s-1"


def test_a_short_restart_goes_on_with_the_sample_though_the_stage_has_moved(outbox: Outbox) -> None:
    before = each_slide(outbox)
    before.do("start", sample="s-1")
    before.give(1, 2)
    before.run_a_while(lambda: before.pipeline.sample.fields == 2)
    after = restarted(before)
    after.give(10)
    after.run_a_while(lambda: after.pipeline.sample.fields == 3)
    assert after.pipeline.sample.sid == "s-1"


def test_what_was_seen_after_the_last_stored_field_counts_over_an_orderly_restart(outbox: Outbox) -> None:
    before = each_slide(outbox)
    before.do("start", sample="s-1", stop_at_cells=2)
    before.give(1, 2, 12, 22)  # the last two are not counted any more: looked at, on the same slide
    before.run_a_while(lambda: before.health.snapshot().dropped.get(NO_SAMPLE) == 2)
    after = restarted(before)
    after.give(30)
    after.run_a_while(lambda: after.health.snapshot().dropped.get(NO_SAMPLE) == 1)
    assert after.pipeline.sample.sid == "s-1"


def test_who_has_paused_a_sample_says_which_slide_goes_on(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    evening = each_slide(outbox)
    evening.do("start", sample="s-1")
    evening.give(1)
    evening.run_a_while(lambda: evening.pipeline.sample.fields == 1)
    evening.do("pause", "t-2")
    switch_off_and_on(monkeypatch)
    morning = restarted(evening)
    morning.do("resume", "t-3")
    morning.give(40)
    morning.run_a_while(lambda: morning.pipeline.sample.fields == 2)
    assert morning.pipeline.sample.sid == "s-1"


def test_where_commands_alone_begin_samples_an_absence_changes_nothing(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", sample="s-1")
    place.give(1, 2, 40)
    place.run_a_while(lambda: place.pipeline.sample.fields == 3)
    assert place.pipeline.sample.sid == "s-1"


def test_the_other_slides_first_field_waits_with_all_the_rest_while_the_outbox_takes_nothing(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = each_slide(outbox)
    place.do("start", sample="s-1")
    place.give(1, 40)
    append, failed = outbox.append, []

    def fail_twice(drafts: Any = (), **more: Any) -> Any:
        if more.get("sample") is not None and more["sample"].sid != "s-1" and len(failed) < 2:
            failed.append(1)
            raise OutboxError("no space")
        return append(drafts, **more)

    monkeypatch.setattr(outbox, "append", fail_twice)
    place.run_a_while(lambda: place.pipeline.sample.sid != "s-1")
    assert len(failed) == 2
    kinds = [event["kind"] for event in place.messages("event")]
    assert (kinds.count("sample-finished"), kinds.count("sample-opened")) == (1, 2)
    assert place.pipeline.sample.fields == 1
