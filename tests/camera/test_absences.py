"""What was deleted while the agent was off is forgotten at its next start; what may only be out of reach never is."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from agent.camera import replay
from agent.camera.absences import ELSEWHERE, STEP
from agent.camera.deletions import FORGET_AFTER_S
from agent.camera.replay import WatchedFolderCamera, open_folder
from agent.domain import Frame
from agent.errors import CameraError
from agent.files import directory_identity
from tests.camera.test_replay import MadeTime, folder_section, save_picture


class Device:
    """What the outbox remembers, over starts of the agent that watch one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.time = MadeTime()
        self.done: set[str] = set()
        self.noted: str | None = None
        self.forgotten: list[list[str]] = []

    def start(self) -> WatchedFolderCamera:
        camera = open_folder(
            folder_section(self.folder, watch=True, settle_s=0),
            done=frozenset(self.done),
            clocks=self.time.clocks,
            sleep=self.time.sleep,
            forget=self.forget,
            noted=self.noted,
            note=self.note,
        )
        assert isinstance(camera, WatchedFolderCamera)
        return camera

    def forget(self, keys: list[str]) -> None:
        self.forgotten.append(keys)
        self.done -= set(keys)

    def note(self, place: str) -> None:
        self.noted = place

    def look(self, camera: WatchedFolderCamera, for_s: float = 2) -> list[str]:
        """Names of what is counted meanwhile."""
        names = []
        until_ns = self.time.now_ns + for_s * 1e9
        while self.time.now_ns < until_ns:
            frame = camera.read()
            if isinstance(frame, Frame):
                self.done.add(frame.origin_key or "")
                names.append(Path(frame.source).relative_to(self.folder).as_posix())
        return names

    def run(self, for_s: float = 2) -> list[str]:
        """One run of the agent."""
        return self.look(self.start(), for_s)

    def remembered(self) -> list[str]:
        return sorted(key.rpartition("|")[0].rpartition("|")[0] for key in self.done)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device whose folder has a lasting name, whatever disk the tests run on."""
    monkeypatch.setattr(
        "agent.camera.replay.directory_identity", lambda folder: f"test {folder.stat().st_dev} {folder.stat().st_ino}"
    )
    folder = tmp_path / "watched"
    for name in ("a.png", "b.png", "slide-1/c.png", "slide-1/d.png"):
        save_picture(folder / name)
    return Device(folder)


def test_what_was_deleted_while_the_agent_was_off_is_forgotten_at_its_start(device: Device) -> None:
    assert len(device.run()) == 4
    (device.folder / "a.png").unlink()
    for name in ("c.png", "d.png"):
        (device.folder / "slide-1" / name).unlink()
    (device.folder / "slide-1").rmdir()
    assert device.run() == []
    assert device.remembered() == ["b.png"]


def test_a_picture_that_was_written_anew_meanwhile_is_counted_and_its_old_self_forgotten(device: Device) -> None:
    device.run()
    save_picture(device.folder / "a.png", width_px=80)
    assert device.run() == ["a.png"]
    assert device.remembered() == ["a.png", "b.png", "slide-1/c.png", "slide-1/d.png"]


def test_a_share_that_is_not_mounted_or_mounted_late_empties_nothing(device: Device) -> None:
    device.run()
    share = device.folder.rename(device.folder.with_name("share"))
    device.folder.mkdir()
    mount_point = device.folder.with_name("mount-point")
    camera = device.start()
    assert device.look(camera, 2 * FORGET_AFTER_S) == []
    device.folder.rename(mount_point)
    share.rename(device.folder)
    (device.folder / "a.png").unlink()
    assert device.look(camera) == []
    assert device.remembered() == ["b.png", "slide-1/c.png", "slide-1/d.png"]


def test_pictures_that_were_counted_below_a_missing_share_do_not_prove_that_it_is_there(device: Device) -> None:
    device.run()
    share = device.folder.rename(device.folder.with_name("share"))
    save_picture(device.folder / "local.png")
    assert device.run() == ["local.png"]
    assert device.noted == ELSEWHERE
    assert device.run(2 * FORGET_AFTER_S) == []
    assert len(device.done) == 5
    device.folder.rename(device.folder.with_name("mount-point"))
    share.rename(device.folder)
    assert device.run() == []


def test_a_directory_that_shows_nothing_empties_nothing(device: Device) -> None:
    device.run()
    kept = device.folder.with_name("kept")
    kept.mkdir()
    for path in list(device.folder.iterdir()):
        path.rename(kept / path.name)
    assert device.run(2 * FORGET_AFTER_S) == []
    for path in list(kept.iterdir()):
        path.rename(device.folder / path.name)
    assert device.run() == []
    assert len(device.done) == 4


def test_a_folder_that_is_emptied_each_evening_is_forgotten_after_an_hour_of_the_next_day(device: Device) -> None:
    device.run()
    for path in list(device.folder.rglob("*.png")):
        path.unlink()
    camera = device.start()
    save_picture(device.folder / "e.png")
    assert device.look(camera, FORGET_AFTER_S - 60) == ["e.png"]
    assert len(device.done) == 5
    assert device.look(camera, 120) == []
    assert device.remembered() == ["e.png"]


def test_pictures_of_another_disk_below_the_folder_are_never_forgotten(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:

    look_at = replay._PictureFolder.look_at
    monkeypatch.setattr(
        replay._PictureFolder,
        "look_at",
        lambda folder, path: (
            (file := look_at(folder, path)) and replace(file, device=file.device + ("c.png" in str(path)))
        ),
    )
    device.run()
    assert device.noted == ELSEWHERE
    (device.folder / "slide-1" / "c.png").unlink()
    device.run()
    assert len(device.done) == 4


def test_keys_of_another_kind_of_source_and_of_names_that_are_no_text_are_kept(device: Device) -> None:
    device.run()
    device.done |= {"/videos/v.avi|9|9|7", "v.avi|9|9|7", "bad\\xff.png|9|9", "odd", "gone.png|9|9"}
    device.run()
    assert sorted(device.done)[-1] == "v.avi|9|9|7"
    assert [keys for keys in device.forgotten if keys] == [["gone.png|9|9"]]


def test_a_directory_without_a_lasting_name_empties_nothing_and_a_noted_one_that_cannot_be_noted_counts_nothing(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_place: str) -> None:
        raise CameraError("the outbox is full")

    with monkeypatch.context() as patch:
        patch.setattr(device, "note", refuse)
        with pytest.raises(CameraError):
            device.run()
    monkeypatch.setattr("agent.camera.replay.directory_identity", lambda _folder: None)
    device.run()
    assert device.noted == ELSEWHERE
    (device.folder / "a.png").unlink()
    device.run()
    assert len(device.done) == 4


def test_a_hundred_thousand_deleted_pictures_go_in_short_steps(device: Device) -> None:
    device.run()
    device.done |= {f"old/{number}.png|9|9" for number in range(100_000)}
    camera = device.start()
    slowest_s = 0.0
    for _ in range(102):
        begun_s = time.process_time()
        device.look(camera, 1)
        slowest_s = max(slowest_s, time.process_time() - begun_s)
    assert len(device.done) == 4
    assert max(map(len, device.forgotten)) == STEP
    assert slowest_s < 5


# ------------------------------------------------------------------------------------------ the name of a directory


@pytest.mark.parametrize(
    ("kind", "is_named"), [("ext4", True), ("nfs4", True), ("cifs", True), ("vfat", False), ("tmpfs", False)]
)
def test_only_a_directory_that_no_other_disk_can_pass_for_has_a_lasting_name(
    tmp_path: Path, kind: str, is_named: bool
) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/root / {kind} rw 0 0\n")
    identity = directory_identity(tmp_path, mounts)
    assert (identity is not None) == is_named
    (tmp_path / "other").mkdir()
    assert not is_named or identity != directory_identity(tmp_path / "other", mounts)
    mounts.unlink()
    assert directory_identity(tmp_path, mounts) is None


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Path]]:
    """Two ext4 disks in files, not mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a disk needs root")
    images = [tmp_path / "one.img", tmp_path / "two.img"]
    for image in images:
        with image.open("wb") as file:
            file.truncate(4 * 2**20)
        made = subprocess.run(["mkfs.ext4", "-q", str(image)], capture_output=True, text=True, check=False)
        if made.returncode != 0:
            pytest.skip(f"no ext4 can be made here: {made.stderr.strip()}")
    yield images
    subprocess.run(["umount", "--quiet", str(tmp_path / "watched")], check=False)


def test_two_cards_that_take_turns_in_one_reader_are_told_apart(tmp_path: Path, disks: list[Path]) -> None:
    folder = tmp_path / "watched"
    folder.mkdir()

    def insert(disk: Path) -> None:
        subprocess.run(["umount", "--quiet", str(folder)], check=False)
        mounted = subprocess.run(["mount", "-o", "loop", disk, folder], capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            pytest.skip(f"a disk in a file cannot be mounted here: {mounted.stderr.strip()}")

    device = Device(folder)
    insert(disks[0])
    for name in ("1.png", "2.png"):
        save_picture(folder / name)
    assert device.run() == ["1.png", "2.png"]
    (folder / "1.png").unlink()
    device.run()
    assert device.remembered() == ["2.png"]
    insert(disks[1])
    save_picture(folder / "1.png", width_px=80)
    assert device.run() == ["1.png"]
    assert device.run() == []
    assert device.remembered() == ["1.png", "2.png"]
    insert(disks[0])
    assert device.run() == []
