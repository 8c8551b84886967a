"""Which files and folders are opened, which are refused, and in what words."""

from __future__ import annotations

import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import pytest

from agent.delivery.outbox import begin_boot, open_outbox
from agent.errors import OutboxError
from tests.delivery.outbox.making import make_draft, make_outbox


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_network_file_system_is_refused(tmp_path: Path, kind: str) -> None:
    mounts = tmp_path / "mounts"
    place = tmp_path / "far away" / "outbox"
    place.mkdir(parents=True)
    far = str(place.parent).replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {far} {kind} rw 0 0\n")
    with pytest.raises(OutboxError, match=rf"network file system \({kind}\)"):
        make_outbox(place, mounts_file=mounts)
    assert not (place / "outbox.db").exists()


def test_a_local_disk_mounted_over_a_network_one_is_taken(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"server:/ / nfs rw 0 0\nserver:/x {tmp_path} nfs rw 0 0\n/dev/b {tmp_path} ext4 rw 0 0\n")
    make_outbox(tmp_path, mounts_file=mounts).close()


def test_looking_into_an_outbox_that_is_not_there_makes_none(tmp_path: Path) -> None:
    with pytest.raises(OutboxError, match="there is no outbox"):
        open_outbox(tmp_path, create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_user_may_not_look_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path, **_options: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(OutboxError, match="Permission denied; ask as the agent's user"):
        open_outbox(tmp_path, create=False)


def test_an_outbox_that_could_only_be_opened_for_reading_is_refused_until_the_disk_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite falls back to reading without a word, and the connection would stay so after the disk is mended."""
    make_outbox(tmp_path).close()
    connect = sqlite3.connect

    def connect_for_reading(path: Path, **options: Any) -> sqlite3.Connection:
        return connect(f"{Path(path).as_uri()}?mode=ro", uri=True, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", connect_for_reading)
        with pytest.raises(OutboxError, match="read-only"):
            open_outbox(tmp_path, device="scope", min_free_mb=0, verify=False)
        open_outbox(tmp_path, verify=False, create=False).close()  # whoever only looks may
    with make_outbox(tmp_path, verify=False) as mended:
        mended.append([make_draft()])


def test_a_disk_that_becomes_read_only_is_said_in_these_words(small_disk: Path) -> None:
    outbox = make_outbox(small_disk)
    outbox.append([make_draft()])
    outbox.close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(OutboxError, match="cannot be"):
        make_outbox(small_disk)
    with pytest.raises(OutboxError, match=r"cannot be written: Read-only"):
        begin_boot(small_disk)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    with make_outbox(small_disk) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == 1


def test_a_fault_of_the_program_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    outbox = make_outbox(tmp_path)
    outbox.close()
    with pytest.raises(sqlite3.ProgrammingError):
        outbox.depth()
