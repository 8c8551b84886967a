"""What every source of frames promises, and `open_camera`, which picks the one that the configuration names.

A camera belongs to one thread (`agent.camera.grabber`); nothing else touches it. `read()` answers in one of five ways:

| answer                   | meaning                                  | the grabber's reaction                  |
|--------------------------|------------------------------------------|-----------------------------------------|
| a `Frame`                | a picture                                | hand it on                              |
| `NOTHING_YET`            | all is well, no new picture now          | look whether to stop, read again        |
| `None`                   | the end of a finite source, for good     | pass the end on, finish                 |
| raises `FrameUnreadable` | this picture is bad, the next may not be | pass that on as an `UnreadableFrame`    |
| raises `CameraError`     | the device is lost, silent or not there  | close, wait, open again                 |

`read()` never blocks for ever. How each source keeps to that:

| source    | bound                                                                                               |
|-----------|-----------------------------------------------------------------------------------------------------|
| simulated | waits at most `POLL_S` for the next field's time, then says `NOTHING_YET`                           |
| folder    | opens only regular files (never a FIFO); a watched folder waits at most `POLL_S`                    |
| video     | FFMPEG's read timeout; `NOTHING_YET` while it passes over pictures that are not due                 |
| network   | FFMPEG's open and read timeouts, from `network.read_timeout_s`                                      |
| usb       | polls the device for at most `usb.read_timeout_s` before it takes the picture                       |

What no timeout reaches is a system call that the kernel does not return from (a dead network share, a hung driver):
then the camera's heartbeat stays out, and the watchdog has systemd start the agent anew.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final, Literal, Protocol

from agent.camera.hashing import hash_pixels
from agent.config import CameraSection
from agent.domain import Frame, Pixels

POLL_S: Final = 0.5
"""s; longest wait of a source that has nothing to give. A stop is noticed within it, and half a second is no delay for
a person at a microscope."""


class NothingYet(enum.Enum):
    """The answer of a source that is well and has no new picture. One member, so that `is NOTHING_YET` narrows types.

    Not `None`, which is the end of a finite source; not an exception, because it is the normal state of a watched
    folder for hours.
    """

    NOTHING_YET = "nothing yet"


NOTHING_YET: Final = NothingYet.NOTHING_YET


@dataclass(frozen=True, slots=True)
class UnreadableFrame:
    """A picture that could not be decoded, in its place among the frames: a `FrameUnreadable` as a value.

    origin: names it for people. key: its `Frame.origin_key`, so that the pipeline can mark it as finished; None where
    it should be tried again at the next start (a disk error, no permission) or the source has no keys.
    """

    origin: str
    reason: str
    key: str | None = None


class Camera(Protocol):
    """A source of frames, opened and ready. Owned by one thread."""

    @property
    def is_live(self) -> bool:
        """True: pictures come at their own pace and the newest counts. False: the source waits, none may be lost."""

    @property
    def description(self) -> str:
        """What it is, for people: `folder /srv/fields`, `camera /dev/video0`. Never holds a password."""

    def read(self) -> Frame | Literal[NothingYet.NOTHING_YET] | None:
        """The next frame, or one of the other answers in the table at the head of this file."""

    def close(self) -> None:
        """Let go of the device. May be called twice."""


@dataclass(frozen=True, slots=True)
class Clocks:
    """The two clocks of the machine; tests pass their own."""

    utc: Callable[[], datetime] = lambda: datetime.now(timezone.utc)
    monotonic_ns: Callable[[], int] = time.monotonic_ns


SYSTEM_CLOCKS: Final = Clocks()


def make_frame(
    number: int,
    pixels_bgr: Pixels,
    *,
    source: str,
    clocks: Clocks,
    origin_key: str | None = None,
    um_per_px: float | None = None,
    stage_um: tuple[float, float] | None = None,
) -> Frame:
    """A frame of these pixels, taken now. The array is made read-only in place, not copied.

    The time is that of reading, for stored pictures too: a file's date is often that of a copy, and `captured_at` must
    belong to the same moment as the monotonic reading.
    """
    pixels_bgr.flags.writeable = False
    return Frame(
        number=number,
        pixels_bgr=pixels_bgr,
        captured_at=clocks.utc(),
        captured_monotonic_ns=clocks.monotonic_ns(),
        sha256=hash_pixels(pixels_bgr),
        source=source,
        origin_key=origin_key,
        um_per_px=um_per_px,
        stage_um=stage_um,
    )


def open_camera(
    section: CameraSection,
    *,
    done: Collection[str] = (),
    clocks: Clocks = SYSTEM_CLOCKS,
    forget: Callable[[Sequence[str]], None] = lambda _keys: None,
    noted: str | None = None,
    note: Callable[[str], None] = lambda _place: None,
) -> Camera:
    """The camera that the configuration names, opened. Raises CameraError where that fails.

    done: origin keys of stored pictures that are finished; these are skipped. It is asked again for each picture, so
    a set that grows meanwhile is fine. forget: told, while the camera is read, of which pictures nobody need know any
    more that they are finished: they were deleted for good. note: told where they lie, before the first is taken, or
    raises CameraError; noted: what it was told the last time.
    """
    # Imported here: a folder needs no camera libraries, and a source that cannot be imported must not stop the others.
    if section.kind == "folder":
        from agent.camera.replay import open_folder

        return open_folder(section, done=done, clocks=clocks, forget=forget, noted=noted, note=note)
    if section.kind == "video":
        from agent.camera.replay import open_video

        return open_video(section, done=done, clocks=clocks)
    if section.kind == "network":
        from agent.camera.network import open_network

        return open_network(section, clocks=clocks)
    if section.kind == "usb":
        from agent.camera.usb import open_usb

        return open_usb(section, clocks=clocks)
    from agent.camera.simulated import open_simulated

    return open_simulated(section, done=done, clocks=clocks)
