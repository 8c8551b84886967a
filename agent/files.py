"""Files that are there when they are complete, and not before; and which disks are no disks of this computer."""

from __future__ import annotations

import errno
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

SELF_NAMED_FILE_SYSTEMS = frozenset({"ext2", "ext3", "ext4", "btrfs", "zfs"})
"""Their statvfs(3) f_fsid is made from the volume's own id. Elsewhere (vfat, exfat, xfs) it is the device's number,
which another card in the same slot has too."""

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
"""No space, no more files (inodes), or the quota of either used up."""

MOUNTS = Path("/proc/self/mounts")


def network_file_system(folder: Path, mounts_file: Path = MOUNTS) -> str | None:
    """The kind of the network file system on which a folder lies, or would lie; None = on none, as far as is known."""
    _, kind = _mount_of(folder, mounts_file)
    return kind if kind in NETWORK_FILE_SYSTEMS else None


def directory_identity(folder: Path, mounts_file: Path = MOUNTS) -> str | None:
    """What names this directory after restarts of the computer too: no other disk or share in its place has the same.

    None = nothing does. The directory under a share that is not mounted is another one than the share's. Raises
    OSError where it cannot be reached.
    """
    source, kind = _mount_of(folder, mounts_file)
    if kind in NETWORK_FILE_SYSTEMS:
        volume = source
    elif kind in SELF_NAMED_FILE_SYSTEMS:
        volume = f"{os.statvfs(folder).f_fsid:x}"
    else:
        return None
    return f"{kind} {volume} {folder.stat().st_ino}"


def _mount_of(folder: Path, mounts_file: Path) -> tuple[str, str]:
    """Source and kind of the file system of a folder; both empty where nobody tells."""
    try:
        mounts = mounts_file.read_text(errors="replace").splitlines()
    except OSError:
        return "", ""  # no /proc here
    place = folder.resolve()
    found, longest = ("", ""), -1
    for line in mounts:
        parts = line.split()
        if len(parts) < 3:
            continue
        mount_point = Path(parts[1].replace("\\040", " "))
        # >= : of two mounts on one place the later covers the earlier
        if (mount_point == place or mount_point in place.parents) and len(mount_point.parts) >= longest:
            found, longest = (parts[0], parts[2]), len(mount_point.parts)
    return found


def has_room(folder: Path, size_bytes: int, files: int) -> bool:
    """Whether the disk takes so many files more in this folder, one of them of this size; none of them stays.

    size_bytes: 0 = all of them empty. Tried, not asked: a disk may have free bytes and no more files, and what it tells
    leaves quotas out. Raises OSError where something else than room is wanting.
    """
    trials = [folder / f".room-{number}" for number in range(files)]
    try:
        for trial in trials:
            with trial.open("wb") as file:
                if trial is trials[0] and size_bytes > 0:
                    os.posix_fallocate(file.fileno(), 0, size_bytes)
    except OSError as error:
        if error.errno in NO_ROOM:
            return False
        raise
    finally:
        for trial in trials:
            trial.unlink(missing_ok=True)
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file under its name only when the block has ended well. Raises ConfigError: it cannot be written there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        sink = unfinished.open("wb")
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with sink:
            yield sink
        try:
            unfinished.replace(path)
        except OSError as error:  # a folder has this name
            raise _cannot_write(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"--output {path}", (f"cannot be written: {error.strerror}",))


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
