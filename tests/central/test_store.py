"""Batches become rows, once each; what is acknowledged is there. On real SQLite and real PostgreSQL."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Engine

from agent.central import tables
from agent.central.database import open_database
from agent.central.intake import Place
from agent.central.ledger import Ack, Question
from agent.central.numbers import Span
from agent.central.store import Arrival, Outcome, Store
from agent.delivery.reports import Alert, alert_body
from agent.domain import AgentState
from tests.central.conftest import NOW, arrival
from tests.central.fake_device import FakeDevice, Sent

PLACE = Place("lab", "scope")
Rows = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine)


def commit(store: Store, sent: Sequence[Sent | tuple[str, bytes]], at: datetime = NOW) -> Outcome:
    return store.commit([arrival(one, at) for one in sent])


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def reply(device: FakeDevice, question: Question, *gone: list[int]) -> tuple[str, bytes]:
    body = {"status": "ok", "code": "replayed", "transaction": question.transaction, "data": {"gone": list(gone)}}
    return device.topics.reply("replay"), json.dumps(body).encode()


def test_a_field_is_a_row_with_its_cells_as_rows(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    field = device.field(cells=3)
    outcome = commit(store, [field])
    assert outcome.acks == [Ack(PLACE, "field", 1, 1)]
    (row,) = rows(tables.fields)
    assert row["body"] == field.body
    assert (row["sample"], row["seq"], row["cell_count"], row["focus"]) == ("s-1", 1, 3, 100.0)
    assert row["captured_at"].isoformat() == "2026-11-25T08:00:01+00:00"
    assert row["classifier"] == "shufflenetv2 0.1.0"
    cells = rows(tables.cells)
    assert [(cell["cell_id"], cell["class"], cell["boot"], cell["seq"]) for cell in cells] == [
        ("s-1-1", "neutrophil", 1, 1),
        ("s-1-2", "lymphocyte", 1, 1),
        ("s-1-3", "monocyte", 1, 1),
    ]
    assert cells[0]["probabilities"]["neutrophil"] == 0.9
    assert [sample["sample"] for sample in rows(tables.samples)] == ["s-1"]


def test_a_cell_told_twice_is_one_row_whichever_comes_first(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    field, *cells = device.field_with_cells(2)
    commit(store, [cells[0]])
    outcome = commit(store, [field, cells[1]])
    assert outcome.acks == [Ack(PLACE, "cell", 1, 2), Ack(PLACE, "field", 1, 1)]
    assert [(row["cell_id"], row["boot"], row["seq"]) for row in rows(tables.cells)] == [
        ("s-1-1", 1, 1),
        ("s-1-2", 1, 1),
    ]


def test_a_repeat_is_acknowledged_again_and_stored_once(store: Store, rows: Rows) -> None:
    field = FakeDevice().field()
    historical = Sent(
        field.stream, 1, 1, field.topic, field.payload.replace(b'"historical":false', b'"historical":true')
    )
    commit(store, [field])
    outcome = commit(store, [historical])
    assert outcome.acks == [Ack(PLACE, "field", 1, 1)]
    assert (outcome.stored, outcome.repeats, outcome.dead) == (0, 1, 0)
    assert len(rows(tables.fields)) == 1


def test_another_message_under_the_same_id_is_set_aside_not_dropped(store: Store, rows: Rows) -> None:
    """A copied SD card: two devices of one name, both at boot 1."""
    field = FakeDevice().field(cells=1)
    other = FakeDevice().field(cells=2)
    commit(store, [field])
    outcome = commit(store, [other])
    assert outcome.dead == 1
    (letter,) = rows(tables.dead_letters)
    assert bytes(letter["payload"]) == other.payload
    assert letter["reason"] == "the same id as another message that says something else"
    assert rows(tables.fields)[0]["body"] == field.body


def test_only_what_lies_before_the_first_gap_is_acknowledged(store: Store, rows: Rows) -> None:
    one, two, three, four = FakeDevice().fields(4)
    assert commit(store, [one, two, four]).acks == [Ack(PLACE, "field", 1, 2)]
    (gap,) = rows(tables.gaps)
    assert (gap["status"], gap["first_seq"], gap["last_seq"]) == ("open", 3, 3)
    assert commit(store, [three]).acks == [Ack(PLACE, "field", 1, 4)]
    (gap,) = rows(tables.gaps)
    assert gap["status"] == "filled"


def test_a_receiver_that_came_late_does_not_acknowledge_what_it_never_saw(store: Store) -> None:
    fields = FakeDevice().fields(5)
    assert commit(store, fields[3:]).acks == []
    (question,) = store.questions(later(6))
    assert question.span == Span(1, 3)
    device = FakeDevice()
    assert commit(store, [reply(device, question, [1, 3])]).acks == [Ack(PLACE, "field", 1, 5)]


def test_a_gap_is_asked_about_after_a_while_and_then_less_and_less_often(store: Store) -> None:
    one, _, three = FakeDevice().fields(3)
    commit(store, [one, three])
    assert store.questions(later(4)) == []
    (question,) = store.questions(later(6))
    assert question == Question(PLACE, "field", Span(2, 2), "gap-1-1")
    assert store.questions(later(30)) == []
    assert [again.transaction for again in store.questions(later(36))] == ["gap-1-2"]
    assert store.questions(later(90)) == []
    assert [again.transaction for again in store.questions(later(96))] == ["gap-1-3"]


def test_a_device_that_is_back_is_asked_at_once_and_told_what_is_here(store: Store) -> None:
    device = FakeDevice()
    one, _, three = device.fields(3)
    commit(store, [one, three, device.event()])
    for seconds in (6, 36, 96):
        store.questions(later(seconds))
    outcome = commit(store, [device.state(AgentState.INIT)], later(100))
    assert outcome.acks == [Ack(PLACE, "event", 1, 1), Ack(PLACE, "field", 1, 1)]
    assert len(store.questions(later(101))) == 1


def test_the_answer_says_what_is_gone_and_the_rest_stays_asked_for(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    fields = device.fields(8)
    commit(store, [fields[0], fields[7]])
    (question,) = store.questions(later(6))
    commit(store, [reply(device, question, [2, 4], [6, 6], [90, 99])])
    spans = {(gap["status"], gap["first_seq"], gap["last_seq"]) for gap in rows(tables.gaps)}
    assert {span for span in spans if span[0] == "open"} == {("open", 5, 5), ("open", 7, 7)}
    assert {span for span in spans if span[0] == "gone"} == {("gone", 2, 4), ("gone", 6, 6)}
    assert commit(store, [fields[4], fields[6]]).acks == [Ack(PLACE, "field", 1, 8)]


@pytest.mark.parametrize("transaction", ["gap-1-1", "gap-x-1", "gap-99-1", "other", "gap-" + "9" * 40 + "-1", None])
def test_an_answer_to_somebody_elses_question_changes_nothing(
    store: Store, rows: Rows, transaction: str | None
) -> None:
    other = FakeDevice(device="other")
    one, _, three = FakeDevice().fields(3)
    commit(store, [one, three])
    body = {"status": "ok", "transaction": transaction, "data": {"gone": [[1, 99], ["a"], 5, [2]]}}
    commit(store, [(other.topics.reply("replay"), json.dumps(body).encode())])
    assert [gap["status"] for gap in rows(tables.gaps)] == ["open"]


def test_what_was_given_up_and_comes_after_all_is_stored(store: Store, rows: Rows, engine: Engine) -> None:
    device = FakeDevice()
    fields = device.fields(5)
    commit(store, [fields[4]])
    (question,) = store.questions(later(6))
    commit(store, [reply(device, question, [1, 4])])
    assert commit(store, [fields[2]]).stored == 1
    assert commit(Store(engine), [fields[2]]).repeats == 1
    assert [row["seq"] for row in rows(tables.fields)] == [3, 5]
    gone = [(gap["first_seq"], gap["last_seq"]) for gap in rows(tables.gaps) if gap["status"] == "gone"]
    assert sorted(gone) == [(1, 2), (4, 4)]


def test_a_lost_outbox_begins_another_numbering_of_all_streams(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    old = device.fields(4)
    commit(store, [old[0], old[1], old[3], device.event()])
    device.lose_outbox()
    new = device.fields(2)
    outcome = commit(store, [device.event("outbox-set-aside"), *new])
    assert outcome.acks == [
        Ack(PLACE, "event", 1, 1),
        Ack(PLACE, "event", 2, 1),
        Ack(PLACE, "field", 1, 4),  # what is missing of the old ones is gone with the file
        Ack(PLACE, "field", 2, 2),
    ]
    assert len(rows(tables.fields)) == 5
    (gap,) = rows(tables.gaps)
    assert (gap["status"], gap["note"]) == ("gone", "the numbers began again under boot 2")
    assert store.questions(later(60)) == []
    # A device that is back knows nothing of its old numbers.
    assert set(store.acks()) == {Ack(PLACE, "event", 2, 1), Ack(PLACE, "field", 2, 2)}
    assert set(commit(store, [device.state()]).acks) == set(store.acks())


def test_a_new_numbering_is_seen_even_if_its_first_messages_are_missing(
    store: Store, rows: Rows, engine: Engine
) -> None:
    device = FakeDevice()
    commit(store, device.fields(3))
    device.lose_outbox()
    event, new = device.event(), device.fields(9)
    assert Ack(PLACE, "field", 2, 9) not in commit(store, new[6:]).acks  # might still be the old numbering
    commit(Store(engine), [device.event("second")])  # number 2 of the events
    outcome = commit(store, [event, *new[:2]])
    assert outcome.acks[-1] == Ack(PLACE, "field", 2, 2)
    opened = [(gap["first_seq"], gap["last_seq"]) for gap in rows(tables.gaps) if gap["status"] == "open"]
    assert opened == [(3, 6)]
    assert commit(store, new[2:6]).acks[-1] == Ack(PLACE, "field", 2, 9)


def info(device: FakeDevice, since_boot: int | None) -> tuple[str, bytes]:
    body = {"schema": "hv/1/info", "device": "scope", "site": "lab", "boot": device.boot}
    return device.topics.info, json.dumps({**body, "numbered_since_boot": since_boot}).encode()


@pytest.mark.parametrize("is_told_first", [True, False])
def test_what_a_device_says_of_its_numbers_shows_a_new_numbering_of_which_nothing_else_tells(
    store: Store, rows: Rows, engine: Engine, is_told_first: bool
) -> None:
    """Without its word, field 4 of the new numbers would pass for the one after field 3 of the old ones."""
    device = FakeDevice()
    commit(store, device.fields(3))
    device.lose_outbox()
    new = device.fields(4)
    told = info(device, since_boot=2)
    outcome = commit(store, [told, new[3]] if is_told_first else [new[3], told])
    assert [ack for ack in outcome.acks if ack.seq == 4] == []
    assert [(gap["first_seq"], gap["last_seq"]) for gap in rows(tables.gaps) if gap["status"] == "open"] == [(1, 3)]
    assert commit(Store(engine), new[:3]).acks == [Ack(PLACE, "field", 2, 4)]
    assert len(rows(tables.fields)) == 7


def test_what_a_device_says_of_its_numbers_changes_nothing_where_they_go_on(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    fields = device.fields(6)
    commit(store, [info(device, since_boot=1), *fields[:2]])
    device.restart()
    outcome = commit(store, [info(device, since_boot=1), info(device, since_boot=None), *fields[2:], *device.fields(1)])
    assert outcome.acks == [Ack(PLACE, "field", 2, 7)]
    assert rows(tables.gaps) == []
    assert [row["since_boot"] for row in rows(tables.acks)] == [0]


def test_one_bad_message_does_not_keep_the_others_out(store: Store, rows: Rows) -> None:
    one, two, three = FakeDevice().fields(3)
    broken = Sent("field", 1, 2, two.topic, two.payload.replace(b'"cells":[', b'"cells":7,"x":['))
    outcome = commit(store, [one, broken, three, ("no/topic", b"x"), (one.topic, b"{")])
    assert outcome.acks == [Ack(PLACE, "field", 1, 3)]  # the bytes of number 2 are kept: it has arrived
    assert outcome.dead == 3
    assert {bytes(letter["payload"]) for letter in rows(tables.dead_letters)} == {broken.payload, b"x", b"{"}
    assert [row["seq"] for row in rows(tables.fields)] == [1, 3]


def test_a_value_that_only_the_database_refuses_is_found_and_set_aside(
    store: Store, rows: Rows, engine: Engine
) -> None:
    one, two, three = FakeDevice().fields(3)
    name = random.Random(1).randbytes(5000).hex().encode()  # PostgreSQL's indexes hold 2704 bytes
    long = Sent("field", 1, 2, two.topic, two.payload.replace(b'"class":"neutrophil"', b'"class":"%s"' % name))
    assert commit(store, [one, long, three]).acks[-1] == Ack(PLACE, "field", 1, 3)
    stored = [row["seq"] for row in rows(tables.fields)]
    letters = [(letter["seq"], bytes(letter["payload"])) for letter in rows(tables.dead_letters)]
    if engine.dialect.name == "postgresql":
        assert (stored, letters) == ([1, 3], [(2, long.payload)])
    else:
        assert (stored, letters) == ([1, 2, 3], [])


def test_the_same_dead_letter_is_counted_not_stored_again(store: Store, rows: Rows) -> None:
    for _ in range(3):
        commit(store, [("no/topic", b"x")])
    (letter,) = rows(tables.dead_letters)
    assert letter["times"] == 3


def test_documents_show_the_newest_word(store: Store, rows: Rows) -> None:
    device = FakeDevice(boot=3)
    commit(store, [device.state(AgentState.READY)])
    old = FakeDevice(boot=2)
    commit(store, [old.state(AgentState.DEGRADED)])  # a broker that came back with an old file
    (row,) = rows(tables.devices)
    assert (row["state"], row["boot"]) == ("ready", 3)


def test_an_alert_is_open_until_its_topic_is_cleared(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    alert = Alert("disk-low", "warning", "64 MB left", NOW)
    topic = device.topics.alert("disk-low")
    commit(store, [device.document(topic, alert_body(alert, device.topics, boot=1))])
    assert rows(tables.alerts)[0]["cleared_at"] is None
    commit(store, [(topic, b"")])
    assert rows(tables.alerts)[0]["cleared_at"] == NOW
    assert rows(tables.alerts)[0]["message"] == "64 MB left"


def differential(device: FakeDevice, status: str, at: str, count: int) -> dict[str, Any]:
    share = {"class": "neutrophil", "count": count, "pct": 100.0, "low_pct": 90.0, "high_pct": 100.0, "flag": None}
    return {
        "schema": "hv/1/differential",
        "device": device.topics.device,
        "site": device.topics.site,
        "boot": device.boot,
        "at": at,
        "sample": device.sample,
        "status": status,
        "report": None if status == "preliminary" else "s-1-r1",
        "leukocytes": count,
        "shares": [share],
        "historical": False,
        "ruo": True,
    }


def test_a_running_differential_is_replaced_and_a_final_one_stays(store: Store, rows: Rows) -> None:
    device = FakeDevice()
    topic = device.topics.differential("s-1")
    running = [differential(device, "preliminary", f"2026-11-25T08:0{n}:00Z", n) for n in (1, 2)]
    for body in running:
        commit(store, [device.document(topic, body)])
    assert [(row["status"], row["leukocytes"]) for row in rows(tables.differentials)] == [("preliminary", 2)]
    assert [(row["class"], row["count"]) for row in rows(tables.differential_shares)] == [("neutrophil", 2)]
    final = {**differential(device, "final", "2026-11-25T08:05:00Z", 9), "id": "scope:1:1", "seq": 1}
    outcome = commit(store, [device.document(topic, final)])
    assert outcome.acks == [Ack(PLACE, "differential", 1, 1)]
    commit(store, [device.document(topic, running[0])])  # came late
    commit(store, [device.document(topic, final)])  # retained, at the next connection
    assert [(row["status"], row["leukocytes"]) for row in rows(tables.differentials)] == [("final", 9)]
    assert [row["count"] for row in rows(tables.differential_shares)] == [9]


def test_two_collectors_of_one_group_write_one_ledger(database_url: str, rows: Rows) -> None:
    """Each hears half of the messages; what is acknowledged is complete all the same."""
    engines = [open_database(database_url) for _ in range(2)]
    stores = [Store(one) for one in engines]
    device = FakeDevice()
    fields = device.fields(40)
    chance = random.Random(1)
    told: dict[int, int] = {}
    waiting = list(fields)
    chance.shuffle(waiting)
    while waiting:
        batch, waiting = waiting[:3], waiting[3:]
        for ack in commit(chance.choice(stores), batch).acks:
            told[ack.seq] = len(rows(tables.fields))
            assert {row["seq"] for row in rows(tables.fields)} >= set(range(1, ack.seq + 1))
    assert max(told) == 40
    assert {gap["status"] for gap in rows(tables.gaps)} == {"filled"}
    for one in engines:
        one.dispose()


def test_in_any_order_with_repeats_all_of_it_is_stored_once_and_acknowledged(engine: Engine, rows: Rows) -> None:
    """Three boots and a lost outbox, shuffled within a window as re-deliveries do it; a new collector now and then."""
    device = FakeDevice()
    sent: list[Sent] = []
    for boot in range(4):
        for _ in range(6):
            sent += [*device.field_with_cells(1), device.event()]
        device.lose_outbox() if boot == 1 else device.restart()
    chance = random.Random(7)
    arriving = sorted(sent * 2, key=lambda one: sent.index(one) + chance.uniform(0, 12))
    store = Store(engine)
    last: dict[tuple[str, bool], Ack] = {}
    for start in range(0, len(arriving), 5):
        if chance.random() < 0.2:
            store = Store(engine)
        outcome = commit(store, arriving[start : start + 5])
        last |= {(ack.stream, ack.boot > 2): ack for ack in outcome.acks}
    assert len(rows(tables.fields)) == len(rows(tables.events)) == len(rows(tables.cells)) == 24
    assert {(ack.stream, ack.boot, ack.seq) for (_, is_new), ack in last.items() if is_new} == {
        ("field", 4, 12),
        ("cell", 4, 12),
        ("event", 4, 12),
    }
    assert rows(tables.dead_letters) == []


def test_a_batch_that_fails_leaves_nothing_behind(store: Store, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    from agent.central import store as module
    from agent.errors import StoreUnavailable

    fields = FakeDevice().fields(2)
    commit(store, fields[:1])

    def fail(_self: object) -> None:
        raise OSError("the wire was cut")

    with monkeypatch.context() as patch:
        patch.setattr(module.Ledger, "write", fail)
        with pytest.raises(StoreUnavailable, match="the wire was cut"):
            commit(store, fields[1:])
    assert len(rows(tables.fields)) == 1
    assert commit(store, fields[1:]).acks == [Ack(PLACE, "field", 1, 2)]


def test_arrivals_need_no_device(store: Store, rows: Rows) -> None:
    store.commit([Arrival("", b"", NOW)])
    assert rows(tables.devices) == []
