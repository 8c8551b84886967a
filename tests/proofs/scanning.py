"""A large picture of cells with known truth, and a stage that walks over it: for measuring how cells are counted once.

Everything is in pixels of the picture. A window's pixel p shows the picture's pixel turn(p) + corner.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone

import cv2
import numpy as np
from numpy.random import Generator

from agent.analysis.registration import Shift
from agent.camera.hashing import hash_pixels
from agent.camera.simulated import CellDensity, SimulatedSlide
from agent.domain import Box, Cell, CellStatus, Classification, Detection, Frame, Pixels
from tests.proofs.degrading import RealField

RED_CELL, PLATELET = "RBC", "platelet"
MARGIN_PX = 43
SEAM_PX = 4
"""A box that ends as near to a seam is taken to end there: by so much the detector's boxes are restless."""

LEAST_SEEN = 0.02
"""Of a cell; nobody could find a smaller sliver."""


@dataclass(frozen=True, slots=True)
class TrueCell:
    """identifier: the same in every piece of one slide."""

    identifier: int
    class_name: str
    box: Box


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """pixels_bgr: the whole picture; cells: all that is in it. seams_px: x and y at which real fields meet."""

    pixels_bgr: Pixels
    cells: tuple[TrueCell, ...]
    seams_px: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    def is_at_seam(self, box: Box) -> bool:
        """Whether the box reaches a seam, or nearly: what is there may be the half of a cell."""
        sides = (box.x_min, box.x_max), (box.y_min, box.y_max)
        return any(
            low - SEAM_PX <= seam <= high + SEAM_PX
            for (low, high), seams in zip(sides, self.seams_px, strict=True)
            for seam in seams
        )


@dataclass(frozen=True, slots=True)
class Window:
    """What the camera sees at one time. x, y: upper left corner. blur_px: out of focus."""

    x: float
    y: float
    turn: float = 0.0
    blur_px: float = 0.0


def crowded_slide(seed: int, nucleated_per_field: float = 4.0) -> SimulatedSlide:
    """A simulated slide with more nucleated cells than usual."""
    return SimulatedSlide(seed, density=CellDensity.per_field(22, nucleated_per_field, 2.5, 640 * 480 / 12.5**2))


def piece_of(slide: SimulatedSlide, left_px: int, top_px: int, size_px: tuple[int, int]) -> World:
    """A piece of a simulated slide, with its own corner at (0, 0)."""
    scale, (width_px, height_px) = slide.px_per_um, size_px
    corner_um = (left_px / scale, top_px / scale)
    cells = []
    for cell in slide.cells_in(*corner_um, (left_px + width_px) / scale, (top_px + height_px) / scale):
        area = cell.outline_area
        edges_um = (area.x_min_um, area.y_min_um, area.x_max_um, area.y_max_um)
        box = Box(*(um * scale - corner for um, corner in zip(edges_um, (left_px, top_px) * 2, strict=True)))
        cells.append(TrueCell(hash(cell.identifier), cell.class_name, box))
    return World(slide.render(*corner_um, width_px, height_px), tuple(cells))


def simulated_world(seed: int, width_px: int, height_px: int, nucleated_per_field: float = 4.0) -> World:
    return piece_of(crowded_slide(seed, nucleated_per_field), 0, 0, (width_px, height_px))


def world_of_fields(fields: Sequence[RealField], columns: int) -> World:
    """Real fields of one device side by side. Where two meet, at the seams, cells end."""
    height, width = fields[0].pixels_bgr.shape[:2]
    alike = [field for field in fields if field.pixels_bgr.shape == fields[0].pixels_bgr.shape]
    rows = len(alike) // columns
    picture = np.zeros((rows * height, columns * width, 3), np.uint8)
    cells: list[TrueCell] = []
    for index, field in enumerate(alike[: rows * columns]):
        row, column = divmod(index, columns)
        x, y = column * width, row * height
        picture[y : y + height, x : x + width] = field.pixels_bgr
        for class_name, box in field.cells:
            moved = Box(box.x_min + x, box.y_min + y, box.x_max + x, box.y_max + y)
            cells.append(TrueCell(len(cells), class_name, moved))
    seams = tuple(column * width for column in range(1, columns)), tuple(row * height for row in range(1, rows))
    return World(picture, tuple(cells), seams)


def take(world: World, window: Window, size_px: tuple[int, int], rng: Generator, number: int, **known: object) -> Frame:
    """The frame that the camera gives: light a little uneven in time, fresh noise."""
    cos, sin = math.cos(window.turn), math.sin(window.turn)
    matrix = np.asarray([[cos, -sin, window.x], [sin, cos, window.y]])
    # OpenCV counts from pixel centres.
    matrix[:, 2] += matrix[:, :2] @ (0.5, 0.5) - 0.5
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    pixels = cv2.warpAffine(world.pixels_bgr, matrix, size_px, flags=flags, borderMode=cv2.BORDER_REFLECT)
    if window.blur_px:
        pixels = cv2.GaussianBlur(pixels, (0, 0), window.blur_px)
    light = pixels * rng.uniform(0.97, 1.03) + rng.normal(0, 2, pixels.shape)
    pixels = np.clip(light, 0, 255).astype(np.uint8)
    now = datetime(2026, 11, 25, tzinfo=timezone.utc)
    return Frame(number, pixels, now, number * 10**9, hash_pixels(pixels), "proof", f"proof:{number}", **known)  # type: ignore[arg-type]


def truth_in(world: World, window: Window, size_px: tuple[int, int]) -> list[tuple[TrueCell, Box]]:
    """The cells that a window shows, with their boxes in it, cut at its edges."""
    back = Shift(window.x, window.y, window.turn).inverse()
    seen = []
    for cell in world.cells:
        x, y = back.apply(*cell.box.centre_px)
        half_width, half_height = cell.box.width_px / 2, cell.box.height_px / 2
        x_min, x_max = max(0.0, x - half_width), min(float(size_px[0]), x + half_width)
        y_min, y_max = max(0.0, y - half_height), min(float(size_px[1]), y + half_height)
        if x_min >= x_max or y_min >= y_max:
            continue
        if (x_max - x_min) * (y_max - y_min) >= LEAST_SEEN * cell.box.width_px * cell.box.height_px:
            seen.append((cell, Box(x_min, y_min, x_max, y_max)))
    return seen


def perfect_cells(seen: Sequence[tuple[TrueCell, Box]], first: int, rng: Generator, unrest_px: float) -> list[Cell]:
    """What a detector without faults would say: each box, moved by its unrest where it is not cut."""
    cells = []
    for number, (true, box) in enumerate(seen, start=first):
        edges = [box.x_min, box.y_min, box.x_max, box.y_max]
        for index, shake in enumerate(rng.normal(0, unrest_px, 4)):
            if edges[index] != round(edges[index]):  # the window's edges are whole numbers: there the box is cut
                low, high = (1.5, edges[index + 2] - 1) if index < 2 else (edges[index - 2] + 1, np.inf)
                edges[index] = max(low, min(high, edges[index] + shake))  # of a sliver too something is left
        detection = Detection(Box(*edges), true.class_name, 0.9)
        named = None if true.class_name == RED_CELL else Classification(true.class_name, 0.9, {true.class_name: 0.9})
        cells.append(Cell(f"proof-{number}", detection, true.class_name, 0.9, named, CellStatus.ACCEPTED))
    return cells


def may_count(box: Box, size_px: tuple[int, int]) -> bool:
    """The two-sides rule, for the truth."""
    return box.x_max <= size_px[0] - 1 and box.y_max <= size_px[1] - 1


def meander(world: World, size_px: tuple[int, int], overlap: float) -> list[Window]:
    """Row by row, forth and back, over the picture less a margin, so that no window ends at a seam of real fields."""
    height, width = (side - MARGIN_PX for side in world.pixels_bgr.shape[:2])
    rows, columns = (_stops(full, side, overlap) for full, side in ((height, size_px[1]), (width, size_px[0])))
    return [
        Window(x + MARGIN_PX, y + MARGIN_PX)
        for row, y in enumerate(rows)
        for x in (columns if row % 2 == 0 else columns[::-1])
    ]


def _stops(full: int, side: int, overlap: float) -> list[float]:
    step = side * (1 - overlap)
    count = max(1, math.floor((full - side) / step + 1e-6) + 1)
    return [index * step for index in range(count)]


def shaken(windows: Sequence[Window], rng: Generator, jitter_px: float, drift_px: float) -> list[Window]:
    """A stage that does not stop exactly, and creeps: each step is off by the jitter, each field drifts on."""
    return [
        replace(
            window,
            x=window.x + rng.uniform(-jitter_px, jitter_px) + index * drift_px,
            y=window.y + rng.uniform(-jitter_px, jitter_px),
        )
        for index, window in enumerate(windows)
    ]


def refocused(windows: Sequence[Window], rng: Generator, most_px: float) -> list[Window]:
    """Somebody turns the fine focus on the way."""
    return [replace(window, blur_px=float(rng.uniform(0, most_px))) for window in windows]


def turned(windows: Sequence[Window], size_px: tuple[int, int], degrees: float) -> list[Window]:
    """The same middles, the slide turned under the camera."""
    turn = math.radians(degrees)
    at = Shift(0, 0, turn)
    moved = []
    for window in windows:
        x, y = at.apply(size_px[0] / 2, size_px[1] / 2)
        moved.append(replace(window, x=window.x + size_px[0] / 2 - x, y=window.y + size_px[1] / 2 - y, turn=turn))
    return moved


def after_a_jump(windows: Sequence[Window]) -> list[Window]:
    """The upper half row by row; then the stage jumps to the far end, and comes back to what it has seen."""
    rows = sorted({window.y for window in windows})
    middle = rows[len(rows) // 2]
    return [
        *(window for window in windows if window.y < middle),
        *reversed([window for window in windows if window.y >= middle]),
    ]


def with_revisits(windows: Sequence[Window], rng: Generator, share: float) -> Iterator[Window]:
    """Now and then the stage goes back to an earlier place, not quite exactly, and returns."""
    for index, window in enumerate(windows):
        yield window
        if index > 3 and rng.random() < share:
            earlier = windows[int(rng.integers(0, index - 1))]
            yield replace(earlier, x=earlier.x + rng.uniform(-40, 40), y=earlier.y + rng.uniform(-40, 40))
