"""The latest frame and what became of it: the pipeline puts it here, whoever looks on takes it as a frozen value.

    pipeline --show--> Latest --field, frame--> the page

Nothing waits here for anybody: the newest replaces the one before, seen or not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime

import cv2
import numpy as np

from agent.domain import Cell, FieldResult, Frame, FrameQuality, Pixels, SlidePlace

LONGEST_SIDE_PX = 1600
"""px; a larger frame is kept smaller: a tablet shows no more, and 80 megapixels would hold 240 MB of memory."""

SCALED_EVERY_S = 0.5
"""s; of frames that give no field and must be made smaller so many are kept, however fast the camera is. Scaling 12
megapixels takes some 10 ms."""


@dataclass(frozen=True, slots=True, eq=False)
class SeenFrame:
    """A frame and what became of it.

    number: from 1 since the start, in the order in which they were seen. at_monotonic_s: when it was done with.
    width_px, height_px: of the frame, to whose pixels boxes refer. pixels_bgr: the picture, perhaps smaller.
    dropped: why it gave no field; None for a field, which alone has cells, quality and place.
    """

    number: int
    sid: str
    at_monotonic_s: float
    captured_at: datetime
    source: str
    width_px: int
    height_px: int
    pixels_bgr: Pixels
    dropped: str | None = None
    cells: tuple[Cell, ...] = ()
    quality: FrameQuality | None = None
    place: SlidePlace | None = None
    took_ms: float | None = None


class Latest:
    """Holds the newest frame and the newest field; written by one thread, read by any."""

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._lock = threading.Lock()
        self._number = 0
        self._frame: SeenFrame | None = None
        self._field: SeenFrame | None = None
        self._scaled_at_s = -SCALED_EVERY_S

    def show(self, frame: Frame, sid: str, field: FieldResult | None, dropped: str | None) -> None:
        """A frame is done with: it gave this field, or was dropped for this reason."""
        now_s = self._monotonic_s()
        is_large = max(frame.width_px, frame.height_px) > LONGEST_SIDE_PX
        if field is None and is_large and now_s - self._scaled_at_s < SCALED_EVERY_S:
            return
        if is_large:
            self._scaled_at_s = now_s
        self._number += 1
        seen = SeenFrame(
            self._number,
            sid,
            now_s,
            frame.captured_at,
            frame.source,
            frame.width_px,
            frame.height_px,
            at_most(frame.pixels_bgr, LONGEST_SIDE_PX),
            dropped,
            *(() if field is None else (field.cells, field.quality, field.place, field.timing_ms.get("total"))),
        )
        with self._lock:
            self._frame = seen
            self._field = self._field if field is None else seen

    def read(self) -> tuple[SeenFrame | None, SeenFrame | None]:
        """The newest frame, and the newest that gave a field; None where there is none yet."""
        with self._lock:
            return self._frame, self._field


def at_most(pixels_bgr: Pixels, side_px: int) -> Pixels:
    """The picture itself, or a smaller copy whose longer side has so many pixels."""
    scale = side_px / max(pixels_bgr.shape[:2])
    if scale >= 1:
        return pixels_bgr
    return np.asarray(cv2.resize(pixels_bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
