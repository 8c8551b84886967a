"""The camera thread: it alone holds the camera, and hands frames on through a bounded queue.

    open_camera() --> read() --> [repeats the last?] --> FrameQueue --> pipeline
        ^               |
        +-- back-off <--+  CameraError, or a live picture that stands still

A live camera never waits for the models: the newest frame wins, what it displaces is counted. A finite source waits for
them: no frame is lost. The end of a finite source is passed on behind the last frame; a stop is not an end, because
after an end the sample is closed.

The heartbeat `camera` is given for a frame, for an answer that there is none now, and while this thread knows what it
is waiting for (the queue, the next attempt to open). It is not given while `open_camera` or `read` has not returned.
"""

from __future__ import annotations

import enum
import logging
import random
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Final, Literal

from agent.camera.camera import NOTHING_YET, Camera, NothingYet, UnreadableFrame
from agent.domain import Frame
from agent.errors import CameraError, FrameUnreadable
from agent.health import Health

log = logging.getLogger(__name__)

FROZEN_FRAMES: Final = 50
"""Live frames in a row that are alike byte by byte: the sensor's noise makes two in a row unlikely, so this many mean
that a driver repeats its last buffer (OpenCV issue 5221)."""

FROZEN_S: Final = 10.0
"""s; and for this long. A compressed stream of a scene at rest repeats frames until its next key frame, which comes
every few seconds; at 25 frames a second 50 of them are only two."""

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
"""s; the pause between two attempts to open goes 1, 2, 4 ... 30: quick for a cable put back, quiet for a camera that
is off over night."""

JITTER: Final = 0.2
"""Share by which a pause varies, so that the agents of a laboratory do not all ask one camera server at once."""

WELL_S: Final = 10.0
"""s; a camera must have worked for this long before its earlier failures are forgotten: one that dies after each first
frame shall not be opened every second."""

IDLE_AFTER_S: Final = 5.0
"""s without a new frame from a source that is well, then health says `idle`."""

SLICE_S: Final = 0.5
"""s; waiting is cut into slices, for the heartbeat and for the stop."""

KEYS_REMEMBERED: Final = 1000
"""Origin keys of frames that were handed on, so that a source that is opened again does not give them twice. At least
those in the queue and in the pipeline are needed; the rest is margin, a tenth of a megabyte."""

SUPERSEDED: Final = "superseded"
FROZEN: Final = "frozen"
UNREADABLE: Final = "unreadable"


class EndOfFrames(enum.Enum):
    """The mark behind the last frame of a finite source. One member, so that `is END_OF_FRAMES` narrows types."""

    END_OF_FRAMES = "end of frames"


END_OF_FRAMES: Final = EndOfFrames.END_OF_FRAMES

Taken = Frame | UnreadableFrame
"""What the camera gave, in its order."""


class FrameQueue:
    """The frames that wait for the models; one thread puts, one takes."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[Taken] = deque()
        self._has_ended = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        with self._changed:
            return len(self._waiting)

    def put_waiting(self, taken: Taken, timeout_s: float) -> bool:
        """Put it in as soon as there is room. False where there was none within the time; it is not in then."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._waiting) < self._capacity, timeout_s):
                return False
            self._append(taken)
            return True

    def put_newest(self, taken: Taken) -> str | None:
        """Put it in at once; in a full queue something gives way. The reason for what was dropped, or None.

        Only a fresh frame displaces: first what brings nothing new (a repeat, an unreadable one), then the oldest.
        Anything else that finds the queue full is itself dropped.
        """
        with self._changed:
            if len(self._waiting) < self._capacity:
                self._append(taken)
                return None
            if not _is_fresh(taken):
                return _drop_reason(taken)
            displaced = next((other for other in self._waiting if not _is_fresh(other)), self._waiting[0])
            self._waiting.remove(displaced)
            self._append(taken)
            return _drop_reason(displaced)

    def end(self) -> None:
        """Nothing comes any more: who has taken what still waits is told END_OF_FRAMES."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def take(self, timeout_s: float) -> Taken | Literal[NothingYet.NOTHING_YET, EndOfFrames.END_OF_FRAMES]:
        """The oldest one that waits; NOTHING_YET after the time; END_OF_FRAMES, again and again, after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._has_ended, timeout_s)
            if self._waiting:
                self._changed.notify_all()
                return self._waiting.popleft()
            return END_OF_FRAMES if self._has_ended else NOTHING_YET

    def _append(self, taken: Taken) -> None:
        self._waiting.append(taken)
        self._changed.notify_all()


def _is_fresh(taken: Taken) -> bool:
    return isinstance(taken, Frame) and not taken.repeats_last


def _drop_reason(taken: Taken) -> str:
    if isinstance(taken, UnreadableFrame):
        return UNREADABLE
    return FROZEN if taken.repeats_last else SUPERSEDED


class Grabber(threading.Thread):
    """Opens the camera, reads it, and opens it again for as long as nobody stops it.

    open_camera: called for every opening; raises CameraError where that fails now. It must look up the finished origin
    keys each time: this thread itself remembers only the newest ones that it handed on, committed or not.
    last_sha256_16: hash of the last frame of the run before, so that a picture that was analysed then is known as a
    repeat now.
    sleep: waits for seconds and returns whether to stop; by default the stop event's own wait.
    failure: what ended the thread against expectation; the supervisor looks at it and raises it.
    """

    def __init__(
        self,
        open_camera: Callable[[], Camera],
        queue: FrameQueue,
        health: Health,
        stop: threading.Event,
        *,
        last_sha256_16: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        # A daemon: a camera call that the kernel does not return from must not keep the process from ending.
        super().__init__(name="camera", daemon=True)
        self.failure: BaseException | None = None
        self._open_camera = open_camera
        self._queue = queue
        self._health = health
        self._stop_event = stop
        self._last_sha256_16 = last_sha256_16
        self._handed_on: OrderedDict[str, None] = OrderedDict()
        self._clock = clock
        self._sleep = stop.wait if sleep is None else sleep
        self._jitter = jitter
        self._is_lost = False
        self._is_frozen = False
        self._is_idle = False
        self._failures = 0
        self._well_since_s: float | None = None
        self._last_frame_s = clock()
        self._last_change_s = clock()
        self._repeats = 0

    def run(self) -> None:
        try:
            self._grab_until_stopped()
        except BaseException as error:  # the top of the thread: kept for the supervisor, which ends the process
            self.failure = error

    def _grab_until_stopped(self) -> None:
        self._health.camera_state("opening")
        while not self._stop_event.is_set():
            try:
                with closing(self._open_camera()) as camera:
                    self._begin_opening()
                    self._read_until_end(camera)
            except CameraError as error:
                self._wait_after(error)
            else:
                return

    def _begin_opening(self) -> None:
        self._well_since_s = None
        self._repeats = 0
        self._last_frame_s = self._last_change_s = self._clock()

    def _read_until_end(self, camera: Camera) -> None:
        """Hand on what the camera gives, until its end or the stop. Raises CameraError when it is lost."""
        while not self._stop_event.is_set():
            try:
                frame = camera.read()
            except FrameUnreadable as error:
                self._mark_well(camera)
                if not self._is_known(error.key):
                    self._hand_on(UnreadableFrame(error.origin, error.reason, error.key), error.key, camera.is_live)
                continue
            self._health.beat("camera")
            if frame is None:
                log.info("%s: read to its end", camera.description)
                self._health.camera_state("ended", camera.description)
                self._health.retire("camera")
                self._queue.end()
                return
            if frame is NOTHING_YET:
                self._mark_idle(camera)
            elif not self._is_known(frame.origin_key):
                self._take(frame, camera)

    def _take(self, frame: Frame, camera: Camera) -> None:
        repeats_last = frame.sha256_16 == self._last_sha256_16
        self._last_sha256_16 = frame.sha256_16
        self._last_frame_s = self._clock()
        if repeats_last:
            self._repeats += 1
        else:
            self._repeats = 0
            self._last_change_s = self._last_frame_s
            self._is_frozen = False
        if not self._is_frozen:
            self._mark_well(camera)
        self._hand_on(replace(frame, repeats_last=repeats_last), frame.origin_key, camera.is_live)
        if camera.is_live:
            self._check_frozen(camera)

    def _check_frozen(self, camera: Camera) -> None:
        still_s = self._last_frame_s - self._last_change_s
        if self._repeats >= FROZEN_FRAMES and still_s >= FROZEN_S:
            self._is_frozen = True
            raise CameraError(
                f"{camera.description}: stands still, the same picture {self._repeats + 1} times in {still_s:.0f} s"
            )

    def _hand_on(self, taken: Taken, key: str | None, is_live: bool) -> None:
        self._health.beat("camera")
        if is_live:
            reason = self._queue.put_newest(taken)
            if reason is not None:
                self._health.count_dropped(reason)
            return
        while not self._stop_event.is_set():
            if self._queue.put_waiting(taken, SLICE_S):
                self._remember(key)
                return
            self._health.beat("camera")

    def _is_known(self, key: str | None) -> bool:
        return key is not None and key in self._handed_on

    def _remember(self, key: str | None) -> None:
        if key is not None:
            self._handed_on[key] = None
            if len(self._handed_on) > KEYS_REMEMBERED:
                self._handed_on.popitem(last=False)

    def _mark_well(self, camera: Camera) -> None:
        """The camera works: tell it where it was not so before."""
        if self._well_since_s is None or self._is_idle:
            self._health.camera_state("open", camera.description)
        if self._well_since_s is None:
            self._well_since_s = self._clock()
            if self._is_lost:
                log.info("%s: camera is back", camera.description)
        self._is_lost = self._is_idle = False

    def _mark_idle(self, camera: Camera) -> None:
        self._last_change_s = self._clock()  # nothing to give is as good as a new frame: it does not stand still
        if self._well_since_s is None:
            self._mark_well(camera)
        if not self._is_idle and self._clock() - self._last_frame_s >= IDLE_AFTER_S:
            self._is_idle = True
            self._health.camera_state("idle", f"{camera.description}: no new picture")

    def _wait_after(self, error: CameraError) -> None:
        """Tell that the camera is lost, once in the log, and wait before it is opened again."""
        if self._well_since_s is not None and self._last_change_s - self._well_since_s >= WELL_S:
            self._failures = 0
        self._well_since_s = None  # it is well no more: the next failure to open is the second in a row
        pause_s = min(FIRST_PAUSE_S * 2**self._failures, LONGEST_PAUSE_S)
        pause_s *= 1 + JITTER * (2 * self._jitter() - 1)
        self._failures = min(self._failures + 1, 16)  # 2**16 s is far beyond the longest pause
        if not self._is_lost:
            log.warning("camera lost: %s", error)
        self._is_lost, self._is_idle = True, False
        state: Literal["frozen", "lost"] = "frozen" if self._is_frozen else "lost"
        self._health.camera_state(state, f"{error}; next attempt in {pause_s:.0f} s")
        while pause_s > 0 and not self._stop_event.is_set():
            self._health.beat("camera")
            if self._sleep(min(pause_s, SLICE_S)):
                return
            pause_s -= SLICE_S
