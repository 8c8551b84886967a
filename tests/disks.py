"""Disks of a test's own, in memory: with little space, or with room for few files."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at a folder that is made for it; skips the test where this user may not mount one.

    options: of mount(8) for a tmpfs, such as `size=8m` or `nr_inodes=60`.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mount.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def use_up_space(folder: Path) -> Path:
    """Somebody else's file, in a folder of the disk, that takes all that is left."""
    filler = folder / "of-somebody-else"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017 - what is waited for
    return filler


def use_up_files(folder: Path) -> None:
    """Somebody else's files, in a folder that is made for them, until the disk takes no more."""
    folder.mkdir()
    try:
        for number in range(1000):
            (folder / f"{number}").touch()
    except OSError as error:
        assert error.errno == errno.ENOSPC  # noqa: PT017 - what is waited for
        return
    pytest.fail("the disk takes any number of files")
