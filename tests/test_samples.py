"""Samples that begin with the agent and end with their source: a real outbox, and what is left in it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest

from agent.analysis.differential import Rules
from agent.config import SampleSection
from agent.delivery.outbox import Outbox
from agent.delivery.topics import Topics
from agent.domain import ModelIdentity, Provenance, SampleState
from agent.reporting import Reporter
from agent.samples import begin_sample, close_sample

TODAY = datetime(2026, 11, 23, 8, tzinfo=timezone.utc)
REPORTER = Reporter(
    Topics("lab", "dev"),
    Rules({}),
    Provenance("0", ModelIdentity("d", "1", "a" * 64), ModelIdentity("c", "1", "b" * 64), "r", "none", "c" * 64),
)


def begin(
    outbox: Outbox, sid: str | None = None, *, takes_all_anew: bool = True, **section: Any
) -> tuple[SampleState, bool]:
    return begin_sample(outbox, SampleSection(id=sid, **section), TODAY, REPORTER, takes_all_anew=takes_all_anew)


def test_a_new_sample_is_named_by_date_and_boot_and_runs(outbox: Outbox) -> None:
    sample, is_new = begin(outbox, stop_at_cells=200, age_band="child", accession="A-1")
    assert is_new
    assert (sample.sid, sample.phase, sample.target_cells) == (f"s-20261123-b{outbox.boot}", "running", 200)
    assert (sample.age_band, sample.accession, sample.opened_at) == ("child", "A-1", "2026-11-23T08:00:00.000Z")
    assert outbox.sample_state() == sample


def test_a_sample_that_was_not_closed_goes_on_after_a_restart(outbox: Outbox) -> None:
    stored = SampleState("s-20261122-b1", next_cell_number=40, fields=3, counts={"rbc": 39}, last_sha256_16="ab")
    outbox.append((), sample=stored, finished_keys=("one",))
    assert begin(outbox) == (stored, False)
    assert begin(outbox, "s-20261122-b1") == (stored, False)
    assert outbox.finished_keys() == {"one"}


def test_another_id_in_the_configuration_ends_the_sample_with_its_report_and_begins_another(outbox: Outbox) -> None:
    outbox.append((), sample=SampleState("first", next_cell_number=40), finished_keys=("one",))
    second, is_new = begin(outbox, "second")
    assert (second.sid, second.next_cell_number, is_new) == ("second", 1, True)
    assert outbox.finished_keys() == frozenset(), "the second sample takes the folder from its beginning"
    (report, event) = [json.loads(row.payload) for row in outbox.pending(0, 9)]
    assert (report["status"], report["report"]) == ("final", "first-r1")
    assert event["detail"]["reason"] == "replaced"


def test_another_id_does_not_count_the_earlier_slides_of_a_watched_folder(outbox: Outbox) -> None:
    outbox.append((), sample=SampleState("first"), finished_keys=("one",))
    assert begin(outbox, "second", takes_all_anew=False)[0].sid == "second"
    assert outbox.finished_keys() == {"one"}
    assert begin(outbox, "third", takes_all_anew=False, start="command")[0].phase == "idle"
    assert (outbox.sample_state(), outbox.finished_keys()) == (None, {"one"})


def test_a_closed_sample_is_followed_by_a_new_one_with_another_id(outbox: Outbox) -> None:
    first, _ = begin(outbox)
    close_sample(outbox, first, None)
    assert outbox.finished_keys() == frozenset()
    assert begin(outbox)[0].sid == f"s-20261123-b{outbox.boot}-2"


def test_no_cell_id_and_no_report_is_given_twice_when_a_named_sample_runs_again(outbox: Outbox) -> None:
    close_sample(outbox, SampleState("named", next_cell_number=40, fields=3, counts={"rbc": 39}, reports=1), "named")
    again, is_new = begin(outbox, "named")
    assert is_new
    assert (again.sid, again.next_cell_number, again.fields, again.counts) == ("named", 40, 0, {})
    assert (again.reports, again.phase) == (1, "running")


def end(outbox: Outbox, sample: SampleState) -> SampleState:
    """As the pipeline does at the end of a source."""
    ending = REPORTER.finish(sample, TODAY, "source-ended")
    cells = {f"{kind}/{sample.sid}/{sample.sid}-1": "round" for kind in ("cells", "review")}
    documents = REPORTER.documents(ending.sample, boot=outbox.boot, at=TODAY)
    outbox.append(ending.drafts, sample=ending.sample, documents=documents, notes={**ending.notes, **cells})
    return ending.sample


def told(outbox: Outbox, kind: str) -> set[str]:
    return {topic.rpartition("/")[2] for topic in outbox.told(f"{REPORTER.topics.base}/{kind}/")}


@pytest.mark.parametrize("is_named", [False, True])
def test_samples_that_are_begun_by_a_start_archive_those_before(outbox: Outbox, *, is_named: bool) -> None:
    """A folder that a timer has read, or another `sample.id` for each slide: nothing is kept for ever."""
    sids = []
    for number in range(20):
        sample, is_new = begin(outbox, f"slide-{number}" if is_named else None)
        assert is_new
        assert (sample.number, told(outbox, "sample")) == (number + 1, set()), "cleared when the next begins"
        sids.append(sample.sid)
        ended = end(outbox, sample)
        if not is_named:
            close_sample(outbox, ended, None)
    newest = set(sids[-16:])
    assert told(outbox, "sample") == {sids[-1]}
    assert told(outbox, "differential") == newest, "cleared with the sixteenth after it"
    for kind in ("samples/", "cells/", "review/"):
        assert {key.split("/")[1] for key in outbox.notes(kind)} == newest


def test_a_sample_that_was_thrown_over_and_closed_leaves_nothing_to_the_next(outbox: Outbox) -> None:
    thrown = SampleState("s-1", phase="aborted")
    documents = REPORTER.documents(thrown, boot=outbox.boot, at=TODAY)
    outbox.append((), sample=thrown, documents=documents, notes={"cells/s-1/s-1-1": "round"})
    close_sample(outbox, thrown, None)
    begin(outbox)
    assert (told(outbox, "sample"), outbox.notes("cells/")) == (set(), {})


def test_a_named_sample_that_runs_again_keeps_its_report_and_no_cell_of_the_run_before(outbox: Outbox) -> None:
    ended = end(outbox, begin(outbox, "named")[0])
    close_sample(outbox, ended, "named")
    begin(outbox, "named")
    assert told(outbox, "sample") == told(outbox, "differential") == {"named"}
    assert [outbox.notes(kind) for kind in ("samples/", "cells/", "review/")] == [{}, {}, {}]


def test_a_name_that_comes_back_after_another_gives_no_cell_id_and_no_report_twice(outbox: Outbox) -> None:
    """Answers to cells of the run before stay under their ids."""
    outbox.append((), sample=SampleState("first", next_cell_number=40))
    begin(outbox, "second")
    again, is_new = begin(outbox, "first")
    assert (is_new, again.next_cell_number, again.reports, again.fields) == (True, 40, 1, 0)


def test_where_commands_begin_samples_none_begins_by_itself(outbox: Outbox) -> None:
    assert begin(outbox, start="command")[0].phase == "idle"
    assert outbox.sample_state() is None


def test_a_sample_that_has_ended_is_not_begun_again_by_a_restart(outbox: Outbox) -> None:
    ended = SampleState("s-1", phase="finished", fields=9)
    outbox.append((), sample=ended)
    assert begin(outbox) == (ended, False)
