"""Commands on the pipeline's own thread and outbox: done once, answered, audited, and all of it in one transaction."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from test_pipeline import WHITE, FullOutbox, make_bench, make_frame, make_models

from agent.analysis.control_charts import Plan
from agent.analysis.differential import CellKind, Rules
from agent.analysis.drift import DriftMemory, DriftPlan
from agent.analysis.drift import from_text as drift_from_text
from agent.analysis.duplicates import map_from_traces
from agent.analysis.quality import from_text as gate_from_text
from agent.bench import Bench
from agent.camera.grabber import FrameQueue
from agent.config import SampleSection
from agent.delivery.audit import verify
from agent.delivery.commands import Gatekeeper, InboundCommand
from agent.delivery.messages import load_schema
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.desk import NO_SAMPLE_YET, NUMBER_KEY, Desk, Done, Instruments, Refused
from agent.domain import SampleState
from agent.errors import ModelError, OutboxError
from agent.health import Health, SelfTest
from agent.latest import Latest
from agent.pipeline import DRIFT_NOTE, GATE_NOTE, NO_SAMPLE, Pipeline, Service

AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)
BASE = "hv/1/site/dev"
KINDS: dict[str, CellKind] = {"round": "leukocyte", "lobed": "leukocyte", "red": "red-cell"}


def make_instruments(**changes: Any) -> Instruments:
    def refuse(*_args: object) -> Done:
        raise Refused("no-models", "nothing is staged")

    named: dict[str, Any] = {
        "self_test": lambda: SelfTest(AT, is_passed=True, detail="both models answer"),
        "reload": lambda: Done("changed: quality", {"changed": ["quality"]}),
        "relearn": lambda: Done("what is usual is learnt anew, from 30 slides", {"slides": 30}),
        "stage": refuse,
        "activate": refuse,
        "roll_back": refuse,
        "replay": lambda stream, first, last: Done("3 rows", {"stream": stream, "from_seq": first, "to_seq": last}),
        "describe": lambda: {"agent": "0.0"},
    }
    return Instruments(**{**named, **changes})


class Place:
    """A pipeline with a desk; what it says is kept in `replies` and `pictures`."""

    def __init__(
        self,
        outbox: Outbox,
        sample: SampleState = NO_SAMPLE_YET,
        bench: Bench | None = None,
        section: SampleSection = SampleSection(),  # noqa: B008 - frozen
        latest: Latest | None = None,
        **instruments: Any,
    ) -> None:
        self.outbox = outbox
        self.frames = FrameQueue(16)
        self.replies: list[dict[str, Any]] = []
        self.pictures: list[tuple[str, bytes]] = []
        self.commands: queue.Queue[InboundCommand] = queue.Queue(16)
        self.health = Health()
        desk = Desk(
            outbox,
            Gatekeeper(BASE, "broker"),
            lambda: section,
            make_instruments(**instruments),
            clock=lambda: datetime.now(timezone.utc),
            is_clock_true=lambda: True,
            monotonic_s=time.monotonic,
        )
        self.pipeline = Pipeline(
            frames=self.frames,
            outbox=outbox,
            bench=bench or replace(make_bench(), counting=Rules(KINDS)),
            sample=sample,
            health=self.health,
            service=Service(
                self.commands,
                desk,
                lambda _topic, body, _correlation: self.replies.append(json.loads(json.dumps(body))),
                lambda topic, jpeg: self.pictures.append((topic, jpeg)),
            ),
            documents_every_s=0,
            retry_s=0.02,
            latest=latest,
        )

    def send(self, name: str, transaction: str = "t-1", **body: Any) -> None:
        payload = json.dumps({"transaction": transaction, **body}).encode()
        self.commands.put(InboundCommand(name, payload, received_monotonic_s=time.monotonic()))

    def do(self, name: str, transaction: str = "t-1", **body: Any) -> dict[str, Any]:
        """Send one command and have it served, on this thread; returns the reply."""
        self.send(name, transaction, **body)
        self.pipeline._serve_commands()
        reply = self.replies[-1]
        jsonschema.Draft202012Validator(load_schema("reply")).validate(reply)
        return reply

    def give(self, *seeds: int) -> None:
        for seed in seeds:
            assert self.frames.put_waiting(make_frame(seed), 5)

    def run_a_while(self, is_so: Callable[[], bool]) -> None:
        """Run the thread until it is so."""
        self.pipeline.start()
        deadline_s = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < deadline_s, "it did not come to it"
            time.sleep(0.005)
        assert self.pipeline.stop(5)
        assert self.pipeline.failure is None

    @property
    def phase(self) -> str:
        return self.pipeline.sample.phase

    def messages(self, kind: str) -> list[dict[str, Any]]:
        with open_outbox(self.outbox.path.parent, device="dev", verify=False) as mine:
            found = [json.loads(row.payload) for row in mine.pending(0, 100_000)]
        chosen = [message for message in found if message["schema"] == f"hv/1/{kind}"]
        for message in chosen:
            jsonschema.Draft202012Validator(load_schema(kind)).validate(message)
        return chosen

    def documents(self) -> dict[str, Any]:
        """The retained documents by the end of their topic; None = to be cleared."""
        found = {}
        for document in self.outbox.documents():
            body = None if document.payload is None else json.loads(document.payload)
            if body is not None:
                jsonschema.Draft202012Validator(load_schema(document.topic.split("/")[4])).validate(body)
            found[document.topic.removeprefix(f"{BASE}/")] = body
        return found


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as opened:
        yield opened


# ------------------------------------------------------------------------------------------------ the life of a sample


def watched_bench() -> Bench:
    plan = DriftPlan("basis", Plan(learn=5, weight=0.25, tail=1e-4), ("round", "lobed"))
    return replace(make_bench(), counting=Rules(KINDS), drift=plan)


def test_an_operator_has_it_learnt_anew_what_is_usual(outbox: Outbox) -> None:
    place = Place(outbox, SampleState("s-1"), watched_bench())
    place.give(1, 2, 3)
    place.run_a_while(lambda: place.pipeline.sample.fields == 3)
    assert drift_from_text(outbox.note(DRIFT_NOTE)).slide.seen == 3
    place = Place(outbox, place.pipeline.sample, watched_bench())
    assert place.do("relearn", by="op-1")["data"] == {"slides": 30}
    assert drift_from_text(outbox.note(DRIFT_NOTE)) == DriftMemory()
    assert gate_from_text(outbox.note(GATE_NOTE)).usual.frames == 0
    (entry,) = place.messages("audit")
    assert (entry["action"], entry["outcome"], entry["by"]) == ("cmd.relearn", "done", "op-1")
    assert [event["kind"] for event in place.messages("event")] == ["drift-relearnt"]


def test_what_is_not_watched_cannot_be_learnt_anew(outbox: Outbox) -> None:
    def refuse() -> Done:
        raise Refused("not-watched", "nothing is learnt here: drift.enabled is false")

    place = Place(outbox, SampleState("s-1"), relearn=refuse)
    assert place.do("relearn")["code"] == "not-watched"
    assert outbox.note(DRIFT_NOTE) is None


def test_a_sample_that_is_thrown_over_is_not_learnt_from(outbox: Outbox) -> None:
    place = Place(outbox, SampleState("s-1"), watched_bench())
    place.give(1, 2, 3)
    place.run_a_while(lambda: place.pipeline.sample.fields == 3)
    place = Place(outbox, place.pipeline.sample, watched_bench())
    assert place.do("stop", abort=True)["status"] == "ok"
    left = drift_from_text(outbox.note(DRIFT_NOTE))
    assert (left.slide.seen, left.charts) == (0, {})


def test_a_sample_is_begun_paused_resumed_stopped_and_reported_by_commands(outbox: Outbox) -> None:
    place = Place(outbox)
    reply = place.do("start", "t-1", sample="s-1", accession="A-7", age_band="child", stop_at_cells=100)
    assert (reply["status"], reply["data"]) == ("ok", {"sample": "s-1", "phase": "running", "fields": 0})
    assert place.do("pause", "t-2")["data"]["phase"] == "paused"
    assert place.do("resume", "t-3")["data"]["phase"] == "running"
    place.give(1, 2)
    place.run_a_while(lambda: place.pipeline.sample.fields == 2)
    assert place.documents()["differential/s-1"]["status"] == "preliminary"

    assert place.do("stop", "t-4")["data"]["phase"] == "finishing"
    place.pipeline._finish_when_drained(None)
    assert place.phase == "finished"
    (report,) = place.messages("differential")
    assert (report["status"], report["report"], report["leukocytes"], report["age_band"]) == (
        *("final", "s-1-r1"),
        *(2, "child"),
    )
    documents = place.documents()
    assert documents["differential/s-1"]["report"] == "s-1-r1"
    assert documents["sample/s-1"]["phase"] == "finished"
    assert documents["sample/s-1"]["end_reason"] == "command"
    told = [event["kind"] for event in place.messages("event")]
    assert told == ["sample-opened", "sample-paused", "sample-resumed", "sample-finished"]


def test_the_accession_token_stands_in_the_fields_of_its_sample(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", sample="s-1", accession="A-7")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    assert place.messages("field")[0]["accession"] == "A-7"


def test_what_the_command_leaves_open_is_taken_from_the_configuration(outbox: Outbox) -> None:
    place = Place(outbox, section=SampleSection(age_band="adult", stop_at_cells=400, accession="A-OLD"))
    place.do("start", "t-1", stop_at_cells=50)
    sample = place.pipeline.sample
    assert (sample.age_band, sample.target_cells, sample.accession) == ("adult", 50, None)
    assert sample.sid.startswith("s-20")


def test_while_no_sample_is_open_frames_are_not_analysed(outbox: Outbox) -> None:
    place = Place(outbox)
    place.give(1, 2)
    place.run_a_while(lambda: place.health.snapshot().dropped.get(NO_SAMPLE) == 2)
    assert place.messages("field") == []
    assert place.documents() == {}


def test_frames_that_were_taken_before_the_stop_still_belong_to_the_sample(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", "t-1", sample="s-1")
    place.give(1, 2)
    place.do("stop", "t-2")
    assert place.frames.put_waiting(replace(make_frame(3), captured_monotonic_ns=time.monotonic_ns()), 5)
    place.run_a_while(lambda: place.phase == "finished")
    assert place.pipeline.sample.fields == 2
    assert place.health.snapshot().dropped[NO_SAMPLE] >= 0
    assert place.messages("differential")[0]["fields"] == 2


def test_a_sample_stops_by_itself_and_its_report_is_stored_with_the_last_field(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", sample="s-1", stop_at_cells=3)
    place.give(1, 2, 3, 4, 5)
    place.run_a_while(lambda: place.health.snapshot().dropped.get(NO_SAMPLE) == 2)
    assert place.pipeline.sample.end_reason == "target-cells"
    assert [report["leukocytes"] for report in place.messages("differential")] == [3]
    assert len(place.messages("field")) == 3


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
    place.pipeline.use_bench(replace(place.pipeline._bench, absence_s=15.0))
    place.give(1, 40)
    place.run_a_while(lambda: place.pipeline.sample.sid != "s-1")


def restarted(before: Place) -> Place:
    """The agent after a restart, with what the outbox holds and nothing else."""
    return each_slide(before.outbox, before.outbox.sample_state() or NO_SAMPLE_YET)


def switch_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.pipeline.read_kernel_boot", lambda: "the next morning")


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


def test_a_sample_that_is_thrown_over_has_no_report_and_its_differential_is_cleared(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", "t-1", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    place.do("stop", "t-2", abort=True)
    assert place.phase == "aborted"
    assert place.messages("differential") == []
    assert place.documents()["differential/s-1"] is None


def test_the_next_sample_clears_the_one_before_and_two_never_share_an_id(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", "t-1", sample="s-1")
    place.do("stop", "t-2")
    place.pipeline._finish_when_drained(None)
    assert place.do("start", "t-3", sample="s-1")["code"] == "sample-exists"
    place.do("start", "t-4", sample="s-2")
    assert place.documents()["sample/s-1"] is None
    assert place.documents()["differential/s-1"]["status"] == "final"
    ids = set()
    for number in range(5, 9):
        place.do("stop", f"t-{number}-a")
        place.pipeline._finish_when_drained(None)
        ids.add(place.do("start", f"t-{number}-b")["data"]["sample"])
    assert len(ids) == 4


def test_the_oldest_samples_are_forgotten_and_their_documents_cleared(outbox: Outbox) -> None:
    place = Place(outbox)
    for number in range(20):
        place.do("start", f"a-{number}", sample=f"s-{number}")
        place.do("stop", f"b-{number}")
        place.pipeline._finish_when_drained(None)
    assert len(outbox.notes("samples/")) == 16
    assert place.documents()["differential/s-0"] is None
    assert place.documents()["differential/s-19"] is not None


@pytest.mark.parametrize("last_number", [16, None])
def test_a_clock_that_went_back_does_not_make_the_newest_sample_the_oldest(
    outbox: Outbox, last_number: int | None
) -> None:
    """Nor do samples that a version before this one has ended, which had no number."""
    reporter = make_bench().reporter
    numbers = {f"s-{number}": None if number < 5 else number for number in range(16)}
    for sid, number in numbers.items():
        day = 20 if number is None else 10  # the clock went back after the fifth
        ended_at = f"2026-11-{day}T08:{int(sid[2:]):02}:00.000Z"
        outbox.append((), notes=reporter.keep(SampleState(sid, phase="finished", ended_at=ended_at, number=number)))
    last = SampleState("s-16", phase="finished", ended_at="2026-11-01T08:00:00.000Z", number=last_number)
    outbox.append((), sample=last, notes={**reporter.keep(last), NUMBER_KEY: "16"})
    place = Place(outbox, last)
    assert place.do("start", "t-1", sample="s-17")["status"] == "ok"
    assert place.pipeline.sample.number == 17
    assert {sid for sid in numbers if f"samples/{sid}" not in outbox.notes("samples/")} == {"s-0", "s-1"}
    assert "samples/s-16" in outbox.notes("samples/")


def test_a_word_at_the_wrong_time_is_refused_with_what_is_possible(outbox: Outbox) -> None:
    place = Place(outbox)
    reply = place.do("pause", "t-1")
    assert (reply["status"], reply["code"]) == ("refused", "not-now")
    assert "possible now: start" in reply["message"]
    place.do("start", "t-2", sample="s-1")
    assert place.do("start", "t-3")["code"] == "not-now"
    assert place.do("pause", "t-4", sample="s-9")["code"] == "other-sample"


def test_a_sample_survives_a_restart_in_the_middle_without_losing_or_doubling_a_cell(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
        place = Place(outbox)
        place.do("start", "t-1", sample="s-1", accession="A-1", age_band="elder", stop_at_half_width_pct=5.0)
        place.give(1, 2, 3)
        place.run_a_while(lambda: place.pipeline.sample.fields == 3)
        before = place.pipeline.sample
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
        stored = outbox.sample_state()
        assert stored == before
        place = Place(outbox, stored)
        place.give(3, 4)  # the frame of the last moment comes again
        place.run_a_while(lambda: place.pipeline.sample.fields == 4)
        cells = [cell["cell_id"] for field in place.messages("field") for cell in field["cells"]]
        assert len(cells) == len(set(cells)) == 8
        assert place.pipeline.sample.counts == {"red": 4, "round": 4}


# ----------------------------------------------------------------------------------------------- once, and audited


def test_the_same_transaction_is_not_done_again_and_gets_the_same_answer(outbox: Outbox) -> None:
    place = Place(outbox)
    first = place.do("start", "t-1", sample="s-1")
    again = place.do("start", "t-1", sample="s-1")
    assert again["repeated"]
    assert {**again, "at": first["at"], "repeated": False} == first
    assert len(place.messages("audit")) == 1
    assert place.do("stop", "t-1")["code"] == "transaction-reused"


def test_a_transaction_is_remembered_over_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        begin_boot(tmp_path)
        with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
            reply = Place(outbox, outbox.sample_state() or NO_SAMPLE_YET).do("start", "t-1", sample="s-1")
    assert (reply["status"], reply["repeated"]) == ("ok", True)


def test_every_command_that_does_something_is_in_the_chain_and_the_chain_goes_on_over_restarts(tmp_path: Path) -> None:
    for boot in (1, 2):
        begin_boot(tmp_path)
        with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
            place = Place(outbox, outbox.sample_state() or NO_SAMPLE_YET)
            place.do("ping", f"p-{boot}")
            place.do("start", f"a-{boot}", sample=f"s-{boot}", by="tech-1")
            place.do("stop", f"b-{boot}")
            place.pipeline._finish_when_drained(None)
            place.do("selftest", f"c-{boot}")
            entries = place.messages("audit")
    assert [entry["action"] for entry in entries] == ["cmd.start", "cmd.stop", "cmd.selftest"] * 2
    assert entries[0]["by"] == "tech-1"
    assert verify(json.dumps(entry) for entry in entries).is_sound


def test_a_refusal_of_an_operators_command_is_audited_and_told(outbox: Outbox) -> None:
    place = Place(outbox)
    place.pipeline._service.desk._gatekeeper = Gatekeeper(BASE, "none")  # type: ignore[union-attr]
    assert place.do("reload", by="somebody")["code"] == "not-allowed"
    (entry,) = place.messages("audit")
    assert (entry["action"], entry["outcome"], entry["by"]) == ("cmd.reload", "refused", "somebody")
    (event,) = place.messages("event")
    assert event["kind"] == "command-refused"


def test_a_retained_command_is_refused_and_reported(outbox: Outbox) -> None:
    place = Place(outbox)
    place.commands.put(InboundCommand("start", b'{"transaction":"t"}', is_retained=True))
    place.pipeline._serve_commands()
    assert place.replies[-1]["code"] == "retained"
    assert [event["kind"] for event in place.messages("event")] == ["command-refused"]
    assert place.phase == "idle"


def test_a_command_that_waited_behind_a_slow_frame_for_too_long_is_refused(outbox: Outbox) -> None:
    place = Place(outbox)
    place.commands.put(InboundCommand("start", b'{"transaction":"t"}', received_monotonic_s=time.monotonic() - 31))
    place.pipeline._serve_commands()
    assert (place.replies[-1]["code"], place.phase) == ("expired", "idle")


def test_a_ping_is_answered_with_who_and_where_and_leaves_no_trace(outbox: Outbox) -> None:
    place = Place(outbox)
    reply = place.do("ping")
    assert reply["data"] == {"agent": "0.0", "sample": None, "phase": "idle", "fields": 0}
    assert outbox.depth() == 0


def test_what_the_tools_refuse_or_cannot_do_becomes_the_reply(outbox: Outbox) -> None:
    def fail() -> SelfTest:
        raise ModelError("self-test: the models answer, but not with shares")

    place = Place(outbox, self_test=fail)
    assert place.do("model.activate", "t-1")["code"] == "no-models"
    failed = place.do("selftest", "t-2")
    assert (failed["status"], failed["code"]) == ("failed", "model")
    assert [event["kind"] for event in place.messages("event")] == ["self-test-failed"]
    assert [entry["outcome"] for entry in place.messages("audit")] == ["refused", "failed"]
    assert place.do("reload", "t-3")["data"] == {"changed": ["quality"]}
    assert place.do("replay", "t-4", stream="field", from_seq=2, to_seq=4)["data"]["to_seq"] == 4


def test_a_command_is_done_wholly_or_not_at_all(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    full.is_full = True
    place = Place(full)  # type: ignore[arg-type]
    reply = place.do("start", "t-1", sample="s-1")
    assert (reply["status"], reply["code"]) == ("failed", "outbox-stopped")
    assert place.phase == "idle"
    full.is_full = False
    assert place.do("start", "t-1", sample="s-1")["status"] == "ok"
    assert [entry["n"] for entry in place.messages("audit")] == [1]


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not come to it"
        time.sleep(0.005)


def test_what_has_changed_the_configuration_is_recorded_as_soon_as_the_disk_takes_it(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    place = Place(full)  # type: ignore[arg-type]
    place.send("reload", "t-1")
    place.pipeline.start()
    try:
        wait_until(lambda: full.refused > 3)
        assert place.health.snapshot().outbox == "stopped"
        assert place.replies == []
        full.is_full = False
        wait_until(lambda: bool(place.replies))
    finally:
        full.is_full = False
        assert place.pipeline.stop(5)
    assert place.replies[0]["status"] == "ok"
    assert place.health.snapshot().outbox == "ok"
    assert [entry["action"] for entry in place.messages("audit")] == ["cmd.reload"]


def test_what_was_done_and_cannot_be_recorded_is_not_called_undone(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    place = Place(full)  # type: ignore[arg-type]
    place.send("reload", "t-1")
    place.pipeline.start()
    wait_until(lambda: full.refused > 3)
    assert place.pipeline.stop(5)
    (reply,) = place.replies
    assert (reply["status"], reply["code"]) == ("failed", "not-recorded")
    assert "it was done" in reply["message"]


def test_whoever_sends_a_thousand_refused_commands_does_not_fill_the_disk(outbox: Outbox) -> None:
    place = Place(outbox)
    desk = place.pipeline._service.desk  # type: ignore[union-attr]
    desk._gatekeeper = Gatekeeper(BASE, "none")
    for number in range(100):
        assert place.do("reload", f"t-{number}")["code"] == "not-allowed"
    assert len(place.messages("audit")) == len(place.messages("event")) == 30
    desk._monotonic_s = lambda: time.monotonic() + 61
    place.commands.put(InboundCommand("reload", b'{"transaction":"t"}', received_monotonic_s=time.monotonic() + 61))
    place.pipeline._serve_commands()
    assert place.messages("audit")[-1]["detail"]["not_told_before"] == 70


def test_while_a_frame_waits_for_the_disk_commands_are_answered_at_once(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    full.is_full = False
    place = Place(full, replace(NO_SAMPLE_YET, sid="s-1", phase="running"))  # type: ignore[arg-type]
    full.is_full = True
    place.give(1)
    place.pipeline.start()
    try:
        deadline_s = time.monotonic() + 10
        while full.refused < 3 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        place.send("stop", "t-1")
        place.send("ping", "t-2")
        while len(place.replies) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        full.is_full = False
        while place.pipeline.sample.fields == 0 and time.monotonic() < deadline_s:
            time.sleep(0.005)
    finally:
        full.is_full = False
        assert place.pipeline.stop(5)
    assert [reply["code"] for reply in place.replies] == ["outbox-stopped", "ok"]
    assert place.pipeline.sample.fields == 1


def test_a_sample_can_be_stopped_and_the_next_begun_while_the_outbox_is_full(tmp_path: Path) -> None:
    """Nothing waits for the broker, so nothing that the broker does makes room: only a person does."""
    begin_boot(tmp_path)
    with open_outbox(tmp_path, max_mb=2, min_free_mb=0, device="dev") as outbox:
        place = Place(outbox, SampleState("s-1", fields=3))
        for number in range(2000):
            if outbox._why_full(0, 0) is None:
                outbox.append((), notes={f"slide/s-1/{number:07}": "x" * 10_000})
        place.pipeline._slide = map_from_traces("s-1", ())
        place.pipeline._slide.places.count = 3
        place.give(1)
        place.pipeline.start()
        try:
            wait_until(lambda: place.health.snapshot().outbox == "stopped")
            assert "nothing waits for the broker" in place.health.snapshot().outbox_detail
            place.send("reload", "t-0")
            place.send("stop", "t-1")
            wait_until(lambda: place.phase == "finished")
            assert [(reply["status"], reply["code"]) for reply in place.replies] == [
                ("failed", "outbox-stopped"),
                ("ok", "ok"),
            ]
            place.send("start", "t-2", sample="s-2")
            wait_until(lambda: place.pipeline.sample.sid == "s-2")
            place.give(2)
            wait_until(lambda: place.pipeline.sample.fields == 1)
            assert list(outbox.notes("slide/")) == ["slide/s-2/0000001"]
        finally:
            assert place.pipeline.stop(5)
        assert [field["sample"] for field in place.messages("field")] == ["s-1", "s-2"]
        assert [report["status"] for report in place.messages("differential")] == ["final"]
        assert [entry["action"] for entry in place.messages("audit")] == ["cmd.stop", "cmd.start"]


# ------------------------------------------------------------------------------------------------------ amendments


def counted(outbox: Outbox) -> Place:
    """A finished sample of two fields: two round cells, two red ones."""
    place = Place(outbox)
    place.do("start", "a", sample="s-1")
    place.give(1, 2)
    place.run_a_while(lambda: place.pipeline.sample.fields == 2)
    place.do("stop", "b")
    place.pipeline._finish_when_drained(None)
    return place


def amend(place: Place, transaction: str, cell: str, name: str, **more: Any) -> dict[str, Any]:
    return place.do("amend", transaction, **{"sample": "s-1", "cell_id": cell, "class": name, "by": "dr-2", **more})


def test_an_amendment_makes_a_new_report_that_supersedes_the_old_one(outbox: Outbox) -> None:
    place = counted(outbox)
    reply = amend(place, "t-1", "s-1-1", "lobed")
    assert reply["status"] == "ok", reply
    assert reply["data"] == {"sample": "s-1", "cell_id": "s-1-1", "from": "round", "to": "lobed", "reports": 2}
    final, amended = place.messages("differential")
    assert (final["status"], final["counts"]) == ("final", {"red": 2, "round": 2})
    assert (amended["status"], amended["report"], amended["supersedes"]) == ("amended", "s-1-r2", "s-1-r1")
    assert (amended["counts"], amended["amendments"]) == ({"lobed": 1, "red": 2, "round": 1}, 1)
    assert place.documents()["differential/s-1"]["report"] == "s-1-r2"
    entry = place.messages("audit")[-1]
    assert (entry["by"], entry["detail"]["from"], entry["detail"]["to"]) == ("dr-2", "round", "lobed")
    amend(place, "t-2", "s-1-1", "artefact")
    assert place.messages("differential")[-1]["not_classed"] == 1
    assert place.messages("differential")[-1]["supersedes"] == "s-1-r2"
    amend(place, "t-3", "s-1-1", "round")
    assert place.messages("differential")[-1]["counts"] == {"red": 2, "round": 2}
    assert place.messages("differential")[-1]["not_classed"] == 0


def test_an_amendment_of_a_running_sample_changes_its_counts_without_a_report(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("start", "a", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    amend(place, "t-1", "s-1-1", "lobed")
    assert place.pipeline.sample.counts == {"lobed": 1, "red": 1}
    assert place.messages("differential") == []
    assert place.documents()["differential/s-1"]["amendments"] == 1


def test_a_sample_before_the_open_one_can_be_amended_with_the_models_that_counted_it(outbox: Outbox) -> None:
    place = counted(outbox)
    place.do("start", "c", sample="s-2")
    other = replace(place.pipeline._bench.provenance, agent_version="9.9")
    place.pipeline.use_bench(replace(place.pipeline._bench, provenance=other))
    amend(place, "t-1", "s-1-1", "lobed")
    amended = place.messages("differential")[-1]
    assert (amended["sample"], amended["provenance"]["agent"]) == ("s-1", "0.0")
    assert place.pipeline.sample.sid == "s-2"
    assert place.pipeline.sample.counts == {}


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"by": None}, "bad-request"),
        ({"class": "unicorn"}, "unknown-class"),
        ({"cell_id": "s-1-99"}, "unknown-cell"),
        ({"cell_id": "s-1-2"}, "unknown-cell"),  # a red cell: thousands of them are not kept
        ({"sample": "s-9"}, "unknown-sample"),
    ],
)
def test_an_amendment_that_cannot_be_made_is_refused(outbox: Outbox, changes: dict[str, Any], code: str) -> None:
    place = counted(outbox)
    body = {"sample": "s-1", "cell_id": "s-1-1", "class": "lobed", "by": "dr-2", **changes}
    assert place.do("amend", "t-1", **body)["code"] == code
    assert len(place.messages("differential")) == 1


def test_an_amendment_that_changes_nothing_makes_no_report(outbox: Outbox) -> None:
    place = counted(outbox)
    assert amend(place, "t-1", "s-1-1", "round")["status"] == "ok"
    assert len(place.messages("differential")) == 1


# --------------------------------------------------------------------------------------------------------- pictures


def test_a_snapshot_is_the_next_frame_as_a_picture(outbox: Outbox) -> None:
    place = Place(outbox)
    place.do("snapshot")
    place.give(7, 8)
    place.run_a_while(lambda: place.health.snapshot().dropped.get(NO_SAMPLE) == 2)
    ((topic, jpeg),) = place.pictures
    assert topic == f"{BASE}/image/none/frame-7"
    assert jpeg.startswith(b"\xff\xd8")


def test_crops_are_published_when_the_configuration_asks_for_them(outbox: Outbox) -> None:
    bench = replace(make_bench(make_models((WHITE,))), with_images=True, counting=Rules(KINDS))
    place = Place(outbox, bench=bench)
    place.do("start", sample="s-1")
    place.give(1)
    place.run_a_while(lambda: place.pipeline.sample.fields == 1)
    assert [topic for topic, _ in place.pictures] == [f"{BASE}/image/s-1/s-1-1"]
