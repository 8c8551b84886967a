"""The life of a sample: the table holds all there is, what is not in it is refused in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.analysis.differential import CellKind
from agent.analysis.sample import ENDED, TRANSITIONS, NotNow, Trigger, begin, change, next_phase, reached_target
from agent.domain import SamplePhase, SampleState

AT = "2026-11-25T08:00:00.000Z"
KINDS: dict[str, CellKind] = {"round": "leukocyte", "lobed": "leukocyte", "young": "erythroblast"}
TRIGGERS: tuple[Trigger, ...] = ("start", "pause", "resume", "stop", "settle", "abort")


def test_a_sample_runs_pauses_goes_on_and_is_finished() -> None:
    sample = begin(None, SampleState("s-1"), AT)
    phases = [sample.phase]
    for trigger in ("pause", "resume", "stop", "settle"):
        sample = change(sample, trigger, AT, "command" if trigger == "stop" else None)  # type: ignore[arg-type]
        phases.append(sample.phase)
    assert phases == ["running", "paused", "running", "finishing", "finished"]
    assert (sample.opened_at, sample.ended_at, sample.end_reason) == (AT, AT, "command")


@pytest.mark.parametrize("phase", TRANSITIONS)
@pytest.mark.parametrize("trigger", TRIGGERS)
def test_what_is_not_in_the_table_is_refused_and_the_words_say_what_is_possible(
    phase: SamplePhase, trigger: Trigger
) -> None:
    if trigger in TRANSITIONS[phase]:
        assert next_phase(phase, trigger) == TRANSITIONS[phase][trigger]
        return
    with pytest.raises(NotNow, match=f"the sample is {phase}: it cannot {trigger}; possible now: ") as refusal:
        next_phase(phase, trigger)
    assert "settle" not in str(refusal.value).split("possible now")[1]


@given(st.lists(st.sampled_from(TRIGGERS), max_size=30))
def test_no_row_of_words_brings_an_ended_sample_back(triggers: list[Trigger]) -> None:
    sample = begin(None, SampleState("s-1"), AT)
    for trigger in triggers:
        had_ended = sample.phase in ENDED
        try:
            sample = change(sample, trigger, AT)
        except NotNow:
            continue
        assert not had_ended or trigger == "start"


def test_the_next_sample_begins_only_when_the_one_before_has_ended() -> None:
    running = begin(None, SampleState("s-1", last_sha256_16="f" * 16), AT)
    with pytest.raises(NotNow, match="running"):
        begin(running, SampleState("s-2"), AT)
    ended = change(change(replace(running, last_sha256_16="f" * 16), "stop", AT), "settle", AT)
    fresh = begin(ended, SampleState("s-2"), AT)
    assert (fresh.sid, fresh.phase, fresh.fields) == ("s-2", "running", 0)
    assert fresh.last_sha256_16 == "f" * 16, "the picture under the lens at the change is still the old slide's"


def test_a_sample_stops_by_itself_at_so_many_nucleated_cells() -> None:
    sample = replace(begin(None, SampleState("s"), AT), target_cells=100)
    assert reached_target(sample, {"round": 90, "young": 9, "unidentified": 50}, KINDS) is None
    assert reached_target(sample, {"round": 90, "young": 10}, KINDS) == "target-cells"
    assert reached_target(replace(sample, phase="paused"), {"round": 900}, KINDS) is None


def test_a_sample_stops_by_itself_when_the_widest_interval_is_narrow_enough() -> None:
    sample = replace(begin(None, SampleState("s"), AT), target_half_width_pct=5.0)
    assert reached_target(sample, {}, KINDS) is None
    assert reached_target(sample, {"round": 100, "lobed": 100}, KINDS) is None
    assert reached_target(sample, {"round": 201, "lobed": 201}, KINDS) == "target-width"
    assert reached_target(replace(sample, target_half_width_pct=None), {"round": 9000}, KINDS) is None
