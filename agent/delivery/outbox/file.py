"""The file under the outbox: its transactions, its size, and its failures in the words of the house.

Of an outbox that is open SQLite is asked inside one of three blocks: `OutboxFile.reading`, `writing` (all or nothing,
on the disk when it ends) or `leaving` (all or nothing, on the disk with the next `writing` at the latest).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from agent.errors import OutboxDamaged, OutboxError

BUSY_TIMEOUT_S = 10.0
"""A commit takes milliseconds; a checkpoint of a large write-ahead log on a slow card takes seconds."""

WAL_LIMIT_BYTES = 4 * 1024 * 1024
"""The write-ahead log keeps this much disk after a checkpoint, so that acknowledging works on a full disk too."""

LEAST_FREE_BYTES = 2 * 1024 * 1024
"""Left free whatever `outbox.min_free_mb` says: to take rows out needs room too, in the write-ahead log."""

START_ROOM_BYTES = LEAST_FREE_BYTES + WAL_LIMIT_BYTES
"""Free on the disk, a start works: the boot counter, the write-ahead log and its index are written anew."""

FULL_DISK = (
    "the disk is full; free space there, or files or quota where those are used up: "
    f"a start of the agent needs {START_ROOM_BYTES / 2**20:g} MB"
)

DAMAGE_NAME = "damaged"
"""A mark beside the file: damage was met in use. The quick check at the next start need not find it, so the mark
counts instead."""

VACUUM_ABOVE_PAGES = 1024
VACUUM_STEP_PAGES = 256
"""After an outage the file shrinks again, 1 MB with each acknowledgement, while more than 4 MB and three quarters of
it are empty. Sooner would be costly: full pages at the end of the file have to be moved first."""

MOST_MARKS = 500
"""Row ids in one statement: fewer than SQLite's least limit of 999."""


class OutboxFile:
    """One connection to the file, for one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self.path = path
        self.connection = connection
        self._log = path.with_name(f"{path.name}-wal")
        with explained(path):
            self._page_bytes = pragma(connection, "page_size")

    def close(self) -> None:
        """Close the connection; the last one to close also empties the write-ahead log."""
        self.connection.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """The connection, with failures explained."""
        with explained(self.path):
            yield self.connection

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that is on the disk when the block has ended."""
        with explained(self.path), transaction(self.connection) as connection:
            yield connection

    @contextmanager
    def leaving(self) -> Iterator[sqlite3.Connection]:
        """A transaction in which rows leave.

        One that is lost in a power cut only repeats messages, so it need not wait for the disk: on an SD card that is
        the greater part of the time, and of the wear. The next append makes it durable too.
        """
        with explained(self.path):
            self.connection.execute("PRAGMA synchronous=NORMAL")
            try:
                with transaction(self.connection) as connection:
                    yield connection
                self._shrink()
            finally:
                self.connection.execute("PRAGMA synchronous=FULL")

    def used_bytes(self) -> int:
        """How much of the file holds content."""
        return pragma(self.connection, "page_count") * self._page_bytes - self.empty_bytes()

    def empty_bytes(self) -> int:
        """In the file, without content: the next rows go there first."""
        return pragma(self.connection, "freelist_count") * self._page_bytes

    def log_bytes(self) -> int:
        """How large the write-ahead log is on the disk."""
        return self._log.stat().st_size if self._log.exists() else 0

    def empty_log(self) -> None:
        """Move the write-ahead log into the file, and give its room back to the disk."""
        self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _shrink(self) -> None:
        """Give empty pages back to the disk, a few at a time."""
        empty_pages = pragma(self.connection, "freelist_count")
        if empty_pages > VACUUM_ABOVE_PAGES and 4 * empty_pages > 3 * pragma(self.connection, "page_count"):
            # Not `execute`: it stops after the first page.
            self.connection.executescript(f"PRAGMA incremental_vacuum({VACUUM_STEP_PAGES})")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
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
def explained(path: Path) -> Iterator[None]:
    """SQLite's failures as OutboxError and OutboxDamaged; the latter leaves its mark beside the file."""
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


def pragma(connection: sqlite3.Connection, name: str) -> int:
    """A number that SQLite knows of the file."""
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def each_of(connection: sqlite3.Connection, statement: str, row_ids: Sequence[int]) -> None:
    """Do this to each of the rows; inside a transaction."""
    for marks, some in in_portions(row_ids):
        connection.execute(f"{statement} WHERE row_id IN ({marks})", some)


def in_portions(row_ids: Sequence[int]) -> Iterator[tuple[str, Sequence[int]]]:
    """Marks for `IN (...)` and as many ids."""
    for begin in range(0, len(row_ids), MOST_MARKS):
        some = row_ids[begin : begin + MOST_MARKS]
        yield ", ".join("?" * len(some)), some


def lenient_text(raw: bytes) -> str:
    """What the disk has changed must not stop the reading; the checksum tells of it."""
    return raw.decode("utf-8", errors="replace")
