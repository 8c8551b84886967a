"""The outbox: what has been counted and not yet been confirmed, on disk, in order; and for a while what has been.

What it promises
  * All drafts of one `append`, the sample's state and the finished frame are stored together or not at all.
  * When `append` returns, they survive a power cut (`synchronous=FULL`).
  * Numbers (`seq`) are without gaps in each stream, over restarts too.
  * The newest word on each retained topic, notes and answers to transactions are stored in the same transaction.
  * A row leaves only by `acknowledge`, by `confirm` (a receiver has it on its disk) or, with its reason, into the dead
    letters. What has left stays as history, to be sent again when asked for, as long as there is room and time for it.
  * For room goes, oldest first: what else of ours lies on a disk that is short (`spare`: pictures), history, cells
    (their fields hold them too), events. What goes unconfirmed is counted (`dropped`). Fields, differentials and the
    audit never go: a full outbox refuses the next append, and takes it again when some have left. Commands and the end
    of a sample have a reserve: they are taken then too.

What it does not promise
  * That a message is delivered once only: an acknowledgement lost in a power cut sends the message again.
  * That numbers go on after the file itself was lost: a new file begins at 1. The boot counter lies in a file of its
    own, so that no id is ever given twice.

One file `outbox.db` (SQLite, WAL) and one file `boot` in a folder on a local disk. An `Outbox` holds one connection
and belongs to one thread at a time; each thread opens its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import shutil
import sqlite3
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, Any

from agent.delivery.messages import Draft, RetainedDocument, message_id, serialise, set_aside_draft, stamp
from agent.delivery.salvage import FoundRow, find_rows, rows_cut_off
from agent.delivery.topics import Topics
from agent.domain import SampleState
from agent.errors import OutboxDamaged, OutboxError
from agent.files import MOUNTS, network_file_system, sync_folder, write_durably

logger = logging.getLogger(__name__)

DATABASE_NAME = "outbox.db"
SALVAGING_NAME, SALVAGED_NAME = "outbox.db.salvaging", "outbox.db.salvaged"
DAMAGE_NAME = "damaged"
"""A mark: damage was met in use. The quick check at the next start need not find it, so the mark counts instead."""

BOOT_NAME = "boot"
LOCK_NAME = "lock"

APPLICATION_ID = 0x48764F62
"""`HvOb`; tells our file from any other SQLite database."""

SCHEMA_VERSION = 3

BUSY_TIMEOUT_S = 10.0
"""A commit takes milliseconds; a checkpoint of a large write-ahead log on a slow card takes seconds."""

WAL_LIMIT_BYTES = 4 * 1024 * 1024
"""The write-ahead log keeps this much disk after a checkpoint, so that acknowledging works on a full disk too."""

EVENT_RESERVE_BYTES = 1024 * 1024
"""Room beyond the limits for events alone: that the outbox is full must be said too."""

WORD_RESERVE_BYTES = 2 * EVENT_RESERVE_BYTES
"""Room beyond the limits for commands and the end of a sample, half of it beyond the events': some thousand of them.
What a person does about a full outbox must be stored when no field can be."""

RESERVED_STREAMS = frozenset({"audit", "differential"})
RESERVED_PHASES = frozenset({"finishing", "finished", "aborted"})
"""In `finishing` come the fields that were taken before the stop: those few that the queue holds."""

LEAST_FREE_BYTES = 2 * 1024 * 1024
"""Left free whatever `outbox.min_free_mb` says: to take rows out needs room too, in the write-ahead log."""

START_ROOM_BYTES = LEAST_FREE_BYTES + WAL_LIMIT_BYTES
"""Free on the disk, a start works: the boot counter, the write-ahead log and its index are written anew."""

FULL_DISK = (
    "the disk is full; free space there, or files or quota where those are used up: "
    f"a start of the agent needs {START_ROOM_BYTES / 2**20:g} MB"
)

VACUUM_ABOVE_PAGES = 1024
VACUUM_STEP_PAGES = 256
"""After an outage the file shrinks again, 1 MB with each acknowledgement, while more than 4 MB and three quarters of
it are empty. Sooner would be costly: full pages at the end of the file have to be moved first."""

EXPORT_STEP_ROWS = 200

NUMBERS_LEFT_OUT = 100_000
"""When nobody knows any more how far the numbers went, they go on this far beyond the highest that is left: a number
that comes twice with different contents would hide a loss, one that never comes tells of it."""

CONFIRM_STEP_ROWS = 1000
PRUNE_STEP_ROWS = 64
"""Rows that leave in one transaction: others wait for it."""

MOST_MARKS = 500
"""Row ids in one statement."""

FIRST_TO_GO = ("cell", "event")
"""Streams that make room for results when nothing else is left, in this order."""

EVENTS_KEPT = 100
"""The newest events stay even then: among them the one which says that the outbox is full."""

PUBLISH_PROPERTIES_BYTES = 22
"""MQTT 5 properties of a row's PUBLISH with their length: payload format, content type `application/json`."""

SPEAK_AGAIN_AFTER_S = 60.0
"""A broker that refuses every message would cause as many events: one a minute, with their number."""

WAITING, KEPT, ASKED = 0, 1, 2
"""States of a row: not confirmed; confirmed and kept as history; history that is to be sent again."""

PACKET_LIMIT_NOTE = "broker/max-packet-bytes"
NUMBERING_NOTE = "numbering/since-boot"
"""The boot in which this file began to number its streams at 1."""

MOST_ANSWERS = 512
"""Transactions that are remembered: more than a person or a program sends while any repeat of them is under way."""

MOST_DOCUMENTS = 1000

NO_NOTES: Mapping[str, str | None] = MappingProxyType({})

_TABLES = (
    """CREATE TABLE rows (
        row_id INTEGER PRIMARY KEY AUTOINCREMENT,
        stream TEXT NOT NULL,
        boot INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        topic TEXT NOT NULL,
        captured_monotonic_ns INTEGER NOT NULL,
        appended_unix_s REAL NOT NULL,
        payload BLOB NOT NULL,
        crc32 INTEGER NOT NULL)""",
    """CREATE TABLE dead_letters (
        letter_id INTEGER PRIMARY KEY AUTOINCREMENT,
        stream TEXT NOT NULL,
        boot INTEGER NOT NULL,
        seq INTEGER NOT NULL,
        topic TEXT NOT NULL,
        captured_monotonic_ns INTEGER NOT NULL,
        appended_unix_s REAL NOT NULL,
        payload BLOB NOT NULL,
        crc32 INTEGER NOT NULL,
        reason TEXT NOT NULL,
        rejected_at TEXT NOT NULL)""",
    "CREATE TABLE streams (stream TEXT PRIMARY KEY, last_seq INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE finished (origin_key TEXT PRIMARY KEY) WITHOUT ROWID",
    "CREATE TABLE sample (only INTEGER PRIMARY KEY CHECK (only = 1), state TEXT NOT NULL)",
    # depth: rows waiting, counted as they come and go; counting a million of them takes seconds on a small board.
    "CREATE TABLE tally (only INTEGER PRIMARY KEY CHECK (only = 1), depth INTEGER NOT NULL, boot INTEGER NOT NULL)",
    "INSERT INTO tally VALUES (1, 0, 0)",
)
_TABLES_OF_2 = (
    # payload NULL: the topic is to be cleared; the row goes when the broker has done so.
    "CREATE TABLE documents (version INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT UNIQUE NOT NULL, payload BLOB)",
    "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE answers (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, text TEXT NOT NULL)",
)
_TABLES_OF_3 = (
    # A constant default takes no room in a row, and going from 0 to 1 or 2 changes one byte of it.
    "ALTER TABLE rows ADD COLUMN state INTEGER NOT NULL DEFAULT 0",
    "CREATE INDEX rows_by_state ON rows (state)",
    "CREATE INDEX rows_by_number ON rows (stream, state, seq)",
    # kept_bytes: payloads of rows that are history.
    "ALTER TABLE tally ADD COLUMN kept_bytes INTEGER NOT NULL DEFAULT 0",
    # What each receiver has acknowledged, where there are several and a row waits for all of them.
    "CREATE TABLE acks (receiver TEXT NOT NULL, stream TEXT NOT NULL, boot INTEGER NOT NULL, seq INTEGER NOT NULL, "
    "PRIMARY KEY (receiver, stream, boot, seq)) WITHOUT ROWID",
    "CREATE TABLE dropped (stream TEXT PRIMARY KEY, rows INTEGER NOT NULL, last_at TEXT NOT NULL) WITHOUT ROWID",
)
_COPIED_TABLES = (
    *("streams", "rows", "dead_letters", "finished", "sample", "documents", "notes", "answers", "acks", "dropped"),
)
STREAMS = ("field", "cell", "event", "audit", "differential")
_COPIED = "stream, boot, seq, topic, captured_monotonic_ns, appended_unix_s, payload, crc32"


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


@dataclass(frozen=True, slots=True)
class Row:
    """One stored message. row_id: its place in the order of sending. is_intact: the payload is what was stored.

    is_replay: it was confirmed before and is asked for again.
    """

    row_id: int
    stream: str
    boot: int
    seq: int
    topic: str
    captured_monotonic_ns: int
    payload: bytes
    is_intact: bool = True
    is_replay: bool = False


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """The newest of a retained topic. payload: None = the topic is to be cleared. version: rises with each change."""

    topic: str
    payload: bytes | None
    version: int


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


@dataclass(frozen=True, slots=True)
class Salvage:
    """What came of a damaged file. bad: where it was put. rows: how many were read out of it, dead letters with them.

    is_whole: every table could be read to its end. reason: what was found.
    """

    bad: Path
    rows: int
    is_whole: bool
    reason: str


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


# ------------------------------------------------------------------------------------------------ the boot counter


def begin_boot(folder: Path) -> int:
    """Count one more start of the agent on this device; once for each process, before the outbox is opened."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutboxError(f"outbox folder {folder}: cannot be made: {error.strerror}; choose outbox.folder") from error
    boot = _last_boot(folder) + 1
    _write_boot(folder, boot)
    return boot


def read_boot(folder: Path) -> int:
    """The number of the boot in force; 0 before the first."""
    try:
        return int((folder / BOOT_NAME).read_text("ascii"))
    except (OSError, ValueError):
        return 0


def _last_boot(folder: Path) -> int:
    """The highest boot number used so far. A damaged file must not send the counter back: ids would repeat."""
    path = folder / BOOT_NAME
    stored = _boot_in_database(folder)
    try:
        return max(int(path.read_text("ascii")), stored)
    except FileNotFoundError:
        return stored
    except ValueError:
        # Nobody knows the number any more. Seconds since 1970 are above every counter that began at 1.
        return stored or int(time.time())
    except OSError as error:
        raise OutboxError(f"{path}: cannot be read: {error.strerror}; mend the rights of the folder") from error


def _boot_in_database(folder: Path) -> int:
    path = folder / DATABASE_NAME
    if not path.exists():
        return 0
    try:
        # Read-only: closing must not tidy up a log that nobody has looked at yet.
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)
        try:
            return int(connection.execute("SELECT boot FROM tally").fetchone()[0])
        finally:
            connection.close()
    except (sqlite3.Error, TypeError, ValueError):
        return 0  # opening the outbox will say what is wrong with it


def _write_boot(folder: Path, boot: int) -> None:
    """Atomic: after a power cut either the old or the new number is there."""
    path = folder / BOOT_NAME
    try:
        write_durably(path, f"{boot}\n".encode("ascii"))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OutboxError(f"{path}: cannot be written: {FULL_DISK}") from error
        raise OutboxError(f"{path}: cannot be written: {error.strerror}; free space or mend the rights") from error


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutboxError(f"{path}: cannot be removed: {error.strerror}; mend the rights of the folder") from error


def has_outbox(folder: Path) -> bool:
    """Whether there is one. Raises OutboxError where this user may not look."""
    try:
        return (folder / DATABASE_NAME).exists()
    except PermissionError as error:
        raise OutboxError(
            f"outbox folder {folder}: {error.strerror}; ask as the agent's user: sudo -u hematovision hematovision ..."
        ) from error


def lock_folder(folder: Path) -> IO[str]:
    """Keep a second agent off this folder while the returned file is open; raises OutboxError when one is there."""
    import fcntl  # not on every system; only the agent itself needs it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a", encoding="ascii")
    except OSError as error:
        raise OutboxError(
            f"outbox folder {folder}: cannot be used: {error.strerror}; choose another outbox.folder or mend its rights"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OutboxError(
            f"outbox folder {folder}: another agent uses it; stop that one or choose another outbox.folder"
        ) from error
    return file


# --------------------------------------------------------------------------------------------------------- opening


def open_outbox(
    folder: Path,
    max_mb: float = 2048,
    min_free_mb: float = 64,
    device: str = "",
    *,
    keep_mb: float = 0,
    keep_hours: float = 0,
    verify: bool = True,
    create: bool = True,
    mounts_file: Path = MOUNTS,
    monotonic_ns: Callable[[], int] = time.monotonic_ns,
    unix_time: Callable[[], float] = time.time,
) -> Outbox:
    """Open the outbox of a folder for the calling thread.

    keep_mb, keep_hours: how much of what was confirmed is kept, and for how long, to be sent again. 0 = nothing.
    verify: read the whole file; one that is no outbox or is damaged is set aside, a new one is begun and is given all
        that can still be read (`Outbox.salvage` tells of it). For the first opening of a process only: others would go
        on writing into the old file.
    create: False = an outbox must be there already.
    Raises OutboxError: network file system, no right to write, disk full; OutboxDamaged: damaged, and verify is False.
    """
    _refuse_network_file_system(folder, mounts_file)
    path = folder / DATABASE_NAME
    if not create and not has_outbox(folder):
        raise OutboxError(f"{path}: there is no outbox; give the folder of a running agent")
    salvage: Salvage | None = None
    mark = folder / DAMAGE_NAME
    if verify:
        _finish_salvage(path)
    try:
        connection = _connect(path, verify=verify, mark=mark if verify else None)
    except OutboxDamaged as error:
        if not verify:
            raise
        boot = begin_boot(folder)  # what is numbered from now on is kept apart from what may have been lost
        salvage = _salvage(path, boot, str(error))
        connection = _connect(path, verify=True)
    try:
        if create:
            _refuse_read_only(connection, path)
        if verify:
            _remove(mark)
    except BaseException:
        connection.close()
        raise
    return Outbox(
        connection,
        path,
        device=device,
        boot=read_boot(folder),
        max_bytes=int(max_mb * 1024 * 1024),
        min_free_bytes=int(min_free_mb * 1024 * 1024),
        keep_bytes=int(keep_mb * 1024 * 1024) if keep_hours > 0 else 0,
        keep_s=keep_hours * 3600,
        salvage=salvage,
        monotonic_ns=monotonic_ns,
        unix_time=unix_time,
    )


def _connect(path: Path, *, verify: bool, mark: Path | None = None) -> sqlite3.Connection:
    if mark is not None and _lost_in_log(path):
        raise OutboxDamaged(f"{path}: damaged: its write-ahead log is broken in the middle")
    if mark is not None and mark.exists() and path.exists():
        raise OutboxDamaged(f"{path}: damaged: {mark.read_text(errors='replace')[:300].strip() or 'met in use'}")
    with _explained(path):
        # The thread check is off because the supervisor opens the outbox and hands it to the pipeline's thread.
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.text_factory = _lenient_text
        try:
            _prepare(connection, path, verify=verify)
        except BaseException:
            connection.close()
            raise
    return connection


def _refuse_read_only(connection: sqlite3.Connection, path: Path) -> None:
    """SQLite opens what it may not write for reading alone, and such a connection stays so when the disk is mended."""
    with _explained(path):
        connection.execute("BEGIN IMMEDIATE")  # passes on those too, as a beginning to read
        try:
            connection.execute("UPDATE tally SET depth = depth")
        finally:
            connection.execute("ROLLBACK")


def _prepare(connection: sqlite3.Connection, path: Path, *, verify: bool) -> None:
    is_empty = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
    if is_empty:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # only before the first table
    elif _pragma(connection, "application_id") != APPLICATION_ID:
        raise OutboxDamaged(f"{path}: this is a database of another program")
    version = _pragma(connection, "user_version")
    if version > SCHEMA_VERSION:
        raise OutboxError(f"{path}: written by a newer agent (version {version}); start that agent or let it empty it")
    mode = str(connection.execute("PRAGMA journal_mode=WAL").fetchone()[0])
    if mode != "wal":
        raise OutboxError(f"{path}: this file system cannot keep a write-ahead log ({mode}); use a local disk")
    connection.execute("PRAGMA synchronous=FULL")
    # Debian's SQLite writes zeros over all that leaves: as many bytes again for an SD card, over counts of cells that
    # hold nobody's name and were published.
    connection.execute("PRAGMA secure_delete=OFF")
    connection.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
    if version < SCHEMA_VERSION:
        _make_tables(connection, since_boot=read_boot(path.parent) if path.name == DATABASE_NAME else 0)
    if verify:
        _verify(connection, path)


def _make_tables(connection: sqlite3.Connection, *, since_boot: int = 0) -> None:
    """Those that are missing. since_boot: in which the numbers of a new file begin; 0 = not known yet, or to nobody."""
    with _transaction(connection):
        version = _pragma(connection, "user_version")
        if version == SCHEMA_VERSION:
            return  # another thread was first
        for number, statements in enumerate((_TABLES, _TABLES_OF_2, _TABLES_OF_3), start=1):
            for statement in statements if version < number else ():
                connection.execute(statement)
        if version == 0 and since_boot:
            _note(connection, NUMBERING_NOTE, str(since_boot))
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """Name and text of each table and index. A flipped bit may rename a column, and the quick check is content."""
    return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def _whole_schema() -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        _make_tables(fresh)
        return _schema(fresh)


def _verify(connection: sqlite3.Connection, path: Path) -> None:
    verdict = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
    if verdict != "ok":
        raise OutboxDamaged(f"{path}: damaged: {verdict}")
    if _schema(connection) != _whole_schema():
        raise OutboxDamaged(f"{path}: damaged: its tables are not those that an outbox has")
    counted = connection.execute(
        "SELECT (SELECT COUNT(*) FROM rows WHERE state = 0), "
        "(SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows WHERE state > 0)"
    ).fetchone()
    if counted != connection.execute("SELECT depth, kept_bytes FROM tally").fetchone():
        connection.execute("UPDATE tally SET depth = ?, kept_bytes = ?", counted)


# --------------------------------------------------------------------------------------------------------- salvage


def _salvage(path: Path, boot: int, reason: str) -> Salvage:
    """Put a damaged file away and begin a new one with all that can be read of it.

    At every moment either the damaged file is in its place, or the finished new one is there: a start that is killed,
    or finds the disk full, is made again from the beginning. Raises OutboxError.
    """
    fresh, done = path.with_name(SALVAGING_NAME), path.with_name(SALVAGED_NAME)
    for ending in ("", "-wal", "-shm"):
        _remove(fresh.with_name(fresh.name + ending))
    logger.error("%s; reading what can be read", reason)
    with contextlib.closing(_connect(fresh, verify=False)) as connection, _explained(fresh):
        with _transaction(connection):
            rows, is_whole = _copy_readable(path, connection)
            connection.execute("UPDATE tally SET boot = MAX(boot, ?)", (boot,))
            if connection.execute("SELECT 1 FROM streams LIMIT 1").fetchone() is None:
                _note(connection, NUMBERING_NOTE, str(boot))  # nothing is left that was numbered
        _verify(connection, fresh)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    try:
        fresh.replace(done)
        sync_folder(path.parent)
    except OSError as error:
        raise OutboxError(f"{done}: cannot be written: {error.strerror}; mend the rights of the folder") from error
    bad = _set_aside(path)
    _finish_salvage(path)
    whole = "all of it" if is_whole else "not all of it could be read"
    logger.error("%s: kept as %s; %d messages were read out of it (%s)", path, bad, rows, whole)
    return Salvage(bad, rows, is_whole, reason)


def _finish_salvage(path: Path) -> None:
    """Bring the finished new file into its place, if there is one and the damaged one has left it."""
    done = path.with_name(SALVAGED_NAME)
    if not done.exists():
        return
    if path.exists():
        _remove(done)  # ended before the damaged one was put away: it is made again
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


def _copy_readable(path: Path, fresh: sqlite3.Connection) -> tuple[int, bool]:
    """Copy all that can be read of a damaged file; how many messages, and whether every table came to its end."""
    ends = dict.fromkeys(_COPIED_TABLES, False)
    lost = _lost_in_log(path)
    # Read-only: nothing of the damaged file or its log is changed, and closing makes no checkpoint.
    with (
        contextlib.suppress(sqlite3.Error, UnicodeDecodeError),  # not even its head can be read
        contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as damaged,
    ):
        damaged.text_factory = _lenient_text
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


def _lost_in_log(path: Path) -> list[FoundRow]:
    """Rows that SQLite would pass over in silence, for they stand in the log behind a frame that is broken.

    A power cut leaves such frames too, but only of the one append that had not returned yet: with those of two, the
    disk has changed what it had taken.
    """
    if not path.exists():
        return []
    found = rows_cut_off(path)
    lasts: dict[str, int] = {}
    if found:
        with (
            contextlib.suppress(sqlite3.Error, UnicodeDecodeError),
            contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as as_read,
        ):
            lasts = dict(as_read.execute("SELECT stream, last_seq FROM streams").fetchall())
    lost = [row for row in found if row.seq > lasts.get(row.stream, 0)]
    return lost if len({row.appended_unix_s for row in lost}) > 1 else []


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
        _checksum(row["topic"], row["payload"]) == row.get("crc32")
    )


def _put_found(fresh: sqlite3.Connection, row: FoundRow) -> None:
    """Where it was in the order of sending, if that place is free."""
    columns = (row.stream, row.boot, row.seq, row.topic, row.captured_monotonic_ns, row.appended_unix_s)
    if row.reason:
        fresh.execute(
            f"INSERT INTO dead_letters ({_COPIED}, reason, rejected_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*columns, row.payload, row.crc32, row.reason, row.rejected_at),
        )
        return
    is_free = fresh.execute("SELECT 1 FROM rows WHERE row_id = ?", (row.row_id,)).fetchone() is None
    fresh.execute(
        f"INSERT INTO rows (row_id, {_COPIED}, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (row.row_id if is_free and 0 < row.row_id < 2**62 else None, *columns, row.payload, row.crc32, row.state),
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


def _nothing_to_spare() -> bool:
    return False


def _refuse_network_file_system(folder: Path, mounts_file: Path) -> None:
    kind = network_file_system(folder, mounts_file)
    if kind is not None:
        raise OutboxError(
            f"outbox folder {folder}: lies on a network file system ({kind}), where a database is not safe; "
            "set outbox.folder to a local disk"
        )


# ------------------------------------------------------------------------------------------------------ the outbox


class Outbox:
    """One thread's way to the outbox; made by `open_outbox`.

    boot: the boot that new ids carry. salvage: what opening made of a damaged file; None = it was whole.
    """

    def __init__(
        self,
        connection: sqlite3.Connection,
        path: Path,
        *,
        device: str,
        boot: int,
        max_bytes: int,
        min_free_bytes: int,
        keep_bytes: int = 0,
        keep_s: float = 0,
        salvage: Salvage | None = None,
        monotonic_ns: Callable[[], int],
        unix_time: Callable[[], float],
    ) -> None:
        self.path = path
        self.device = device
        self.boot = boot
        self.salvage = salvage
        self._connection = connection
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._keep_bytes = keep_bytes
        self._keep_s = keep_s
        self._monotonic_ns = monotonic_ns
        self._unix_time = unix_time
        self._untold = Untold()
        self._spare: Callable[[], bool] = _nothing_to_spare
        self._log = path.with_name(f"{path.name}-wal")
        with _explained(path):
            self._page_bytes = _pragma(connection, "page_size")

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the last one to close also empties the write-ahead log."""
        self._connection.close()

    def spare(self, let_go: Callable[[], bool]) -> None:
        """What is worth less than all that is here, and goes first when the disk is short.

        let_go: deletes some of it and says True, or False when nothing is left. Called on the thread that appends.
        """
        self._spare = let_go

    # ---- writing

    def append(
        self,
        drafts: Sequence[Draft],
        *,
        sample: SampleState | None = None,
        finished_keys: Sequence[str] = (),
        closes_sample: bool = False,
        documents: Sequence[RetainedDocument] = (),
        notes: Mapping[str, str | None] = NO_NOTES,
        answer: tuple[str, str] | None = None,
    ) -> tuple[int, ...]:
        """Number and store the drafts, the sample's state and the finished frames, all in one transaction.

        sample: None = leave the stored state as it is. closes_sample: forget the state and all finished frames, so
        that the next run begins a new sample. documents: the newest words on retained topics. notes: small facts to
        remember by key; None = forget it, and with a key that ends in `/` all below it. answer: (name, text) of a
        transaction that must not be done twice; the newest MOST_ANSWERS are kept.
        Returns the row ids in the order of the drafts.
        Raises OutboxError when it cannot store now, MessageRejected for a body that JSON cannot say; then nothing of
        it is stored, no number is used up, and a later append works again.
        """
        self._give_back_log()
        with self._writing() as connection:
            for key, value in notes.items():
                if value is None:  # first: its room may be what the drafts need
                    _note(connection, key, None)
            row_ids = self._store(drafts, is_ending=sample is not None and sample.phase in RESERVED_PHASES)
            connection.executemany("INSERT OR IGNORE INTO finished VALUES (?)", ((key,) for key in finished_keys))
            if sample is not None:
                connection.execute("INSERT OR REPLACE INTO sample VALUES (1, ?)", (sample_text(sample),))
            if closes_sample:
                _forget_sample(connection, with_finished=True)
            self._store_documents(documents)
            for key, value in notes.items():
                if value is not None:
                    _note(connection, key, value)
            if answer is not None:
                connection.execute("INSERT OR REPLACE INTO answers (name, text) VALUES (?, ?)", answer)
                connection.execute(
                    "DELETE FROM answers WHERE number <= (SELECT MAX(number) FROM answers) - ?", (MOST_ANSWERS,)
                )
        return row_ids

    def settle_document(self, document: StoredDocument) -> None:
        """The broker has cleared the topic of this document: it need not be told again, unless it was written anew."""
        with self._writing() as connection:
            connection.execute(
                "DELETE FROM documents WHERE topic = ? AND version = ? AND payload IS NULL",
                (document.topic, document.version),
            )

    def acknowledge(self, row_ids: Sequence[int]) -> None:
        """These rows are where they should be; they leave, and history that was asked for is history again.

        Unknown ids are passed over.
        """
        with self._leaving() as connection:
            for marks, some in _in_portions(row_ids):
                found = connection.execute(
                    f"SELECT row_id, state, LENGTH(payload) FROM rows WHERE row_id IN ({marks})", some
                )
                self._let_go(found.fetchall())

    def confirm(self, receiver: str, stream: str, boot: int, seq: int, receivers: Sequence[str]) -> list[int] | None:
        """A receiver has all of a stream up to this number on its disk; what all the receivers have leaves.

        receivers: all that have to confirm. Returns the ids of the rows that left; None: this cannot be true, for such
        a number was never given, and nothing is done.
        """
        with self._explaining():
            known = self._connection.execute("SELECT last_seq FROM streams WHERE stream = ?", (stream,)).fetchone()
        if boot > self.boot or known is None or seq > known[0]:
            return None
        left: list[int] = []
        is_more = True
        while is_more:
            with self._leaving() as connection:
                if len(receivers) > 1:
                    self._note_ack(receiver, stream, boot, seq)
                found = connection.execute(
                    "SELECT row_id, state, LENGTH(payload), boot, seq FROM rows "
                    "WHERE stream = ? AND state = 0 AND seq <= ? AND boot <= ? ORDER BY seq LIMIT ?",
                    (stream, seq, boot, CONFIRM_STEP_ROWS),
                ).fetchall()
                marks = [self._acks(other, stream) for other in receivers if other != receiver]
                leaving = [
                    (row_id, state, size)
                    for row_id, state, size, row_boot, row_seq in found
                    if all(any(row_boot <= b and row_seq <= s for b, s in theirs) for theirs in marks)
                ]
                self._let_go(leaving)
            left += [row_id for row_id, _, _ in leaving]
            is_more = len(leaving) == CONFIRM_STEP_ROWS
        return left

    def prune(self) -> None:
        """Let history go that is too old or too much; a little at each call."""
        with self._leaving():
            self._prune()

    def request_replay(self, stream: str, first: int, last: int) -> ReplayAnswer:
        """Have what is kept of these numbers, both included, sent again."""
        with self._writing() as connection:
            known = connection.execute("SELECT last_seq FROM streams WHERE stream = ?", (stream,)).fetchone()
            last_given = known[0] if known else 0
            span = (stream, first, min(last, last_given))
            asked = connection.execute(
                "UPDATE rows SET state = 2 WHERE stream = ? AND state = 1 AND seq BETWEEN ? AND ?", span
            ).rowcount
            waiting = connection.execute(
                "SELECT COUNT(*) FROM rows WHERE stream = ? AND state = 0 AND seq BETWEEN ? AND ?", span
            ).fetchone()[0]
            here = connection.execute(
                "SELECT DISTINCT seq FROM rows WHERE stream = ? AND state IN (0, 2) AND seq BETWEEN ? AND ? "
                "ORDER BY seq",
                span,
            )
            gone, following = [], first
            for (seq,) in here:
                if seq > following:
                    gone.append((following, seq - 1))
                following = seq + 1
            if following <= span[2]:
                gone.append((following, span[2]))
        beyond = max(first, last_given + 1) if last > last_given else None
        return ReplayAnswer(asked, waiting, tuple(gone), beyond)

    def note_packet_limit(self, max_packet_bytes: int | None) -> None:
        """The largest PUBLISH that the broker takes, as it said last; None = it set no limit. Survives a restart."""
        text = None if max_packet_bytes is None else str(max_packet_bytes)
        if self.note(PACKET_LIMIT_NOTE) != text:
            with self._writing() as connection:
                if text is None:
                    connection.execute("DELETE FROM notes WHERE key = ?", (PACKET_LIMIT_NOTE,))
                else:
                    _note(connection, PACKET_LIMIT_NOTE, text)

    def reject(self, row_id: int, reason: str, events: Sequence[Draft] = ()) -> None:
        """Set a row aside with the reason why it cannot be sent, and store the events that tell of it."""
        now = self._now_text()
        with self._writing() as connection:
            moved = connection.execute(
                f"INSERT INTO dead_letters ({_COPIED}, reason, rejected_at) "
                f"SELECT {_COPIED}, ?, ? FROM rows WHERE row_id = ? AND state = 0",
                (reason, now, row_id),
            ).rowcount
            # History that cannot be sent again goes: nobody lacks it, and asking for it must come to an end.
            connection.execute(
                "UPDATE tally SET kept_bytes = kept_bytes - "
                "(SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM rows WHERE row_id = ? AND state > 0)",
                (row_id,),
            )
            connection.execute("DELETE FROM rows WHERE row_id = ?", (row_id,))
            connection.execute("UPDATE tally SET depth = depth - ?", (moved,))
            self._store(events)

    def requeue(self, letter_ids: Sequence[int] | None = None) -> int:
        """Put dead letters back to be sent, behind all that waits; damaged ones stay. None = all. Returns how many."""
        with self._writing() as connection:
            letters = connection.execute("SELECT letter_id, topic, payload, crc32 FROM dead_letters ORDER BY letter_id")
            intact = [
                letter_id
                for letter_id, topic, payload, crc32 in letters
                if _checksum(topic, payload) == crc32 and (letter_ids is None or letter_id in letter_ids)
            ]
            for letter_id in intact:
                connection.execute(
                    f"INSERT INTO rows ({_COPIED}) SELECT {_COPIED} FROM dead_letters WHERE letter_id = ?", (letter_id,)
                )
                connection.execute("DELETE FROM dead_letters WHERE letter_id = ?", (letter_id,))
            connection.execute("UPDATE tally SET depth = depth + ?", (len(intact),))
        return len(intact)

    def discard(self, letter_ids: Sequence[int]) -> int:
        """Throw dead letters away for good, at a person's word. Returns how many."""
        with self._writing() as connection:
            return sum(
                connection.execute("DELETE FROM dead_letters WHERE letter_id = ?", (letter_id,)).rowcount
                for letter_id in letter_ids
            )

    def clear_sample(self, *, with_finished: bool) -> None:
        """Forget the sample's state. with_finished: and the finished frames, so that the source is taken anew."""
        with self._writing() as connection:
            _forget_sample(connection, with_finished=with_finished)

    def forget_finished(self, keys: Sequence[str]) -> None:
        """These frames cannot come again: their pictures were deleted. A power cut may bring the keys back."""
        with self._leaving() as connection:
            connection.executemany("DELETE FROM finished WHERE origin_key = ?", ((key,) for key in keys))

    # ---- reading

    def documents(self, after_version: int = 0, limit: int = MOST_DOCUMENTS) -> list[StoredDocument]:
        """The retained documents that were written after this version, in the order of writing."""
        with self._explaining():
            found = self._connection.execute(
                "SELECT topic, payload, version FROM documents WHERE version > ? ORDER BY version LIMIT ?",
                (after_version, limit),
            ).fetchall()
        return [StoredDocument(*columns) for columns in found]

    def told(self, prefix: str) -> tuple[str, ...]:
        """The retained topics that begin so and are not to be cleared."""
        with self._explaining():
            found = self._connection.execute(
                "SELECT topic FROM documents WHERE topic >= ? AND topic < ? AND payload IS NOT NULL ORDER BY topic",
                _from_to(prefix),
            ).fetchall()
        return tuple(topic for (topic,) in found)

    def document(self, topic: str) -> bytes | None:
        """The newest word on a retained topic; None where nothing was said, or it is to be cleared."""
        with self._explaining():
            found = self._connection.execute("SELECT payload FROM documents WHERE topic = ?", (topic,)).fetchone()
        return None if found is None else found[0]

    def of_topic(self, stream: str, topic: str, after_row: int = 0) -> Iterator[Row]:
        """Every message of a topic that is here, confirmed or not, in order, for reports; read in portions.

        after_row: only those behind this one.
        """
        while True:
            with self._explaining():
                found = self._connection.execute(
                    "SELECT row_id, stream, boot, seq, topic, captured_monotonic_ns, payload, crc32 FROM rows "
                    "WHERE row_id > ? AND stream = ? AND topic = ? ORDER BY row_id LIMIT ?",
                    (after_row, stream, topic, EXPORT_STEP_ROWS),
                ).fetchall()
            if not found:
                return
            yield from (_read_row(columns, is_replay=False) for columns in found)
            after_row = found[-1][0]

    def numbered(self, stream: str, boot: int, seq: int) -> Row | None:
        """One message, confirmed or not, where it is still here."""
        with self._explaining():
            found = self._connection.execute(
                "SELECT row_id, stream, boot, seq, topic, captured_monotonic_ns, payload, crc32 FROM rows "
                "WHERE stream = ? AND boot = ? AND seq = ?",
                (stream, boot, seq),
            ).fetchone()
        return None if found is None else _read_row(found, is_replay=False)

    def notes(self, prefix: str) -> dict[str, str]:
        """All notes whose key begins so."""
        with self._explaining():
            return dict(
                self._connection.execute(
                    "SELECT key, value FROM notes WHERE key >= ? AND key < ? ORDER BY key", _from_to(prefix)
                )
            )

    def each_note(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Key and value of all notes below a prefix, in the order of their keys; read in portions."""
        after, end = _from_to(prefix)
        while True:
            with self._explaining():
                found = self._connection.execute(
                    "SELECT key, value FROM notes WHERE key > ? AND key < ? ORDER BY key LIMIT ?",
                    (after, end, EXPORT_STEP_ROWS),
                ).fetchall()
            if not found:
                return
            yield from found
            after = found[-1][0]

    def note(self, key: str) -> str | None:
        """What was noted under this key."""
        with self._explaining():
            found = self._connection.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def numbered_since_boot(self) -> int | None:
        """The boot in which the numbers of this file began at 1; None for a file of an older agent."""
        text = self.note(NUMBERING_NOTE)
        return int(text) if text is not None and text.isdecimal() else None

    def answer(self, name: str) -> str | None:
        """What was answered to this transaction, if it was done and not too long ago."""
        with self._explaining():
            found = self._connection.execute("SELECT text FROM answers WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def pending(self, after_row: int, limit: int, without: Sequence[str] = ()) -> list[Row]:
        """The next rows to send, in order; after_row: 0, or the last row id that was taken. without: streams."""
        return self._rows(WAITING, after_row, limit, without)

    def asked_again(self, after_row: int, limit: int) -> list[Row]:
        """History that is to be sent again, in order."""
        return self._rows(ASKED, after_row, limit)

    def _rows(self, state: int, after_row: int, limit: int, without: Sequence[str] = ()) -> list[Row]:
        others = f"AND stream NOT IN ({', '.join('?' * len(without))}) " if without else ""
        with self._explaining():
            found = self._connection.execute(
                "SELECT row_id, stream, boot, seq, topic, captured_monotonic_ns, payload, crc32 FROM rows "
                f"WHERE state = ? AND row_id > ? {others}ORDER BY row_id LIMIT ?",
                (state, after_row, *without, limit),
            ).fetchall()
        return [_read_row(columns, is_replay=state == ASKED) for columns in found]

    def depth(self) -> int:
        """How many rows wait."""
        return int(self._value("SELECT depth FROM tally"))

    def dead_letter_count(self) -> int:
        return int(self._value("SELECT COUNT(*) FROM dead_letters"))

    def kept_bytes(self) -> int:
        """bytes; payloads of what was confirmed and is kept to be sent again."""
        return int(self._value("SELECT kept_bytes FROM tally"))

    def dropped(self) -> dict[str, int]:
        """How many messages of each stream went unconfirmed, for room, since this file was begun."""
        with self._explaining():
            return dict(self._connection.execute("SELECT stream, rows FROM dropped ORDER BY stream").fetchall())

    def oldest_age_s(self) -> float | None:
        """s; how long the first row has waited; None when nothing waits. After a restart by the wall clock."""
        with self._explaining():
            found = self._connection.execute(
                "SELECT boot, captured_monotonic_ns, appended_unix_s FROM rows WHERE state = 0 ORDER BY row_id LIMIT 1"
            ).fetchone()
        if found is None:
            return None
        return self._age_s(*found)

    def _age_s(self, boot: object, captured_ns: object, appended_unix_s: object) -> float | None:
        """s; how old a row is, by the clock that nobody sets if it is of this boot; None: the disk has changed it."""
        if not (isinstance(captured_ns, int) and isinstance(appended_unix_s, (int, float))):
            return None
        if boot == self.boot:
            return max(0.0, (self._monotonic_ns() - captured_ns) / 1e9)
        return max(0.0, self._unix_time() - appended_unix_s)

    def sample_state(self) -> SampleState | None:
        """The state stored with the last field; None before the first and after the sample was closed."""
        text = self._value("SELECT state FROM sample")
        try:
            return None if text is None else sample_from(str(text))
        except (ValueError, TypeError, AttributeError):
            logger.error("%s: the disk has changed the sample's state; a new sample is begun", self.path)  # noqa: TRY400
            return None

    def finished_keys(self) -> frozenset[str]:
        """Origin keys of the frames that are done with, as they are now; may be handed to another thread."""
        with self._explaining():
            return frozenset(key for (key,) in self._connection.execute("SELECT origin_key FROM finished"))

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """All that was set aside, oldest first."""
        with self._explaining():
            found = self._connection.execute(
                "SELECT letter_id, stream, boot, seq, topic, payload, reason, rejected_at "
                "FROM dead_letters ORDER BY letter_id"
            ).fetchall()
        return tuple(DeadLetter(*columns) for columns in found)

    def export_rows(self, *, dead_letters: bool = False, only: Sequence[int] | None = None) -> Iterator[str]:
        """What waits, or what was set aside, one JSON object a line: row, topic, message (as text when damaged).

        only: of the dead letters those with these numbers.
        """
        if dead_letters:
            for letter in self.dead_letters():
                if only is None or letter.letter_id in only:
                    more = {"reason": letter.reason, "rejected_at": letter.rejected_at}
                    yield _export_line(letter.letter_id, letter.topic, letter.payload, **more)
            return
        after_row = 0
        while rows := self.pending(after_row, EXPORT_STEP_ROWS):
            for row in rows:
                yield _export_line(row.row_id, row.topic, row.payload)
            after_row = rows[-1].row_id

    # ---- inside

    def _store_documents(self, documents: Sequence[RetainedDocument]) -> None:
        for document in documents:
            payload = None if document.body is None else serialise(document.body, document.topic)
            # The old row goes, the new one gets a higher version than any before.
            self._connection.execute(
                "INSERT OR REPLACE INTO documents (topic, payload) VALUES (?, ?)", (document.topic, payload)
            )

    def _store(self, drafts: Sequence[Draft], *, is_ending: bool = False) -> tuple[int, ...]:
        """Insert the drafts; inside a transaction. is_ending: they belong to the end of a sample.

        What is too large for the broker goes into the dead letters at once, and an event tells of it.
        """
        rows = self._number(drafts)
        more_bytes = sum(len(row[6]) for row in rows)
        self._make_room(more_bytes, _reserve_bytes({draft.stream for draft in drafts}, is_ending=is_ending))
        text = self.note(PACKET_LIMIT_NOTE) if rows else None
        limit = None if text is None else int(text)
        row_ids, waiting, events = [], 0, []
        for row in rows:
            length = publish_bytes(row[3], row[6])
            if limit is not None and length > limit:
                row_ids.append(0)
                events += self._set_aside_at_once(row, f"too large: {length} bytes, the broker takes {limit}")
            else:
                row_ids.append(self._insert(row))
                waiting += 1
        self._connection.execute("UPDATE tally SET boot = MAX(boot, ?), depth = depth + ?", (self.boot, waiting))
        if events:
            self._store(events)
        return tuple(row_ids)

    def _set_aside_at_once(self, row: tuple[Any, ...], reason: str) -> list[Draft]:
        """Into the dead letters; the event that tells of it, if it is time for one."""
        stream, boot, seq, topic, _, appended_unix_s, payload, _ = row
        self._connection.execute(
            f"INSERT INTO dead_letters ({_COPIED}, reason, rejected_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*row, reason, self._now_text()),
        )
        topics = Topics.of(topic)
        # An event about an event that is too large would be too large itself.
        may_tell = stream != "event" and topics is not None
        number, self._untold = self._untold.with_another(self._monotonic_ns() / 1e9, may_tell=may_tell)
        if number == 0 or topics is None:
            logger.debug("%s %d:%d is set aside: %s", stream, boot, seq, reason)
            return []
        logger.warning("%s %d:%d is set aside, %d since the last word of it: %s", stream, boot, seq, number, reason)
        return [
            set_aside_draft(
                topics,
                at=datetime.fromtimestamp(appended_unix_s, timezone.utc),
                reason=reason,
                stream=stream,
                name=message_id(self.device, boot, seq),
                topic=topic,
                size_bytes=len(payload),
                set_aside=number,
            )
        ]

    def _now_text(self) -> str:
        return datetime.fromtimestamp(self._unix_time(), timezone.utc).isoformat(timespec="seconds")

    def _number(self, drafts: Sequence[Draft]) -> list[tuple[Any, ...]]:
        """The columns of each draft's row, stamped and serialised; inside the transaction that stores them."""
        last_ids: dict[str, str] = {}
        last_seqs: dict[str, int] = {}
        appended_unix_s, now_ns = self._unix_time(), self._monotonic_ns()
        rows: list[tuple[Any, ...]] = []
        for draft in drafts:
            if draft.stream not in last_seqs:
                found = self._connection.execute("SELECT last_seq FROM streams WHERE stream = ?", (draft.stream,))
                last_seqs[draft.stream] = (found.fetchone() or (0,))[0]
            seq = last_seqs[draft.stream] = last_seqs[draft.stream] + 1
            last_ids[draft.stream] = message_id(self.device, self.boot, seq)
            body = dict(draft.body)
            if draft.belongs_to is not None:
                body[f"{draft.belongs_to}_id"] = last_ids[draft.belongs_to]
            payload = serialise(stamp(body, self.device, self.boot, seq), draft.topic)
            captured_ns = now_ns if draft.captured_monotonic_ns is None else draft.captured_monotonic_ns
            crc32 = _checksum(draft.topic, payload)
            rows.append((draft.stream, self.boot, seq, draft.topic, captured_ns, appended_unix_s, payload, crc32))
        self._connection.executemany("INSERT OR REPLACE INTO streams VALUES (?, ?)", last_seqs.items())
        return rows

    def _insert(self, row: tuple[Any, ...]) -> int:
        cursor = self._connection.execute(f"INSERT INTO rows ({_COPIED}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return int(cursor.lastrowid or 0)

    def _give_back_log(self) -> None:
        """Near the disk's floor, move the write-ahead log into the file: it may hold the very room that is missing.

        SQLite does so by itself only every 1000 pages, and with the intake stopped nobody writes them. Not while rows
        wait: taking them out needs the room that the log keeps.
        """
        near_bytes = max(self._min_free_bytes, LEAST_FREE_BYTES) + WAL_LIMIT_BYTES
        if _disk_free_bytes(self.path) > near_bytes or not self._log.exists():
            return
        if self._log.stat().st_size == 0 or self.depth() > 0:
            return
        with contextlib.suppress(sqlite3.OperationalError):  # a reader is busy, the disk is full: the append will tell
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _make_room(self, more_bytes: int, reserve_bytes: int) -> None:
        """Let go what may go until this fits; raises OutboxError when nothing is left that may.

        reserve_bytes: how far this may go beyond the limits.
        """
        if more_bytes == 0:
            return
        short = self._why_short(more_bytes, reserve_bytes)
        while short is not None and self._spare():  # what else of ours is on the disk
            short = self._why_short(more_bytes, reserve_bytes)
        while (fault := self._why_full(more_bytes, reserve_bytes) or short) is not None:
            if not (self._drop_history() or any(self._drop(stream) for stream in FIRST_TO_GO)):
                raise OutboxError(fault)
            short = self._why_short(more_bytes, reserve_bytes)

    def _why_full(self, more_bytes: int, reserve_bytes: int) -> str | None:
        """What is wrong when this would make the outbox larger than it may be."""
        used_bytes = _pragma(self._connection, "page_count") * self._page_bytes - self._empty_bytes()
        if used_bytes + more_bytes > self._max_bytes + reserve_bytes:
            return (
                f"{self.path}: full: {used_bytes / 2**20:.1f} MB are used, outbox.max_mb is "
                f"{self._max_bytes / 2**20:g}; {self._what_frees()}, or raise outbox.max_mb"
            )
        return None

    def _what_frees(self) -> str:
        """What a person may do for room, in words."""
        if self.depth() > 0:
            return "connect the broker"
        if self.dead_letter_count() > 0:
            return "nothing waits for the broker: requeue or discard what was set aside (`hematovision outbox`)"
        return "nothing waits for the broker: end the sample and begin another, which frees what is kept of old ones"

    def _why_short(self, more_bytes: int, reserve_bytes: int) -> str | None:
        """What is wrong when this would leave the disk less than must stay free."""
        free_bytes = _disk_free_bytes(self.path) + self._empty_bytes()
        to_leave_bytes = max(self._min_free_bytes, LEAST_FREE_BYTES)
        at_least_bytes = LEAST_FREE_BYTES - EVENT_RESERVE_BYTES
        if free_bytes - more_bytes < max(to_leave_bytes - reserve_bytes, at_least_bytes):
            also = ", or connect the broker" if self.depth() > 0 else ""
            return (
                f"{self.path}: the disk has {free_bytes / 2**20:.1f} MB left, {to_leave_bytes / 2**20:g} must stay "
                f"free (outbox.min_free_mb); free space on the disk{also}"
            )
        return None

    def _empty_bytes(self) -> int:
        """In the file, without content: the next rows go there first."""
        return _pragma(self._connection, "freelist_count") * self._page_bytes

    def _drop_history(self) -> bool:
        """Some of the oldest history; False = there is none."""
        for state in (KEPT, ASKED):
            oldest = self._connection.execute(
                "SELECT row_id, LENGTH(payload) FROM rows WHERE state = ? ORDER BY row_id LIMIT ?",
                (state, PRUNE_STEP_ROWS),
            ).fetchall()
            if oldest:
                self._forget(oldest)
                return True
        return False

    def _drop(self, stream: str) -> bool:
        """Some of the oldest waiting rows of a stream, counted; False = there are none that may go."""
        spared = EVENTS_KEPT if stream == "event" else 0
        newest = self._connection.execute(
            "SELECT seq FROM rows WHERE stream = ? AND state = 0 ORDER BY seq DESC LIMIT 1 OFFSET ?", (stream, spared)
        ).fetchone()
        if newest is None:
            return False
        oldest = self._connection.execute(
            "SELECT row_id FROM rows WHERE stream = ? AND state = 0 AND seq <= ? ORDER BY seq LIMIT ?",
            (stream, newest[0], PRUNE_STEP_ROWS),
        ).fetchall()
        self._each_of("DELETE FROM rows", [row_id for (row_id,) in oldest])
        self._connection.execute("UPDATE tally SET depth = depth - ?", (len(oldest),))
        before = self._connection.execute("SELECT rows FROM dropped WHERE stream = ?", (stream,)).fetchone()
        self._connection.execute(
            "INSERT OR REPLACE INTO dropped VALUES (?, ?, ?)",
            (stream, (before[0] if before else 0) + len(oldest), self._now_text()),
        )
        return True

    def _let_go(self, rows: Sequence[tuple[int, int, int]]) -> None:
        """(row_id, state, bytes) of rows that were confirmed; inside a transaction."""
        waiting = [size for _, state, size in rows if state == WAITING]
        if self._keep_bytes:
            self._each_of("UPDATE rows SET state = 1", [row_id for row_id, state, _ in rows if state != KEPT])
            grown = sum(waiting)
        else:
            self._each_of("DELETE FROM rows", [row_id for row_id, _, _ in rows])
            grown = -sum(size for _, state, size in rows if state != WAITING)
        self._connection.execute(
            "UPDATE tally SET depth = depth - ?, kept_bytes = kept_bytes + ?", (len(waiting), grown)
        )
        self._prune()

    def _each_of(self, statement: str, row_ids: Sequence[int]) -> None:
        """Do this to each of the rows; inside a transaction."""
        for marks, some in _in_portions(row_ids):
            self._connection.execute(f"{statement} WHERE row_id IN ({marks})", some)

    def _prune(self) -> None:
        """Some of the history that is too old or too much; more at the next call."""
        kept_bytes = self._connection.execute("SELECT kept_bytes FROM tally").fetchone()[0]
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
        leaving = []
        for row_id, size, *times in oldest:
            if kept_bytes <= self._keep_bytes and not self._is_too_old(*times):
                break
            leaving.append((row_id, size))
            kept_bytes -= size
        self._forget(leaving)

    def _is_too_old(self, boot: object, captured_ns: object, appended_unix_s: object) -> bool:
        """Whether history is kept no longer; what cannot be dated any more is not kept for its age."""
        age_s = self._age_s(boot, captured_ns, appended_unix_s)
        return age_s is None or age_s > self._keep_s

    def _forget(self, rows: Sequence[tuple[int, int]]) -> None:
        """(row_id, bytes) of history that goes for good."""
        self._each_of("DELETE FROM rows", [row_id for row_id, _ in rows])
        self._connection.execute("UPDATE tally SET kept_bytes = kept_bytes - ?", (sum(size for _, size in rows),))

    def _note_ack(self, receiver: str, stream: str, boot: int, seq: int) -> None:
        """Acknowledgements of different numberings stand beside each other; the others are covered by the newest."""
        ack = (receiver, stream, boot, seq)
        self._connection.execute("DELETE FROM acks WHERE receiver = ? AND stream = ? AND boot <= ? AND seq <= ?", ack)
        self._connection.execute("INSERT INTO acks VALUES (?, ?, ?, ?)", ack)

    def _acks(self, receiver: str, stream: str) -> list[tuple[int, int]]:
        return self._connection.execute(
            "SELECT boot, seq FROM acks WHERE receiver = ? AND stream = ?", (receiver, stream)
        ).fetchall()

    def _shrink(self) -> None:
        """Give empty pages back to the disk, a few at a time."""
        empty_pages = _pragma(self._connection, "freelist_count")
        if empty_pages > VACUUM_ABOVE_PAGES and 4 * empty_pages > 3 * _pragma(self._connection, "page_count"):
            # Not `execute`: it stops after the first page.
            self._connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_STEP_PAGES})")

    def _value(self, query: str) -> Any:
        with self._explaining():
            found = self._connection.execute(query).fetchone()
        return None if found is None else found[0]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        untold = self._untold
        try:
            with self._explaining(), _transaction(self._connection) as connection:
                yield connection
        except BaseException:
            self._untold = untold  # the event about it is not stored either
            raise

    @contextmanager
    def _leaving(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which rows leave.

        One that is lost in a power cut only repeats messages, so it need not wait for the disk: on an SD card that is
        the greater part of the time, and of the wear. The next append makes it durable too.
        """
        with self._explaining():
            self._connection.execute("PRAGMA synchronous=NORMAL")
            try:
                with _transaction(self._connection) as connection:
                    yield connection
                self._shrink()
            finally:
                self._connection.execute("PRAGMA synchronous=FULL")

    def _explaining(self) -> Any:
        return _explained(self.path)


# ------------------------------------------------------------------------------------------------------- the parts


def _in_portions(row_ids: Sequence[int]) -> Iterator[tuple[str, Sequence[int]]]:
    """Marks for `IN (...)` and as many ids: fewer than SQLite's least limit of 999 for one statement."""
    for begin in range(0, len(row_ids), MOST_MARKS):
        some = row_ids[begin : begin + MOST_MARKS]
        yield ", ".join("?" * len(some)), some


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """All or nothing. IMMEDIATE: waits for the other writer here, not halfway through."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some failures have rolled it back already
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """SQLite's failures in the words of the house."""
    try:
        yield
    except sqlite3.OperationalError as error:
        text = str(error)
        if "full" in text:
            hint = FULL_DISK
        elif "readonly" in text or "read-only" in text:
            hint = "cannot be written; mend the rights, or the disk has become read-only"
        elif "unable to open" in text:
            hint = "cannot be opened; the folder must exist and be writable for this user"
        elif "locked" in text:
            hint = f"held for more than {BUSY_TIMEOUT_S:g} s: the disk is slow, or another program writes; end that one"
        else:
            hint = "the disk does not work as it should; look into the system's log"
        raise OutboxError(f"{path}: {hint} ({text})") from error
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        # Of a damaged schema not even SQLite's complaint can be decoded.
        if type(error) not in (sqlite3.DatabaseError, UnicodeDecodeError):
            raise  # a fault of this program, not of the file
        # Only "not a database" and "malformed" come as the base class itself.
        with contextlib.suppress(OSError):
            path.with_name(DAMAGE_NAME).write_text(f"met in use: {error}\n")
        raise OutboxDamaged(f"{path}: damaged ({error}); the next start of the agent sets it aside") from error


def _reserve_bytes(streams: Collection[str], *, is_ending: bool) -> int:
    """How far an append of these streams may go beyond the limits."""
    if is_ending or not RESERVED_STREAMS.isdisjoint(streams):
        return WORD_RESERVE_BYTES
    return EVENT_RESERVE_BYTES if set(streams) == {"event"} else 0


def _note(connection: sqlite3.Connection, key: str, value: str | None) -> None:
    if value is not None:
        connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, value))
    elif key.endswith("/"):
        connection.execute("DELETE FROM notes WHERE key >= ? AND key < ?", _from_to(key))
    else:
        connection.execute("DELETE FROM notes WHERE key = ?", (key,))


def _from_to(prefix: str) -> tuple[str, str]:
    """Bounds of all keys that begin so; keys are ASCII."""
    return prefix, f"{prefix}\x7f"


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _disk_free_bytes(path: Path) -> int:
    try:
        return shutil.disk_usage(path.parent).free
    except OSError as error:
        raise OutboxError(f"{path.parent}: the disk does not answer: {error.strerror}") from error


def publish_bytes(topic: str, payload: bytes) -> int:
    """How long the PUBLISH packet of a row is with MQTT 5."""
    rest = 2 + len(topic.encode()) + 2 + PUBLISH_PROPERTIES_BYTES + len(payload)
    return 1 + (1 if rest < 128 else 2 if rest < 16_384 else 3 if rest < 2_097_152 else 4) + rest


def _lenient_text(raw: bytes) -> str:
    """What the disk has changed must not stop the reading; the checksum tells of it."""
    return raw.decode("utf-8", errors="replace")


def _read_row(columns: Sequence[Any], *, is_replay: bool) -> Row:
    """A row as it stands there, whatever the disk has made of its columns."""
    row_id, stream, boot, seq, topic, captured_ns, payload, crc32 = columns
    is_intact = isinstance(topic, str) and isinstance(payload, bytes) and _checksum(topic, payload) == crc32
    numbers = [value if isinstance(value, int) else 0 for value in (boot, seq, captured_ns)]
    payload = payload if isinstance(payload, bytes) else str(payload).encode()
    return Row(row_id, str(stream), numbers[0], numbers[1], str(topic), numbers[2], payload, is_intact, is_replay)


def _checksum(topic: str, payload: bytes) -> int:
    return zlib.crc32(payload, zlib.crc32(topic.encode()))


def _forget_sample(connection: sqlite3.Connection, *, with_finished: bool) -> None:
    connection.execute("DELETE FROM sample")
    if with_finished:
        connection.execute("DELETE FROM finished")


_SAMPLE_KEYS = tuple(part.name for part in dataclasses.fields(SampleState))


def sample_text(sample: SampleState) -> str:
    """The state as JSON."""
    keys = {name: getattr(sample, name) for name in _SAMPLE_KEYS}
    tallies = {key: {name: int(count) for name, count in keys[key].items()} for key in ("counts", "refused")}
    return json.dumps({**keys, **tallies})


def sample_from(text: str) -> SampleState:
    """The state from its JSON; keys of a newer agent are passed over."""
    stored = json.loads(text)
    known = {name: stored[name] for name in _SAMPLE_KEYS if name in stored}
    return SampleState(**{**known, **{key: MappingProxyType(stored.get(key, {})) for key in ("counts", "refused")}})


def _export_line(number: int, topic: str, payload: bytes, **more: str) -> str:
    try:
        message: Any = json.loads(payload)
    except ValueError:
        message = payload.decode("utf-8", errors="replace")
    return json.dumps({"row": number, "topic": topic, **more, "message": message}, ensure_ascii=False)
