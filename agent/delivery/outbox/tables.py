"""The tables of the file, how older files come to have them, and whether a file is what an outbox should be.

A new version of the tables adds statements; a file of an older agent is brought up to date when it is opened. A file
of a newer agent is refused.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from agent.delivery.outbox.file import BUSY_TIMEOUT_S, WAL_LIMIT_BYTES, explained, lenient_text, pragma, transaction
from agent.delivery.outbox.words import NUMBERING_NOTE, put_note
from agent.errors import OutboxDamaged, OutboxError

APPLICATION_ID = 0x48764F62
"""`HvOb`; tells our file from any other SQLite database."""

TABLES_OF_VERSION = {
    1: (
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
    ),
    2: (
        # payload NULL: the topic is to be cleared; the row goes when the broker has done so.
        "CREATE TABLE documents (version INTEGER PRIMARY KEY AUTOINCREMENT, topic TEXT UNIQUE NOT NULL, payload BLOB)",
        "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
        "CREATE TABLE answers "
        "(number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT UNIQUE NOT NULL, text TEXT NOT NULL)",
    ),
    3: (
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
    ),
}
"""What each version of the file has added. Their text stays to the letter: files are compared with it."""

SCHEMA_VERSION = max(TABLES_OF_VERSION)


def connect(path: Path, *, verify: bool, since_boot: int = 0) -> sqlite3.Connection:
    """Open a file that has all the tables, or begin one.

    verify: read the whole file. since_boot: in which the numbers of a new file begin; 0 = not known yet, or to nobody.
    Raises OutboxError: no right to write, disk full, a newer agent's file; OutboxDamaged: damaged, or not our file.
    """
    with explained(path):
        # The thread check is off because the supervisor opens the outbox and hands it to the pipeline's thread.
        connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        connection.text_factory = lenient_text
        try:
            _prepare(connection, path, since_boot=since_boot)
            if verify:
                verify_file(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, *, since_boot: int) -> None:
    is_empty = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
    if is_empty:
        connection.execute("PRAGMA auto_vacuum=INCREMENTAL")  # only before the first table
    elif pragma(connection, "application_id") != APPLICATION_ID:
        raise OutboxDamaged(f"{path}: this is a database of another program")
    version = pragma(connection, "user_version")
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
        _make_tables(connection, since_boot=since_boot)


def _make_tables(connection: sqlite3.Connection, *, since_boot: int = 0) -> None:
    """Those that are missing."""
    with transaction(connection):
        version = pragma(connection, "user_version")
        if version == SCHEMA_VERSION:
            return  # another thread was first
        for number, statements in TABLES_OF_VERSION.items():
            for statement in statements if version < number else ():
                connection.execute(statement)
        if version == 0 and since_boot:
            put_note(connection, NUMBERING_NOTE, str(since_boot))
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")


def verify_file(connection: sqlite3.Connection, path: Path) -> None:
    """Read it throughout, and count its rows anew; raises OutboxDamaged."""
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


def _schema(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    """Name and text of each table and index. A flipped bit may rename a column, and the quick check is content."""
    return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def _whole_schema() -> set[tuple[str, str]]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as fresh:
        _make_tables(fresh)
        return _schema(fresh)


def refuse_read_only(connection: sqlite3.Connection, path: Path) -> None:
    """SQLite opens what it may not write for reading alone, and such a connection stays so when the disk is mended."""
    with explained(path):
        connection.execute("BEGIN IMMEDIATE")  # passes on those too, as a beginning to read
        try:
            connection.execute("UPDATE tally SET depth = depth")
        finally:
            connection.execute("ROLLBACK")
