"""What is read from a topic and its bytes; what cannot be read says why and, where it can, which number it has."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.central.intake import FieldMessage, Message, MessageUnusable, Number, Place, read_message
from tests.central.fake_device import FakeDevice

FIELD = FakeDevice().field()


def read(body: Any, topic: str = FIELD.topic) -> Message:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_message(topic, payload, is_retained=False)


def changed(**keys: Any) -> dict[str, Any]:
    return {**FIELD.body, **keys}


def refusal(body: Any, topic: str = FIELD.topic) -> MessageUnusable:
    with pytest.raises(MessageUnusable) as caught:
        read(body, topic)
    return caught.value


def test_a_field_is_read_with_its_number_and_cells() -> None:
    message = read(FIELD.payload)
    assert message.place == Place("lab", "scope")
    assert message.number == Number("field", 1, 1)
    assert isinstance(message.part, FieldMessage)
    assert [cell.cell_id for cell in message.part.cells] == ["s-1-1", "s-1-2", "s-1-3"]


def test_keys_of_a_newer_agent_are_passed_over_and_kept() -> None:
    message = read(changed(colour="new"))
    assert message.body is not None
    assert message.body["colour"] == "new"


def test_what_a_newer_agent_leaves_out_is_unknown() -> None:
    body = {key: FIELD.body[key] for key in ("schema", "id", "seq", "sample", "captured_at", "frame", "cells")}
    part = read(body).part
    assert isinstance(part, FieldMessage)
    assert part.clock.synchronised is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "no JSON object"),
        (b"\xff\xfe", "no JSON object"),
        (b"[1]", "no JSON object: found list"),
        (b"[" * 100_000, "no JSON object: nested too deeply"),
        (changed(seq=2), "do not agree"),
        (changed(id="other:1:1"), "id: of the device other, on the topic of scope"),
        (changed(id=5), "id: not device:boot:seq"),
        (changed(id="scope:1:99999999999999999"), "id: not device:boot:seq"),
        (changed(id="scope:1:9999999999999999", seq=9999999999999999), "out of range"),
        (changed(sample="s-2"), "its topic is about the sample s-1, its content about s-2"),
        (changed(captured_at="yesterday"), "captured_at"),
        (changed(captured_at="2026-01-01T00:00:00"), "captured_at"),
        (changed(captured_at="0001-01-01T00:00:00+14:00"), "captured_at"),
        (changed(cells=None), "cells"),
        (changed(note="zero\0byte"), "zero byte"),
        (changed(note="\ud800"), "no JSON object"),
        (FIELD.payload.replace(b"100.0", b"1e999"), "no JSON object"),
        (FIELD.payload.replace(b"100.0", b"NaN"), "no JSON object"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_reason(body: Any, words: str) -> None:
    assert words in refusal(body).reason


def test_a_text_that_shows_how_a_zero_byte_is_written_is_no_zero_byte() -> None:
    assert read(changed(note="\\u0000")).body == changed(note="\\u0000")


def test_a_message_with_a_fault_keeps_its_number() -> None:
    assert refusal(changed(cells=None)).number == Number("field", 1, 1)
    assert refusal(FIELD.payload[:-20]).number == Number("field", 1, 1)
    assert refusal(b"{").number is None


@pytest.mark.parametrize(
    "topic",
    [
        "hv/2/lab/scope/field/s-1",
        "hv/1/lab/scope",
        "hv/1/Lab/scope/field/s-1",
        "hv/1/lab/scope/field",
        "hv/1/lab/scope/field/s-1/more",
        "hv/1/lab/scope/image/s-1",
        "",
    ],
)
def test_a_topic_that_is_not_in_the_contract_is_refused(topic: str) -> None:
    assert refusal(FIELD.payload, topic).number is None


def test_an_empty_payload_clears_a_document_and_is_no_field() -> None:
    assert read(b"", "hv/1/lab/scope/alert/disk-low").is_cleared
    assert refusal(b"").reason.startswith("no JSON object")


def reason_or_none(topic: str, payload: bytes) -> str | None:
    """Any other exception fails the test."""
    try:
        read_message(topic, payload, is_retained=False)
    except MessageUnusable as unusable:
        return unusable.reason
    return None


@given(
    payload=st.binary(max_size=200), kind=st.sampled_from(["field/s-1", "event", "state", "alert/a", "reply/replay"])
)
def test_any_bytes_are_read_or_refused(payload: bytes, kind: str) -> None:
    assert reason_or_none(f"hv/1/lab/scope/{kind}", payload) != ""


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(key=st.sampled_from(sorted(FIELD.body)), value=JSON_VALUES)
def test_any_value_in_any_key_is_read_or_refused(key: str, value: Any) -> None:
    assert reason_or_none(FIELD.topic, json.dumps({**FIELD.body, key: value}).encode()) != ""
