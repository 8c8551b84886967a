"""Dirt, grains of stain, fibres and air bubbles drawn into pictures, and cells smeared: none of them has a name.

Nobody has labelled such pictures of ours, so they are drawn. Training meets LEARNT; HELD_BACK is for measuring alone:
how far what was learnt reaches to what was not. All functions take and give uint8 RGB, (height, width, 3), and leave
their input alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from models.common.labels import Rgb

Mask = NDArray[np.float32]
"""How much of each pixel is covered, 0 to 1, (side, side)."""

FINE = 4
"""Outlines are drawn this many times as large and shrunk: their edges are then as soft as a camera's."""


def dirt(square: Rgb, rng: Generator) -> Rgb:
    """An opaque dark piece with a ragged outline, in the middle of a square picture, 0.4 to 0.9 of its side long."""
    side = square.shape[0]
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radii = np.ones(64)
    for wave in range(2, 9):
        ragged = rng.uniform(0.02, 0.3) / wave**0.5
        radii += ragged * rng.normal() * np.cos(wave * angles + rng.uniform(0, 2 * np.pi))
    radii = np.clip(radii, 0.25, 2.5)
    radii *= side * rng.uniform(0.2, 0.45) / radii.max()
    points = np.stack((radii * np.cos(angles), radii * np.sin(angles) * rng.uniform(0.3, 1)), 1)
    points = points @ turned(rng.uniform(0, 2 * np.pi)) + side / 2
    mask = canvas(side)
    cv2.fillPoly(mask, [(points * FINE).astype(np.int32)], 255)
    body = uneven(side, np.clip(rng.uniform(10, 120) + rng.normal(0, 12, 3), 0, 255), 25, rng)
    return laid_on(square, body, shrunk(mask, side, rng))


def precipitate(square: Rgb, rng: Generator) -> Rgb:
    """A heap of purple to black grains of stain, sharp and apart, 0.4 to 0.9 of the side wide."""
    side = square.shape[0]
    mask = canvas(side)
    spread = side * rng.uniform(0.11, 0.2)
    for x, y in rng.normal(0, spread, (rng.integers(8, 70), 2)) * (1, rng.uniform(0.4, 1)) + side / 2:
        radius = max(1, round(side * FINE * rng.uniform(0.012, 0.05)))
        cv2.circle(mask, (round(x * FINE), round(y * FINE)), radius, 255, -1)
    colour = np.array((rng.uniform(40, 120), rng.uniform(5, 60), rng.uniform(40, 120)))
    body = uneven(side, colour, 15, rng)
    return laid_on(square, body, shrunk(mask, side, rng) * rng.uniform(0.7, 1))


def fibre(square: Rgb, rng: Generator) -> Rgb:
    """A bent dark thread through the square."""
    side = square.shape[0]
    along = np.linspace(-0.6, 0.6, 60)
    bend = rng.uniform(-0.6, 0.6) * along**2 + rng.uniform(-0.5, 0.5) * along**3
    points = np.stack((along, bend), 1) @ turned(rng.uniform(0, 2 * np.pi)) * side + side / 2
    mask = canvas(side)
    width = max(1, round(side * FINE * rng.uniform(0.03, 0.12)))
    cv2.polylines(mask, [(points * FINE).astype(np.int32)], False, 255, width)
    body = uneven(side, np.clip(rng.uniform(20, 150) + rng.normal(0, 25, 3), 0, 255), 15, rng)
    return laid_on(square, body, shrunk(mask, side, rng) * rng.uniform(0.6, 1))


def bubble(square: Rgb, rng: Generator) -> Rgb:
    """A round bubble: dark rim, its inside as bright as the glass around or brighter."""
    side = square.shape[0]
    middle, radius = (side * FINE // 2,) * 2, round(side * FINE * rng.uniform(0.2, 0.42))
    inside, rim = canvas(side), canvas(side)
    cv2.circle(inside, middle, radius, 255, -1)
    cv2.circle(rim, middle, radius, 255, max(1, round(radius * rng.uniform(0.08, 0.3))))
    lit = laid_on(
        square, np.full(square.shape, rng.uniform(215, 255)), shrunk(inside, side, rng) * rng.uniform(0.2, 0.9)
    )
    return laid_on(lit, np.full(square.shape, rng.uniform(20, 90)), shrunk(rim, side, rng) * rng.uniform(0.6, 1))


LEARNT: Mapping[str, Callable[[Rgb, Generator], Rgb]] = {"dirt": dirt, "precipitate": precipitate}
HELD_BACK: Mapping[str, Callable[[Rgb, Generator], Rgb]] = {"fibre": fibre, "bubble": bubble}
KINDS = {**LEARNT, **HELD_BACK}


def with_debris(pixels: Rgb, rng: Generator) -> Rgb:
    """A square picture with one of LEARNT in its middle."""
    return list(LEARNT.values())[rng.integers(len(LEARNT))](pixels, rng)


Place = tuple[int, int, int]
"""Of a square in a field: left, top, side in px."""


def littered(pixels: Rgb, boxes: NDArray[np.float32], rng: Generator, most: int = 4) -> Rgb:
    """A field with up to so many of LEARNT between its cells. boxes: of the cells, as for `free_place`."""
    littered = pixels.copy()
    height, width = pixels.shape[:2]
    for _ in range(rng.integers(1, most + 1)):
        side = int(np.exp(rng.uniform(np.log(LEAST_SIDE_PX), np.log(min(120, height, width)))))
        if place := free_place(boxes, height, width, side, rng):
            draw_at(littered, place, dirt if side < GRAINS_FROM_PX else with_debris, rng)
    return littered


def free_place(boxes: NDArray[np.float32], height: int, width: int, side: int, rng: Generator) -> Place | None:
    """A square of this side in a picture that hides less than MOST_HIDDEN of each cell; None where none is met.

    boxes: of the cells, (boxes, 4): x_min, y_min, x_max, y_max in px.
    """
    for _ in range(TRIES):
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        if share_hidden(boxes, left, top, side) < MOST_HIDDEN:
            return left, top, side
    return None


def draw_at(pixels: Rgb, place: Place, draw: Callable[[Rgb, Generator], Rgb], rng: Generator) -> None:
    """A piece of debris drawn into the picture itself."""
    left, top, side = place
    part = np.s_[top : top + side, left : left + side]
    pixels[part] = draw(pixels[part], rng)


MOST_HIDDEN = 0.1
TRIES = 10
LEAST_SIDE_PX = 16
GRAINS_FROM_PX = 28
"""A heap of grains that is seen smaller than this may as well be a platelet."""


def share_hidden(boxes: NDArray[np.float32], left: int, top: int, side: int) -> float:
    """The largest share of one of the boxes that lies under a square."""
    low = np.maximum(boxes[:, :2], (left, top))
    high = np.minimum(boxes[:, 2:], (left + side, top + side))
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((np.clip(high - low, 0, None).prod(1) / np.maximum(areas, 1)).max(initial=0))


def smeared(pixels: Rgb, share: float, degrees: float) -> Rgb:
    """Drawn out along a line, as a cell that burst when the drop was spread. share: of the side, the line's length."""
    length = max(3, round(pixels.shape[0] * share))
    line = np.zeros((length, length), np.float32)
    line[length // 2] = 1
    middle = ((length - 1) / 2, (length - 1) / 2)
    streak = cv2.warpAffine(line, cv2.getRotationMatrix2D(middle, degrees, 1.0), (length, length))
    return np.asarray(cv2.filter2D(pixels, -1, streak / streak.sum(), borderType=cv2.BORDER_REPLICATE), np.uint8)


def turned(angle: float) -> NDArray[np.float64]:
    """(2, 2); turns rows of x, y by an angle in radians."""
    return np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))


def canvas(side: int) -> NDArray[np.uint8]:
    """An empty mask, FINE times as large as the square."""
    return np.zeros((side * FINE, side * FINE), np.uint8)


def uneven(side: int, colour: NDArray[np.float64], most: float, rng: Generator) -> NDArray[np.float64]:
    """A square of a colour, (side, side, 3), 0 to 255, of uneven brightness: 2 to `most` grey levels of deviation."""
    deviation = rng.uniform(2, most)
    noise = cv2.GaussianBlur(rng.normal(0, 1, (side, side)).astype(np.float32), (0, 0), max(0.5, side / 40))
    grain = np.asarray(noise * (deviation / max(1e-6, float(noise.std()))), np.float32)
    return np.asarray(np.clip(colour + grain[..., None], 0, 255))


def shrunk(mask: NDArray[np.uint8], side: int, rng: Generator) -> Mask:
    """A mask drawn FINE times as large, at its size; in focus or a little out of it."""
    small = cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.GaussianBlur(small, (0, 0), max(0.3, side / 128 * rng.uniform(0.3, 2.5))) / 255, np.float32)


def laid_on(pixels: Rgb, body: NDArray[np.float64], mask: Mask) -> Rgb:
    """`body` where the mask covers, the picture where it does not."""
    return np.asarray(pixels * (1 - mask[..., None]) + body * mask[..., None], np.uint8)
