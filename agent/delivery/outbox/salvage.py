"""Salvage: a damaged file is put away, and a new one is begun with all that can still be read of it.

Tables are read as far as SQLite reads them, then the pages of the file and its log one by one (`pages`). At every
moment either the damaged file is in its place, or the finished new one is there: a start that is killed, or finds the
disk full, is made again from the beginning. Nothing of the damaged file is changed or deleted.
"""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from agent.delivery.outbox.dead_letters import put_letter
from agent.delivery.outbox.file import explained, lenient_text, transaction
from agent.delivery.outbox.folder import remove_file
from agent.delivery.outbox.pages import FoundRow, find_rows, rows_cut_off
from agent.delivery.outbox.rows import NUMBERED_COLUMNS, STREAMS, checksum
from agent.delivery.outbox.tables import connect, verify_file
from agent.delivery.outbox.words import NUMBERING_NOTE, put_note
from agent.errors import OutboxError
from agent.files import sync_folder

logger = logging.getLogger(__name__)

SALVAGING_NAME, SALVAGED_NAME = "outbox.db.salvaging", "outbox.db.salvaged"

NUMBERS_LEFT_OUT = 100_000
"""When nobody knows any more how far the numbers went, they go on this far beyond the highest that is left: a number
that comes twice with different contents would hide a loss, one that never comes tells of it."""

_COPIED_TABLES = (
    *("streams", "rows", "dead_letters", "finished", "sample", "documents", "notes", "answers", "acks", "dropped"),
)


@dataclass(frozen=True, slots=True)
class Salvage:
    """What came of a damaged file. bad: where it was put. rows: how many were read out of it, dead letters with them.

    is_whole: every table could be read to its end. reason: what was found.
    """

    bad: Path
    rows: int
    is_whole: bool
    reason: str


def salvage_file(path: Path, boot: int, reason: str) -> Salvage:
    """Put a damaged file away and begin a new one with all that can be read of it. boot: in which it goes on.

    Raises OutboxError.
    """
    fresh, done = path.with_name(SALVAGING_NAME), path.with_name(SALVAGED_NAME)
    for ending in ("", "-wal", "-shm"):
        remove_file(fresh.with_name(fresh.name + ending))
    logger.error("%s; reading what can be read", reason)
    with contextlib.closing(connect(fresh, verify=False)) as connection, explained(fresh):
        with transaction(connection):
            rows, is_whole = _copy_readable(path, connection)
            connection.execute("UPDATE tally SET boot = MAX(boot, ?)", (boot,))
            if connection.execute("SELECT 1 FROM streams LIMIT 1").fetchone() is None:
                put_note(connection, NUMBERING_NOTE, str(boot))  # nothing is left that was numbered
        verify_file(connection, fresh)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    try:
        fresh.replace(done)
        sync_folder(path.parent)
    except OSError as error:
        raise OutboxError(f"{done}: cannot be written: {error.strerror}; mend the rights of the folder") from error
    bad = _set_aside(path)
    finish_salvage(path)
    whole = "all of it" if is_whole else "not all of it could be read"
    logger.error("%s: kept as %s; %d messages were read out of it (%s)", path, bad, rows, whole)
    return Salvage(bad, rows, is_whole, reason)


def finish_salvage(path: Path) -> None:
    """Bring the finished new file into its place, if there is one and the damaged one has left it."""
    done = path.with_name(SALVAGED_NAME)
    if not done.exists():
        return
    if path.exists():
        remove_file(done)  # ended before the damaged one was put away: it is made again
        return
    try:
        for ending in ("-wal", "-shm"):  # ended while it was put away; to the new file they would be poison
            left = path.with_name(path.name + ending)
            if left.exists():
                left.rename(path.with_name(f"{path.name}.bad-left-{time.time_ns()}{ending}"))
        done.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise OutboxError(f"{path}: cannot be written: {error.strerror}; mend the rights of the folder") from error


def rows_lost_in_log(path: Path) -> list[FoundRow]:
    """Rows that SQLite would pass over in silence, for they stand in the log behind a frame that is broken.

    A power cut leaves such frames too, but only of the one append that had not returned yet: with those of two, the
    disk has changed what it had taken.
    """
    if not path.exists():
        return []
    found = rows_cut_off(path)
    lasts: dict[str, int] = {}
    if found:
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError), contextlib.closing(_as_found(path)) as as_read:
            lasts = dict(as_read.execute("SELECT stream, last_seq FROM streams").fetchall())
    lost = [row for row in found if row.seq > lasts.get(row.stream, 0)]
    return lost if len({row.appended_unix_s for row in lost}) > 1 else []


def _as_found(path: Path) -> sqlite3.Connection:
    """Read-only: nothing of the damaged file or its log is changed, and closing makes no checkpoint."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


# ---------------------------------------------------------------------------------------------------------- reading


def _copy_readable(path: Path, fresh: sqlite3.Connection) -> tuple[int, bool]:
    """Copy all that can be read of a damaged file; how many messages, and whether every table came to its end."""
    ends = dict.fromkeys(_COPIED_TABLES, False)
    lost = rows_lost_in_log(path)
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError),  # not even its head can be read
        contextlib.closing(_as_found(path)) as damaged,
    ):
        damaged.text_factory = lenient_text
        ends = {table: _copy_table(damaged, fresh, table) for table in _COPIED_TABLES}
    if lost or not (ends["rows"] and ends["dead_letters"]):
        here = "SELECT stream, boot, seq FROM rows UNION ALL SELECT stream, boot, seq FROM dead_letters"
        taken = set(fresh.execute(here).fetchall())
        with contextlib.suppress(OSError):
            for row in find_rows(path) if not (ends["rows"] and ends["dead_letters"]) else lost:
                if (row.stream, row.boot, row.seq) not in taken:
                    _put_found(fresh, row)
                    taken.add((row.stream, row.boot, row.seq))
    _mend_numbers(fresh, are_known=ends["streams"])
    count = fresh.execute("SELECT (SELECT COUNT(*) FROM rows) + (SELECT COUNT(*) FROM dead_letters)").fetchone()[0]
    return int(count), all(ends.values()) and not lost


def _copy_table(damaged: sqlite3.Connection, fresh: sqlite3.Connection, table: str) -> bool:
    """Copy a table from its beginning and, when that breaks off, from its end; whether it could be read throughout."""
    try:
        theirs = {str(column[1]) for column in damaged.execute(f"PRAGMA table_info({table})")}
        columns = [column[1] for column in fresh.execute(f"PRAGMA table_info({table})") if column[1] in theirs]
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return False
    if not columns:
        return True  # of an older version
    key = {"rows": "row_id", "dead_letters": "letter_id"}.get(table)
    put = f"INSERT OR IGNORE INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
    are_sound = True
    for order in (f" NOT INDEXED ORDER BY {key}", f" NOT INDEXED ORDER BY {key} DESC") if key else ("",):
        try:
            for values in damaged.execute(f"SELECT {', '.join(columns)} FROM {table}{order}"):
                if key and not _is_sound(dict(zip(columns, values, strict=True))):
                    are_sound = False  # its pages are read once more, in case another copy of it is right
                else:
                    fresh.execute(put, values)
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            continue
        return are_sound
    return False


def _is_sound(row: Mapping[str, Any]) -> bool:
    kinds = {"stream": str, "topic": str, "boot": int, "seq": int, "captured_monotonic_ns": int, "payload": bytes}
    return all(isinstance(row.get(name), kind) for name, kind in kinds.items()) and (
        checksum(row["topic"], row["payload"]) == row.get("crc32")
    )


def _put_found(fresh: sqlite3.Connection, row: FoundRow) -> None:
    """Where it was in the order of sending, if that place is free."""
    if row.reason:
        put_letter(fresh, row, row.reason, row.rejected_at)
        return
    is_free = fresh.execute("SELECT 1 FROM rows WHERE row_id = ?", (row.row_id,)).fetchone() is None
    fresh.execute(
        f"INSERT INTO rows (row_id, {NUMBERED_COLUMNS}, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (row.row_id if is_free and 0 < row.row_id < 2**62 else None, *row.columns, row.state),
    )


def _mend_numbers(fresh: sqlite3.Connection, *, are_known: bool) -> None:
    """No number that is left may be given again."""
    highest = dict(
        fresh.execute(
            "SELECT stream, MAX(seq) FROM "
            "(SELECT stream, seq FROM rows UNION ALL SELECT stream, seq FROM dead_letters) GROUP BY stream"
        ).fetchall()
    )
    if are_known:
        stored = dict(fresh.execute("SELECT stream, last_seq FROM streams").fetchall())
        lasts = {name: max(seq, stored.get(name, 0)) for name, seq in highest.items()}
    else:
        # All streams alike: to a receiver one that begins at 1 again would mean that all do.
        beyond = max(highest.values(), default=0) + NUMBERS_LEFT_OUT
        lasts = dict.fromkeys((*STREAMS, *highest), beyond) if highest else {}
    fresh.executemany("INSERT OR REPLACE INTO streams VALUES (?, ?)", lasts.items())


# ------------------------------------------------------------------------------------------------------- putting away


def _set_aside(path: Path) -> Path:
    """Rename the file and its write-ahead log, for somebody to look at; never delete them."""
    stamped = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    bad = path.with_name(f"{path.name}.bad-{stamped}")
    number = 1
    while bad.exists():
        number += 1
        bad = path.with_name(f"{path.name}.bad-{stamped}-{number}")
    try:
        for ending in ("", "-wal", "-shm"):
            part = path.with_name(path.name + ending)
            if part.exists():
                part.rename(bad.with_name(bad.name + ending))
        sync_folder(path.parent)
    except OSError as error:
        raise OutboxError(f"{path}: damaged, and cannot be set aside: {error.strerror}; move it away") from error
    return bad
