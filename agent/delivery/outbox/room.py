"""Room: what is full, the outbox or its disk, and what goes first when something must.

In this order, oldest first: what else of ours lies on a disk that is short (pictures), history, cells, events. Fields,
differentials and the audit never go; what finds no room is refused. Events, and beyond them commands and the end of a
sample, have a reserve beyond the limits.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Collection
from pathlib import Path

from agent.delivery.outbox.dead_letters import count_letters
from agent.delivery.outbox.file import LEAST_FREE_BYTES, WAL_LIMIT_BYTES, OutboxFile, each_of
from agent.delivery.outbox.leaving import PRUNE_STEP_ROWS, History
from agent.delivery.outbox.queue import change_depth, depth
from agent.delivery.outbox.rows import Clocks
from agent.errors import OutboxError

EVENT_RESERVE_BYTES = 1024 * 1024
"""Room beyond the limits for events alone: that the outbox is full must be said too."""

WORD_RESERVE_BYTES = 2 * EVENT_RESERVE_BYTES
"""Room beyond the limits for commands and the end of a sample, half of it beyond the events': some thousand of them.
What a person does about a full outbox must be stored when no field can be."""

RESERVED_STREAMS = frozenset({"audit", "differential"})
RESERVED_PHASES = frozenset({"finishing", "finished", "aborted"})
"""In `finishing` come the fields that were taken before the stop: those few that the queue holds."""

FIRST_TO_GO = ("cell", "event")
"""Streams that make room for results when nothing else is left, in this order."""

EVENTS_KEPT = 100
"""The newest events stay even then: among them the one which says that the outbox is full."""


def reserve_for(streams: Collection[str], phase: str | None = None) -> int:
    """How far an append of these streams may go beyond the limits. phase: of the sample that is stored with them."""
    if phase in RESERVED_PHASES or not RESERVED_STREAMS.isdisjoint(streams):
        return WORD_RESERVE_BYTES
    return EVENT_RESERVE_BYTES if set(streams) == {"event"} else 0


def disk_free_bytes(path: Path) -> int:
    """Free on the disk of this file, for this user."""
    try:
        return shutil.disk_usage(path.parent).free
    except OSError as error:
        raise OutboxError(f"{path.parent}: the disk does not answer: {error.strerror}") from error


class Room:
    """The limits of an outbox and of its disk, and how what comes finds room within them.

    max_bytes: of the file's content (`outbox.max_mb`). min_free_bytes: to be left on the disk (`outbox.min_free_mb`).
    """

    def __init__(
        self, file: OutboxFile, history: History, clocks: Clocks, *, max_bytes: int, min_free_bytes: int
    ) -> None:
        self._file = file
        self._history = history
        self._clocks = clocks
        self._max_bytes = max_bytes
        self._to_leave_bytes = max(min_free_bytes, LEAST_FREE_BYTES)
        self._spare: Callable[[], bool] = _nothing_to_spare

    def spare(self, let_go: Callable[[], bool]) -> None:
        """What goes before anything of the outbox when the disk is short; see `Outbox.spare`."""
        self._spare = let_go

    def make(self, more_bytes: int, reserve_bytes: int) -> None:
        """Let go what may go until this fits; inside a transaction.

        reserve_bytes: how far this may go beyond the limits. Raises OutboxError when nothing is left that may go.
        """
        if more_bytes == 0:
            return
        short = self._why_short(more_bytes, reserve_bytes)
        while short is not None and self._spare():  # what else of ours is on the disk
            short = self._why_short(more_bytes, reserve_bytes)
        while (fault := self._why_full(more_bytes, reserve_bytes) or short) is not None:
            if not (self._history.drop_some() or any(self._drop(stream) for stream in FIRST_TO_GO)):
                raise OutboxError(fault)
            short = self._why_short(more_bytes, reserve_bytes)

    def give_back_log(self) -> None:
        """Near the disk's floor, move the write-ahead log into the file: it may hold the very room that is missing.

        SQLite does so by itself only every 1000 pages, and with the intake stopped nobody writes them. Not while rows
        wait: taking them out needs the room that the log keeps. Outside of a transaction.
        """
        if disk_free_bytes(self._file.path) > self._to_leave_bytes + WAL_LIMIT_BYTES or self._file.log_bytes() == 0:
            return
        with self._file.reading() as connection:
            if depth(connection) > 0:
                return
        with contextlib.suppress(sqlite3.OperationalError):  # a reader is busy, the disk is full: the append will tell
            self._file.empty_log()

    def dropped(self) -> dict[str, int]:
        """How many messages of each stream went unconfirmed, for room, since this file was begun."""
        return dict(self._file.connection.execute("SELECT stream, rows FROM dropped ORDER BY stream").fetchall())

    def _why_full(self, more_bytes: int, reserve_bytes: int) -> str | None:
        """What is wrong when this would make the outbox larger than it may be."""
        used_bytes = self._file.used_bytes()
        if used_bytes + more_bytes > self._max_bytes + reserve_bytes:
            return (
                f"{self._file.path}: full: {used_bytes / 2**20:.1f} MB are used, outbox.max_mb is "
                f"{self._max_bytes / 2**20:g}; {self._what_frees()}, or raise outbox.max_mb"
            )
        return None

    def _what_frees(self) -> str:
        """What a person may do for room, in words."""
        if depth(self._file.connection) > 0:
            return "connect the broker"
        if count_letters(self._file.connection) > 0:
            return "nothing waits for the broker: requeue or discard what was set aside (`hematovision outbox`)"
        return "nothing waits for the broker: end the sample and begin another, which frees what is kept of old ones"

    def _why_short(self, more_bytes: int, reserve_bytes: int) -> str | None:
        """What is wrong when this would leave the disk less than must stay free."""
        free_bytes = disk_free_bytes(self._file.path) + self._file.empty_bytes()
        at_least_bytes = LEAST_FREE_BYTES - EVENT_RESERVE_BYTES
        if free_bytes - more_bytes < max(self._to_leave_bytes - reserve_bytes, at_least_bytes):
            also = ", or connect the broker" if depth(self._file.connection) > 0 else ""
            return (
                f"{self._file.path}: the disk has {free_bytes / 2**20:.1f} MB left, "
                f"{self._to_leave_bytes / 2**20:g} must stay free (outbox.min_free_mb); free space on the disk{also}"
            )
        return None

    def _drop(self, stream: str) -> bool:
        """Some of the oldest waiting rows of a stream, counted; False = there are none that may go."""
        connection = self._file.connection
        spared = EVENTS_KEPT if stream == "event" else 0
        newest = connection.execute(
            "SELECT seq FROM rows WHERE stream = ? AND state = 0 ORDER BY seq DESC LIMIT 1 OFFSET ?", (stream, spared)
        ).fetchone()
        if newest is None:
            return False
        oldest = connection.execute(
            "SELECT row_id FROM rows WHERE stream = ? AND state = 0 AND seq <= ? ORDER BY seq LIMIT ?",
            (stream, newest[0], PRUNE_STEP_ROWS),
        ).fetchall()
        each_of(connection, "DELETE FROM rows", [row_id for (row_id,) in oldest])
        change_depth(connection, -len(oldest))
        before = connection.execute("SELECT rows FROM dropped WHERE stream = ?", (stream,)).fetchone()
        connection.execute(
            "INSERT OR REPLACE INTO dropped VALUES (?, ?, ?)",
            (stream, (before[0] if before else 0) + len(oldest), self._clocks.now_text()),
        )
        return True


def _nothing_to_spare() -> bool:
    return False
