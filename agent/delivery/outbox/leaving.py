"""How rows leave: by a word of the broker or of all receivers, into the history, and from there for good.

History is what was confirmed and is kept to be sent again, as long as there is room and time for it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from agent.delivery.outbox.file import each_of, in_portions
from agent.delivery.outbox.queue import last_number
from agent.delivery.outbox.rows import ASKED, KEPT, WAITING, Clocks

CONFIRM_STEP_ROWS = 1000
PRUNE_STEP_ROWS = 64
"""Rows that leave in one transaction: others wait for it."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A row that is confirmed. state: in which it was so far. payload_bytes: how long its payload is."""

    row_id: int
    state: int
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class ReplayAnswer:
    """What becomes of numbers that were asked for. asked: confirmed before, sent again. waiting: on their way anyway.

    gone: ranges (first, last) that are not here: too old, set aside, dropped for room, or lost with a file.
    beyond: the first number of the range that was never given; None = all of them were.
    """

    asked: int
    waiting: int
    gone: tuple[tuple[int, int], ...]
    beyond: int | None = None


# ------------------------------------------------------------------------------------------------ who has confirmed


def rows_of_ids(connection: sqlite3.Connection, row_ids: Sequence[int]) -> Iterator[list[Leaving]]:
    """These rows, in portions; unknown ids are passed over."""
    for marks, some in in_portions(row_ids):
        found = connection.execute(f"SELECT row_id, state, LENGTH(payload) FROM rows WHERE row_id IN ({marks})", some)
        yield [Leaving(*columns) for columns in found.fetchall()]


def rows_all_have(
    connection: sqlite3.Connection,
    receiver: str,
    stream: str,
    boot: int,
    seq: int,
    receivers: Sequence[str],
    up_to_row: int,
) -> list[Leaving]:
    """Some of the rows that all receivers have, now that this one has all of a stream up to this number.

    up_to_row: the last row of the stream that was sent. A dead letter that a person put back waits behind it, and to
    the receiver its number is gone.
    Inside a transaction. At most CONFIRM_STEP_ROWS of them: with so many, ask again when they have left.
    """
    if len(receivers) > 1:
        _note_ack(connection, receiver, stream, boot, seq)
    found = connection.execute(
        "SELECT row_id, state, LENGTH(payload), boot, seq FROM rows "
        "WHERE stream = ? AND state = 0 AND seq <= ? AND boot <= ? AND row_id <= ? ORDER BY seq LIMIT ?",
        (stream, seq, boot, up_to_row, CONFIRM_STEP_ROWS),
    ).fetchall()
    acks = [_acks(connection, other, stream) for other in receivers if other != receiver]
    return [
        Leaving(row_id, state, payload_bytes)
        for row_id, state, payload_bytes, row_boot, row_seq in found
        if all(any(row_boot <= b and row_seq <= s for b, s in theirs) for theirs in acks)
    ]


def _note_ack(connection: sqlite3.Connection, receiver: str, stream: str, boot: int, seq: int) -> None:
    """Acknowledgements of different numberings stand beside each other; the others are covered by the newest."""
    ack = (receiver, stream, boot, seq)
    connection.execute("DELETE FROM acks WHERE receiver = ? AND stream = ? AND boot <= ? AND seq <= ?", ack)
    connection.execute("INSERT INTO acks VALUES (?, ?, ?, ?)", ack)


def _acks(connection: sqlite3.Connection, receiver: str, stream: str) -> list[tuple[int, int]]:
    return connection.execute(
        "SELECT boot, seq FROM acks WHERE receiver = ? AND stream = ?", (receiver, stream)
    ).fetchall()


# ------------------------------------------------------------------------------------------------------------ history


class History:
    """What was confirmed and is kept, with its limits. Methods that write are called inside a transaction.

    keep_bytes: of payloads; 0 = what is confirmed is gone. keep_s: how long.
    """

    def __init__(self, connection: sqlite3.Connection, clocks: Clocks, *, keep_bytes: int, keep_s: float) -> None:
        self._connection = connection
        self._clocks = clocks
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s

    def let_go(self, rows: Sequence[Leaving]) -> None:
        """These rows were confirmed: they become history, or are gone where none is kept."""
        waiting = [row.payload_bytes for row in rows if row.state == WAITING]
        if self._keep_bytes:
            each_of(self._connection, "UPDATE rows SET state = 1", [row.row_id for row in rows if row.state != KEPT])
            grown = sum(waiting)
        else:
            each_of(self._connection, "DELETE FROM rows", [row.row_id for row in rows])
            grown = -sum(row.payload_bytes for row in rows if row.state != WAITING)
        self._connection.execute(
            "UPDATE tally SET depth = depth - ?, kept_bytes = kept_bytes + ?", (len(waiting), grown)
        )
        self.prune()

    def prune(self) -> None:
        """Some of the history that is too old or too much; more at the next call."""
        kept_bytes = self.kept_bytes()
        if kept_bytes == 0:
            return
        first = "SELECT boot, captured_monotonic_ns, appended_unix_s FROM rows WHERE state = 1 ORDER BY row_id LIMIT 1"
        times = self._connection.execute(first).fetchone()
        if times is None or (kept_bytes <= self._keep_bytes and not self._is_too_old(*times)):
            return  # as nearly always
        oldest = self._connection.execute(
            "SELECT row_id, LENGTH(payload), boot, captured_monotonic_ns, appended_unix_s FROM rows WHERE state = 1 "
            "ORDER BY row_id LIMIT ?",
            (PRUNE_STEP_ROWS,),
        ).fetchall()
        too_much = []
        for row_id, payload_bytes, *times in oldest:
            if kept_bytes <= self._keep_bytes and not self._is_too_old(*times):
                break
            too_much.append((row_id, payload_bytes))
            kept_bytes -= payload_bytes
        self._forget(too_much)

    def drop_some(self) -> bool:
        """Some of the oldest, for room; False = there is none."""
        for state in (KEPT, ASKED):
            oldest = self._connection.execute(
                "SELECT row_id, LENGTH(payload) FROM rows WHERE state = ? ORDER BY row_id LIMIT ?",
                (state, PRUNE_STEP_ROWS),
            ).fetchall()
            if oldest:
                self._forget(oldest)
                return True
        return False

    def ask_for(self, stream: str, first: int, last: int) -> ReplayAnswer:
        """Mark what is kept of these numbers, both included, to be sent again."""
        last_given = last_number(self._connection, stream) or 0
        span = (stream, first, min(last, last_given))
        asked = self._connection.execute(
            "UPDATE rows SET state = 2 WHERE stream = ? AND state = 1 AND seq BETWEEN ? AND ?", span
        ).rowcount
        waiting = self._connection.execute(
            "SELECT COUNT(*) FROM rows WHERE stream = ? AND state = 0 AND seq BETWEEN ? AND ?", span
        ).fetchone()[0]
        here = self._connection.execute(
            "SELECT DISTINCT seq FROM rows WHERE stream = ? AND state IN (0, 2) AND seq BETWEEN ? AND ? ORDER BY seq",
            span,
        )
        gone = _gaps(first, span[2], (seq for (seq,) in here))
        return ReplayAnswer(asked, waiting, gone, max(first, last_given + 1) if last > last_given else None)

    def kept_bytes(self) -> int:
        """bytes; payloads of what is kept."""
        return int(self._connection.execute("SELECT kept_bytes FROM tally").fetchone()[0])

    def _is_too_old(self, boot: object, captured_ns: object, appended_unix_s: object) -> bool:
        """Whether history is kept no longer; what cannot be dated any more is not kept for its age."""
        age_s = self._clocks.age_s(boot, captured_ns, appended_unix_s)
        return age_s is None or age_s > self._keep_s

    def _forget(self, rows: Sequence[tuple[int, int]]) -> None:
        """(row_id, bytes) of history that goes for good."""
        each_of(self._connection, "DELETE FROM rows", [row_id for row_id, _ in rows])
        self._connection.execute("UPDATE tally SET kept_bytes = kept_bytes - ?", (sum(size for _, size in rows),))


def _gaps(first: int, last: int, present: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Ranges (first, last) of the numbers that are not present. present: in rising order, none outside."""
    gaps, following = [], first
    for number in present:
        if number > following:
            gaps.append((following, number - 1))
        following = number + 1
    if following <= last:
        gaps.append((following, last))
    return tuple(gaps)
