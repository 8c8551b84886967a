"""Frames of any shape into the detector's square, and boxes back."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from agent.domain import Pixels


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a frame lies in the square: input px = frame px * scale + offset."""

    scale_x: float
    scale_y: float
    offset_x_px: int
    offset_y_px: int


def letterbox(pixels: Pixels, side_px: int, fill: int) -> tuple[Pixels, Placement]:
    """The frame scaled with its proportions kept into the middle of a square; the colour order stays.

    Returns a new array (side_px, side_px, 3). Shrinking averages over areas, so that small cells do not alias away.
    """
    height, width = pixels.shape[:2]
    scale = side_px / max(height, width)
    new_width, new_height = max(1, round(width * scale)), max(1, round(height * scale))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    offset_x, offset_y = (side_px - new_width) // 2, (side_px - new_height) // 2
    square = np.full((side_px, side_px, 3), fill, np.uint8)
    inner = square[offset_y : offset_y + new_height, offset_x : offset_x + new_width]
    inner[:] = cv2.resize(pixels, (new_width, new_height), interpolation=how)
    return square, Placement(new_width / width, new_height / height, offset_x, offset_y)
