"""The rows in the order of sending: numbered, put in, looked at, and counted.

Functions on a connection. Those that write are called inside a transaction.
"""

from __future__ import annotations

import sqlite3
from array import array
from collections.abc import Sequence

from agent.delivery.messages import Draft, message_id, serialise, stamp
from agent.delivery.outbox.rows import (
    ASKED,
    NUMBERED_COLUMNS,
    ROW_COLUMNS,
    Clocks,
    NumberedRow,
    Row,
    checksum,
    read_row,
)


def number_drafts(
    connection: sqlite3.Connection, drafts: Sequence[Draft], device: str, clocks: Clocks
) -> list[NumberedRow]:
    """Give each draft the next number of its stream, and its stamped and serialised payload.

    Raises MessageRejected for a body that JSON cannot say.
    """
    last_ids: dict[str, str] = {}
    last_seqs: dict[str, int] = {}
    appended_unix_s, now_ns = clocks.unix_time(), clocks.monotonic_ns()
    rows: list[NumberedRow] = []
    for draft in drafts:
        if draft.stream not in last_seqs:
            last_seqs[draft.stream] = last_number(connection, draft.stream) or 0
        seq = last_seqs[draft.stream] = last_seqs[draft.stream] + 1
        last_ids[draft.stream] = message_id(device, clocks.boot, seq)
        body = dict(draft.body)
        if draft.belongs_to is not None:
            body[f"{draft.belongs_to}_id"] = last_ids[draft.belongs_to]
        payload = serialise(stamp(body, device, clocks.boot, seq), draft.topic)
        captured_ns = now_ns if draft.captured_monotonic_ns is None else draft.captured_monotonic_ns
        crc32 = checksum(draft.topic, payload)
        rows.append(
            NumberedRow(draft.stream, clocks.boot, seq, draft.topic, captured_ns, appended_unix_s, payload, crc32)
        )
    connection.executemany("INSERT OR REPLACE INTO streams VALUES (?, ?)", last_seqs.items())
    return rows


def last_number(connection: sqlite3.Connection, stream: str) -> int | None:
    """The number that a stream gave last; None before its first."""
    found = connection.execute("SELECT last_seq FROM streams WHERE stream = ?", (stream,)).fetchone()
    return None if found is None else found[0]


def put_row(connection: sqlite3.Connection, row: NumberedRow) -> int:
    """Behind all that waits; returns its row id."""
    cursor = connection.execute(f"INSERT INTO rows ({NUMBERED_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row.columns)
    return int(cursor.lastrowid or 0)


def rows_in_state(
    connection: sqlite3.Connection, state: int, after_row: int, limit: int, without: Sequence[str] = ()
) -> list[Row]:
    """The next rows that wait, or are asked for again, behind this one; without: streams."""
    others = f"AND stream NOT IN ({', '.join('?' * len(without))}) " if without else ""
    found = connection.execute(
        f"SELECT {ROW_COLUMNS} FROM rows WHERE state = ? AND row_id > ? {others}ORDER BY row_id LIMIT ?",
        (state, after_row, *without, limit),
    ).fetchall()
    return [read_row(columns, is_replay=state == ASKED) for columns in found]


def row_ids_of_stream(connection: sqlite3.Connection, stream: str, after_row: int) -> array[int]:
    """All rows of a stream behind this one, in order, confirmed or not; from the index alone."""
    found = connection.execute(
        "SELECT row_id FROM rows WHERE stream = ? AND row_id > ? ORDER BY row_id", (stream, after_row)
    )
    return array("q", (row_id for (row_id,) in found))


def rows_of_topic(connection: sqlite3.Connection, row_ids: Sequence[int], topic: str) -> list[Row]:
    """Those of these rows that are of a topic, in order. row_ids: at most MOST_MARKS."""
    found = connection.execute(
        f"SELECT {ROW_COLUMNS} FROM rows WHERE row_id IN ({', '.join('?' * len(row_ids))}) AND topic = ? "
        "ORDER BY row_id",
        (*row_ids, topic),
    ).fetchall()
    return [read_row(columns) for columns in found]


def numbered_row(connection: sqlite3.Connection, stream: str, boot: int, seq: int) -> Row | None:
    """One row, confirmed or not, where it is still here."""
    found = connection.execute(
        f"SELECT {ROW_COLUMNS} FROM rows WHERE stream = ? AND boot = ? AND seq = ?", (stream, boot, seq)
    ).fetchone()
    return None if found is None else read_row(found)


def depth(connection: sqlite3.Connection) -> int:
    """How many rows wait."""
    return int(connection.execute("SELECT depth FROM tally").fetchone()[0])


def change_depth(connection: sqlite3.Connection, by: int) -> None:
    """So many more rows wait; negative: fewer."""
    connection.execute("UPDATE tally SET depth = depth + ?", (by,))


def count_appended(connection: sqlite3.Connection, rows: int, boot: int) -> None:
    """So many more rows wait; the boot is known here too, should the file of the counter be lost."""
    connection.execute("UPDATE tally SET boot = MAX(boot, ?), depth = depth + ?", (boot, rows))


def oldest_age_s(connection: sqlite3.Connection, clocks: Clocks) -> float | None:
    """s; how long the first row has waited; None when nothing waits."""
    times = connection.execute(
        "SELECT boot, captured_monotonic_ns, appended_unix_s FROM rows WHERE state = 0 ORDER BY row_id LIMIT 1"
    ).fetchone()
    return None if times is None else clocks.age_s(*times)
