"""The audit chain: whatever is changed, left out, put in or swapped is found."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delivery.audit import BEGINNING, ChainHead, Entry, Verdict, chain, verify
from agent.delivery.messages import as_historical, load_schema, serialise, stamp
from agent.delivery.topics import Topics

AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)
TOPICS = Topics("lab", "scope")


def make_entry(number: int = 1, **changes: Any) -> Entry:
    return Entry(**{"action": "cmd.start", "outcome": "done", "message": f"sample s-{number} begins", **changes})


def make_lines(count: int, head: ChainHead = ChainHead(), boot: int = 3) -> list[str]:  # noqa: B008 - frozen
    drafts, _ = chain([make_entry(n) for n in range(count)], head, TOPICS, boot=boot, at=AT)
    return [serialise(stamp(draft.body, "scope", boot, n)).decode() for n, draft in enumerate(drafts, start=head.n + 1)]


def test_entries_follow_each_other_from_the_beginning() -> None:
    lines = make_lines(3)
    messages = [json.loads(line) for line in lines]
    assert messages[0]["previous"] == BEGINNING
    assert [message["previous"] for message in messages[1:]] == [message["hash"] for message in messages[:-1]]
    assert verify(lines) == Verdict(entries=3, repeats=0, chains=1, missing=0, first=1, last=3, faults=())


def test_each_entry_has_a_valid_message() -> None:
    detail = {"sha256": "f" * 64, "n": 3, "ratio": 0.5, "names": ("a", 1), "none": None}
    entry = make_entry(by="op-1", role="operator", transaction="t-1", detail=detail, message="ein Name: \udcff")
    (draft,), _ = chain([entry], ChainHead(), TOPICS, boot=1, at=AT)
    line = serialise(stamp(draft.body, "scope", 1, 1))
    jsonschema.Draft202012Validator(load_schema("audit")).validate(json.loads(line))
    assert verify([line.decode()]).is_sound
    assert json.loads(line)["detail"]["ratio"] == "0.5", "no fractions: every language writes them differently"


def test_a_chain_goes_on_over_a_restart_from_its_head() -> None:
    drafts, head = chain([make_entry()], ChainHead(), TOPICS, boot=3, at=AT)
    first = serialise(stamp(drafts[0].body, "scope", 3, 1)).decode()
    assert verify([first, *make_lines(2, head, boot=4)]).is_sound


def test_repeats_order_history_and_other_messages_do_not_matter() -> None:
    lines = make_lines(4)
    historical = as_historical(lines[1].encode()).decode()
    exported = json.dumps({"row": 7, "topic": "t", "message": json.loads(lines[2])})
    mixed = [exported, lines[3], historical, lines[0], lines[1], "no json", '{"schema":"hv/1/event"}', "[]"]
    verdict = verify(mixed)
    assert verdict.is_sound, verdict
    assert (verdict.entries, verdict.repeats) == (4, 1)


@settings(deadline=None)
@given(st.integers(0, 4), st.data())
def test_any_changed_value_is_found(number: int, data: st.DataObject) -> None:
    lines = make_lines(5)
    message = json.loads(lines[number])
    key = data.draw(st.sampled_from(sorted(set(message) - {"id", "seq", "historical", "schema"})))
    message[key] = {"x": 1} if key == "detail" else f"{message[key]}0"
    lines[number] = json.dumps(message)
    assert not verify(lines).is_sound


def test_what_is_left_out_is_counted() -> None:
    lines = make_lines(6)
    verdict = verify([lines[0], lines[1], lines[4], lines[5]])
    assert (verdict.missing, verdict.faults) == (2, ("line 3: 2 entries before 5 are missing",))


def test_an_entry_that_was_put_in_anew_does_not_fit_its_neighbour() -> None:
    lines = make_lines(4)
    (forged,), _ = chain([make_entry(99)], ChainHead(2, "a" * 64), TOPICS, boot=3, at=AT)
    lines[2] = serialise(stamp(forged.body, "scope", 3, 3)).decode()
    verdict = verify(lines)
    assert "entry 3 does not follow the entry 2" in verdict.faults[0]
    assert "entry 4 does not follow the entry 3" in verdict.faults[1]


def test_two_chains_are_told() -> None:
    verdict = verify([*make_lines(2, boot=3), *make_lines(2, boot=5)])
    assert verdict.chains == 2
    assert "begins anew in boot 5" in verdict.faults[0]


def test_the_end_of_a_chain_may_be_verified_alone() -> None:
    lines = make_lines(6)
    verdict = verify(lines[3:])
    assert verdict.is_sound
    assert (verdict.first, verdict.last) == (4, 6)


def test_an_empty_file_holds_no_chain() -> None:
    assert verify([]) == Verdict(0, 0, 0, 0, None, None, ())


@pytest.mark.parametrize("key", ["hash", "n", "boot", "previous"])
def test_an_entry_without_a_key_is_told(key: str) -> None:
    message = json.loads(make_lines(1)[0])
    del message[key]
    assert not verify([json.dumps(message)]).is_sound


@pytest.mark.parametrize("key", ["n", "boot"])
def test_an_entry_with_a_number_beyond_all_numbers_is_told(key: str) -> None:
    line = make_lines(1)[0]
    verdict = verify([line.replace(f'"{key}":{json.loads(line)[key]},', f'"{key}":1e999,')])
    assert [fault.partition(":")[0] for fault in verdict.faults] == ["line 1"]
