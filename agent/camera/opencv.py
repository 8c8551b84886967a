"""What the sources that read through OpenCV's VideoCapture share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import cv2
import numpy as np

from agent.domain import Pixels
from agent.errors import CameraError

# The switch moved from `cv2` to `cv2.utils.logging` in a 4.x release; both stand in the range that we install.
_opencv_log: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging
SILENT = 0
"""LOG_LEVEL_SILENT of opencv2/core/utils/logger.defines.hpp."""


@contextmanager
def quiet_opencv() -> Iterator[None]:
    """None of OpenCV's log lines inside the block: they hold traces and addresses; our messages say it better.

    The level belongs to the process. Two threads may leave it quiet for each other a little longer; nothing is lost.
    """
    level = _opencv_log.setLogLevel(SILENT)
    try:
        yield
    finally:
        _opencv_log.setLogLevel(level)


def check_capture_size(capture: cv2.VideoCapture, max_megapixels: float, name: str) -> None:
    """Release a capture whose pictures need more memory than we allow, and raise CameraError."""
    width_px = int(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
    height_px = int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
    if width_px * height_px > max_megapixels * 1e6:
        capture.release()
        raise CameraError(
            f"{name}: {width_px} x {height_px} pixels = {width_px * height_px / 1e6:.1f} megapixels, "
            f"the limit is {max_megapixels:g} (camera.max_megapixels)"
        )


def captured_pixels(taken: tuple[bool, Any], name: str) -> Pixels | None:
    """The picture of `VideoCapture.read` or `retrieve`; None where there is none.

    Raises CameraError where it is not B G R of 8 bits: OpenCV hands on what it cannot convert.
    """
    is_taken, array = taken
    if not is_taken or array is None:
        return None
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise CameraError(f"{name}: it gives {array.shape} {array.dtype}, which is no colour picture of 8 bits")
    return cast(Pixels, np.ascontiguousarray(array))
