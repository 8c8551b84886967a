"""Opening an outbox: from a folder and its limits to an `Outbox`, with salvage where the file is damaged."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from agent.delivery.outbox.file import DAMAGE_NAME, OutboxFile
from agent.delivery.outbox.folder import (
    DATABASE_NAME,
    begin_boot,
    has_outbox,
    read_boot,
    refuse_network_file_system,
    remove_file,
)
from agent.delivery.outbox.leaving import History
from agent.delivery.outbox.outbox import Outbox
from agent.delivery.outbox.room import Room
from agent.delivery.outbox.rows import Clocks
from agent.delivery.outbox.salvage import Salvage, finish_salvage, rows_lost_in_log, salvage_file
from agent.delivery.outbox.tables import connect, refuse_read_only
from agent.errors import OutboxDamaged, OutboxError
from agent.files import MOUNTS


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
    refuse_network_file_system(folder, mounts_file)
    path = folder / DATABASE_NAME
    if not create and not has_outbox(folder):
        raise OutboxError(f"{path}: there is no outbox; give the folder of a running agent")
    salvage: Salvage | None = None
    if verify:
        connection, salvage = _connect_or_salvage(folder)
    else:
        connection = connect(path, verify=False, since_boot=read_boot(folder))
    try:
        if create:
            refuse_read_only(connection, path)
        if verify:
            remove_file(folder / DAMAGE_NAME)
        file = OutboxFile(connection, path)
    except BaseException:
        connection.close()
        raise
    clocks = Clocks(read_boot(folder), monotonic_ns, unix_time)
    history = History(
        connection, clocks, keep_bytes=int(keep_mb * 2**20) if keep_hours > 0 else 0, keep_s=keep_hours * 3600
    )
    room = Room(file, history, clocks, max_bytes=int(max_mb * 2**20), min_free_bytes=int(min_free_mb * 2**20))
    return Outbox(file, device=device, clocks=clocks, history=history, room=room, salvage=salvage)


def _connect_or_salvage(folder: Path) -> tuple[sqlite3.Connection, Salvage | None]:
    """The file, read throughout, or the new one that takes the place of a damaged one."""
    path = folder / DATABASE_NAME
    finish_salvage(path)
    try:
        _refuse_damage_that_sqlite_passes(path)
        return connect(path, verify=True, since_boot=read_boot(folder)), None
    except OutboxDamaged as error:
        boot = begin_boot(folder)  # what is numbered from now on is kept apart from what may have been lost
        salvage = salvage_file(path, boot, str(error))
        return connect(path, verify=True, since_boot=boot), salvage


def _refuse_damage_that_sqlite_passes(path: Path) -> None:
    """A log that breaks off in the middle, and what was met in use and marked."""
    if rows_lost_in_log(path):
        raise OutboxDamaged(f"{path}: damaged: its write-ahead log is broken in the middle")
    mark = path.with_name(DAMAGE_NAME)
    if mark.exists() and path.exists():
        raise OutboxDamaged(f"{path}: damaged: {mark.read_text(errors='replace')[:300].strip() or 'met in use'}")
