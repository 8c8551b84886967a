"""Commands at the desk of a real pipeline: what each does, what it is answered, and what it leaves behind."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from agent.analysis.control_charts import Plan
from agent.analysis.differential import Rules
from agent.analysis.drift import DriftMemory, DriftPlan
from agent.analysis.drift import from_text as drift_from_text
from agent.analysis.quality import from_text as gate_from_text
from agent.bench import Bench
from agent.config import SampleSection
from agent.delivery.commands import Gatekeeper, InboundCommand
from agent.delivery.outbox import Outbox
from agent.desk import NUMBER_KEY, Done, Refused
from agent.domain import SampleState
from agent.errors import ModelError
from agent.health import SelfTest
from agent.pipeline import DRIFT_NOTE, GATE_NOTE, NO_SAMPLE
from tests.counting.running import BASE, KINDS, Place
from tests.frames import make_bench, make_frame

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


# ------------------------------------------------------------------------------------------ refused, answered, audited


def test_a_refusal_of_an_operators_command_is_audited_and_told(outbox: Outbox) -> None:
    place = Place(outbox)
    place.desk._gatekeeper = Gatekeeper(BASE, "none")
    assert place.do("reload", by="somebody")["code"] == "not-allowed"
    (entry,) = place.messages("audit")
    assert (entry["action"], entry["outcome"], entry["by"]) == ("cmd.reload", "refused", "somebody")
    (event,) = place.messages("event")
    assert event["kind"] == "command-refused"


def test_a_retained_command_is_refused_and_reported(outbox: Outbox) -> None:
    place = Place(outbox)
    place.commands.put(InboundCommand("start", b'{"transaction":"t"}', is_retained=True))
    place.serve()
    assert place.replies[-1]["code"] == "retained"
    assert [event["kind"] for event in place.messages("event")] == ["command-refused"]
    assert place.phase == "idle"


def test_a_command_that_waited_behind_a_slow_frame_for_too_long_is_refused(outbox: Outbox) -> None:
    place = Place(outbox)
    place.commands.put(InboundCommand("start", b'{"transaction":"t"}', received_monotonic_s=time.monotonic() - 31))
    place.serve()
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


def test_whoever_sends_a_thousand_refused_commands_does_not_fill_the_disk(outbox: Outbox) -> None:
    place = Place(outbox)
    desk = place.desk
    desk._gatekeeper = Gatekeeper(BASE, "none")
    for number in range(100):
        assert place.do("reload", f"t-{number}")["code"] == "not-allowed"
    assert len(place.messages("audit")) == len(place.messages("event")) == 30
    desk._monotonic_s = lambda: time.monotonic() + 61
    place.commands.put(InboundCommand("reload", b'{"transaction":"t"}', received_monotonic_s=time.monotonic() + 61))
    place.serve()
    assert place.messages("audit")[-1]["detail"]["not_told_before"] == 70


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
    other = replace(place.bench.provenance, agent_version="9.9")
    place.pipeline.use_bench(replace(place.bench, provenance=other))
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
