"""Stored pictures as a camera: a folder read once, a folder watched for new files, a video file.

Many microscopes only write files; watching their folder is the camera then. Each picture has an origin key, made from
what the file system says about the file, so that a restart goes on where the last commit was:

    folder   path|size|mtime_ns             path relative to the folder, so that the folder may move
    video    path|size|mtime_ns|position    position counts the video's pictures from 0

A file that is written anew under its old name has another size or time: it is a new picture.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import cv2

from agent.camera.absences import Absences
from agent.camera.camera import NOTHING_YET, POLL_S, SYSTEM_CLOCKS, Clocks, NothingYet, make_frame
from agent.camera.decoding import decode_bytes, describe_os_error, read_content
from agent.camera.deletions import Deletions
from agent.camera.opencv import captured_pixels, check_capture_size, quiet_opencv
from agent.config import CameraSection
from agent.domain import Frame
from agent.errors import CameraError, FrameUnreadable
from agent.files import directory_identity

log = logging.getLogger(__name__)

PICTURE_SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})

LOOK_SHARE: Final = 0.1
"""Looking through a watched folder may take this share of the time, so that 20,000 files on an SD card do not keep a
core busy: the pause between two looks is at least nine times as long as the look."""

VIDEO_TIMEOUT_MS: Final = 10_000
"""ms; a local disk answers at once, a network share that is silent for longer is lost."""

MISSING_PICTURES_SHARE: Final = 0.1
"""A video's own count of its pictures is exact in AVI and MP4 and an estimate elsewhere; it ended too early when more
than this share is missing."""


@dataclass(frozen=True, slots=True)
class _PictureFile:
    """One file of a folder at one moment. name: relative to the folder, printable. device: of the file system."""

    path: Path
    name: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    device: int

    @property
    def origin_key(self) -> str:
        return f"{self.name}|{self.size_bytes}|{self.mtime_ns}"


def list_pictures(folder: Path, *, recursive: bool = True) -> list[Path]:
    """The picture files of a folder in natural order (2 before 10, sub-folders where their names stand).

    Files and folders whose names begin with a dot are left out; links to folders are not followed, they may lead in a
    circle. A sub-folder without permission is left out with a warning. Raises CameraError where the folder itself
    cannot be read.
    """
    return _list_pictures(folder, recursive, lambda text: log.warning("%s", text))


def _list_pictures(folder: Path, recursive: bool, warn: Callable[[str], None]) -> list[Path]:
    def refuse(error: OSError) -> None:
        where = Path(error.filename or folder)
        if where == folder:
            raise CameraError(f"{printable(folder)}: {_describe_folder_error(error)}") from error
        warn(f"{printable(where)}: left out, {describe_os_error(error)}")

    paths: list[Path] = []
    for parent, folder_names, file_names in os.walk(folder, onerror=refuse):
        folder_names[:] = [name for name in folder_names if recursive and not name.startswith(".")]
        paths += [Path(parent, name) for name in file_names if _is_picture_name(name)]
    return sorted(paths, key=lambda path: _natural_order(path.relative_to(folder)))


def _is_picture_name(name: str) -> bool:
    return not name.startswith(".") and name[name.rfind(".") :].lower() in PICTURE_SUFFIXES


def _natural_order(path: Path) -> tuple[object, ...]:
    # The parts as they are come last, so that names that differ only in case keep one order.
    return (tuple(_split_numbers(part.casefold()) for part in path.parts), path.parts)


def _split_numbers(text: str) -> tuple[str | int, ...]:
    """`field10.png` as ("field", 10, ".png"): words at even places, numbers at odd ones, so that all compare."""
    return tuple(int(part) if place % 2 else part for place, part in enumerate(re.split(r"([0-9]+)", text)))


def _describe_folder_error(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such folder; is the disk or share mounted? (camera.folder.path)"
    if isinstance(error, NotADirectoryError):
        return "this is a file, a folder is expected (camera.folder.path)"
    return describe_os_error(error)


def printable(path: Path) -> str:
    """A path as text that JSON and SQLite take: bytes of a name that are no UTF-8 are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


class _PictureFolder:
    """The files of one folder, and frames made from them."""

    def __init__(self, section: CameraSection, clocks: Clocks) -> None:
        if section.folder.path is None:
            raise CameraError("no folder is named; set camera.folder.path")
        self.path = section.folder.path
        self._recursive = section.folder.recursive
        self._max_megapixels = section.max_megapixels
        self._um_per_px = section.um_per_px
        self._clocks = clocks
        self._frames = 0
        self._warned: set[str] = set()

    def check(self) -> None:
        """Raises CameraError where the folder itself cannot be read."""
        try:
            next(self.path.iterdir(), None)
        except OSError as error:
            raise CameraError(f"{printable(self.path)}: {_describe_folder_error(error)}") from error

    def look(self) -> list[_PictureFile]:
        """The picture files as they are now, in natural order. Raises CameraError as `check` does."""
        paths = _list_pictures(self.path, self._recursive, self._warn_once)
        return [file for path in paths if (file := self.look_at(path))]

    def look_at(self, path: Path) -> _PictureFile | None:
        """The file as it is now; None where it has gone, or is a link that leads nowhere."""
        try:
            status = path.stat()
        except OSError:
            return None
        name = printable(path.relative_to(self.path))
        return _PictureFile(path, name, status.st_size, status.st_mtime_ns, status.st_ctime_ns, device=status.st_dev)

    def place(self) -> tuple[int, int]:
        """Device and inode of the folder itself: another disk in its place has others. Raises CameraError."""
        try:
            status = self.path.stat()
        except OSError as error:
            raise CameraError(f"{printable(self.path)}: {_describe_folder_error(error)}") from error
        return status.st_dev, status.st_ino

    def identity(self) -> str | None:
        """What names the folder itself after restarts too; None = nothing does."""
        try:
            return directory_identity(self.path)
        except OSError:
            return None  # it has just gone: the next look says so

    def read(self, file: _PictureFile) -> Frame:
        """A frame of one file.

        Raises FrameUnreadable. A picture that is bad stays bad: it is reported with its key, and so is finished. What
        the disk or the rights refuse may be fine at the next start: it is reported without a key. When the whole folder
        has gone, the camera is lost: CameraError.
        """
        origin = printable(file.path)
        try:
            content = read_content(file.path, self._max_megapixels, key=file.origin_key)
        except OSError as error:
            self.check()
            key = file.origin_key if isinstance(error, FileNotFoundError) else None
            raise FrameUnreadable(origin, describe_os_error(error), key) from error
        pixels_bgr = decode_bytes(content, origin, self._max_megapixels, key=file.origin_key)
        self._frames += 1
        return make_frame(
            self._frames,
            pixels_bgr,
            source=origin,
            clocks=self._clocks,
            origin_key=file.origin_key,
            um_per_px=self._um_per_px,
        )

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            log.warning("%s", text)


class FolderCamera:
    """The pictures of a folder, once: those that are there at opening, in natural order, then the end."""

    is_live: Final = False

    def __init__(self, folder: _PictureFolder, files: Iterable[_PictureFile], done: Container[str]) -> None:
        self.description = f"folder {printable(folder.path)}"
        self._folder = folder
        self._waiting = deque(files)
        self._done = done

    def read(self) -> Frame | None:
        while self._waiting:
            listed = self._waiting.popleft()
            # Looked at again: since the listing, perhaps hours ago, it may have been written anew.
            file = self._folder.look_at(listed.path) or listed
            if file.origin_key not in self._done:
                return self._folder.read(file)
        return None

    def close(self) -> None:
        self._waiting.clear()


class WatchedFolderCamera:
    """The pictures of a folder as they come. It never ends.

    A file is taken when its size and time have not changed for `settle_s`, measured by looking twice with the
    monotonic clock: a file's date comes from the clock of the machine that wrote it. Looking again and again works on
    network shares too, where the kernel sends no notes about changes. forget: told the origin keys of files that were
    deleted for good. noted, note: of `Absences`.
    """

    is_live: Final = False

    def __init__(
        self,
        folder: _PictureFolder,
        settle_s: float,
        done: Collection[str],
        monotonic_ns: Callable[[], int],
        sleep: Callable[[float], object],
        forget: Callable[[Sequence[str]], None],
        noted: str | None,
        note: Callable[[str], None],
    ) -> None:
        self.description = f"watched folder {printable(folder.path)}"
        self._folder = folder
        self._settle_ns = int(settle_s * 1e9)
        self._done = done
        self._monotonic_ns = monotonic_ns
        self._sleep = sleep
        self._next_look_ns = monotonic_ns()
        self._waiting: deque[_PictureFile] = deque()
        self._settling: dict[Path, tuple[_PictureFile, int]] = {}
        self._forget = forget
        self._deletions = Deletions()
        self._absences = Absences(folder.path, folder.identity, done, noted, note)
        # What this opening has handed out, by path; of files that were deleted for good nothing is kept.
        self._taken: dict[Path, str] = {}
        # What the disk or the rights refused; tried again when the file changes in any way, its rights included.
        self._refused: dict[Path, _PictureFile] = {}

    def read(self) -> Frame | Literal[NothingYet.NOTHING_YET]:
        if not self._waiting and self._wait_for_look():
            self._look_for_settled()
        while self._waiting:
            file = self._waiting.popleft()
            if self._is_known(file) or self._folder.look_at(file.path) != file:
                continue  # the next look sees what has become of it
            self._absences.before_taking(file.device)
            self._taken[file.path] = file.origin_key
            try:
                return self._folder.read(file)
            except FrameUnreadable as error:
                if error.key is None:
                    del self._taken[file.path]
                    self._refused[file.path] = file
                raise
        return NOTHING_YET

    def close(self) -> None:
        self._waiting.clear()

    def _wait_for_look(self) -> bool:
        """Sleep towards the next look, at most POLL_S. Whether its time has come."""
        wait_s = (self._next_look_ns - self._monotonic_ns()) / 1e9
        if wait_s > 0:
            self._sleep(min(wait_s, POLL_S))
        return self._monotonic_ns() >= self._next_look_ns

    def _look_for_settled(self) -> None:
        started_ns = self._monotonic_ns()
        place = self._folder.place()
        listed = self._folder.look()
        self._forget_deleted(listed, place, started_ns)
        files = [file for file in listed if not self._is_known(file)]
        now_ns = self._monotonic_ns()
        self._next_look_ns = now_ns + max(int(POLL_S * 1e9), int((now_ns - started_ns) * (1 / LOOK_SHARE - 1)))
        settling: dict[Path, tuple[_PictureFile, int]] = {}
        for file in files:
            seen, since_ns = self._settling.get(file.path, (file, started_ns))
            if seen.origin_key != file.origin_key:
                since_ns = started_ns
            if started_ns - since_ns >= self._settle_ns:
                self._waiting.append(file)
            else:
                settling[file.path] = (file, since_ns)
        self._settling = settling

    def _forget_deleted(self, listed: Iterable[_PictureFile], place: tuple[int, int], now_ns: int) -> None:
        there = {file.origin_key: file.path for file in listed if file.device == place[0]}
        deleted = self._deletions.follow(there, place, now_ns)
        gone_before = self._absences.look(there, place[0], self._taken, now_ns)
        if gone_before:
            log.info("%d pictures that were deleted while the agent was off are forgotten", len(gone_before))
            self._forget(gone_before)
        if deleted:
            gone = frozenset(deleted)
            self._taken = {path: key for path, key in self._taken.items() if key not in gone}
            self._refused = {path: file for path, file in self._refused.items() if file.origin_key not in gone}
            self._forget(deleted)

    def _is_known(self, file: _PictureFile) -> bool:
        return (
            self._taken.get(file.path) == file.origin_key
            or self._refused.get(file.path) == file
            or file.origin_key in self._done
        )


def open_folder(
    section: CameraSection,
    *,
    done: Collection[str] = (),
    clocks: Clocks = SYSTEM_CLOCKS,
    sleep: Callable[[float], object] = time.sleep,
    forget: Callable[[Sequence[str]], None] = lambda _keys: None,
    noted: str | None = None,
    note: Callable[[str], None] = lambda _place: None,
) -> FolderCamera | WatchedFolderCamera:
    """The folder of the configuration, once or watched.

    Raises CameraError where it is not there, is no folder, may not be read, or, read once, holds no pictures. A watched
    folder may be empty at first.
    """
    folder = _PictureFolder(section, clocks)
    if section.folder.watch:
        folder.check()
        return WatchedFolderCamera(
            folder, section.folder.settle_s, done, clocks.monotonic_ns, sleep, forget, noted, note
        )
    files = folder.look()
    if not files:
        where = "in this folder and its sub-folders" if section.folder.recursive else "in this folder"
        raise CameraError(
            f"{printable(folder.path)}: no pictures {where}; looked for {' '.join(sorted(PICTURE_SUFFIXES))}"
        )
    return FolderCamera(folder, files, done)


class VideoCamera:
    """The pictures of a video file, or every n-th of them, then the end."""

    is_live: Final = False

    def __init__(
        self,
        capture: cv2.VideoCapture,
        path: Path,
        *,
        every_nth: int,
        um_per_px: float | None,
        done: Container[str],
        clocks: Clocks,
    ) -> None:
        status = path.stat()
        self._origin = printable(path)
        self._key = f"{self._origin}|{status.st_size}|{status.st_mtime_ns}"
        self.description = f"video {self._origin}"
        self._capture = capture
        self._every_nth = every_nth
        self._um_per_px = um_per_px
        self._done = done
        self._clocks = clocks
        self._expected = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))  # 0 or less: not known
        self._next = 0
        self._frames = 0
        self._has_ended = False

    def read(self) -> Frame | Literal[NothingYet.NOTHING_YET] | None:
        """The next picture that is due. Passing over many that are not takes time: NOTHING_YET in between."""
        pause_at_ns = self._clocks.monotonic_ns() + int(POLL_S * 1e9)
        while not self._has_ended:
            if not self._capture.grab():
                self._has_ended = True
                self._check_end()
                return None
            position = self._next
            self._next += 1
            key = f"{self._key}|{position}"
            if position % self._every_nth == 0 and key not in self._done:
                return self._take(position, key)
            if self._clocks.monotonic_ns() >= pause_at_ns:
                return NOTHING_YET
        return None

    def close(self) -> None:
        self._has_ended = True
        self._capture.release()

    def _take(self, position: int, key: str) -> Frame:
        pixels_bgr = captured_pixels(self._capture.retrieve(), self._origin)
        if pixels_bgr is None:
            raise FrameUnreadable(f"{self._origin}, picture {position}", "the decoder refuses it", key)
        self._frames += 1
        return make_frame(
            self._frames,
            pixels_bgr,
            source=self._origin,
            clocks=self._clocks,
            origin_key=key,
            um_per_px=self._um_per_px,
        )

    def _check_end(self) -> None:
        """A file that was cut off ends like a whole one: only the count in its head tells."""
        if self._next < self._expected * (1 - MISSING_PICTURES_SHARE):
            raise FrameUnreadable(
                self._origin,
                f"the video ends after {self._next} of {self._expected} pictures: it is cut off or damaged; "
                "what could be read was taken",
            )


def open_video(section: CameraSection, *, done: Container[str] = (), clocks: Clocks = SYSTEM_CLOCKS) -> VideoCamera:
    """The video file of the configuration. Raises CameraError where it is not there, no video, or too large."""
    path = section.video.path
    if path is None:
        raise CameraError("no video is named; set camera.video.path")
    origin = printable(path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise CameraError(f"{origin}: {describe_os_error(error)} (camera.video.path)") from error
    capture = cv2.VideoCapture()
    with quiet_opencv():
        # The absolute path, because FFMPEG takes `name:rest` for an address.
        is_open = capture.open(str(path.resolve()), cv2.CAP_FFMPEG, [cv2.CAP_PROP_READ_TIMEOUT_MSEC, VIDEO_TIMEOUT_MS])
    if not is_open:
        raise CameraError(f"{origin}: not a video that can be read: damaged, cut off, or an unknown codec")
    # Pictures stand as they are stored, like those of a folder: see agent.camera.decoding on orientation.
    capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0)
    check_capture_size(capture, section.max_megapixels, origin)
    return VideoCamera(
        capture, path, every_nth=section.video.every_nth, um_per_px=section.um_per_px, done=done, clocks=clocks
    )
