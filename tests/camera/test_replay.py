"""Stored pictures as a camera: real files in real folders, real videos; only the time is made."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.camera import replay
from agent.camera.camera import NOTHING_YET, POLL_S, Clocks, open_camera
from agent.camera.hashing import hash_pixels
from agent.camera.replay import FolderCamera, WatchedFolderCamera, list_pictures, open_folder, open_video
from agent.config import CameraSection
from agent.domain import Frame
from agent.errors import CameraError, FrameUnreadable


class MadeTime:
    """A monotonic clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_ns = 5_000_000_000
        self.slept: list[float] = []
        self.clocks = Clocks(utc=lambda: datetime(2026, 1, 2, tzinfo=timezone.utc), monotonic_ns=lambda: self.now_ns)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_ns += round(seconds * 1e9)


def save_picture(path: Path, shade: int = 120, width_px: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.full((48, width_px, 3), shade, np.uint8)
    assert cv2.imwrite(str(path.with_suffix(".png")), picture)
    if path.suffix != ".png":
        path.with_suffix(".png").rename(path)
    return path


def folder_section(path: Path, **keys: Any) -> CameraSection:
    return CameraSection.model_validate({"kind": "folder", "um_per_px": 0.2, "folder": {"path": path, **keys}})


def open_once(path: Path, done: Container[str] = (), **keys: Any) -> FolderCamera:
    camera = open_folder(folder_section(path, **keys), done=done)
    assert isinstance(camera, FolderCamera)
    return camera


def open_watched(
    path: Path,
    time: MadeTime,
    done: Container[str] = (),
    forget: Callable[[Sequence[str]], None] = lambda _keys: None,
    **keys: Any,
) -> WatchedFolderCamera:
    section = folder_section(path, watch=True, **keys)
    camera = open_folder(section, done=done, clocks=time.clocks, sleep=time.sleep, forget=forget)
    assert isinstance(camera, WatchedFolderCamera)
    return camera


def read_frame(camera: Any) -> Frame:
    frame = camera.read()
    assert isinstance(frame, Frame), frame
    return frame


def read_all(camera: Any) -> list[Frame]:
    frames = []
    while (frame := camera.read()) is not None:
        if frame is not NOTHING_YET:
            frames.append(frame)
    return frames


def read_for(camera: WatchedFolderCamera, time: MadeTime, seconds: float) -> list[str]:
    """Names of the frames that a watched folder gives within this time."""
    names = []
    until_ns = time.now_ns + seconds * 1e9
    while time.now_ns < until_ns:
        frame = camera.read()
        if isinstance(frame, Frame):
            names.append(Path(frame.source).name)
    return names


# ------------------------------------------------------------------------------------------------- a folder, once
def test_a_folder_gives_its_pictures_in_natural_order_and_then_ends(tmp_path: Path) -> None:
    for name in ("field10.png", "field2.PNG", "Field1.jpg", "slide2/a.tif", "slide10/a.bmp", "slide2/b.webp"):
        save_picture(tmp_path / name)
    camera = open_once(tmp_path)
    names = [Path(frame.source).relative_to(tmp_path).as_posix() for frame in read_all(camera)]
    assert names == ["Field1.jpg", "field2.PNG", "field10.png", "slide2/a.tif", "slide2/b.webp", "slide10/a.bmp"]
    assert camera.read() is None
    assert not camera.is_live


def test_hidden_files_other_files_and_links_to_folders_are_left_out(tmp_path: Path) -> None:
    save_picture(tmp_path / "seen.png")
    for name in (".hidden.png", ".thumbnails/a.png"):
        save_picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "png").write_text("no picture")
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "absent.png")
    assert [path.name for path in list_pictures(tmp_path)] == ["nowhere.png", "seen.png"]
    assert [Path(frame.source).name for frame in read_all(open_once(tmp_path))] == ["seen.png"]


def test_sub_folders_are_left_out_when_the_configuration_says_so(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png")
    save_picture(tmp_path / "sub/b.png")
    assert len(read_all(open_once(tmp_path, recursive=False))) == 1


def test_a_frame_of_a_folder_carries_all_that_is_promised(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "sub/a.png", shade=77)
    status = path.stat()
    frame = read_frame(open_once(tmp_path))
    assert frame.number == 1
    assert frame.source == str(path)
    assert frame.origin_key == f"sub/a.png|{status.st_size}|{status.st_mtime_ns}"
    assert frame.um_per_px == 0.2
    assert frame.sha256 == hash_pixels(frame.pixels_bgr)
    assert frame.captured_at.tzinfo is timezone.utc
    assert frame.captured_monotonic_ns > 0
    assert not frame.repeats_last
    assert frame.pixels_bgr[0, 0].tolist() == [77, 77, 77]
    with pytest.raises(ValueError, match="read-only"):
        frame.pixels_bgr[0, 0] = 0


def test_finished_pictures_are_passed_over_and_numbers_have_no_gaps(tmp_path: Path) -> None:
    for number in range(4):
        save_picture(tmp_path / f"{number}.png", shade=number)
    keys = [frame.origin_key for frame in read_all(open_once(tmp_path))]
    rest = read_all(open_once(tmp_path, done={keys[0], keys[2]}))
    assert [frame.origin_key for frame in rest] == [keys[1], keys[3]]
    assert [frame.number for frame in rest] == [1, 2]
    assert read_all(open_once(tmp_path, done=set(keys))) == []


def test_a_picture_written_anew_under_its_old_name_is_a_new_one(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png")
    done = {frame.origin_key for frame in read_all(open_once(tmp_path))}
    save_picture(path, width_px=80)
    assert [frame.width_px for frame in read_all(open_once(tmp_path, done=done))] == [80]


def test_a_picture_that_changes_behind_the_listing_gets_the_key_of_what_was_read(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "a.png")
    camera = open_once(tmp_path)
    save_picture(path, width_px=80)
    frame = read_frame(camera)
    assert frame.width_px == 80
    assert frame.origin_key == f"a.png|{path.stat().st_size}|{path.stat().st_mtime_ns}"


def test_an_unreadable_picture_is_reported_with_its_key_and_the_next_one_follows(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(b"")
    save_picture(tmp_path / "2.png")
    camera = open_once(tmp_path)
    with pytest.raises(FrameUnreadable, match="empty") as caught:
        camera.read()
    assert caught.value.key == f"1.jpg|0|{(tmp_path / '1.jpg').stat().st_mtime_ns}"
    assert caught.value.origin == str(tmp_path / "1.jpg")
    assert read_frame(camera).source.endswith("2.png")
    assert camera.read() is None


def test_a_picture_that_was_deleted_meanwhile_is_finished_too(tmp_path: Path) -> None:
    path = save_picture(tmp_path / "1.png")
    save_picture(tmp_path / "2.png")
    camera = open_once(tmp_path)
    path.unlink()
    with pytest.raises(FrameUnreadable, match="not there") as caught:
        camera.read()
    assert caught.value.key is not None
    assert read_frame(camera).source.endswith("2.png")


def test_a_picture_that_the_disk_refuses_has_no_key_so_that_the_next_start_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(tmp_path / "1.png")
    camera = open_once(tmp_path)

    def fail(*_: Any, **__: Any) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(replay, "read_content", fail)
    with pytest.raises(FrameUnreadable, match="Input/output error") as caught:
        camera.read()
    assert caught.value.key is None


def test_when_the_whole_folder_has_gone_the_camera_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "stick"
    save_picture(folder / "1.png")
    save_picture(folder / "2.png")
    camera = open_once(folder)
    read_frame(camera)
    shutil.rmtree(folder)
    with pytest.raises(CameraError, match="mounted"):
        camera.read()


def test_a_folder_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path / "absent", "no such folder"),
        (tmp_path / "file", "a folder is expected"),
        (tmp_path / "empty", "no pictures in this folder and its sub-folders; looked for .bmp"),
    ):
        with pytest.raises(CameraError, match=reason) as caught:
            open_once(path)
        assert str(path) in str(caught.value)
    with pytest.raises(CameraError, match=r"camera\.folder\.path"):
        open_camera(CameraSection(kind="folder"))


def test_a_sub_folder_without_permission_is_left_out_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save_picture(tmp_path / "a.png")
    (tmp_path / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # the tests may run as root, which may read everything
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    time = MadeTime()
    assert read_for(open_watched(tmp_path, time, settle_s=0), time, 5) == ["a.png"]
    assert [record.message for record in caplog.records if "lost+found" in record.message] == [
        f"{tmp_path}/lost+found: left out, no permission to read it; let the user that runs the agent read it "
        "(chmod, chown)"
    ]


def test_a_name_that_is_no_utf8_becomes_text_that_json_takes(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xfcld.png"))
    path.write_bytes(save_picture(tmp_path / "a.png").read_bytes())
    frames = read_all(open_once(tmp_path))
    assert len(frames) == 2
    assert frames[1].source.encode("utf-8").endswith(rb"f\xfcld.png")
    assert str(frames[1].origin_key).encode("utf-8").startswith(rb"f\xfcld.png|")


# ------------------------------------------------------------------------------------------------- a watched folder
def test_a_watched_folder_may_be_empty_and_gives_files_as_they_come(tmp_path: Path) -> None:
    time = MadeTime()
    camera = open_watched(tmp_path, time, settle_s=1)
    assert read_for(camera, time, 3) == []
    save_picture(tmp_path / "2.png")
    save_picture(tmp_path / "1.png")
    assert read_for(camera, time, 3) == ["1.png", "2.png"]
    save_picture(tmp_path / "3.png")
    assert read_for(camera, time, 3) == ["3.png"]
    assert read_for(camera, time, 3) == []


def test_a_watched_folder_answers_nothing_yet_within_its_poll_time(tmp_path: Path) -> None:
    time = MadeTime()
    camera = open_watched(tmp_path, time)
    for _ in range(20):
        before_ns = time.now_ns
        assert camera.read() is NOTHING_YET
        assert time.now_ns - before_ns <= POLL_S * 1e9
    assert max(time.slept) <= POLL_S
    assert sum(time.slept) > 5, "it sleeps, it does not spin"


def test_a_file_that_still_grows_is_not_taken_until_it_has_settled(tmp_path: Path) -> None:
    whole = save_picture(tmp_path / "elsewhere/whole.png").read_bytes()
    shutil.rmtree(tmp_path / "elsewhere")
    time = MadeTime()
    camera = open_watched(tmp_path, time, settle_s=2)
    growing = tmp_path / "growing.png"
    for end in range(10, len(whole), max(1, len(whole) // 8)):
        growing.write_bytes(whole[:end])
        assert read_for(camera, time, 1) == []
    growing.write_bytes(whole)
    assert read_for(camera, time, 1.5) == []
    assert read_for(camera, time, 2) == ["growing.png"]


def test_a_watched_file_written_anew_is_taken_again(tmp_path: Path) -> None:
    time = MadeTime()
    camera = open_watched(tmp_path, time, settle_s=1)
    save_picture(tmp_path / "live.png")
    assert read_for(camera, time, 3) == ["live.png"]
    save_picture(tmp_path / "live.png", width_px=96)
    assert read_for(camera, time, 3) == ["live.png"]


def test_a_change_of_rights_alone_does_not_count_a_picture_twice(tmp_path: Path) -> None:
    time = MadeTime()
    camera = open_watched(tmp_path, time, settle_s=0)
    path = save_picture(tmp_path / "a.png")
    assert read_for(camera, time, 2) == ["a.png"]
    path.chmod(0o600)
    assert read_for(camera, time, 2) == []


def test_a_refused_watched_file_is_reported_once_and_read_when_its_rights_are_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_content = replay.read_content
    path = save_picture(tmp_path / "a.png")

    def read_with_rights(path: Path, *rest: Any, **keys: Any) -> bytes:
        if path.stat().st_mode & 0o777 == 0:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_content(path, *rest, **keys)

    monkeypatch.setattr(replay, "read_content", read_with_rights)
    path.chmod(0)
    time = MadeTime()
    camera = open_watched(tmp_path, time, settle_s=0)
    with pytest.raises(FrameUnreadable, match="chmod"):
        camera.read()
    assert read_for(camera, time, 3) == []
    path.chmod(0o644)
    assert read_for(camera, time, 3) == ["a.png"]


def test_a_watched_folder_passes_over_finished_files_and_reports_bad_ones_once(tmp_path: Path) -> None:
    save_picture(tmp_path / "1.png")
    (tmp_path / "2.png").write_bytes(b"not a picture")
    done = {frame.origin_key for frame in [read_frame(open_once(tmp_path))]}
    time = MadeTime()
    camera = open_watched(tmp_path, time, done=done, settle_s=0)
    with pytest.raises(FrameUnreadable):
        camera.read()
    assert read_for(camera, time, 3) == []


def test_of_files_that_were_deleted_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.camera.deletions.FORGET_AFTER_S", 20)
    monkeypatch.setattr("agent.camera.deletions.FORGET_EVERY_S", 5)
    monkeypatch.setattr(replay, "POLL_S", 1)
    time, forgotten = MadeTime(), list[str]()
    old = save_picture(tmp_path / "old.png")
    done = {read_frame(open_once(tmp_path)).origin_key or ""}
    camera = open_watched(tmp_path, time, done=done, forget=forgotten.extend, settle_s=0)
    save_picture(tmp_path / "new.png")
    save_picture(tmp_path / "stays.png")
    assert read_for(camera, time, 3) == ["new.png", "stays.png"]
    assert len(camera._taken) == 2
    old.unlink()
    (tmp_path / "new.png").unlink()
    assert read_for(camera, time, 15) == []
    assert forgotten == []
    assert read_for(camera, time, 15) == []
    assert sorted(key.partition("|")[0] for key in forgotten) == ["new.png", "old.png"]
    assert list(camera._taken) == [tmp_path / "stays.png"]
    assert read_for(camera, time, 30) == []


def test_files_on_a_disk_that_is_mounted_below_the_folder_are_not_forgotten_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.camera.deletions.FORGET_AFTER_S", 20)
    monkeypatch.setattr("agent.camera.deletions.FORGET_EVERY_S", 5)
    monkeypatch.setattr(replay, "POLL_S", 1)
    time, forgotten = MadeTime(), list[str]()
    stick = tmp_path / "stick"
    save_picture(stick / "a.png")
    save_picture(tmp_path / "b.png")
    look_at = replay._PictureFolder.look_at

    def on_its_own_disk(folder: Any, path: Path) -> Any:
        file = look_at(folder, path)
        return file and replace(file, device=file.device + (path.parent == stick))

    monkeypatch.setattr(replay._PictureFolder, "look_at", on_its_own_disk)
    camera = open_watched(tmp_path, time, forget=forgotten.extend, settle_s=0)
    assert sorted(read_for(camera, time, 3)) == ["a.png", "b.png"]
    shutil.move(stick, tmp_path.parent / f"{tmp_path.name}-away")
    assert read_for(camera, time, 60) == []
    shutil.move(tmp_path.parent / f"{tmp_path.name}-away", stick)
    assert read_for(camera, time, 5) == []
    assert forgotten == []


def test_a_watched_folder_that_goes_away_is_a_lost_camera(tmp_path: Path) -> None:
    folder = tmp_path / "share"
    folder.mkdir()
    time = MadeTime()
    camera = open_watched(folder, time)
    assert camera.read() is NOTHING_YET
    folder.rmdir()
    with pytest.raises(CameraError, match="no such folder"):
        read_for(camera, time, 3)
    with pytest.raises(CameraError, match="no such folder"):
        open_watched(folder, time)


def test_looking_through_a_slow_folder_takes_a_tenth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = MadeTime()
    camera = open_watched(tmp_path, time)
    looks: list[int] = []

    def look_slowly(*_: Any) -> list[Path]:
        looks.append(time.now_ns)
        time.now_ns += 1_000_000_000
        return []

    monkeypatch.setattr(replay, "_list_pictures", look_slowly)
    read_for(camera, time, 100)
    assert 9 <= len(looks) <= 11


# ------------------------------------------------------------------------------------------------- a video
def save_video(path: Path, pictures: int = 10, size_px: tuple[int, int] = (64, 48)) -> Path:
    """Each picture has its own shade: 10, 20, 30 ..."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, size_px)
    assert writer.isOpened()
    for number in range(pictures):
        writer.write(np.full((size_px[1], size_px[0], 3), 10 * (number + 1) % 250, np.uint8))
    writer.release()
    return path


def video_section(path: Path, **keys: Any) -> CameraSection:
    return CameraSection.model_validate({"kind": "video", "video": {"path": path, **keys}})


def shades(frames: list[Frame]) -> list[int]:
    return [round(float(frame.pixels_bgr.mean()) / 10) for frame in frames]


def test_a_video_gives_all_its_pictures_with_position_in_the_key(tmp_path: Path) -> None:
    path = save_video(tmp_path / "stage.avi")
    status = path.stat()
    camera = open_camera(video_section(path))
    frames = read_all(camera)
    assert shades(frames) == list(range(1, 11))
    assert [frame.number for frame in frames] == list(range(1, 11))
    assert frames[3].origin_key == f"{path}|{status.st_size}|{status.st_mtime_ns}|3"
    assert frames[3].source == str(path)
    assert not frames[3].pixels_bgr.flags.writeable
    assert camera.read() is None
    assert not camera.is_live
    camera.close()
    assert camera.read() is None


def test_every_third_picture_of_a_video_and_none_that_is_finished(tmp_path: Path) -> None:
    path = save_video(tmp_path / "stage.avi")
    frames = read_all(open_video(video_section(path, every_nth=3)))
    assert shades(frames) == [1, 4, 7, 10]
    rest = read_all(open_video(video_section(path, every_nth=3), done={frames[0].origin_key, frames[2].origin_key}))
    assert shades(rest) == [4, 10]


def test_passing_over_many_pictures_says_nothing_yet_in_between(tmp_path: Path) -> None:
    ticks = iter(range(0, 10**12, 200_000_000))
    clocks = Clocks(monotonic_ns=lambda: next(ticks))
    camera = open_video(video_section(save_video(tmp_path / "stage.avi"), every_nth=10), clocks=clocks)
    assert isinstance(camera.read(), Frame)
    assert camera.read() is NOTHING_YET
    assert read_all(camera) == []


def test_a_video_that_is_cut_off_is_told_after_its_last_picture(tmp_path: Path) -> None:
    path = save_video(tmp_path / "stage.avi", pictures=40)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    camera = open_video(video_section(path))
    assert read_frame(camera).number == 1
    with pytest.raises(FrameUnreadable, match=r"ends after \d+ of 40 pictures: it is cut off") as caught:
        read_all(camera)
    assert caught.value.key is None
    assert camera.read() is None


def test_what_is_no_video_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for path, reason in (
        (tmp_path / "absent.avi", "not there"),
        (tmp_path / "text.mp4", "not a video that can be read"),
        (tmp_path, "cannot be read"),
    ):
        with pytest.raises(CameraError, match=reason) as caught:
            open_video(video_section(path))
        assert str(path) in str(caught.value)
    with pytest.raises(CameraError, match=r"camera\.video\.path"):
        open_camera(CameraSection(kind="video"))
    assert "WARN" not in capfd.readouterr().err


def test_a_video_with_pictures_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = save_video(tmp_path / "stage.avi", pictures=1, size_px=(640, 480))
    section = CameraSection.model_validate({"kind": "video", "max_megapixels": 0.2, "video": {"path": path}})
    with pytest.raises(CameraError, match=r"640 x 480 pixels = 0\.3 megapixels, the limit is 0\.2"):
        open_video(section)
