"""The gate: whether a frame is worth the models' time. A refused frame is a value with its reasons, not an error."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np

from agent.config import QualitySection
from agent.domain import FrameQuality, Pixels

WORKING_SIDE_PX: Final = 640
"""px; longer side at which brightness, contrast and focus are measured. Focus depends on it, so it is fixed: frames of
one optics at two camera resolutions then have comparable figures, and 80 megapixels cost no more than one."""

FULL_WHITE: Final = 253
"""A pixel counts as clipped when all its channels reach this: JPEG moves full white by a level or two."""

CLIPPING_SAMPLE_PX: Final = 300_000
"""Pixels that are looked at for clipping; a share of 1 % is then known to 0.02 %. They are picked, not averaged: the
mean of a white and a grey pixel is no longer white."""


def assess_quality(pixels_bgr: Pixels, section: QualitySection) -> FrameQuality:
    """The gate's verdict on a frame: any of `dark`, `saturated`, `featureless`, `blurred`, or accepted.

    An empty field is accepted as long as it shows texture: no cells is an answer, not a bad frame. The focus of a
    picture that is not quite flat hardly falls below 0.5: rounding to whole grey levels alone gives that.
    """
    grey = cv2.cvtColor(_shrink(pixels_bgr), cv2.COLOR_BGR2GRAY)
    brightness, contrast = (float(value[0, 0]) for value in cv2.meanStdDev(grey))
    # 32-bit float: in 8 bits the negative half of the Laplacian would be cut off.
    focus = float(cv2.Laplacian(grey, cv2.CV_32F).var(dtype=np.float64))
    clipped_pct = _clipped_pct(pixels_bgr)
    faults = {
        "dark": brightness < section.min_brightness,
        "saturated": clipped_pct > section.max_clipped_pct,
        "featureless": contrast < section.min_contrast,
        "blurred": focus < section.min_focus,
    }
    reasons = tuple(reason for reason, is_so in faults.items() if is_so)
    return FrameQuality(is_accepted=not reasons, reasons=reasons, focus=focus, clipped_pct=clipped_pct)


def _shrink(pixels_bgr: Pixels) -> Pixels:
    """At most WORKING_SIDE_PX on the longer side; smaller frames stay as they are."""
    height_px, width_px = pixels_bgr.shape[:2]
    factor = WORKING_SIDE_PX / max(height_px, width_px)
    if factor >= 1:
        return pixels_bgr
    size = (max(1, round(width_px * factor)), max(1, round(height_px * factor)))
    return np.asarray(cv2.resize(pixels_bgr, size, interpolation=cv2.INTER_AREA), np.uint8)


def _clipped_pct(pixels_bgr: Pixels) -> float:
    """Share of pixels at full white, 0 to 100, from an even sample."""
    height_px, width_px = pixels_bgr.shape[:2]
    step = max(1, round((height_px * width_px / CLIPPING_SAMPLE_PX) ** 0.5))
    sample = np.ascontiguousarray(pixels_bgr[::step, ::step])
    white = cv2.inRange(sample, (FULL_WHITE,) * 3, (255,) * 3)
    return 100.0 * cv2.countNonZero(white) / white.size
