"""A simulated slide with known truth: the camera that needs no hardware, and the instrument of tests and training.

SimulatedSlide   cells at fixed places in um, without end, made tile by tile from the seed; any window, any time
SimulatedCamera  a stage that walks over it row by row, with the faults of real cameras as knobs
render_training_field, render_training_crop   pictures of random slides for the training of the models
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from agent.camera.camera import NOTHING_YET, POLL_S, SYSTEM_CLOCKS, Clocks, NothingYet, make_frame
from agent.camera.smear import (
    CELL_CLASSES,
    PLATELET,
    RED_CELL,
    Floats,
    SmearStyle,
    Sprite,
    draw_cell,
    draw_radius_um,
    outline_um,
)
from agent.config import CameraSection, SimulatedSection
from agent.domain import Box, Frame, Pixels
from agent.errors import CameraError, ConfigError

TILE_UM = 40.0
"""um; side of a tile. Larger than two of the largest cells, so that only neighbouring tiles can touch."""

DEFAULT_SHARES: Mapping[str, float] = MappingProxyType(
    {
        "neutrophil": 0.50,
        "lymphocyte": 0.26,
        "monocyte": 0.08,
        "eosinophil": 0.06,
        "basophil": 0.03,
        "ig": 0.04,
        "erythroblast": 0.03,
    }
)
"""Nucleated cells by class: near a normal differential, with enough of the rare ones that all are seen in an hour."""


# ---------------------------------------------------------------------------------------------------- the slide
@dataclass(frozen=True, slots=True)
class SlideArea:
    """A rectangle on the slide, um."""

    x_min_um: float
    y_min_um: float
    x_max_um: float
    y_max_um: float

    def touches(self, other: SlideArea) -> bool:
        return (
            self.x_min_um < other.x_max_um
            and other.x_min_um < self.x_max_um
            and self.y_min_um < other.y_max_um
            and other.y_min_um < self.y_max_um
        )


@dataclass(frozen=True, slots=True)
class SlideCell:
    """One cell of the slide as it truly is. outline_area: the drawn outline's bounds. seed: all of its appearance."""

    identifier: str
    class_name: str
    centre_um: tuple[float, float]
    radius_um: float
    outline_area: SlideArea
    seed: int


@dataclass(frozen=True, slots=True)
class CellDensity:
    """Mean numbers of cells for each 1000 square um of slide."""

    red_cells: float = 9.0
    nucleated_cells: float = 0.6
    platelets: float = 1.0

    @staticmethod
    def per_field(red_cells: float, nucleated_cells: float, platelets: float, area_um2: float) -> CellDensity:
        """The density that gives these mean numbers in a field of this size."""
        scale = 1000.0 / area_um2
        return CellDensity(red_cells * scale, nucleated_cells * scale, platelets * scale)


def _plant(
    identifier: str, class_name: str, centre_um: tuple[float, float], radius_um: float, seed: int, style: SmearStyle
) -> SlideCell:
    outline = outline_um(class_name, radius_um, seed, style)
    low, high = outline.min(axis=0), outline.max(axis=0)
    x, y = centre_um
    area = SlideArea(float(x + low[0]), float(y + low[1]), float(x + high[0]), float(y + high[1]))
    return SlideCell(identifier, class_name, centre_um, radius_um, area, seed)


_PLACES_TRIED = 32


def _scatter(
    rng: Generator,
    area: SlideArea,
    density: CellDensity,
    shares: Mapping[str, float],
    style: SmearStyle,
    neighbours: Iterable[SlideCell],
    prefix: str,
) -> tuple[SlideCell, ...]:
    """Cells of one area, placed around those that stand there already. The mean numbers hold at any density."""
    width_um, height_um = area.x_max_um - area.x_min_um, area.y_max_um - area.y_min_um
    thousands = width_um * height_um / 1000.0
    classes = list(shares)
    weights = np.asarray([shares[name] for name in classes], dtype=np.float64)
    nucleated = rng.choice(
        len(classes), int(rng.poisson(density.nucleated_cells * thousands)), p=weights / weights.sum()
    )
    names = [classes[index] for index in nucleated]
    names += [RED_CELL] * int(rng.poisson(density.red_cells * thousands))
    names += [PLATELET] * int(rng.poisson(density.platelets * thousands))

    near = SlideArea(area.x_min_um - 12, area.y_min_um - 12, area.x_max_um + 12, area.y_max_um + 12)
    before = [_disc(cell) for cell in neighbours if cell.outline_area.touches(near)]
    taken = np.zeros((len(before) + len(names), 3))  # x, y, radius of each disc
    taken[: len(before)] = before or np.zeros((0, 3))
    cells: list[SlideCell] = []
    for number, name in enumerate(names):
        radius_um = draw_radius_um(rng, name, style)
        places = rng.uniform((area.x_min_um, area.y_min_um), (area.x_max_um, area.y_max_um), (_PLACES_TRIED, 2))
        wanted_um = _wanted_gap_um(rng, name)
        x, y = (
            float(value)
            for value in places[_first_with_gap(places, radius_um, taken[: len(before) + number], wanted_um)]
        )
        cells.append(_plant(f"{prefix}:{number}", name, (x, y), radius_um, int(rng.integers(0, 2**62)), style))
        taken[len(before) + number] = _disc(cells[-1])
    return tuple(cells)


def _disc(cell: SlideCell) -> tuple[float, float, float]:
    """Middle and half the longer side of a cell, um: what the neighbours keep away from."""
    area = cell.outline_area
    longer = max(area.x_max_um - area.x_min_um, area.y_max_um - area.y_min_um)
    return (area.x_min_um + area.x_max_um) / 2, (area.y_min_um + area.y_max_um) / 2, longer / 2


def _wanted_gap_um(rng: Generator, class_name: str) -> float:
    """Distance from outline to outline below which a place is not taken at first; below 0 = may overlap."""
    if class_name == RED_CELL:
        return float(rng.choice([0.1, -0.4, -2.0], p=[0.72, 0.18, 0.10]))
    if class_name == PLATELET:
        return 0.3
    return 0.8


def _first_with_gap(places: NDArray[np.float64], radius_um: float, taken: NDArray[np.float64], wanted_um: float) -> int:
    """Which place keeps the wanted distance; where none does, the one with the most room."""
    if not len(taken):
        return 0
    apart = np.hypot(places[:, None, 0] - taken[:, 0], places[:, None, 1] - taken[:, 1])
    gaps = (apart - taken[:, 2] - radius_um).min(axis=1)
    wide_enough = np.flatnonzero(gaps >= wanted_um)
    return int(wide_enough[0]) if wide_enough.size else int(gaps.argmax())


class SimulatedSlide:
    """A smear without end, known cell by cell. Any window can be drawn at any time and is always the same.

    Tiles are made when they are needed, each from its own seed, and forgotten when others are needed more: memory
    stays bounded. Tiles come in four colours like (even, odd) squares of a board; a tile looks only at cells of
    neighbours of lower colours, so no order of visits changes the slide.
    """

    TILES_KEPT = 128
    """Some five fields of the usual size; more when one window alone needs more."""
    SPRITES_KEPT_BYTES = 16 * 1024 * 1024
    """About three usual fields of drawn cells: a field overlaps with the one before, and a row holds twenty."""

    def __init__(
        self,
        seed: int,
        *,
        style: SmearStyle | None = None,
        density: CellDensity | None = None,
        shares: Mapping[str, float] = DEFAULT_SHARES,
    ) -> None:
        self.seed = seed
        self.style = style if style is not None else SmearStyle.default()
        self.density = density if density is not None else CellDensity()
        self.shares = shares
        self._tiles: OrderedDict[tuple[int, int], tuple[SlideCell, ...]] = OrderedDict()
        self._tiles_kept = self.TILES_KEPT
        self._sprites: OrderedDict[str, Sprite] = OrderedDict()
        self._sprite_bytes = 0

    @property
    def px_per_um(self) -> float:
        return self.style.px_per_um

    def cells_in(self, x0_um: float, y0_um: float, x1_um: float, y1_um: float) -> tuple[SlideCell, ...]:
        """All cells whose outline reaches into the window: the truth."""
        window = SlideArea(x0_um, y0_um, x1_um, y1_um)
        columns = range(math.floor(x0_um / TILE_UM) - 1, math.floor(x1_um / TILE_UM) + 2)
        rows = range(math.floor(y0_um / TILE_UM) - 1, math.floor(y1_um / TILE_UM) + 2)
        # A tile may ask for tiles up to three further on (three lower colours): room for all of them.
        self._tiles_kept = max(self.TILES_KEPT, 2 * (len(columns) + 6) * (len(rows) + 6))
        return tuple(
            cell
            for row in rows
            for column in columns
            for cell in self._tile(column, row)
            if cell.outline_area.touches(window)
        )

    def render(self, x_um: float, y_um: float, width_px: int, height_px: int) -> Pixels:
        """The window whose upper left corner lies at (x, y), in focus, evenly lit, free of noise. A new array.

        The corner is rounded to the slide's pixel grid, so that windows which overlap show the same pixels.
        """
        left_px, top_px = round(x_um * self.px_per_um), round(y_um * self.px_per_um)
        margin_um = 1.5
        window = self.cells_in(
            left_px / self.px_per_um - margin_um,
            top_px / self.px_per_um - margin_um,
            (left_px + width_px) / self.px_per_um + margin_um,
            (top_px + height_px) / self.px_per_um + margin_um,
        )
        sprites = (self._sprite(cell) for cell in window)
        return _develop(sprites, self.style, left_px, top_px, width_px, height_px)

    def _tile(self, column: int, row: int) -> tuple[SlideCell, ...]:
        key = (column, row)
        known = self._tiles.get(key)
        if known is not None:
            self._tiles.move_to_end(key)
            return known
        colour = _colour(column, row)
        neighbours = [
            cell
            for y in (row - 1, row, row + 1)
            for x in (column - 1, column, column + 1)
            if (x, y) != key and _colour(x, y) < colour
            for cell in self._tile(x, y)
        ]
        # Tile numbers may be negative, seeds may not: zigzag numbering.
        rng = np.random.default_rng((self.seed, _zigzag(column), _zigzag(row)))
        area = SlideArea(column * TILE_UM, row * TILE_UM, (column + 1) * TILE_UM, (row + 1) * TILE_UM)
        cells = _scatter(rng, area, self.density, self.shares, self.style, neighbours, f"{column}:{row}")
        self._tiles[key] = cells
        while len(self._tiles) > self._tiles_kept:
            self._tiles.popitem(last=False)
        return cells

    def _sprite(self, cell: SlideCell) -> Sprite:
        known = self._sprites.get(cell.identifier)
        if known is not None:
            self._sprites.move_to_end(cell.identifier)
            return known
        sprite = _draw(cell, self.style)
        self._sprites[cell.identifier] = sprite
        self._sprite_bytes += sprite.od.nbytes
        while self._sprite_bytes > self.SPRITES_KEPT_BYTES and self._sprites:
            _, oldest = self._sprites.popitem(last=False)
            self._sprite_bytes -= oldest.od.nbytes
        return sprite


def _colour(column: int, row: int) -> int:
    return (column & 1) + 2 * (row & 1)


def _zigzag(number: int) -> int:
    return 2 * number if number >= 0 else -2 * number - 1


def _draw(cell: SlideCell, style: SmearStyle) -> Sprite:
    return draw_cell(cell.class_name, cell.centre_um, cell.radius_um, cell.seed, style, style.px_per_um)


def _develop(
    sprites: Iterable[Sprite], style: SmearStyle, left_px: int, top_px: int, width_px: int, height_px: int
) -> Pixels:
    """Sum the densities of all cells in the window and send the lamp's light through."""
    od = np.zeros((height_px, width_px, 3), dtype=np.float32)
    for sprite in sprites:
        x, y = sprite.x_px - left_px, sprite.y_px - top_px
        height, width = sprite.od.shape[:2]
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + width, width_px), min(y + height, height_px)
        if x0 < x1 and y0 < y1:
            od[y0:y1, x0:x1] += sprite.od[y0 - y : y1 - y, x0 - x : x1 - x]
    np.negative(od, out=od)
    light = cv2.exp(od)
    light *= np.asarray(style.lamp_bgr, dtype=np.float32)
    return np.clip(light + 0.5, 0, 255, out=light).astype(np.uint8)


def visible_box(
    cell: SlideCell, corner_um: tuple[float, float], px_per_um: float, width_px: int, height_px: int
) -> tuple[Box | None, float]:
    """The cell's box in a frame whose upper left corner is given, cut at the edge, and the share of it that is seen.

    (None, 0.0) where the cell lies beside the frame.
    """
    area = cell.outline_area
    x_min, x_max = ((x - corner_um[0]) * px_per_um for x in (area.x_min_um, area.x_max_um))
    y_min, y_max = ((y - corner_um[1]) * px_per_um for y in (area.y_min_um, area.y_max_um))
    box = Box(max(x_min, 0.0), max(y_min, 0.0), min(x_max, float(width_px)), min(y_max, float(height_px)))
    if box.width_px <= 0 or box.height_px <= 0:
        return None, 0.0
    return box, box.width_px * box.height_px / ((x_max - x_min) * (y_max - y_min))


# ---------------------------------------------------------------------------------------------------- the optics
@dataclass(frozen=True, slots=True)
class Optics:
    """Lens, lamp and sensor between the slide and the frame.

    blur_px: sigma. noise: sigma, grey levels. illumination: 1 = well set. vignetting: loss of light in the corners.
    """

    blur_px: float = 0.0
    noise: float = 0.0
    illumination: float = 1.0
    vignetting: float = 0.0

    def flat_field(self, width_px: int, height_px: int) -> Floats:
        """What the camera sees of an empty slide, as a factor; float32, shape (height, width)."""
        x = np.linspace(-1, 1, width_px, dtype=np.float32) ** 2
        y = np.linspace(-1, 1, height_px, dtype=np.float32) ** 2
        loss = np.float32(self.vignetting) * (y[:, None] + x[None, :]) / 2
        return np.asarray((1 - loss) * np.float32(self.illumination), dtype=np.float32)


def expose(pixels: Pixels, optics: Optics, rng: Generator, flat: Floats | None = None) -> Pixels:
    """The frame that a camera takes of the slide: blurred, unevenly lit, noisy. A new array.

    flat: the flat field, where the caller keeps one (with dust on it); otherwise that of the optics.
    """
    light: Floats = pixels.astype(np.float32)
    if optics.blur_px > 0.05:
        light = np.asarray(cv2.GaussianBlur(light, (0, 0), optics.blur_px), dtype=np.float32)
    if flat is None:
        flat = optics.flat_field(pixels.shape[1], pixels.shape[0])
    light *= flat[..., None]
    if optics.noise > 0:
        light += rng.standard_normal(light.shape, dtype=np.float32) * np.float32(optics.noise)
    return np.asarray(np.clip(light + np.float32(0.5), 0, 255), dtype=np.uint8)


def dust_shadow(width_px: int, height_px: int, specks: int, rng: Generator) -> Floats:
    """Light that specks on the sensor let through, 0 to 1; float32, shape (height, width)."""
    shadow = np.zeros((height_px, width_px), dtype=np.float32)
    for _ in range(specks):
        centre = (int(rng.integers(0, width_px)), int(rng.integers(0, height_px)))
        axes = (int(rng.integers(2, 7)), int(rng.integers(2, 7)))
        cv2.ellipse(shadow, centre, axes, float(rng.uniform(0, 180)), 0, 360, float(rng.uniform(0.35, 0.7)), -1)
    return np.asarray(1 - cv2.GaussianBlur(shadow, (0, 0), 1.2), dtype=np.float32)


# ---------------------------------------------------------------------------------------------------- the camera
STAGE_COLUMNS: Final = 20
"""Fields in a row of the stage: with the default frame about a millimetre, the width of a counting track."""

UM_PER_PX_ALLOWED: Final = (0.02, 0.5)
"""um; closer, one cell fills the frame; from further off, red cells are under 15 px and a field holds thousands."""

_MISSING_IN_A_ROW = 50
_FRAMES_REMEMBERED = 1000
_DUST_STREAM, _NOISE_STREAM, _FAULT_STREAM = 1_000_001, 1_000_002, 1_000_003


@dataclass(frozen=True, slots=True)
class TrueCell:
    """One cell that a delivered frame shows. box: cut at the frame's edge; visible_share: of its box, above 0 to 1."""

    identifier: str
    class_name: str
    box: Box
    visible_share: float


class SimulatedCamera:
    """A stage under a camera: walks over the slide row by row, forth and back, and knows what it showed.

    The slide has no edge: with `fields: 0` the stage goes on for ever and never sees a place twice. Every visit has
    its number and everything about its frame follows from seed and number, so that a restart gives the same frames.
    """

    is_live = False

    def __init__(
        self,
        section: SimulatedSection,
        um_per_px: float | None = None,
        *,
        done: Container[str] = (),
        clocks: Clocks = SYSTEM_CLOCKS,
        sleep: Callable[[float], None] = time.sleep,
        style: SmearStyle | None = None,
        shares: Mapping[str, float] = DEFAULT_SHARES,
    ) -> None:
        look = style if style is not None else SmearStyle.default()
        if um_per_px is not None:
            look = replace(look, px_per_um=1 / um_per_px)
        self._section = section
        self._done = done
        self._clocks = clocks
        self._sleep = sleep
        self._width_px, self._height_px = section.frame_width_px, section.frame_height_px
        self._um_per_px = 1 / look.px_per_um
        density = CellDensity.per_field(
            section.red_cells_per_field,
            section.nucleated_cells_per_field,
            section.platelets_per_field,
            area_um2=self._width_px * self._height_px * self._um_per_px**2,
        )
        self.slide = SimulatedSlide(section.seed, style=look, density=density, shares=shares)
        self._optics = Optics(section.blur_px, section.noise, section.illumination, section.vignetting)
        dust = dust_shadow(self._width_px, self._height_px, section.dust, self._rng(_DUST_STREAM, 0))
        self._flat = self._optics.flat_field(self._width_px, self._height_px) * dust
        self._next_visit = 0
        self._next_number = 1
        self._due_ns: int | None = None
        self._is_closed = False
        self._last_shown: tuple[int, int] | None = None
        self._last_pixels: tuple[int, Pixels] | None = None
        self._shown_by_number: OrderedDict[int, int] = OrderedDict()

    @property
    def description(self) -> str:
        return f"simulated slide {self._section.seed}"

    def read(self) -> Frame | Literal[NothingYet.NOTHING_YET] | None:
        """The next field when its time has come, NOTHING_YET before, None after the last one."""
        if self._is_closed:
            raise CameraError(f"{self.description}: read after close; open the camera again")
        for _ in range(_MISSING_IN_A_ROW):
            visit = self._skip_done()
            if visit is None:
                return None
            if not self._wait_until_due():
                return NOTHING_YET
            self._next_visit = visit + 1
            if not self._is_missing(visit):
                return self._take(visit)
        self._sleep(POLL_S)
        return NOTHING_YET

    def close(self) -> None:
        self._is_closed = True

    def truth(self, frame_number: int) -> tuple[TrueCell, ...]:
        """The cells in a frame that this camera delivered (one of the newest thousand); slivers included.

        A frozen frame shows the cells of the field before it.
        """
        if frame_number not in self._shown_by_number:
            raise LookupError(f"{self.description}: frame {frame_number} was not delivered, or too long ago")
        return self._truth_of_visit(self._shown_by_number[frame_number])

    def corner_um(self, visit: int) -> tuple[float, float]:
        """Where on the slide the upper left corner of a visited field lies. visit: from 0."""
        row, place = divmod(visit, STAGE_COLUMNS)
        column = place if row % 2 == 0 else STAGE_COLUMNS - 1 - place
        step_x_px = max(1, round(self._width_px * (1 - self._section.overlap)))
        step_y_px = max(1, round(self._height_px * (1 - self._section.overlap)))
        return column * step_x_px * self._um_per_px, row * step_y_px * self._um_per_px

    def _skip_done(self) -> int | None:
        """The first visit not finished in an earlier run; None behind the last one."""
        visit = self._next_visit
        while not self._section.fields or visit < self._section.fields:
            if self._origin_key(visit) not in self._done:
                return visit
            visit += 1
        return None

    def _wait_until_due(self) -> bool:
        now_ns = self._clocks.monotonic_ns()
        if self._due_ns is not None and now_ns < self._due_ns:
            self._sleep(min((self._due_ns - now_ns) / 1e9, POLL_S))
            now_ns = self._clocks.monotonic_ns()
            if now_ns < self._due_ns:
                return False
        # Counted from the time it was due, so that the pace holds; from now where the reader was late.
        interval_ns = round(self._section.interval_s * 1e9)
        punctual = self._due_ns is not None and now_ns - self._due_ns < interval_ns
        self._due_ns = (self._due_ns if punctual and self._due_ns is not None else now_ns) + interval_ns
        return True

    def _take(self, visit: int) -> Frame:
        shown = self._shown_at(visit)
        number = self._next_number
        self._next_number += 1
        self._shown_by_number[number] = shown
        if len(self._shown_by_number) > _FRAMES_REMEMBERED:
            self._shown_by_number.popitem(last=False)
        return make_frame(
            number,
            self._expose(shown),
            source="simulated",
            clocks=self._clocks,
            origin_key=self._origin_key(visit),
            um_per_px=self._um_per_px,
            stage_um=self.corner_um(visit),
        )

    def _expose(self, visit: int) -> Pixels:
        if self._last_pixels is None or self._last_pixels[0] != visit:
            sharp = self.slide.render(*self.corner_um(visit), self._width_px, self._height_px)
            pixels = expose(sharp, self._optics, self._rng(_NOISE_STREAM, visit), self._flat)
            self._last_pixels = (visit, pixels)
        return self._last_pixels[1]

    def _shown_at(self, visit: int) -> int:
        """The visit whose picture the camera gives at this one: an earlier one while the camera is frozen."""
        shown = visit
        while self._is_frozen(shown):
            if self._last_shown is not None and self._last_shown[0] == shown:
                shown = self._last_shown[1]
                break
            earlier = self._arrived_before(shown)
            if earlier is None:  # the first picture of all has nothing to repeat
                break
            shown = earlier
        self._last_shown = (visit, shown)
        return shown

    def _arrived_before(self, visit: int) -> int | None:
        return next((earlier for earlier in range(visit - 1, -1, -1) if not self._is_missing(earlier)), None)

    def _is_frozen(self, visit: int) -> bool:
        return self._section.frozen_share > self._fault_lot(visit, 0)

    def _is_missing(self, visit: int) -> bool:
        return self._section.missing_share > self._fault_lot(visit, 1)

    def _fault_lot(self, visit: int, which: int) -> float:
        return float(self._rng(_FAULT_STREAM + which, visit).random())

    def _truth_of_visit(self, visit: int) -> tuple[TrueCell, ...]:
        x_um, y_um = corner = self.corner_um(visit)
        width_um, height_um = self._width_px * self._um_per_px, self._height_px * self._um_per_px
        cells = []
        for cell in self.slide.cells_in(x_um, y_um, x_um + width_um, y_um + height_um):
            box, share = visible_box(cell, corner, self.slide.px_per_um, self._width_px, self._height_px)
            if box is not None:
                cells.append(TrueCell(cell.identifier, cell.class_name, box, share))
        return tuple(cells)

    def _origin_key(self, visit: int) -> str:
        return f"simulated:{self._section.seed}:{visit}"

    def _rng(self, stream: int, visit: int) -> Generator:
        return np.random.default_rng((self._section.seed, stream, visit))


def open_simulated(
    section: CameraSection, *, done: Container[str] = (), clocks: Clocks = SYSTEM_CLOCKS
) -> SimulatedCamera:
    """The simulated slide that the configuration describes. Raises ConfigError where it cannot be drawn to scale."""
    low, high = UM_PER_PX_ALLOWED
    if section.um_per_px is not None and not low <= section.um_per_px <= high:
        raise ConfigError(
            "camera",
            (f"camera.um_per_px: found {section.um_per_px:g}; the simulated slide is drawn at {low:g} to {high:g}",),
        )
    return SimulatedCamera(section.simulated, section.um_per_px, done=done, clocks=clocks)


# ---------------------------------------------------------------------------------------------------- for training
_TRAINING_SHARES: Mapping[str, float] = MappingProxyType({name: 1.0 for name in CELL_CLASSES if name != PLATELET})
_MIN_VISIBLE = 0.25
"""A cell of which less lies in the frame carries no box: people leave such slivers unlabelled too."""


def render_training_field(rng: Generator, width_px: int, height_px: int) -> tuple[Pixels, list[tuple[str, Box]]]:
    """A field of a random slide through random optics, with a box for each cell: one of the eight classes or `RBC`.

    Nucleated cells, and the rare ones among them, are far more frequent than on a real slide.
    """
    style = SmearStyle.random(rng)
    # A red cell measures 0.09 to 0.30 of the short side: from low power to the closest of the real sources.
    share = float(np.exp(rng.uniform(np.log(0.09), np.log(0.30))))
    style = replace(style, px_per_um=share * min(width_px, height_px) / 7.3)
    area = SlideArea(0, 0, width_px / style.px_per_um, height_px / style.px_per_um)
    thousands = area.x_max_um * area.y_max_um / 1000.0
    density = CellDensity(
        red_cells=float(rng.uniform(2, 16)),
        nucleated_cells=min(float(rng.uniform(0.5, 3.5)), 9 / thousands),
        platelets=float(rng.choice([0.5, rng.uniform(0.5, 5)])),
    )
    beyond = SlideArea(area.x_min_um - 9, area.y_min_um - 9, area.x_max_um + 9, area.y_max_um + 9)
    cells = _scatter(rng, beyond, density, _TRAINING_SHARES, style, (), "training")
    pixels = _develop((_draw(cell, style) for cell in cells), style, 0, 0, width_px, height_px)
    pixels = expose(_strew_precipitate(pixels, style, rng), _random_optics(rng, style.px_per_um), rng)
    boxes = []
    for cell in cells:
        box, share = visible_box(cell, (0.0, 0.0), style.px_per_um, width_px, height_px)
        if box is not None and share >= _MIN_VISIBLE:
            boxes.append((cell.class_name, box))
    return pixels, boxes


def render_training_crop(rng: Generator, class_name: str, size_px: int) -> Pixels:
    """A square crop of a random slide with one cell of the class in the middle, 1.1 to 3 times as wide as the cell."""
    style = SmearStyle.random(rng)
    radius_um = draw_radius_um(rng, class_name, style)
    cell = _plant("centre", class_name, (0.0, 0.0), radius_um, int(rng.integers(0, 2**62)), style)
    bounds = cell.outline_area
    middle = ((bounds.x_min_um + bounds.x_max_um) / 2, (bounds.y_min_um + bounds.y_max_um) / 2)
    extent_um = max(bounds.x_max_um - bounds.x_min_um, bounds.y_max_um - bounds.y_min_um)
    view_um = extent_um * float(np.exp(rng.uniform(np.log(1.1), np.log(3.0))))
    # Drawn at the scale of some microscope, then resized as the pipeline resizes its crops.
    drawn_px = max(24, round(view_um * style.px_per_um))
    style = replace(style, px_per_um=drawn_px / view_um)
    shift = rng.normal(0, 0.03, 2) * extent_um
    left_um, top_um = middle[0] - view_um / 2 + shift[0], middle[1] - view_um / 2 + shift[1]
    area = SlideArea(left_um - 5, top_um - 5, left_um + view_um + 5, top_um + view_um + 5)
    density = CellDensity(float(rng.uniform(2, 15)), float(rng.uniform(0, 0.6)), float(rng.uniform(0, 2)))
    around = _scatter(rng, area, density, _TRAINING_SHARES, style, (cell,), "around")
    left_px, top_px = round(left_um * style.px_per_um), round(top_um * style.px_per_um)
    sprites = (_draw(each, style) for each in (cell, *around))
    pixels = _develop(sprites, style, left_px, top_px, drawn_px, drawn_px)
    pixels = expose(_strew_precipitate(pixels, style, rng), _random_optics(rng, style.px_per_um), rng)
    if drawn_px != size_px:
        way = cv2.INTER_AREA if drawn_px > size_px else cv2.INTER_LINEAR
        pixels = np.asarray(cv2.resize(pixels, (size_px, size_px), interpolation=way), dtype=np.uint8)
    return pixels


def _random_optics(rng: Generator, px_per_um: float) -> Optics:
    return Optics(
        blur_px=float(rng.choice([rng.uniform(0, 0.10), rng.uniform(0.05, 0.28)], p=[0.75, 0.25])) * px_per_um,
        noise=float(rng.choice([rng.uniform(0, 4), rng.uniform(3, 14)], p=[0.8, 0.2])),
        illumination=float(np.clip(np.exp(rng.normal(0, 0.13)), 0.55, 1.35)),
        vignetting=float(rng.choice([0.0, rng.uniform(0, 0.35)])),
    )


def _strew_precipitate(pixels: Pixels, style: SmearStyle, rng: Generator) -> Pixels:
    """Specks of dried stain: dark, small, no cells, so that the models learn to pass them by."""
    height, width = pixels.shape[:2]
    area_mm2 = width * height / style.px_per_um**2 / 1e6
    for _ in range(int(rng.poisson(style.precipitate_per_mm2 * area_mm2))):
        centre = (int(rng.integers(0, width)), int(rng.integers(0, height)))
        radius = max(1, round(float(rng.uniform(0.1, 0.35)) * style.px_per_um))
        colour = np.asarray(style.lamp_bgr) * np.exp(-np.asarray(style.dark_granule_od) * rng.uniform(0.4, 1.0))
        cv2.circle(pixels, centre, radius, colour.tolist(), -1, cv2.LINE_AA)
    return pixels
