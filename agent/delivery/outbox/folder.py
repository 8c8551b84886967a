"""The folder of the outbox: its boot counter, the lock of the agent that uses it, and where it may lie.

The boot counter lies in a file of its own, `boot`, and the database knows the newest number too: whichever of the two
is lost, no number is given twice.
"""

from __future__ import annotations

import errno
import sqlite3
import time
from pathlib import Path
from typing import IO

from agent.delivery.outbox.file import BUSY_TIMEOUT_S, FULL_DISK
from agent.errors import OutboxError
from agent.files import NO_ROOM, network_file_system, write_durably

DATABASE_NAME = "outbox.db"
BOOT_NAME = "boot"
LOCK_NAME = "lock"


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
        if error.errno in NO_ROOM:
            raise OutboxError(f"{path}: cannot be written: {FULL_DISK}") from error
        raise OutboxError(f"{path}: cannot be written: {error.strerror}; free space or mend the rights") from error


# ---------------------------------------------------------------------------------------------------------- the place


def lock_folder(folder: Path) -> IO[str]:
    """Keep a second agent off this folder while the returned file is open; raises OutboxError when one is there."""
    import fcntl  # not on every system; only the agent itself needs it

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_NAME).open("a", encoding="ascii")
    except OSError as error:
        mend = "choose another outbox.folder or mend its rights"
        if error.errno == errno.EROFS:
            mend = (
                "mend the disk if it is; to the service all but its own folders is read-only: `sudo systemctl edit"
                f" hematovision`, with ReadWritePaths={folder} below [Service], lets it write there (docs/outbox.md)"
            )
        raise OutboxError(f"outbox folder {folder}: cannot be used: {error.strerror}; {mend}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OutboxError(
            f"outbox folder {folder}: another agent uses it; stop that one or choose another outbox.folder"
        ) from error
    return file


def has_outbox(folder: Path) -> bool:
    """Whether there is one. Raises OutboxError where this user may not look."""
    try:
        return (folder / DATABASE_NAME).exists()
    except PermissionError as error:
        raise OutboxError(
            f"outbox folder {folder}: {error.strerror}; ask as the agent's user: sudo -u hematovision hematovision ..."
        ) from error


def refuse_network_file_system(folder: Path, mounts_file: Path) -> None:
    """Raise OutboxError where SQLite's locks are not safe."""
    kind = network_file_system(folder, mounts_file)
    if kind is not None:
        raise OutboxError(
            f"outbox folder {folder}: lies on a network file system ({kind}), where a database is not safe; "
            "set outbox.folder to a local disk"
        )


def remove_file(path: Path) -> None:
    """Delete a file of this folder, if it is there."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutboxError(f"{path}: cannot be removed: {error.strerror}; mend the rights of the folder") from error
