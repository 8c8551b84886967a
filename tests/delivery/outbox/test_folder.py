"""The folder: its boot counter, which never goes back, and its lock."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent.delivery.outbox import START_ROOM_BYTES, begin_boot, lock_folder, open_outbox, read_boot
from agent.errors import OutboxError
from tests.delivery.outbox.making import make_draft, make_outbox
from tests.disks import mounted, use_up_space


def test_the_boot_counter_outlives_the_database(tmp_path: Path) -> None:
    assert [begin_boot(tmp_path), begin_boot(tmp_path)] == [1, 2]
    make_outbox(tmp_path).close()
    (tmp_path / "outbox.db").unlink()
    assert begin_boot(tmp_path) == 3
    assert read_boot(tmp_path) == 3
    assert not (tmp_path / "boot.new").exists()


@pytest.mark.parametrize("rubbish", [b"", b"\0\0\0\0", b"seven\n", b"\xff\xfe"])
def test_a_damaged_boot_file_never_sends_the_counter_back(tmp_path: Path, rubbish: bytes) -> None:
    for _ in range(5):
        begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft()])
    (tmp_path / "boot").write_bytes(rubbish)
    assert begin_boot(tmp_path) == 6
    (tmp_path / "boot").write_bytes(rubbish)
    (tmp_path / "outbox.db").unlink()
    assert begin_boot(tmp_path) > 1_700_000_000


def test_a_lost_boot_file_is_made_good_from_the_database(tmp_path: Path) -> None:
    for _ in range(5):
        begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft()])
    (tmp_path / "boot").unlink()
    assert begin_boot(tmp_path) == 6


def test_a_start_on_a_full_disk_says_how_much_room_it_needs(small_disk: Path) -> None:
    begin_boot(small_disk)
    filler = use_up_space(small_disk)
    assert shutil.disk_usage(small_disk).free == 0
    with pytest.raises(OutboxError, match=r"boot: cannot be written: the disk is full; .* 6 MB"):
        begin_boot(small_disk)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - START_ROOM_BYTES)
    assert begin_boot(small_disk) == 2
    with make_outbox(small_disk) as outbox:
        outbox.append([make_draft()])


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutboxError, match=r"choose outbox\.folder"):
        begin_boot(tmp_path / "file" / "outbox")
    with pytest.raises(OutboxError, match="cannot be opened"):
        open_outbox(tmp_path / "nowhere")


def test_a_second_agent_is_kept_off_the_folder(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(OutboxError, match="another agent uses it"):
        lock_folder(tmp_path)
    held.close()
    lock_folder(tmp_path).close()


def test_a_folder_that_the_service_may_not_write_is_told_with_what_lets_it(tmp_path: Path) -> None:
    """To a service all but its own folders is read-only, whatever `check-config` in a shell has found."""
    with mounted(tmp_path / "ssd", "ro") as disk:
        folder = disk / "hematovision"
        with pytest.raises(OutboxError, match=f"Read-only file system; .*systemctl edit.*ReadWritePaths={folder} "):
            lock_folder(folder)
