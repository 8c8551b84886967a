"""What was set aside: with its reason, told of by an event, and sent again at a word."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from agent.delivery.messages import Draft, RetainedDocument, load_schema
from agent.delivery.outbox import Outbox, begin_boot
from agent.errors import MessageRejected
from tests.delivery.outbox.making import make_draft, make_outbox, messages


def test_a_rejected_row_is_kept_with_its_reason_and_can_be_sent_again(outbox: Outbox) -> None:
    row_ids = outbox.append([make_draft(text="bad"), make_draft(text="good")])
    outbox.reject(row_ids[0], "too large")
    outbox.reject(row_ids[0], "twice does nothing")
    assert [message["text"] for message in messages(outbox)] == ["good"]
    (letter,) = outbox.dead_letters()
    assert (letter.reason, letter.stream, letter.seq) == ("too large", "field", 1)
    assert (outbox.depth(), outbox.dead_letter_count()) == (1, 1)
    assert outbox.requeue() == 1
    assert [message["id"] for message in messages(outbox)] == ["scope:1:2", "scope:1:1"]
    assert (outbox.depth(), outbox.dead_letter_count()) == (2, 0)


def test_a_row_that_the_disk_has_changed_is_seen_and_stays_out_of_the_queue(outbox: Outbox) -> None:
    row_ids = outbox.append([make_draft(text="one"), make_draft(text="two")])
    with sqlite3.connect(outbox.path) as disk:
        disk.execute("UPDATE rows SET payload = CAST(replace(payload, 'one', 'ome') AS BLOB) WHERE row_id = 1")
    disk.close()
    assert [row.is_intact for row in outbox.pending(0, 10)] == [False, True]
    outbox.reject(row_ids[0], "it is not what was stored")
    assert outbox.requeue() == 0
    assert outbox.dead_letter_count() == 1
    assert outbox.depth() == 1


def test_export_gives_one_json_object_a_line(outbox: Outbox) -> None:
    row_ids = outbox.append([make_draft(text=f"ä{n}\n") for n in range(450)])
    lines = [json.loads(line) for line in outbox.export_rows()]
    assert [line["row"] for line in lines] == list(row_ids)
    assert lines[0]["topic"] == "hv/1/lab/scope/field/s1"
    assert lines[449]["message"]["text"] == "ä449\n"
    outbox.reject(row_ids[0], "no")
    (dead,) = (json.loads(line) for line in outbox.export_rows(dead_letters=True))
    assert (dead["reason"], dead["message"]["seq"]) == ("no", 1)


# -------------------------------------------------------------------------------------------- too large for the broker


def make_large_draft() -> Draft:
    return make_draft(text="x" * 1000)


def events(outbox: Outbox) -> list[Any]:
    return [json.loads(row.payload) for row in outbox.pending(0, 1000) if row.stream == "event"]


def test_what_the_broker_would_not_take_is_set_aside_before_it_enters_also_after_a_restart(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(1000)
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft(), make_large_draft(), make_draft()])
        assert [row.seq for row in outbox.pending(0, 100, without=["event"])] == [1, 3]
        assert outbox.depth() == 3  # and the event about it
        (letter,) = outbox.dead_letters()
        assert (letter.seq, "too large" in letter.reason, "1000" in letter.reason) == (2, True, True)
        outbox.note_packet_limit(None)
        outbox.requeue([letter.letter_id])
        assert [row.seq for row in outbox.pending(0, 100, without=["event"])] == [1, 3, 2]


def test_an_event_tells_of_what_was_set_aside_at_entry_in_the_same_transaction(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(1000)
        outbox.append([make_large_draft()])
        (event,) = events(outbox)
        jsonschema.Draft202012Validator(load_schema("event")).validate(event)
        (letter,) = outbox.dead_letters()
        assert (event["kind"], event["severity"]) == ("broker-rejected", "error")
        assert event["detail"] == {
            "stream": "field",
            "message_id": "scope:1:1",
            "topic": make_large_draft().topic,
            "bytes": len(letter.payload),
            "reason": letter.reason,
            "set_aside": 1,
        }


def test_many_that_are_too_large_make_one_event_and_one_line_a_minute_with_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begin_boot(tmp_path)
    now_ns = [10**12]
    with make_outbox(tmp_path, monotonic_ns=lambda: now_ns[0]) as outbox:
        outbox.note_packet_limit(1000)
        for _ in range(5):
            outbox.append([make_large_draft()])
        now_ns[0] += 60 * 10**9
        outbox.append([make_large_draft()])
        assert [event["detail"]["set_aside"] for event in events(outbox)] == [1, 5]
        words = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [line.split(", ")[1].split(":")[0] for line in words] == [
            f"{n} since the last word of it" for n in (1, 5)
        ]


def test_an_event_that_is_too_large_itself_makes_no_further_one(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(100)
        outbox.append([make_large_draft()])
        assert outbox.depth() == 0
        assert [letter.stream for letter in outbox.dead_letters()] == ["field", "event"]


def test_what_could_not_be_stored_is_told_of_when_it_is(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.note_packet_limit(1000)
        unsayable = RetainedDocument("t", {"number": float("nan")})
        with pytest.raises(MessageRejected):
            outbox.append([make_large_draft()], documents=[unsayable])
        outbox.append([make_large_draft()])
        assert [event["detail"]["set_aside"] for event in events(outbox)] == [1]
