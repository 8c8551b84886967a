"""Real fields, and what goes wrong between slide and file, made from them on purpose.

Sizes are shares of a red cell's diameter, so that one degradation means the same at every magnification. Every function
returns a new array; `rng` decides all that is left open.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.random import Generator

from agent.domain import Box, Pixels

DATA = Path(__file__).parents[2].parent / "shared" / "data"
CLASSES = ("WBC", "RBC", "platelet")
"""The classes of the label files, by their number."""

RED_CELL = "RBC"


@dataclass(frozen=True, slots=True, eq=False)
class RealField:
    """One labelled field. red_cells: their boxes. red_cell_px: median size of red cells on this device. cells: all."""

    source: str
    pixels_bgr: Pixels
    red_cells: tuple[Box, ...]
    red_cell_px: float
    cells: tuple[tuple[str, Box], ...] = ()


def real_fields(split: str, source: str, limit: int | None = None) -> list[RealField]:
    """The fields of one device and split in the order of the list; empty where the data is absent."""
    index = DATA / "fields.csv"
    if not index.is_file():
        return []
    with index.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["split"], row["source"]) == (split, source)]
    read = [_read(DATA / row["path"]) for row in rows[:limit]]
    red_cells = [tuple(box for name, box in cells if name == RED_CELL) for _, cells in read]
    sizes = [(box.width_px * box.height_px) ** 0.5 for boxes in red_cells for box in boxes]
    typical_px = float(np.median(sizes)) if sizes else 80.0
    return [
        RealField(source, pixels, boxes, typical_px, cells)
        for (pixels, cells), boxes in zip(read, red_cells, strict=True)
    ]


def _read(path: Path) -> tuple[Pixels, tuple[tuple[str, Box], ...]]:
    pixels = cv2.imread(str(path))
    assert pixels is not None, path
    height, width = pixels.shape[:2]
    cells = []
    for line in (path.parents[1] / "labels" / f"{path.stem}.txt").read_text().splitlines():
        label, *numbers = line.split()
        x, y, w, h = (float(number) for number in numbers)
        box = Box((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        cells.append((CLASSES[int(label)], box))
    return pixels, tuple(cells)


def with_noise(pixels: Pixels, rng: Generator, sigma: float = 2.0) -> Pixels:
    """Fresh noise of a sensor, grey levels."""
    return _levels(pixels + rng.normal(0, sigma, pixels.shape))


def with_gain(pixels: Pixels, gain: float | np.ndarray) -> Pixels:
    return _levels(pixels.astype(np.float32) * gain)


def as_jpeg(pixels: Pixels, quality: int) -> Pixels:
    _, coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)


def defocused(pixels: Pixels, rng: Generator, sigma_px: float) -> Pixels:
    """A Gaussian or a disc of the same spread, then noise: the sensor is behind the optics."""
    if rng.random() < 0.5:
        soft = cv2.GaussianBlur(pixels, (0, 0), sigma_px)
    else:
        radius = 2 * sigma_px  # a disc of radius r spreads by r / 2 along each axis
        y, x = np.mgrid[-int(radius) - 1 : int(radius) + 2, -int(radius) - 1 : int(radius) + 2]
        disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1).astype(np.float32)
        soft = cv2.filter2D(pixels, -1, disc / disc.sum(), borderType=cv2.BORDER_REFLECT)
    return with_noise(np.asarray(soft, np.uint8), rng)


def smeared(pixels: Pixels, rng: Generator, length_px: float) -> Pixels:
    """The stage moved by this much during the exposure, in any direction."""
    side = int(length_px) + 3 | 1
    middle, turn = side // 2, rng.uniform(0, np.pi)
    way = np.asarray([np.cos(turn), np.sin(turn)]) * length_px / 2
    ends = [tuple(int(part) for part in np.round((middle + sign * way) * 16)) for sign in (-1, 1)]
    line = np.zeros((side, side), np.float32)
    cv2.line(line, ends[0], ends[1], 1.0, 1, cv2.LINE_AA, 4)
    soft = cv2.filter2D(pixels, -1, line / line.sum(), borderType=cv2.BORDER_REFLECT)
    return with_noise(np.asarray(soft, np.uint8), rng)


def bare_glass(field: RealField, rng: Generator) -> Pixels:
    """The field without what lay on it: its own ground in colour and unevenness, and noise."""
    height, width = field.pixels_bgr.shape[:2]
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x + y * y], -1)
    grey = cv2.cvtColor(field.pixels_bgr, cv2.COLOR_BGR2GRAY)
    bright = grey >= np.percentile(grey, 85)
    plane = np.stack(
        [
            terms @ np.linalg.lstsq(terms[bright], field.pixels_bgr[..., channel][bright].astype(float), rcond=None)[0]
            for channel in range(3)
        ],
        -1,
    )
    low, high = np.percentile(field.pixels_bgr[bright], [5, 95], axis=0)  # no extrapolation beyond the ground's levels
    return with_noise(_levels(np.clip(plane, low, high)), rng, float(rng.uniform(1, 3)))


def lonely_cell(field: RealField, rng: Generator) -> Pixels:
    """Bare glass with a single red cell of the field on it, with soft seams; the glass alone where no cell is whole."""
    glass = bare_glass(field, rng)
    height, width = glass.shape[:2]
    whole = [
        box
        for box in field.red_cells
        if min(box.x_min, box.y_min) > 4 and box.x_max < width - 4 and box.y_max < height - 4
    ]
    box = whole[int(rng.integers(len(whole)))]
    (x, y), axes = box.centre_px, (round(box.width_px * 0.55 + 3), round(box.height_px * 0.55 + 3))
    mask = np.zeros((height, width), np.float32)
    cv2.ellipse(mask, (round(x), round(y)), axes, 0, 0, 360, 1.0, -1, cv2.LINE_AA)
    mask = cv2.GaussianBlur(mask, (0, 0), 0.03 * field.red_cell_px)[..., None]
    return _levels(field.pixels_bgr * mask + glass * (1 - mask))


def has_whole_cell(field: RealField) -> bool:
    height, width = field.pixels_bgr.shape[:2]
    return any(
        min(box.x_min, box.y_min) > 4 and box.x_max < width - 4 and box.y_max < height - 4 for box in field.red_cells
    )


def overexposed(field: RealField, rng: Generator) -> Pixels:
    """So bright that the inside of the red cells is white too."""
    levels = [
        np.median(field.pixels_bgr[int(box.y_min) : int(box.y_max), int(box.x_min) : int(box.x_max)].min(axis=2))
        for box in field.red_cells
        if box.width_px > 4 and box.height_px > 4
    ]
    red_cell = float(np.median(levels)) if levels else 150.0
    return with_gain(field.pixels_bgr, rng.uniform(1.3, 2.0) * 255 / red_cell)


def wrong_white(pixels: Pixels, rng: Generator) -> Pixels:
    """One channel at about half: a lamp of another colour, a white balance that was never set."""
    gain = np.ones(3, np.float32)
    gain[int(rng.integers(3))] = rng.uniform(0.35, 0.55)
    return with_gain(pixels, gain)


Make = Callable[[RealField, Generator], Pixels]

GOOD: dict[str, Make] = {
    "as it is": lambda field, _rng: field.pixels_bgr,
    "lamp a little off": lambda field, rng: with_gain(field.pixels_bgr, rng.uniform(0.8, 1.05)),
    "noisy sensor": lambda field, rng: with_noise(field.pixels_bgr, rng, 4.0),
    "coarse JPEG": lambda field, _rng: as_jpeg(field.pixels_bgr, 60),
    "a touch soft": lambda field, rng: with_noise(
        np.asarray(cv2.GaussianBlur(field.pixels_bgr, (0, 0), 0.01 * field.red_cell_px), np.uint8), rng, 1.0
    ),
    "a lonely cell": lonely_cell,
}
BAD: dict[str, Make] = {
    "blurred": lambda field, rng: defocused(field.pixels_bgr, rng, rng.uniform(0.06, 0.12) * field.red_cell_px),
    "moving": lambda field, rng: smeared(field.pixels_bgr, rng, rng.uniform(0.2, 0.6) * field.red_cell_px),
    "dark": lambda field, rng: with_gain(field.pixels_bgr, rng.uniform(0.02, 0.11)),
    "saturated": overexposed,
    "colour-cast": lambda field, rng: wrong_white(field.pixels_bgr, rng),
    "empty": bare_glass,
}


def _levels(values: np.ndarray) -> Pixels:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
