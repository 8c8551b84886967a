"""Training pictures: cut, placed, augmented and batched. Nothing here ever touches the split `test`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from models.common.augment import vary_look
from models.common.debris import littered
from models.common.labels import FieldImage, Rgb, clip_boxes, read_boxes, read_rgb

CentredBox = tuple[float, float, float, float]
"""Centre x, centre y, width, height in pixels."""


def central_box(pixels: Rgb) -> CentredBox:
    """The stained body nearest to the centre of a single-cell image: centre x, y, width, height in pixels.

    Nuclei and platelets absorb red light, red cells hardly do: Otsu's threshold on the red channel, then the largest
    component of those that come near the centre. A nucleus is smaller than its cell: the box is widened by 1.35.
    """
    red = cv2.GaussianBlur(pixels[..., 0], (0, 0), 1.5)
    height, width = red.shape
    level, _ = cv2.threshold(red, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = cv2.morphologyEx((red < level).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((5, 5), np.uint8))
    count, _, stats, _ = cv2.connectedComponentsWithStats(mask)
    best, best_score = None, 0.0
    for x, y, w, h, area in stats[1:count]:
        gap_x = max(x - width / 2, width / 2 - (x + w), 0)
        gap_y = max(y - height / 2, height / 2 - (y + h), 0)
        score = area / (1 + (np.hypot(gap_x, gap_y) / 6) ** 2)
        if area >= 40 and score > best_score:
            best, best_score = (x + w / 2, y + h / 2, 1.35 * w, 1.35 * h), score
    if best is None or max(best[2:]) > 0.95 * max(width, height):
        return width / 2, height / 2, 0.45 * width, 0.45 * height
    return best


@dataclass(frozen=True, slots=True, eq=False)
class LabelledField:
    """Decoded pixels and boxes of a field, (boxes, 5): class, x_min, y_min, x_max, y_max in pixels."""

    pixels: Rgb
    boxes: NDArray[np.float32]


def load_fields(fields: list[FieldImage]) -> list[LabelledField]:
    """Decode fields into memory."""
    loaded = []
    for field in fields:
        pixels = read_rgb(field.path)
        loaded.append(LabelledField(pixels, read_boxes(field, pixels.shape[1], pixels.shape[0])))
    return loaded


class AugmentedFields(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """An endless stream of training fields: single or mosaic of four, any scale, turned, mirrored, any laboratory.

    Items: uint8 RGB (3, size, size) and boxes (boxes, 5) in its pixels. size_px may be changed between epochs through
    a new dataset object. pools: fields, and how often one of them is drawn. scales: of a single field, 1 = as large as
    fits. plain_share: of the pictures, keeps the look of its own laboratory. debris_share: of them, gets dirt and
    grains of stain between its cells.
    """

    def __init__(
        self,
        pools: Sequence[tuple[list[LabelledField], float]],
        size_px: int,
        seed: int,
        mosaic_share: float = 0.5,
        scales: tuple[float, float] = (0.5, 1.5),
        plain_share: float = 0.125,
        debris_share: float = 0.0,
    ):
        filled = [(fields, share) for fields, share in pools if fields and share > 0]
        self.pools = [fields for fields, _ in filled]
        self.shares = np.array([share for _, share in filled]) / sum(share for _, share in filled)
        self.size_px, self.seed = size_px, seed
        self.mosaic_share, self.scales = mosaic_share, scales
        self.plain_share, self.debris_share = plain_share, debris_share

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        rng = np.random.default_rng((self.seed, worker.id if worker else 0))
        while True:
            pixels, boxes = self._mosaic(rng) if rng.random() < self.mosaic_share else self._single(rng)
            if rng.random() < self.debris_share:
                pixels = littered(pixels, boxes[:, 1:], rng)
            pixels = vary_look(pixels, rng, 0.8, self.plain_share)
            yield torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), torch.from_numpy(boxes)

    def _pick(self, rng: Generator) -> LabelledField:
        pool = self.pools[rng.choice(len(self.pools), p=self.shares)]
        return pool[rng.integers(len(pool))]

    def _single(self, rng: Generator) -> tuple[Rgb, NDArray[np.float32]]:
        field = self._pick(rng)
        height, width = field.pixels.shape[:2]
        fit = self.size_px / max(height, width)
        return place(field, self.size_px, fit * float(np.exp(rng.uniform(*np.log(self.scales)))), rng)

    def _mosaic(self, rng: Generator) -> tuple[Rgb, NDArray[np.float32]]:
        """Four fields in the quarters around a random point; each keeps its own scale."""
        size = self.size_px
        canvas = np.empty((size, size, 3), np.uint8)
        split_x, split_y = (int(size * rng.uniform(0.3, 0.7)) for _ in range(2))
        found = []
        for left, top, right, bottom in (
            (0, 0, split_x, split_y),
            (split_x, 0, size, split_y),
            (0, split_y, split_x, size),
            (split_x, split_y, size, size),
        ):
            field = self._pick(rng)
            fit = size / max(field.pixels.shape[:2]) * float(np.exp(rng.uniform(np.log(0.35), np.log(1.1))))
            pixels, boxes = place(field, size, fit, rng, fill=(right - left, bottom - top))
            canvas[top:bottom, left:right] = pixels[: bottom - top, : right - left]
            boxes = clip_boxes(boxes, right - left, bottom - top)
            boxes[:, 1:] += np.array([left, top, left, top], np.float32)
            found.append(boxes)
        return canvas, np.concatenate(found)


def place(
    field: LabelledField, size_px: int, scale: float, rng: Generator, fill: tuple[int, int] | None = None
) -> tuple[Rgb, NDArray[np.float32]]:
    """The field scaled, turned by quarters, mirrored and shifted on a grey square; boxes follow and are clipped.

    fill: place it so that it covers this width and height from the upper left corner as far as it reaches.
    """
    pixels, boxes = field.pixels, field.boxes
    stretch = float(np.exp(rng.normal(0, 0.06)))
    height, width = pixels.shape[:2]
    new_width, new_height = max(8, round(width * scale * stretch)), max(8, round(height * scale / stretch))
    shrink = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    pixels = cv2.resize(pixels, (new_width, new_height), interpolation=shrink)
    ratio = np.array([new_width / width, new_height / height] * 2, np.float32)
    boxes = np.concatenate((boxes[:, :1], boxes[:, 1:] * ratio), 1)
    pixels, boxes = turn(pixels, boxes, int(rng.integers(4)), bool(rng.integers(2)))
    height, width = pixels.shape[:2]
    room_x, room_y = (fill[0] - width, fill[1] - height) if fill else (size_px - width, size_px - height)
    shift_x, shift_y = (int(rng.integers(min(room, 0), max(room, 0) + 1)) for room in (room_x, room_y))
    canvas = np.full((size_px, size_px, 3), 114, np.uint8)
    left, top = max(shift_x, 0), max(shift_y, 0)
    part = pixels[
        max(-shift_y, 0) : max(-shift_y, 0) + size_px - top, max(-shift_x, 0) : max(-shift_x, 0) + size_px - left
    ]
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    boxes[:, 1:] += np.array([shift_x, shift_y, shift_x, shift_y], np.float32)
    return canvas, clip_boxes(boxes, size_px, size_px)


def turn(pixels: Rgb, boxes: NDArray[np.float32], quarters: int, mirror: bool) -> tuple[Rgb, NDArray[np.float32]]:
    """Quarter turns against the clock, then mirrored left to right; boxes follow."""
    boxes = boxes.copy()
    for _ in range(quarters):
        width = pixels.shape[1]
        pixels = np.rot90(pixels)
        x_min, y_min, x_max, y_max = boxes[:, 1:].T.copy()
        boxes[:, 1:] = np.stack((y_min, width - x_max, y_max, width - x_min), 1)
    if mirror:
        pixels = pixels[:, ::-1]
        boxes[:, [1, 3]] = pixels.shape[1] - boxes[:, [3, 1]]
    return pixels, boxes


def collate_fields(batch: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures (batch, 3, size, size) uint8; boxes (batch, most, 5), padded; which of them are real (batch, most)."""
    most = max(1, max(len(boxes) for _, boxes in batch))
    padded = torch.zeros(len(batch), most, 5)
    real = torch.zeros(len(batch), most, dtype=torch.bool)
    for index, (_, boxes) in enumerate(batch):
        padded[index, : len(boxes)] = boxes
        real[index, : len(boxes)] = True
    return torch.stack([pixels for pixels, _ in batch]), padded, real
