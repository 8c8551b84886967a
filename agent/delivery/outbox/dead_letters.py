"""Dead letters: messages that were set aside with a reason, until a person has them sent again or throws them away.

Functions on a connection. Those that write are called inside a transaction.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from agent.delivery.outbox.queue import change_depth
from agent.delivery.outbox.rows import NUMBERED_COLUMNS, NumberedRow, checksum

SPEAK_AGAIN_AFTER_S = 60.0
"""A broker that refuses every message would cause as many events: one a minute, with their number."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that was set aside, and why."""

    letter_id: int
    stream: str
    boot: int
    seq: int
    topic: str
    payload: bytes
    reason: str
    rejected_at: str


@dataclass(frozen=True, slots=True)
class Untold:
    """Messages that were set aside since the last event about one, and when that was, monotonic."""

    count: int = 0
    spoke_at_s: float = -math.inf

    def with_another(self, now_s: float, *, may_tell: bool = True) -> tuple[int, Untold]:
        """Of how many an event is due now that one more was set aside, 0 = none is; and what is untold after it."""
        if may_tell and now_s - self.spoke_at_s >= SPEAK_AGAIN_AFTER_S:
            return self.count + 1, Untold(spoke_at_s=now_s)
        return 0, Untold(self.count + 1, self.spoke_at_s)


def put_letter(connection: sqlite3.Connection, row: NumberedRow, reason: str, rejected_at: str) -> None:
    """Set a message aside that never waited."""
    connection.execute(
        f"INSERT INTO dead_letters ({NUMBERED_COLUMNS}, reason, rejected_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*row.columns, reason, rejected_at),
    )


def set_row_aside(connection: sqlite3.Connection, row_id: int, reason: str, rejected_at: str) -> None:
    """A row that waits becomes a dead letter.

    History that cannot be sent again goes: nobody lacks it, and asking for it must come to an end.
    """
    moved = connection.execute(
        f"INSERT INTO dead_letters ({NUMBERED_COLUMNS}, reason, rejected_at) "
        f"SELECT {NUMBERED_COLUMNS}, ?, ? FROM rows WHERE row_id = ? AND state = 0",
        (reason, rejected_at, row_id),
    ).rowcount
    connection.execute(
        "UPDATE tally SET kept_bytes = kept_bytes - "
        "(SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows WHERE row_id = ? AND state > 0)",
        (row_id,),
    )
    connection.execute("DELETE FROM rows WHERE row_id = ?", (row_id,))
    change_depth(connection, -moved)


def requeue_letters(connection: sqlite3.Connection, letter_ids: Sequence[int] | None) -> int:
    """Put them behind all that waits; damaged ones stay. None = all. Returns how many."""
    letters = connection.execute("SELECT letter_id, topic, payload, crc32 FROM dead_letters ORDER BY letter_id")
    intact = [
        letter_id
        for letter_id, topic, payload, crc32 in letters
        if checksum(topic, payload) == crc32 and (letter_ids is None or letter_id in letter_ids)
    ]
    for letter_id in intact:
        connection.execute(
            f"INSERT INTO rows ({NUMBERED_COLUMNS}) SELECT {NUMBERED_COLUMNS} FROM dead_letters WHERE letter_id = ?",
            (letter_id,),
        )
        connection.execute("DELETE FROM dead_letters WHERE letter_id = ?", (letter_id,))
    change_depth(connection, len(intact))
    return len(intact)


def discard_letters(connection: sqlite3.Connection, letter_ids: Sequence[int]) -> int:
    """Delete them; returns how many there were."""
    return sum(
        connection.execute("DELETE FROM dead_letters WHERE letter_id = ?", (letter_id,)).rowcount
        for letter_id in letter_ids
    )


def count_letters(connection: sqlite3.Connection) -> int:
    """How many there are."""
    return int(connection.execute("SELECT COUNT(*) FROM dead_letters").fetchone()[0])


def all_letters(connection: sqlite3.Connection) -> tuple[DeadLetter, ...]:
    """Oldest first."""
    found = connection.execute(
        "SELECT letter_id, stream, boot, seq, topic, payload, reason, rejected_at FROM dead_letters ORDER BY letter_id"
    ).fetchall()
    return tuple(DeadLetter(*columns) for columns in found)
