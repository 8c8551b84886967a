"""Files that are there when they are complete, and not before; and which disks are no disks of this computer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agent.errors import ConfigError

NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "afs", "ceph", "lustre", "beegfs", "glusterfs", "vboxsf", "davfs"}
    | {"9p", "virtiofs", "prl_fs", "coda", "orangefs", "pvfs2", "gpfs"}
    | {"fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "fuse.ceph-fuse", "fuse.davfs2", "fuse.smbnetfs"}
    | {"fuse.curlftpfs", "fuse.gcsfuse", "fuse.goofys", "fuse.juicefs", "fuse.mount-s3"}
    | {"fuse.vmhgfs-fuse", "fuse.prl_fsd"}
)
"""SQLite's locks and its shared memory are not safe there (sqlite.org/howtocorrupt.html, 2.1). Folders that a virtual
machine shares with its host are among them."""

MOUNTS = Path("/proc/self/mounts")


def network_file_system(folder: Path, mounts_file: Path = MOUNTS) -> str | None:
    """The kind of the network file system on which a folder lies, or would lie; None = on none, as far as is known."""
    try:
        mounts = mounts_file.read_text(errors="replace").splitlines()
    except OSError:
        return None  # no /proc here
    place = folder.resolve()
    kind, longest = "", -1
    for line in mounts:
        parts = line.split()
        if len(parts) < 3:
            continue
        mount_point = Path(parts[1].replace("\\040", " "))
        # >= : of two mounts on one place the later covers the earlier
        if (mount_point == place or mount_point in place.parents) and len(mount_point.parts) >= longest:
            kind, longest = parts[2], len(mount_point.parts)
    return kind if kind in NETWORK_FILE_SYSTEMS else None


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file under its name only when the block has ended well. Raises ConfigError: it cannot be written there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        sink = unfinished.open("wb")
    except OSError as error:
        raise ConfigError(f"--output {path}", (f"cannot be written: {error.strerror}",)) from error
    try:
        with sink:
            yield sink
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_durably(path: Path, content: bytes) -> None:
    """After a power cut either the old content is there or the new one, whole. Raises OSError."""
    fresh = path.with_name(f"{path.name}.new")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in this folder survive a power cut. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
