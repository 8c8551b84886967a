"""What comes in on `cmd/` becomes a command or a refusal in words; nothing that arrives can raise."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.delivery.commands import (
    COMMANDS,
    LARGEST_COMMAND_BYTES,
    Amend,
    Command,
    Gatekeeper,
    InboundCommand,
    Refusal,
    Start,
    read_command,
    reply_topic,
    sign,
)
from agent.delivery.topics import Topics

NOW = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)
BASE = "hv/1/lab/scope"
KEY = b"a key of the laboratory"
ANYONE = Gatekeeper(BASE)
BY_KEY = Gatekeeper(BASE, "key", KEY)


def inbound(name: str = "ping", body: Any = None, **changes: Any) -> InboundCommand:
    payload = body if isinstance(body, bytes) else json.dumps({"transaction": "t-1", **(body or {})}).encode()
    return InboundCommand(**{"name": name, "payload": payload, "received_monotonic_s": 100.0, **changes})


def read(
    command: InboundCommand, gatekeeper: Gatekeeper = ANYONE, *, monotonic_s: float = 101.0, now: datetime | None = NOW
) -> Command | Refusal:
    return read_command(command, gatekeeper, monotonic_s=monotonic_s, now=now)


def refused(command: InboundCommand, *more: Any, **changes: Any) -> Refusal:
    judged = read(command, *more, **changes)
    assert isinstance(judged, Refusal), judged
    return judged


MINIMAL: dict[str, dict[str, Any]] = {
    "replay": {"stream": "field", "from_seq": 3, "to_seq": 9},
    "model.stage": {"folder": "models-0-2-0"},
    "amend": {"sample": "s-1", "cell_id": "s-1-7", "class": "monocyte"},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_word_of_the_list_is_understood_with_its_least(name: str) -> None:
    judged = read(inbound(name, MINIMAL.get(name)), Gatekeeper(BASE, "broker"))
    assert isinstance(judged, Command), judged
    assert (judged.name, judged.transaction) == (name, "t-1")


def test_a_start_tells_all_that_it_may() -> None:
    body = {"sample": "s-9", "accession": "A26-1-7", "age_band": "child", "stop_at_cells": 200, "by": "tech-4"}
    judged = read(inbound("start", body))
    assert isinstance(judged, Command)
    assert isinstance(judged.request, Start)
    assert judged.request.model_dump(exclude_none=True) == {"transaction": "t-1", **body}


def test_the_class_of_an_amendment_stands_under_class() -> None:
    judged = read(inbound("amend", MINIMAL["amend"]))
    assert isinstance(judged, Command)
    assert isinstance(judged.request, Amend)
    assert judged.request.cell_class == "monocyte"


def test_a_retained_command_is_refused_before_it_is_read() -> None:
    assert refused(inbound("start", b"\xff", is_retained=True)).code == "retained"


@pytest.mark.parametrize(
    ("monotonic_s", "expires_in_s", "is_done"),
    [(129.9, None, True), (130.1, None, False), (104.9, 5.0, True), (105.1, 5.0, False), (131.0, 3600.0, False)],
)
def test_a_command_that_waited_too_long_is_refused(
    monotonic_s: float, expires_in_s: float | None, is_done: bool
) -> None:
    judged = read(inbound(expires_in_s=expires_in_s), monotonic_s=monotonic_s)
    assert isinstance(judged, Command) == is_done
    if isinstance(judged, Refusal):
        assert (judged.code, judged.transaction) == ("expired", "t-1")


@pytest.mark.parametrize(("age_s", "is_done"), [(29, True), (31, False), (-29, True), (-31, False)])
def test_a_command_that_says_when_it_was_sent_is_judged_by_that(age_s: float, is_done: bool) -> None:
    at = (NOW - timedelta(seconds=age_s)).isoformat()
    assert isinstance(read(inbound(body={"at": at})), Command) == is_done
    assert isinstance(read(inbound(body={"at": at}), now=None), Command), "a device that does not know the time"


@pytest.mark.parametrize(
    ("name", "body", "code", "words"),
    [
        ("dance", {}, "unknown-command", "known are: amend, model.activate"),
        ("ping", b"", "not-json", "not a JSON object"),
        ("ping", b"[]", "not-json", "but list"),
        ("ping", b"\xff\xfe", "not-json", "utf-8"),
        ("ping", b'{"transaction":"a","transaction":"b"}', "not-json", "twice"),
        ("ping", b'{"transaction":NaN}', "bad-request", ""),
        ("ping", b"[" * 5000, "not-json", ""),
        ("ping", b"9" * 5000, "not-json", ""),
        ("ping", b"x" * (LARGEST_COMMAND_BYTES + 1), "too-large", "16385 bytes"),
        ("ping", b"{}", "bad-request", "transaction: Field required"),
        ("ping", {"transaction": "a b"}, "bad-request", "transaction"),
        ("ping", {"colour": 1}, "bad-request", "colour: Extra inputs are not permitted"),
        ("ping", {"at": "2026-11-25T08:00:00"}, "bad-request", "without its zone"),
        ("start", {"accession": "Mrs Jones"}, "bad-request", "accession"),
        ("start", {"age_band": "old"}, "bad-request", "age_band"),
        ("start", {"stop_at_cells": 0}, "bad-request", "stop_at_cells"),
        ("model.stage", {"folder": "../../etc"}, "bad-request", "folder"),
        ("replay", {"stream": "field", "from_seq": 9, "to_seq": 3}, "bad-request", "rising order"),
        ("replay", {"stream": "field", "from_seq": 1, "to_seq": 9_000_000}, "bad-request", "range of 1 to"),
        ("replay", {"stream": "state", "from_seq": 1, "to_seq": 2}, "bad-request", "stream"),
    ],
)
def test_what_is_not_understood_is_refused_with_a_code_and_words(name: str, body: Any, code: str, words: str) -> None:
    judged = refused(inbound(name, body), Gatekeeper(BASE, "broker"))
    assert (judged.code, judged.name) == (code, name)
    assert words in judged.message


def test_a_refusal_repeats_the_transaction_where_it_is_one_and_nothing_else() -> None:
    assert refused(inbound("ping", {"transaction": "t-7", "x": 1})).transaction == "t-7"
    assert refused(inbound("ping", {"transaction": "Jürgen <script>"})).transaction is None
    assert refused(inbound("ping", {"transaction": ["t"]})).transaction is None


OPERATORS = ("reload", "relearn", "model.stage", "model.activate", "model.rollback")


@pytest.mark.parametrize("name", OPERATORS)
def test_what_changes_models_configuration_or_what_is_usual_needs_the_operators_role(name: str) -> None:
    judged = refused(inbound(name, MINIMAL.get(name)))
    assert judged.code == "not-allowed"
    assert "commands.operator" in judged.message


def test_no_other_command_needs_it() -> None:
    assert {name for name, kind in COMMANDS.items() if kind.role == "operator"} == set(OPERATORS)


def signed(**changes: Any) -> dict[str, Any]:
    body = {"transaction": "t-1", "at": NOW.isoformat(), "by": "op-1"}
    return {**body, "auth": sign("reload", body, BASE, KEY), **changes}


def test_a_command_signed_with_the_devices_key_is_an_operators() -> None:
    assert isinstance(read(inbound("reload", signed()), BY_KEY), Command)


@pytest.mark.parametrize(
    "body",
    [
        {},
        signed(by="op-2"),
        signed(transaction="t-2"),
        signed(auth="0" * 64),
        {**signed(), "at": None},
    ],
)
def test_a_signature_holds_for_what_was_signed_and_nothing_else(body: dict[str, Any]) -> None:
    assert refused(inbound("reload", body), BY_KEY).code == "not-allowed"


def test_a_signature_is_worth_nothing_for_another_command_or_device() -> None:
    assert refused(inbound("model.rollback", signed()), BY_KEY).code == "not-allowed"
    elsewhere = Gatekeeper("hv/1/lab/other", "key", KEY)
    assert refused(inbound("reload", signed()), elsewhere).code == "not-allowed"


def test_the_same_asked_again_is_known_by_its_digest_whenever_it_was_sent() -> None:
    def digest(**body: Any) -> str:
        judged = read(inbound("start", body))
        assert isinstance(judged, Command)
        return judged.digest

    assert digest(sample="a") == digest(sample="a", at=NOW.isoformat())
    assert digest(sample="a") != digest(sample="b")


@settings(deadline=None)  # a loaded machine is no fault of the reader
@given(st.text(max_size=12), st.binary(max_size=200))
def test_any_bytes_give_a_command_or_a_refusal(name: str, payload: bytes) -> None:
    assert isinstance(read(inbound(name, payload)), (Command, Refusal))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
WORDS = st.sampled_from(
    ["transaction", "at", "by", "auth", "sample", "class", "cell_id", "stream", "from_seq", "folder"]
)


@settings(deadline=None)
@given(st.sampled_from(sorted(COMMANDS)), st.dictionaries(WORDS, JSON, max_size=6))
def test_any_json_gives_a_command_or_a_refusal(name: str, body: dict[str, Any]) -> None:
    payload = json.dumps(body).encode()
    for gatekeeper in (ANYONE, BY_KEY, Gatekeeper(BASE, "broker")):
        assert isinstance(read(inbound(name, payload), gatekeeper), (Command, Refusal))


TOPICS = Topics("lab", "scope")


@pytest.mark.parametrize(
    ("asked", "topic"),
    [
        (None, f"{BASE}/reply/ping"),
        ("desk/7/answers", "desk/7/answers"),
        (f"{BASE}/reply/ping/desk-7", f"{BASE}/reply/ping/desk-7"),
        (f"{BASE}/state", f"{BASE}/reply/ping"),
        ("hv/1/lab/other/cmd/stop", f"{BASE}/reply/ping"),
        ("$SYS/x", f"{BASE}/reply/ping"),
        ("a/#", f"{BASE}/reply/ping"),
        ("", f"{BASE}/reply/ping"),
        ("a" * 500, f"{BASE}/reply/ping"),
    ],
)
def test_a_reply_goes_where_it_was_asked_for_and_never_into_other_topics_of_devices(
    asked: str | None, topic: str
) -> None:
    assert reply_topic(inbound(response_topic=asked), TOPICS) == topic


def test_a_command_whose_name_is_no_word_is_answered_all_the_same() -> None:
    assert reply_topic(inbound("x+\0" * 40), TOPICS) == f"{BASE}/reply/unknown"
