"""Full, the outbox or its disk: what goes first, what is refused, and that all goes on when there is room."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.delivery.messages import Draft
from agent.delivery.outbox import Outbox, begin_boot
from agent.delivery.outbox.file import OutboxFile
from agent.delivery.outbox.leaving import PRUNE_STEP_ROWS, History
from agent.delivery.outbox.queue import count_appended, number_drafts, put_row
from agent.delivery.outbox.room import EVENT_RESERVE_BYTES, WORD_RESERVE_BYTES, Room, reserve_for
from agent.delivery.outbox.rows import Clocks
from agent.delivery.outbox.tables import connect
from agent.domain import SampleState
from agent.errors import OutboxDamaged, OutboxError
from tests.delivery.outbox.making import make_draft, make_outbox, messages
from tests.disks import use_up_space

CLOCKS = Clocks(1, time.monotonic_ns, time.time)


# ---------------------------------------------------------------------------------------------------- Room by itself


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OutboxFile]:
    """A file with its tables, and no Outbox around it."""
    with contextlib.closing(OutboxFile(connect(tmp_path / "outbox.db", verify=False), tmp_path / "outbox.db")) as file:
        yield file


def make_room(file: OutboxFile, *, max_bytes: int = 2**30, min_free_bytes: int = 0) -> Room:
    history = History(file.connection, CLOCKS, keep_bytes=2**20, keep_s=3600)
    return Room(file, history, CLOCKS, max_bytes=max_bytes, min_free_bytes=min_free_bytes)


def put_rows(file: OutboxFile, drafts: list[Draft]) -> None:
    with file.writing() as connection:
        for row in number_drafts(connection, drafts, "scope", CLOCKS):
            put_row(connection, row)
        count_appended(connection, len(drafts), CLOCKS.boot)


@pytest.mark.parametrize(
    ("streams", "phase", "bytes_beyond"),
    [
        ({"field", "cell"}, None, 0),
        ({"field", "cell"}, "counting", 0),
        ({"field", "event"}, "counting", 0),
        ({"event"}, None, EVENT_RESERVE_BYTES),
        ({"audit", "event"}, None, WORD_RESERVE_BYTES),
        ({"field", "differential"}, None, WORD_RESERVE_BYTES),
        ({"field", "cell"}, "finishing", WORD_RESERVE_BYTES),
    ],
)
def test_how_far_an_append_may_go_beyond_the_limits(streams: set[str], phase: str | None, bytes_beyond: int) -> None:
    assert reserve_for(streams, phase) == bytes_beyond


def test_what_needs_no_room_is_taken_where_there_is_none(file: OutboxFile) -> None:
    make_room(file, max_bytes=0).make(0, 0)
    with pytest.raises(OutboxError, match="full"):
        make_room(file, max_bytes=0).make(1, 0)


def test_as_much_goes_as_must_and_not_more(file: OutboxFile) -> None:
    put_rows(file, [make_draft("field", "x" * 9000)] * 20 + [make_draft("cell", "x" * 9000)] * 200)
    full_bytes = file.used_bytes()
    room = make_room(file, max_bytes=full_bytes)
    with file.writing():
        room.make(100_000, 0)
    assert room.dropped() == {"cell": PRUNE_STEP_ROWS}
    assert full_bytes - file.used_bytes() > 100_000
    with file.writing():
        room.make(full_bytes - file.used_bytes(), 0)  # it fits as it is
    assert room.dropped() == {"cell": PRUNE_STEP_ROWS}


def test_on_a_short_disk_what_is_spared_goes_until_there_is_room(
    file: OutboxFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = [5, 5, 5]  # MB
    monkeypatch.setattr("agent.delivery.outbox.room.disk_free_bytes", lambda _path: (18 - sum(pictures)) * 2**20)
    room = make_room(file, min_free_bytes=8 * 2**20)
    room.make(1, EVENT_RESERVE_BYTES * 6)  # deep in its reserve
    assert len(pictures) == 3
    with pytest.raises(OutboxError, match=r"3\.0 MB left, 8 must stay free"):
        room.make(1, 0)
    room.spare(lambda: bool(pictures) and bool(pictures.pop()))
    room.make(1, 0)
    assert len(pictures) == 1


# --------------------------------------------------------------------------------------------- the limit of the outbox


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


def append_often(outbox: Outbox, draft: Draft, times: int) -> None:
    for _ in range(times):
        outbox.append([draft])


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


def test_for_room_go_history_then_cells_then_old_events_and_results_never(tmp_path: Path) -> None:
    big = "x" * 20_000
    begin_boot(tmp_path)
    with make_outbox(tmp_path, max_mb=2) as outbox:

        def put(stream: str) -> None:
            outbox.append([Draft(stream, f"t/{stream}", {"schema": "s", "text": big})])

        for stream in ("field", "cell", "audit", "differential"):
            for _ in range(4):
                put(stream)
        for _ in range(110):
            outbox.append([Draft("event", "t/event", {"schema": "s", "text": "x" * 3000})])
        outbox.confirm("central", "field", 1, 2, ("central",), up_to_row=1000)
        seen: list[tuple[int, dict[str, int]]] = []
        with contextlib.suppress(OutboxError):
            while len(seen) < 1000:
                put("field")
                state = (outbox.kept_bytes(), outbox.dropped())
                if not seen or seen[-1] != state:
                    seen.append(state)
        with pytest.raises(OutboxError, match="full"):
            put("field")
        assert [kept > 0 for kept, _ in seen] == sorted((kept > 0 for kept, _ in seen), reverse=True)
        names = [tuple(dropped) for _, dropped in seen]
        assert names == sorted(names, key=len)
        assert seen[-1] == (0, {"cell": 4, "event": 10})
        streams = [row.stream for row in outbox.pending(0, 1000)]
        assert [streams.count(name) for name in ("audit", "differential", "event", "cell")] == [4, 4, 100, 0]
        numbers = [row.seq for row in outbox.pending(0, 1000) if row.stream == "field"]
        assert numbers == list(range(3, numbers[-1] + 1))


# ------------------------------------------------------------------------------------------------------------ the disk


def test_on_a_short_disk_what_is_worth_less_goes_before_anything_in_the_outbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_boot(tmp_path)
    pictures = [10, 10, 10]  # MB on the disk
    free_mb = 66
    monkeypatch.setattr(
        "agent.delivery.outbox.room.disk_free_bytes", lambda _path: (free_mb + 30 - sum(pictures)) * 2**20
    )
    with make_outbox(tmp_path, min_free_mb=64) as outbox:
        outbox.spare(lambda: bool(pictures) and bool(pictures.pop()))
        outbox.append([Draft("cell", "t/cell", {"schema": "s"})])
        assert len(pictures) == 3
        free_mb = 50
        outbox.append([Draft("cell", "t/cell", {"schema": "s"})])
        assert (len(pictures), outbox.dropped()) == (1, {})
        free_mb = 30
        with pytest.raises(OutboxError, match="min_free_mb"):
            outbox.append([Draft("field", "t/field", {"schema": "s"})])
        assert (pictures, outbox.dropped()) == ([], {})  # what is not stored pushes nothing out


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


@pytest.mark.parametrize("is_honest", [True, False], ids=["the disk tells", "the disk does not tell before"])
def test_a_disk_that_is_really_full_stores_nothing_half_and_goes_on_when_there_is_room(
    small_disk: Path, is_honest: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_honest:  # a quota, a race with another program: only the write itself fails
        monkeypatch.setattr("agent.delivery.outbox.room.disk_free_bytes", lambda _path: 2**40)
    with make_outbox(small_disk) as outbox:
        filler = use_up_space(small_disk)
        assert shutil.disk_usage(small_disk).free == 0
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
        filler = use_up_space(small_disk)
        assert shutil.disk_usage(small_disk).free == 0
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
