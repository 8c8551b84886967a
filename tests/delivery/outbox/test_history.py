"""The word of receivers lets rows leave, into a history from which they can be sent again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.delivery.outbox import Outbox, ReplayAnswer, begin_boot
from tests.delivery.outbox.making import make_draft, make_outbox

KEPT = {"keep_mb": 1.0, "keep_hours": 1.0}


def make_keeping(folder: Path, **options: Any) -> Outbox:
    return make_outbox(folder, **{**KEPT, **options})


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with make_keeping(tmp_path) as opened:
        yield opened


def fill(outbox: Outbox, count: int) -> None:
    for _ in range(count):
        outbox.append([make_draft()])


def seqs(outbox: Outbox) -> list[int]:
    return [row.seq for row in outbox.pending(0, 100)]


# ----------------------------------------------------------------------------------------------- the word of receivers


def test_a_receivers_word_lets_all_rows_up_to_it_leave_and_no_others(outbox: Outbox) -> None:
    fill(outbox, 3)
    outbox.append([make_draft("cell"), make_draft()])
    left = outbox.confirm("central", "field", 1, 2, ("central",), up_to_row=1000)
    assert left == [1, 2]
    assert [(row.stream, row.seq) for row in outbox.pending(0, 9)] == [("field", 3), ("cell", 1), ("field", 4)]
    assert outbox.depth() == 3


def test_a_word_about_an_earlier_boot_says_nothing_of_rows_of_a_later_one(tmp_path: Path) -> None:
    for _ in range(2):
        begin_boot(tmp_path)
        with make_keeping(tmp_path) as outbox:
            fill(outbox, 2)
    with make_keeping(tmp_path) as outbox:
        outbox.confirm("central", "field", 1, 4, ("central",), up_to_row=1000)
        assert seqs(outbox) == [3, 4]


@pytest.mark.parametrize(("boot", "seq", "stream"), [(1, 4, "field"), (2, 1, "field"), (1, 1, "audit")])
def test_a_word_about_numbers_that_were_never_given_does_nothing(
    outbox: Outbox, boot: int, seq: int, stream: str
) -> None:
    fill(outbox, 3)
    assert outbox.confirm("central", stream, boot, seq, ("central",), up_to_row=1000) is None
    assert outbox.depth() == 3


def test_of_several_receivers_a_row_waits_for_the_word_of_each_over_a_restart(tmp_path: Path) -> None:
    both = ("central", "lis")
    begin_boot(tmp_path)
    with make_keeping(tmp_path) as outbox:
        fill(outbox, 4)
        assert outbox.confirm("central", "field", 1, 3, both, up_to_row=1000) == []
        assert outbox.confirm("lis", "field", 1, 1, both, up_to_row=1000) == [1]
    with make_keeping(tmp_path) as outbox:
        assert outbox.confirm("lis", "field", 1, 4, both, up_to_row=1000) == [2, 3]
        assert outbox.confirm("central", "field", 1, 2, both, up_to_row=1000) == []
        assert seqs(outbox) == [4]


# ------------------------------------------------------------------------------------------------------------- history


def test_what_was_confirmed_is_kept_and_sent_again_when_asked_for_once(outbox: Outbox) -> None:
    fill(outbox, 5)
    outbox.confirm("central", "field", 1, 4, ("central",), up_to_row=1000)
    assert outbox.request_replay("field", 2, 9) == ReplayAnswer(3, 1, (), 6)
    again = outbox.asked_again(0, 9)
    assert [(row.seq, row.is_replay) for row in again] == [(2, True), (3, True), (4, True)]
    assert outbox.depth() == 1
    outbox.acknowledge([row.row_id for row in again])
    assert outbox.asked_again(0, 9) == []
    assert outbox.request_replay("field", 2, 2).asked == 1


def test_what_is_gone_is_answered_in_ranges(outbox: Outbox) -> None:
    fill(outbox, 6)
    outbox.reject(2, "refused")
    outbox.reject(3, "refused")
    outbox.reject(6, "refused")
    assert outbox.request_replay("field", 1, 6) == ReplayAnswer(0, 3, ((2, 3), (6, 6)))
    assert outbox.request_replay("audit", 3, 5) == ReplayAnswer(0, 0, (), 3)


def test_history_ends_with_its_time_and_its_room(tmp_path: Path) -> None:
    clock_ns = [1_000_000_000]
    begin_boot(tmp_path)
    with make_keeping(tmp_path, keep_mb=0.001, monotonic_ns=lambda: clock_ns[0]) as outbox:
        fill(outbox, 40)
        outbox.confirm("central", "field", 1, 40, ("central",), up_to_row=1000)
        assert 0 < outbox.kept_bytes() <= 0.001 * 2**20
        assert outbox.request_replay("field", 40, 40).asked == 1
        outbox.acknowledge([row.row_id for row in outbox.asked_again(0, 9)])
        clock_ns[0] += 3601 * 10**9
        outbox.prune()
        assert outbox.kept_bytes() == 0
        assert outbox.request_replay("field", 1, 40).gone == ((1, 40),)


def test_a_step_of_the_clock_takes_no_history_that_is_young(tmp_path: Path) -> None:
    """A device without a clock of its own begins in the past, counts and delivers, and then is told the time."""
    times = {"ns": 60 * 10**9, "s": 1_000_000.0}
    clocks: dict[str, Any] = {"monotonic_ns": lambda: times["ns"], "unix_time": lambda: times["s"]}
    begin_boot(tmp_path)
    with make_keeping(tmp_path, **clocks) as outbox:
        fill(outbox, 3)
        outbox.confirm("central", "field", 1, 3, ("central",), up_to_row=1000)
        times["s"] += 100 * 86_400
        outbox.prune()
        assert outbox.request_replay("field", 1, 3) == ReplayAnswer(3, 0, ())
        outbox.acknowledge([1, 2, 3])
    begin_boot(tmp_path)
    times["ns"] = 0
    with make_keeping(tmp_path, **clocks) as outbox:  # what an earlier boot has left is dated by the clock
        outbox.prune()
        assert outbox.request_replay("field", 1, 3).gone == ((1, 3),)


def test_without_history_what_is_confirmed_is_gone(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_keeping(tmp_path, keep_mb=0) as outbox:
        fill(outbox, 2)
        outbox.acknowledge([1])
        assert outbox.request_replay("field", 1, 2) == ReplayAnswer(0, 1, ((1, 1),))


def test_the_counters_agree_with_the_rows_whatever_happened(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with make_keeping(tmp_path) as outbox:
        fill(outbox, 9)
        outbox.confirm("central", "field", 1, 5, ("central",), up_to_row=1000)
        outbox.request_replay("field", 1, 3)
        outbox.reject(2, "refused")
        outbox.acknowledge([1, 3, 6, 99])
        told = (outbox.depth(), outbox.kept_bytes())
    with make_keeping(tmp_path) as outbox:  # opening counts anew
        assert (outbox.depth(), outbox.kept_bytes()) == told


def test_reading_a_topic_costs_as_much_more_as_there_is_more_to_read(tmp_path: Path) -> None:
    """A report of a long sample, beside a full history, must not read all of it again for each portion."""
    steps = []
    for count in (800, 3200):
        with make_outbox(tmp_path / str(count)) as outbox:
            outbox.append([make_draft() for _ in range(count)])
            seen = [0]

            def note(seen: list[int] = seen) -> int:
                seen[0] += 1
                return 0

            outbox.file.connection.set_progress_handler(note, 100)
            topic = make_draft().topic
            assert [row.seq for row in outbox.of_topic("field", topic)] == list(range(1, count + 1))
            assert list(outbox.of_topic("cell", topic)) == list(outbox.of_topic("field", f"{topic}0")) == []
            steps.append(seen[0])
    assert steps[1] < 6 * steps[0]
