"""Documents, notes, answers and the state of the sample, which lie beside the rows."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path

from agent.delivery.messages import RetainedDocument
from agent.delivery.outbox import Outbox
from agent.delivery.outbox.tables import connect
from agent.delivery.outbox.words import MOST_ANSWERS, answer, put_answer
from agent.domain import SampleState
from tests.delivery.outbox.making import make_draft, make_outbox


def test_a_document_keeps_its_newest_word_and_every_change_has_a_higher_version(outbox: Outbox) -> None:
    for number in range(3):
        outbox.append((), documents=[RetainedDocument("hv/1/lab/scope/sample/s1", {"n": number})])
    outbox.append((), documents=[RetainedDocument("hv/1/lab/scope/sample/s2", {"n": 9})])
    first, second = outbox.documents()
    assert (first.topic, json.loads(first.payload or b"")) == ("hv/1/lab/scope/sample/s1", {"n": 2})
    assert first.version < second.version
    assert outbox.documents(first.version) == [second]


def test_a_cleared_document_is_told_until_the_broker_has_cleared_it(outbox: Outbox) -> None:
    outbox.append((), documents=[RetainedDocument("t", {"n": 1})])
    outbox.append((), documents=[RetainedDocument("t", None)])
    (cleared,) = outbox.documents()
    assert cleared.payload is None
    outbox.append((), documents=[RetainedDocument("t", {"n": 2})])
    outbox.settle_document(cleared)
    (again,) = outbox.documents()
    assert json.loads(again.payload or b"") == {"n": 2}, "it was written anew meanwhile"
    outbox.append((), documents=[RetainedDocument("t", None)])
    (last,) = outbox.documents()
    outbox.settle_document(last)
    assert outbox.documents() == []
    outbox.append((), documents=[RetainedDocument("u", {})])
    assert outbox.documents()[0].version > last.version, "a publisher that saw the last one must see this one"


def test_notes_are_remembered_over_a_restart_and_forgotten_one_by_one_or_all_below_a_key(tmp_path: Path) -> None:
    with make_outbox(tmp_path) as outbox:
        outbox.append((), notes={"a/1": "x", "a/2": "y", "ab": "z"})
    with make_outbox(tmp_path) as outbox:
        assert outbox.notes("a/") == {"a/1": "x", "a/2": "y"}
        outbox.append((), notes={"a/1": None})
        assert (outbox.note("a/1"), outbox.note("a/2")) == (None, "y")
        outbox.append((), notes={"a/": None})
        assert outbox.notes("a") == {"ab": "z"}


def test_of_the_answers_the_newest_are_kept(tmp_path: Path) -> None:
    with contextlib.closing(connect(tmp_path / "outbox.db", verify=False)) as connection:
        for number in range(MOST_ANSWERS + 3):
            put_answer(connection, f"t-{number}", f"answer {number}")
        assert [answer(connection, f"t-{number}") is not None for number in range(6)] == [False] * 3 + [True] * 3
        assert answer(connection, f"t-{MOST_ANSWERS + 2}") == f"answer {MOST_ANSWERS + 2}"


def test_closing_the_sample_forgets_it_in_the_same_transaction(outbox: Outbox) -> None:
    outbox.append([make_draft()], sample=SampleState("s1"), finished_keys=["a"])
    outbox.append([make_draft("event")], closes_sample=True)
    assert outbox.sample_state() is None
    assert outbox.finished_keys() == frozenset()
    assert outbox.depth() == 2
    outbox.append([], sample=SampleState("s2"), finished_keys=["b"])
    outbox.append([], finished_keys=["c", "d"])
    outbox.forget_finished(["c", "d", "never"])
    assert outbox.finished_keys() == {"b"}
    outbox.clear_sample(with_finished=False)
    assert (outbox.sample_state(), outbox.finished_keys()) == (None, {"b"})
    outbox.append([], sample=SampleState("s3"))
    outbox.clear_sample(with_finished=True)
    assert (outbox.sample_state(), outbox.finished_keys()) == (None, frozenset())


def test_a_state_written_by_a_newer_agent_is_read_as_far_as_it_is_known(outbox: Outbox) -> None:
    outbox.append([], sample=SampleState("s1", 3))
    with sqlite3.connect(outbox.path) as other:
        other.execute("UPDATE sample SET state = json_set(state, '$.unheard_of', 1)")
    other.close()
    assert outbox.sample_state() == SampleState("s1", 3)
