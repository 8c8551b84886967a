"""What an append stores: numbers without gaps, all or nothing, whatever happens meanwhile."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import MappingProxyType

import pytest

from agent.delivery.messages import Draft, RetainedDocument
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.outbox.words import NUMBERING_NOTE
from agent.domain import SampleState
from agent.errors import MessageRejected
from tests.delivery.outbox.making import make_draft, make_outbox, messages


def test_each_stream_is_numbered_from_one_without_gaps(outbox: Outbox) -> None:
    outbox.append([make_draft("field"), make_draft("cell"), make_draft("cell")])
    outbox.append([make_draft("event"), make_draft("field"), make_draft("cell")])
    numbers = [(row.stream, row.seq) for row in outbox.pending(0, 10)]
    assert numbers == [("field", 1), ("cell", 1), ("cell", 2), ("event", 1), ("field", 2), ("cell", 3)]
    assert [message["id"] for message in messages(outbox)][:2] == ["scope:1:1", "scope:1:1"]
    assert {message["historical"] for message in messages(outbox)} == {False}


def test_numbers_go_on_after_a_restart_and_the_boot_counts_it(tmp_path: Path) -> None:
    for boot in (1, 2, 3):
        assert begin_boot(tmp_path) == boot
        with make_outbox(tmp_path) as outbox:
            assert outbox.boot == boot
            outbox.append([make_draft()])
            outbox.acknowledge([row.row_id for row in outbox.pending(0, 10)][:1])
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft()])
        assert [message["id"] for message in messages(outbox)] == ["scope:3:4"]


def test_cells_carry_the_id_of_the_field_stored_with_them(outbox: Outbox) -> None:
    cell = Draft("cell", "t/cell", {"schema": "hv/1/cell", "field_id": None}, belongs_to="field")
    outbox.append([make_draft("field")])
    outbox.append([make_draft("field"), cell, cell])
    assert [message.get("field_id") for message in messages(outbox)] == [None, None, "scope:1:2", "scope:1:2"]


def test_row_ids_are_returned_in_order_and_never_used_again(outbox: Outbox) -> None:
    first = outbox.append([make_draft(), make_draft()])
    assert list(first) == sorted(first)
    outbox.acknowledge(first)
    assert min(outbox.append([make_draft()])) > max(first)


def test_an_event_is_given_the_boot(outbox: Outbox) -> None:
    outbox.append([Draft("event", "t/event", {"schema": "hv/1/event", "boot": None})])
    assert messages(outbox)[0]["boot"] == 1


def test_the_outbox_knows_in_which_boot_its_numbers_began(tmp_path: Path) -> None:
    for _ in range(3):
        begin_boot(tmp_path)
    for _ in range(2):
        with open_outbox(tmp_path, device="dev", min_free_mb=0) as outbox:
            assert outbox.numbered_since_boot() == 3
        begin_boot(tmp_path)


def test_an_outbox_of_an_older_agent_does_not_know_where_its_numbers_began(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, device="dev", min_free_mb=0) as outbox:
        outbox.append([], notes={NUMBERING_NOTE: None})
        assert outbox.numbered_since_boot() is None


# ------------------------------------------------------------------------------------------------------ all or nothing


def test_rows_sample_and_finished_frames_are_stored_together(tmp_path: Path) -> None:
    sample = SampleState("s1", 8, 2, MappingProxyType({"round": 5}), "0123456789abcdef")
    with make_outbox(tmp_path) as outbox:
        assert outbox.sample_state() is None
        outbox.append([make_draft()], sample=sample, finished_keys=["a.png:1", "b.png:2"])
        outbox.append([make_draft("event")])
    with make_outbox(tmp_path) as outbox:
        assert outbox.depth() == 2
        assert outbox.sample_state() == sample
        assert outbox.finished_keys() == {"a.png:1", "b.png:2"}
        assert "c.png:3" not in outbox.finished_keys()


def test_one_draft_that_cannot_be_written_stores_nothing_and_uses_no_number(outbox: Outbox) -> None:
    bad = Draft("field", "t/field", {"schema": "hv/1/field", "value": float("nan")})
    with pytest.raises(MessageRejected, match="t/field"):
        outbox.append([make_draft(), bad], sample=SampleState("s1"), finished_keys=["a"])
    assert outbox.depth() == 0
    assert outbox.pending(0, 10) == []
    assert outbox.sample_state() is None
    assert outbox.finished_keys() == frozenset()
    outbox.append([make_draft()])
    assert messages(outbox)[0]["seq"] == 1


def test_what_cannot_be_said_leaves_nothing_of_the_whole_append(outbox: Outbox) -> None:
    with pytest.raises(MessageRejected):
        outbox.append(
            [make_draft()],
            documents=[RetainedDocument("t", {"n": float("nan")})],
            notes={"k": "v"},
            answer=("t-1", "x"),
        )
    assert (outbox.depth(), outbox.documents(), outbox.note("k"), outbox.answer("t-1")) == (0, [], None, None)


KILLED = """
import sys
from pathlib import Path
from agent.delivery.messages import Draft, RetainedDocument
from agent.delivery.outbox import begin_boot, open_outbox
from agent.domain import SampleState
folder = Path(sys.argv[1])
begin_boot(folder)
outbox = open_outbox(folder, device="scope", min_free_mb=0)
done = outbox.sample_state()
n = done.fields if done else 0
while True:
    n += 1
    drafts = [Draft("field", "t/field", {"schema": "hv/1/field", "n": n})]
    drafts += [Draft("cell", "t/cell", {"schema": "hv/1/cell", "field_id": None, "n": n}, "field") for _ in range(5)]
    outbox.append(drafts, sample=SampleState("s1", fields=n), finished_keys=[f"frame-{n}"])
    print(n, flush=True)
"""


def test_sigkill_in_the_middle_loses_no_field_and_doubles_none(tmp_path: Path) -> None:
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        assert child.stdout is not None
        told = [child.stdout.readline() for _ in range(25)]
        child.send_signal(signal.SIGKILL)
        told += child.stdout.readlines()
        child.wait(timeout=10)
        child.stdout.close()
        last_told = max(int(line) for line in told if line.endswith(b"\n"))
        with make_outbox(tmp_path) as outbox:
            fields = [message for message in messages(outbox) if message["schema"] == "hv/1/field"]
            cells = [message for message in messages(outbox) if message["schema"] == "hv/1/cell"]
            stored = [field["n"] for field in fields]
            assert stored == list(range(1, len(stored) + 1))
            assert len(stored) >= last_told
            assert [field["seq"] for field in fields] == stored
            assert [cell["seq"] for cell in cells] == list(range(1, 5 * len(stored) + 1))
            assert {cell["field_id"] for cell in cells} == {field["id"] for field in fields}
            state = outbox.sample_state()
            assert state is not None
            assert state.fields == len(stored)
            assert outbox.finished_keys() == {f"frame-{n}" for n in stored}
            assert outbox.depth() == 6 * len(stored)


def test_one_thread_appends_while_another_takes_and_all_arrive_in_order(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    taken: list[int] = []

    def take() -> None:
        with make_outbox(tmp_path, verify=False) as mine:
            while len(taken) < 600:
                rows = mine.pending(0, 20)
                taken.extend(row.seq for row in rows)
                mine.acknowledge([row.row_id for row in rows])
                if not rows:
                    time.sleep(0.001)

    with make_outbox(tmp_path) as outbox:
        taker = threading.Thread(target=take)
        taker.start()
        for _ in range(200):
            outbox.append([make_draft()] * 3)
        taker.join(timeout=30)
        assert not taker.is_alive()
        assert taken == list(range(1, 601))
        assert outbox.depth() == 0
