"""Crops for the classifier, cut as its training cut them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from typing import cast

import cv2
import numpy as np

from agent.analysis.cells import touches_edge
from agent.analysis.preprocessing import Look, Relook
from agent.domain import Box, Detection, Pixels


def cut_crop(pixels_bgr: Pixels, box: Box, margin: float) -> Pixels:
    """A square around the box, `margin` of its longer side wider on the whole; the colour order stays.

    Where the square reaches over the frame, the frame's edge is repeated. Returns (side, side, 3), a view of the frame
    where it lies inside, else a new array.
    """
    height, width = pixels_bgr.shape[:2]
    side = max(2, round(max(box.width_px, box.height_px) * (1 + margin)))
    x, y = box.centre_px
    left, top = round(x - side / 2), round(y - side / 2)
    before_x, before_y = max(0, -left), max(0, -top)
    after_x, after_y = max(0, left + side - width), max(0, top + side - height)
    part = pixels_bgr[top + before_y : top + side - after_y, left + before_x : left + side - after_x]
    if not (before_x or before_y or after_x or after_y):
        return part
    return np.asarray(cv2.copyMakeBorder(part, before_y, after_y, before_x, after_x, cv2.BORDER_REPLICATE), np.uint8)


class CropCutter:
    """Cuts what is to be classified from one picture: squares around boxes, in the look of the training pictures.

    pixels_bgr: uint8, (height, width, 3), B G R. margin: as in `cut_crop`. look: what the picture is brought to; None =
    light and stain stay as they are.
    """

    def __init__(self, pixels_bgr: Pixels, margin: float, look: Look | None) -> None:
        self._pixels_bgr = pixels_bgr
        self._margin = margin
        self._look = look

    def around(self, box: Box) -> Pixels:
        """The square crop of one cell, (side, side, 3)."""
        share = max(box.width_px, box.height_px) / min(self._pixels_bgr.shape[:2])
        return self._in_look(cut_crop(self._pixels_bgr, box, self._margin), share)

    def whole(self) -> Pixels:
        """The picture itself as one crop."""
        return self._in_look(whole_crop(self._pixels_bgr), 1.0)

    def _in_look(self, crop: Pixels, share: float) -> Pixels:
        return crop if self._relook is None else self._relook.cell(crop, share)

    @cached_property
    def _relook(self) -> Relook | None:
        return None if self._look is None else Relook.of(self._pixels_bgr, self._look)


def whole_crop(pixels_bgr: Pixels) -> Pixels:
    """A picture that is itself the crop of one cell, as the square that the classifier expects."""
    height, width = pixels_bgr.shape[:2]
    return cut_crop(pixels_bgr, Box(0, 0, width, height), 0.0)


def surrounded(pixels_bgr: Pixels, width_px: int) -> Pixels:
    """The picture in the middle of one that is so much wider on each side, its edge repeated."""
    sides = (width_px,) * 4
    return np.asarray(cv2.copyMakeBorder(pixels_bgr, *sides, cv2.BORDER_REPLICATE), np.uint8)


def central_detection(
    detections: Iterable[Detection], classes: Collection[str], width_px: int, height_px: int
) -> Detection | None:
    """Of the cells of these detector classes whose box holds the picture's middle, the one nearest to it."""
    x, y = width_px / 2, height_px / 2
    return min(
        (
            detection
            for detection in detections
            if detection.class_name in classes
            and detection.box.x_min <= x <= detection.box.x_max
            and detection.box.y_min <= y <= detection.box.y_max
        ),
        key=lambda detection: (detection.box.centre_px[0] - x) ** 2 + (detection.box.centre_px[1] - y) ** 2,
        default=None,
    )


def shown_detection(
    detections: Sequence[Detection], classes: Collection[str], width_px: int, height_px: int, min_score: float
) -> Detection | None:
    """The cell that a picture is about, of these detector classes: the one in its middle, however faint.

    Where none lies there the largest that is found with min_score, one that the picture's edge cuts taken for half as
    large: people's pictures are cut at the edge of a field, or are the field.
    """
    central = central_detection(detections, classes, width_px, height_px)
    if central is not None:
        return central

    def size(box: Box) -> float:
        return box.width_px * box.height_px * (0.5 if touches_edge(box, (width_px, height_px)) else 1.0)

    return max(
        (found for found in detections if found.class_name in classes and found.score >= min_score),
        key=lambda found: size(found.box),
        default=None,
    )


LARGEST_JPEG_BYTES = 256 * 1024
"""What brokers take without being asked; a crop has some 10 kB, a frame is made to fit."""


def encode_jpeg(pixels_bgr: Pixels, largest_bytes: int = LARGEST_JPEG_BYTES) -> bytes:
    """A picture as JPEG, first with less quality, then smaller, until it has at most so many bytes."""
    quality = 90
    while True:
        is_done, encoded = cv2.imencode(".jpg", pixels_bgr, (cv2.IMWRITE_JPEG_QUALITY, quality))
        jpeg = encoded.tobytes() if is_done else b""
        if len(jpeg) <= largest_bytes or max(pixels_bgr.shape[:2]) < 2:
            return jpeg
        if quality > 70:
            quality -= 10
        else:
            pixels_bgr = cast("Pixels", cv2.resize(pixels_bgr, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA))
