"""The outbox on real files: what it promises, what it survives, what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import agent.delivery.outbox as outbox_module
from agent.delivery.messages import Draft, RetainedDocument
from agent.delivery.outbox import (
    DATABASE_NAME,
    EVENT_RESERVE_BYTES,
    NUMBERING_NOTE,
    START_ROOM_BYTES,
    WORD_RESERVE_BYTES,
    Outbox,
    ReplayAnswer,
    begin_boot,
    lock_folder,
    open_outbox,
    read_boot,
)
from agent.domain import SampleState
from agent.errors import MessageRejected, OutboxDamaged, OutboxError


def make_draft(stream: str = "field", text: str = "x", **more: Any) -> Draft:
    return Draft(stream, f"hv/1/lab/scope/{stream}/s1", {"schema": f"hv/1/{stream}", "text": text}, **more)


def make_outbox(folder: Path, **options: Any) -> Outbox:
    if not read_boot(folder):
        begin_boot(folder)
    return open_outbox(folder, **{"device": "scope", "min_free_mb": 0, **options})


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with make_outbox(tmp_path) as opened:
        yield opened


def messages(outbox: Outbox) -> list[dict[str, Any]]:
    return [json.loads(row.payload) for row in outbox.pending(0, 100_000)]


# --------------------------------------------------------------------------------------------------------- numbering


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


def test_what_leaves_is_not_written_over_with_zeros(tmp_path: Path) -> None:
    with make_outbox(tmp_path) as outbox:
        (row_id,) = outbox.append([make_draft(text="x" * 400_000)])
        with contextlib.closing(sqlite3.connect(outbox.path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        outbox.acknowledge([row_id])
        assert outbox.depth() == 0
        assert Path(f"{outbox.path}-wal").stat().st_size < 200_000


def test_an_event_is_given_the_boot(outbox: Outbox) -> None:
    outbox.append([Draft("event", "t/event", {"schema": "hv/1/event", "boot": None})])
    assert messages(outbox)[0]["boot"] == 1


# ----------------------------------------------------------------------------------------------------- all or nothing


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


# ------------------------------------------------------------------------------------------------- leaving the outbox


def test_a_row_leaves_when_it_is_acknowledged_and_only_then(outbox: Outbox) -> None:
    row_ids = outbox.append([make_draft(text=str(n)) for n in range(5)])
    assert [row.row_id for row in outbox.pending(0, 3)] == list(row_ids[:3])
    assert [row.row_id for row in outbox.pending(row_ids[2], 10)] == list(row_ids[3:])
    assert outbox.depth() == 5
    outbox.acknowledge([row_ids[0], row_ids[3], 999_999])
    outbox.acknowledge([row_ids[0]])
    assert [row.row_id for row in outbox.pending(0, 10)] == [row_ids[1], row_ids[2], row_ids[4]]
    assert outbox.depth() == 3


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


def test_the_age_of_the_oldest_row_is_monotonic_in_its_boot_and_by_the_clock_afterwards(tmp_path: Path) -> None:
    times = {"ns": 10_000_000_000, "s": 1000.0}
    clocks: dict[str, Any] = {"monotonic_ns": lambda: times["ns"], "unix_time": lambda: times["s"]}
    with make_outbox(tmp_path, **clocks) as outbox:
        assert outbox.oldest_age_s() is None
        outbox.append([make_draft(captured_monotonic_ns=8_000_000_000), make_draft()])
        times["s"] = 1_000_000.0  # the clock steps
        assert outbox.oldest_age_s() == 2.0
    begin_boot(tmp_path)
    times["ns"] = 0
    with make_outbox(tmp_path, **clocks) as outbox:
        assert outbox.oldest_age_s() == 999_000.0
        times["s"] = 0.0  # the clock is back in the past
        assert outbox.oldest_age_s() == 0.0


def test_export_gives_one_json_object_a_line(outbox: Outbox) -> None:
    row_ids = outbox.append([make_draft(text=f"ä{n}\n") for n in range(450)])
    lines = [json.loads(line) for line in outbox.export_rows()]
    assert [line["row"] for line in lines] == list(row_ids)
    assert lines[0]["topic"] == "hv/1/lab/scope/field/s1"
    assert lines[449]["message"]["text"] == "ä449\n"
    outbox.reject(row_ids[0], "no")
    (dead,) = (json.loads(line) for line in outbox.export_rows(dead_letters=True))
    assert (dead["reason"], dead["message"]["seq"]) == ("no", 1)


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


def test_the_file_becomes_small_again_after_an_outage(outbox: Outbox) -> None:
    big = [make_draft(text="x" * 30_000) for _ in range(100)]
    row_ids = [row_id for _ in range(8) for row_id in outbox.append(big)]
    for start in range(0, len(row_ids), 20):
        outbox.acknowledge(row_ids[start : start + 20])
    for _ in range(40):
        outbox.acknowledge([])
    outbox._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert outbox.path.stat().st_size < 6 * 2**20


# ------------------------------------------------------------------------------------------------------ full and sick


def append_until_refused(outbox: Outbox, drafts: list[Draft], says: str) -> list[int]:
    """The row ids of all appends that went well; each also stores their number as the sample's fields."""
    row_ids: list[int] = []
    refusal: OutboxError | None = None
    frames = 0
    while refusal is None:
        sample = SampleState("s1", fields=frames + 1)
        try:
            row_ids += outbox.append(drafts, sample=sample, finished_keys=[f"frame-{frames + 1}"])
            frames += 1
        except OutboxError as error:
            refusal = error
    assert says in str(refusal)
    assert not isinstance(refusal, OutboxDamaged)
    state = outbox.sample_state()
    assert (state.fields if state else 0) == frames
    assert len(outbox.finished_keys()) == frames
    assert len(row_ids) == frames * len(drafts)
    return row_ids


def test_at_its_limit_it_refuses_and_takes_again_when_rows_have_left(tmp_path: Path) -> None:
    with make_outbox(tmp_path, max_mb=1) as outbox:
        stored = append_until_refused(outbox, [make_draft(text="x" * 50_000)], "raise outbox.max_mb")
        assert 15 <= len(stored) <= 21
        assert outbox.depth() == len(stored)
        outbox.append([make_draft("event", "outbox-full")])  # that it is full can be said all the same
        outbox.acknowledge(stored[:3])
        outbox.append([make_draft(text="x" * 50_000)])
        assert [row.seq for row in outbox.pending(0, 100) if row.stream == "field"][-1] == len(stored) + 1


def test_events_have_a_reserve_and_not_more(tmp_path: Path) -> None:
    with make_outbox(tmp_path, max_mb=1) as outbox:
        stored = append_until_refused(outbox, [make_draft("event", "x" * 50_000)], "full")
        assert 2**20 < len(stored) * 50_000 < 2**20 + EVENT_RESERVE_BYTES


def append_often(outbox: Outbox, draft: Draft, times: int) -> None:
    for _ in range(times):
        outbox.append([draft])


def test_what_ends_a_sample_has_a_reserve_that_fields_and_events_do_not_touch(tmp_path: Path) -> None:
    with make_outbox(tmp_path, max_mb=1) as outbox:
        append_until_refused(outbox, [make_draft(text="x" * 50_000)], "connect the broker, or raise outbox.max_mb")
        with pytest.raises(OutboxError, match="full"):
            append_often(outbox, make_draft("event", "x" * 50_000), 100)
        outbox.append([make_draft("audit")])
        outbox.append([make_draft("field"), make_draft("differential")])
        outbox.append([make_draft("field")], sample=SampleState("s1", phase="finishing"))
        with pytest.raises(OutboxError, match="full"):
            outbox.append([make_draft()])
        with pytest.raises(OutboxError, match="full"):
            append_often(outbox, make_draft("audit", "x" * 50_000), WORD_RESERVE_BYTES // 50_000)
        audited = [row for row in outbox.pending(0, 1000) if row.stream == "audit"]
        assert 0.6 * EVENT_RESERVE_BYTES < sum(len(row.payload) for row in audited) < WORD_RESERVE_BYTES


def test_a_full_outbox_says_what_frees_it_when_nothing_waits(tmp_path: Path) -> None:
    with make_outbox(tmp_path, max_mb=1) as outbox:
        outbox.append((), notes={f"slide/s1/{number}": "x" * 10_000 for number in range(120)})
        with pytest.raises(OutboxError, match=r"end the sample and begin another.* or raise outbox\.max_mb"):
            outbox.append([make_draft()])
        outbox.append([make_draft()], notes={"slide/": None})  # what the same append frees is there for its drafts
        outbox.reject(outbox.pending(0, 1)[0].row_id, "refused")
        outbox.append((), notes={f"slide/s1/{number}": "x" * 10_000 for number in range(120)})
        with pytest.raises(OutboxError, match="requeue or discard what was set aside"):
            outbox.append([make_draft()])


def test_it_leaves_the_disk_the_room_that_it_was_told_to_leave(tmp_path: Path) -> None:
    free_mb = shutil.disk_usage(tmp_path).free / 2**20
    with make_outbox(tmp_path, min_free_mb=free_mb + 10_000) as outbox:
        with pytest.raises(OutboxError, match=r"outbox\.min_free_mb"):
            outbox.append([make_draft()])
        assert outbox.depth() == 0
        outbox.append([], sample=SampleState("s1"))  # needs no room to speak of
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft()])
        assert messages(outbox)[0]["seq"] == 1


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    folder = Path(tempfile.mkdtemp(prefix="small-disk-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    folder.rmdir()


def fill_the_disk(folder: Path) -> Path:
    """Somebody else's file that takes all that is left."""
    filler = folder / "of-somebody-else"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(folder).free == 0
    return filler


@pytest.mark.parametrize("is_honest", [True, False], ids=["the disk tells", "the disk does not tell before"])
def test_a_disk_that_is_really_full_stores_nothing_half_and_goes_on_when_there_is_room(
    small_disk: Path, is_honest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_honest:  # a quota, a race with another program: only the write itself fails
        monkeypatch.setattr("agent.delivery.outbox._disk_free_bytes", lambda _path: 2**40)
    with make_outbox(small_disk) as outbox:
        filler = fill_the_disk(small_disk)
        frame = [make_draft(text="x" * 2_000)] * 3
        stored = append_until_refused(outbox, frame, "free space on the disk" if is_honest else "the disk is full")
        assert outbox.depth() == len(stored)
        filler.unlink()
        outbox.append(frame)
        seqs = [row.seq for row in outbox.pending(0, 1000)]
        assert seqs == list(range(1, len(stored) + 4))
    with make_outbox(small_disk) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == len(stored) + 3


def test_an_outbox_that_has_filled_its_disk_can_still_be_emptied(small_disk: Path) -> None:
    with make_outbox(small_disk) as outbox:
        frame = [make_draft(text="x" * 9_000)] * 5
        stored = append_until_refused(outbox, frame, "outbox.min_free_mb")
        for row_id in stored:
            outbox.acknowledge([row_id])
        assert outbox.depth() == 0
        outbox.append(frame)
        assert outbox.depth() == 5


def test_a_disk_filled_by_few_rows_takes_new_ones_when_they_have_left(small_disk: Path) -> None:
    with make_outbox(small_disk) as outbox:
        # So few pages that SQLite never moves its log into the file by itself: the log holds the room that is missing.
        others = small_disk / "of-somebody-else"
        others.write_bytes(bytes(shutil.disk_usage(small_disk).free - 3_200_000))
        frame = [make_draft(text="x" * 9_000)] * 5
        stored = append_until_refused(outbox, frame, "outbox.min_free_mb")
        outbox.acknowledge(stored)
        outbox.append(frame)
        assert outbox.depth() == 5


def test_rows_that_cannot_leave_because_others_filled_the_disk_are_whole_and_leave_later(small_disk: Path) -> None:
    with make_outbox(small_disk) as outbox:
        row_ids = outbox.append([make_draft(text="x" * 9_000)] * 50)
        filler = fill_the_disk(small_disk)
        left = list(row_ids)
        with contextlib.suppress(OutboxError):
            while left:
                outbox.acknowledge(left[:1])
                left.pop(0)
        assert left, "the disk was not full after all"
        assert [row.row_id for row in outbox.pending(0, 100)] == left
        assert outbox.depth() == len(left)
        filler.unlink()
        outbox.acknowledge(left)
        assert outbox.depth() == 0


def test_a_start_on_a_full_disk_says_how_much_room_it_needs(small_disk: Path) -> None:
    begin_boot(small_disk)
    filler = fill_the_disk(small_disk)
    with pytest.raises(OutboxError, match=r"boot: cannot be written: the disk is full; .* 6 MB"):
        begin_boot(small_disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - START_ROOM_BYTES)
    assert begin_boot(small_disk) == 2
    with make_outbox(small_disk) as outbox:
        outbox.append([make_draft()])


def test_a_disk_that_becomes_read_only_is_said_in_these_words(small_disk: Path) -> None:
    outbox = make_outbox(small_disk)
    outbox.append([make_draft()])
    outbox.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutboxError, match="cannot be"):
        make_outbox(small_disk)
    with pytest.raises(OutboxError, match=r"cannot be written: Read-only"):
        begin_boot(small_disk)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with make_outbox(small_disk) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == 1


def fill(folder: Path) -> Path:
    with make_outbox(folder) as outbox:
        outbox.append([make_draft(text="x" * 5_000)] * 50)
        return outbox.path


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garble(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def break_pages(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xff" * 4096 * 20)


def replace_by_another(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE shopping (thing TEXT)")
    other.close()


@pytest.mark.parametrize("damage", [zero, garble, truncate, break_pages, replace_by_another])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path, damage: Any) -> None:
    path = fill(tmp_path)
    damage(path)
    as_found = path.read_bytes()
    with pytest.raises(OutboxDamaged, match=r"damaged|another program"):
        make_outbox(tmp_path, verify=False).pending(0, 1000)
    boot = begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is not None
        assert outbox.salvage.bad.name.startswith("outbox.db.bad-")
        assert outbox.salvage.bad.read_bytes() == as_found
        assert outbox.boot > boot  # no id may come twice, whatever was lost
        left = [(row.boot, row.seq) for row in outbox.pending(0, 10_000)]
        assert len(left) == outbox.salvage.rows == len(set(left))
        assert (len(left) > 0) == (damage in (truncate, break_pages))
        outbox.append([make_draft()])
        newest = messages(outbox)[-1]
        assert newest["id"] == f"scope:{outbox.boot}:{newest['seq']}"
        assert newest["seq"] > max((seq for _, seq in left), default=0)
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == len(left) + 1


def test_a_second_damage_in_the_same_second_overwrites_nothing(tmp_path: Path) -> None:
    for _ in range(3):
        garble(tmp_path / "outbox.db") if (tmp_path / "outbox.db").exists() else fill(tmp_path)
        make_outbox(tmp_path).close()
    assert len(list(tmp_path.glob("outbox.db.bad-*"))) == 2


def test_a_write_ahead_log_that_is_rubbish_too_does_not_live_on_beside_the_new_file(tmp_path: Path) -> None:
    path = fill(tmp_path)
    garble(path)
    garble(tmp_path / "outbox.db-wal")
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is not None
        outbox.append([make_draft()])
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == 1


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


def test_a_file_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    path = fill(tmp_path)
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(OutboxError, match="newer agent"):
        make_outbox(tmp_path)
    assert list(tmp_path.glob("*.bad-*")) == []


def test_a_fault_of_the_program_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    outbox.close()
    with pytest.raises(sqlite3.ProgrammingError):
        outbox.depth()


# ---------------------------------------------------------------------------------------------------------- the place


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    mounts = tmp_path / "mounts"
    place = tmp_path / "far away" / "outbox"
    place.mkdir(parents=True)
    far = str(place.parent).replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {far} {kind} rw 0 0\n")
    with pytest.raises(OutboxError, match=rf"network file system \({kind}\)"):
        make_outbox(place, mounts_file=mounts)
    assert not (place / "outbox.db").exists()


def test_a_local_disk_mounted_over_a_network_one_is_taken(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/ / nfs rw 0 0\nserver:/x {tmp_path} nfs rw 0 0\n/dev/b {tmp_path} ext4 rw 0 0\n")
    make_outbox(tmp_path, mounts_file=mounts).close()


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutboxError, match=r"choose outbox\.folder"):
        begin_boot(tmp_path / "file" / "outbox")
    with pytest.raises(OutboxError, match="cannot be opened"):
        open_outbox(tmp_path / "nowhere")


def test_looking_into_an_outbox_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="there is no outbox"):
        open_outbox(tmp_path, create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_user_may_not_look_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, **_options: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(OutboxError, match="Permission denied; ask as the agent's user"):
        open_outbox(tmp_path, create=False)


def test_a_second_agent_is_kept_off_the_folder(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(OutboxError, match="another agent uses it"):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()


# --------------------------------------------------------------------------------------------------- the boot counter


def test_the_boot_counter_outlives_the_database(tmp_path: Path) -> None:
    assert [begin_boot(tmp_path), begin_boot(tmp_path)] == [1, 2]
    make_outbox(tmp_path).close()
    (tmp_path / "outbox.db").unlink()
    assert begin_boot(tmp_path) == 3
    assert read_boot(tmp_path) == 3
    assert not (tmp_path / "boot.new").exists()


@pytest.mark.parametrize("rubbish", [b"", b"\0\0\0\0", b"seven\n", b"\xff\xfe"])
def test_a_damaged_boot_file_never_sends_the_counter_back(tmp_path: Path, rubbish: bytes) -> None:
    for _ in range(5):
        begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft()])
    (tmp_path / "boot").write_bytes(rubbish)
    assert begin_boot(tmp_path) == 6
    (tmp_path / "boot").write_bytes(rubbish)
    (tmp_path / "outbox.db").unlink()
    assert begin_boot(tmp_path) > 1_700_000_000


def test_a_lost_boot_file_is_made_good_from_the_database(tmp_path: Path) -> None:
    for _ in range(5):
        begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft()])
    (tmp_path / "boot").unlink()
    assert begin_boot(tmp_path) == 6


# -------------------------------------------------------------------------------------------------- against the model


class OutboxAgainstAList(RuleBasedStateMachine):
    """Whatever is done in whatever order, the outbox holds what a plain list would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="outbox-model-"))
        self.outbox = make_outbox(self.folder)
        self.rows: list[tuple[int, str, int]] = []
        self.dead: list[tuple[str, int]] = []
        self.last_seq = {"field": 0, "cell": 0, "event": 0}
        self.finished: set[str] = set()

    @rule(streams=st.lists(st.sampled_from(["field", "cell", "event"]), max_size=4), key=st.sampled_from("abc"))
    def append(self, streams: list[str], key: str) -> None:
        row_ids = self.outbox.append([make_draft(stream) for stream in streams], finished_keys=[key])
        for row_id, stream in zip(row_ids, streams, strict=True):
            self.last_seq[stream] += 1
            self.rows.append((row_id, stream, self.last_seq[stream]))
        self.finished.add(key)

    @rule(streams=st.lists(st.sampled_from(["field", "cell"]), max_size=2))
    def append_in_vain(self, streams: list[str]) -> None:
        bad = Draft("event", "t", {"schema": "hv/1/event", "value": float("inf")})
        with pytest.raises(MessageRejected):
            self.outbox.append([*(make_draft(stream) for stream in streams), bad], finished_keys=["never"])

    @precondition(lambda self: self.rows)
    @rule(place=st.integers(0, 1000), is_taken=st.booleans())
    def leave(self, place: int, is_taken: bool) -> None:
        row_id, stream, seq = self.rows.pop(place % len(self.rows))
        if is_taken:
            self.outbox.acknowledge([row_id])
        else:
            self.outbox.reject(row_id, "no")
            self.dead.append((stream, seq))

    @rule()
    def requeue(self) -> None:
        self.outbox.requeue()
        known = {row[0] for row in self.rows}
        back = [row.row_id for row in self.outbox.pending(0, 10_000) if row.row_id not in known]
        self.rows += [(row_id, stream, seq) for row_id, (stream, seq) in zip(back, self.dead, strict=True)]
        self.dead = []

    @rule()
    def restart(self) -> None:
        self.outbox.close()
        begin_boot(self.folder)
        self.outbox = make_outbox(self.folder)

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        assert [(row.row_id, row.stream, row.seq) for row in self.outbox.pending(0, 10_000)] == self.rows
        assert [(letter.stream, letter.seq) for letter in self.outbox.dead_letters()] == self.dead
        assert self.outbox.depth() == len(self.rows)
        assert self.outbox.finished_keys() == self.finished

    def teardown(self) -> None:
        self.outbox.close()
        shutil.rmtree(self.folder)


OutboxAgainstAList.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestOutboxAgainstAList = OutboxAgainstAList.TestCase


# ------------------------------------------------------------------------------------- documents, notes and answers


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


def test_of_the_answers_the_newest_are_kept(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.delivery.outbox.MOST_ANSWERS", 3)
    for number in range(6):
        outbox.append((), answer=(f"t-{number}", f"answer {number}"))
    assert [outbox.answer(f"t-{number}") is not None for number in range(6)] == [False] * 3 + [True] * 3
    assert outbox.answer("t-5") == "answer 5"


def test_what_cannot_be_said_leaves_nothing_of_the_whole_append(outbox: Outbox) -> None:
    with pytest.raises(MessageRejected):
        outbox.append(
            [make_draft()],
            documents=[RetainedDocument("t", {"n": float("nan")})],
            notes={"k": "v"},
            answer=("t-1", "x"),
        )
    assert (outbox.depth(), outbox.documents(), outbox.note("k"), outbox.answer("t-1")) == (0, [], None, None)


@pytest.mark.parametrize("version", [1, 2])
def test_an_outbox_of_an_older_version_is_taken_over_with_every_row(tmp_path: Path, version: int) -> None:
    with make_outbox(tmp_path / "new") as outbox:
        outbox.append([make_draft(), make_draft("cell")])
    begin_boot(tmp_path)
    tables = {1: outbox_module._TABLES, 2: (*outbox_module._TABLES, *outbox_module._TABLES_OF_2)}[version]
    with sqlite3.connect(tmp_path / "outbox.db") as old:
        for statement in tables:
            old.execute(statement)
        old.execute("ATTACH ? AS new", (str(tmp_path / "new" / "outbox.db"),))
        old.execute(
            f"INSERT INTO rows (row_id, {outbox_module._COPIED}) SELECT row_id, {outbox_module._COPIED} FROM new.rows"
        )
        old.execute("INSERT INTO streams SELECT * FROM new.streams")
        old.execute("UPDATE tally SET depth = 2, boot = 1")
        old.execute(f"PRAGMA application_id={outbox_module.APPLICATION_ID}")
        old.execute(f"PRAGMA user_version={version}")
    old.close()
    with make_outbox(tmp_path, keep_mb=1, keep_hours=1) as outbox:
        assert outbox.depth() == 2
        assert [(row.stream, row.seq, row.is_intact) for row in outbox.pending(0, 9)] == [
            ("field", 1, True),
            ("cell", 1, True),
        ]
        outbox.append([make_draft()])
        outbox.acknowledge([row.row_id for row in outbox.pending(0, 2)])
        assert [row.seq for row in outbox.pending(0, 9)] == [2]
        assert outbox.request_replay("field", 1, 2) == ReplayAnswer(1, 1, ())
        outbox.append((), notes={"k": "v"})
        assert outbox.note("k") == "v"


def test_an_outbox_that_could_only_be_opened_for_reading_is_refused_until_the_disk_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite falls back to reading without a word, and the connection would stay so after the disk is mended."""
    make_outbox(tmp_path).close()
    connect = sqlite3.connect

    def connect_for_reading(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(f"{Path(path).as_uri()}?mode=ro", uri=True, **options)

    with monkeypatch.context() as patched:
        patched.setattr(outbox_module.sqlite3, "connect", connect_for_reading)
        with pytest.raises(OutboxError, match="read-only"):
            open_outbox(tmp_path, device="scope", min_free_mb=0, verify=False)
        open_outbox(tmp_path, verify=False, create=False).close()  # whoever only looks may
    with make_outbox(tmp_path, verify=False) as mended:
        mended.append([make_draft()])


@pytest.mark.parametrize("column", ["captured_monotonic_ns", "state", "origin_key", "crc32"])
def test_a_file_in_whose_tables_a_column_has_another_name_is_set_aside_and_read(tmp_path: Path, column: str) -> None:
    """A flipped bit in the text of the schema, which SQLite's own check passes."""
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft(text=f"text {n}") for n in range(20)], finished_keys=["a"])
    path = tmp_path / "outbox.db"
    content = path.read_bytes()
    changed = f"{column[:-1]}{chr(ord(column[-1]) ^ 1)}"
    path.write_bytes(content.replace(column.encode(), changed.encode()))
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is not None
        assert [message["text"] for message in messages(outbox)] == [f"text {n}" for n in range(20)]
        outbox.append([make_draft()])


def test_the_outbox_knows_in_which_boot_its_numbers_began(tmp_path: Path) -> None:
    for _ in range(3):
        begin_boot(tmp_path)
    for _ in range(2):
        with open_outbox(tmp_path, device="dev", min_free_mb=0) as outbox:
            assert outbox.numbered_since_boot() == 3
        begin_boot(tmp_path)


def test_a_salvaged_outbox_keeps_its_beginning_unless_nothing_numbered_is_left(tmp_path: Path) -> None:
    for name, spoil in (("rows", 8192), ("head", 0)):
        folder = tmp_path / name
        begin_boot(folder)
        with open_outbox(folder, device="dev", min_free_mb=0) as outbox:
            for n in range(40):
                outbox.append([Draft("field", "t", {"schema": "s", "n": n, "text": "x" * 900})])
        content = bytearray((folder / DATABASE_NAME).read_bytes())
        content[spoil:] = bytes(100) + content[spoil + 100 :] if spoil else bytes(len(content))
        (folder / DATABASE_NAME).write_bytes(content)
        begin_boot(folder)
        with open_outbox(folder, device="dev", min_free_mb=0) as outbox:
            assert outbox.salvage is not None
            assert outbox.numbered_since_boot() == (1 if spoil else outbox.boot)


def test_an_outbox_of_an_older_agent_does_not_know_where_its_numbers_began(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, device="dev", min_free_mb=0) as outbox:
        outbox.append([], notes={NUMBERING_NOTE: None})
        assert outbox.numbered_since_boot() is None
