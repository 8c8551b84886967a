"""How stained blood cells look: our own drawing of a May-Grünwald-Giemsa smear in transmitted light.

Everything is drawn as optical density (OD, natural logarithm): light that passes is exp(-OD), densities of cells that
lie over each other add up, so the order of drawing does not matter and overlaps darken as they do under a microscope.
A colour triple is B G R. Lengths are micrometres until the last step; a cell looks the same at each magnification.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Triple = tuple[float, float, float]

RED_CELL = "RBC"
PLATELET = "platelet"

OUTLINE_POINTS = 96
"""Corners of an outline polygon: at 20 px/um the chord of a red cell then errs by less than a tenth of a pixel."""

_SUBPIXEL_BITS = 4
_TURN = np.linspace(0.0, 2 * np.pi, OUTLINE_POINTS, endpoint=False)


# ---------------------------------------------------------------------------------------------------- the look
@dataclass(frozen=True, slots=True)
class SmearStyle:
    """The look of one slide under one lamp. `_od` are optical densities, `lamp_bgr` is the empty slide in the frame.

    pallor: 0 to 1, mean lightness of the middle of red cells. rim: extra density at the edge of red cells (defocus).
    edge_um: width of the soft edge of cells. chromatin: 0 to 1, contrast inside nuclei. glow: refractile light edge.
    anisocytosis: relative spread of red-cell sizes. crenation: share of red cells with a bumpy outline.
    precipitate_per_mm2: specks of stain, which are no cells; in training pictures only.
    """

    lamp_bgr: Triple = (203.0, 228.0, 252.0)
    red_cell_od: Triple = (0.215, 0.355, 0.245)
    nucleus_dark_od: Triple = (0.80, 1.85, 1.55)
    nucleus_light_od: Triple = (0.50, 1.10, 0.85)
    blue_plasm_od: Triple = (0.13, 0.40, 0.46)
    pink_plasm_od: Triple = (0.11, 0.23, 0.17)
    eosin_granule_od: Triple = (0.55, 0.62, 0.27)
    purple_granule_od: Triple = (0.42, 1.10, 0.80)
    dark_granule_od: Triple = (0.85, 2.00, 1.50)
    pallor: float = 0.62
    rim: float = 0.06
    glow: float = 0.0
    edge_um: float = 0.16
    chromatin: float = 0.9
    anisocytosis: float = 0.06
    crenation: float = 0.02
    precipitate_per_mm2: float = 250.0
    px_per_um: float = 12.5

    @staticmethod
    def default() -> SmearStyle:
        """A well-stained slide in a digital slide reader: cream ground, rose-grey red cells, dark violet nuclei."""
        return SmearStyle()

    @staticmethod
    def random(rng: Generator) -> SmearStyle:
        """Any slide of any laboratory: a mixture of known looks, then each dye and the lamp moved on their own."""
        weights = rng.dirichlet(np.full(len(_LOOKS), 0.45))
        basic_dye = _dye_shift(rng)
        acid_dye = _dye_shift(rng)
        lamp = _mix([look.lamp_bgr for look in _LOOKS], weights) * np.exp(rng.normal(0, 0.06, 3) + rng.normal(0, 0.07))

        def stained(name: str, dye: Floats) -> Triple:
            od = _mix([getattr(look, name) for look in _LOOKS], weights) * dye * np.exp(rng.normal(0, 0.07, 3))
            return _triple(od)

        return SmearStyle(
            lamp_bgr=_triple(np.clip(lamp, 90, 255)),
            red_cell_od=stained("red_cell_od", acid_dye),
            nucleus_dark_od=stained("nucleus_dark_od", basic_dye),
            nucleus_light_od=stained("nucleus_light_od", basic_dye),
            blue_plasm_od=stained("blue_plasm_od", basic_dye),
            pink_plasm_od=stained("pink_plasm_od", np.sqrt(acid_dye * basic_dye)),
            eosin_granule_od=stained("eosin_granule_od", acid_dye),
            purple_granule_od=stained("purple_granule_od", basic_dye),
            dark_granule_od=stained("dark_granule_od", basic_dye),
            pallor=float(rng.uniform(0.0, 1.0)),
            rim=float(rng.choice([0.0, rng.uniform(0, 0.5)])),
            glow=float(rng.choice([0.0, rng.uniform(0, 0.12)])),
            edge_um=float(rng.uniform(0.08, 0.4)),
            chromatin=float(rng.uniform(0.25, 1.0)),
            anisocytosis=float(rng.uniform(0.03, 0.12)),
            crenation=float(rng.choice([0.0, 0.02, rng.uniform(0, 0.6)], p=[0.5, 0.3, 0.2])),
            precipitate_per_mm2=float(rng.choice([0.0, rng.uniform(0, 3000)])),
            px_per_um=float(np.exp(rng.uniform(np.log(7.0), np.log(19.0)))),
        )


_GREY_GREEN = SmearStyle(
    lamp_bgr=(200, 206, 204),
    red_cell_od=(0.15, 0.27, 0.13),
    nucleus_dark_od=(0.10, 0.95, 0.62),
    nucleus_light_od=(0.04, 0.62, 0.40),
    blue_plasm_od=(0.03, 0.27, 0.24),
    pink_plasm_od=(0.04, 0.16, 0.10),
    eosin_granule_od=(0.25, 0.55, 0.18),
    purple_granule_od=(0.10, 0.75, 0.48),
    dark_granule_od=(0.18, 1.20, 0.85),
)
_ROSE = SmearStyle(
    lamp_bgr=(172, 186, 218),
    red_cell_od=(0.29, 0.56, 0.38),
    nucleus_dark_od=(0.55, 2.30, 1.00),
    nucleus_light_od=(0.40, 1.50, 0.65),
    blue_plasm_od=(0.14, 0.42, 0.34),
    pink_plasm_od=(0.12, 0.33, 0.18),
    eosin_granule_od=(0.42, 0.85, 0.28),
    purple_granule_od=(0.35, 1.25, 0.62),
    dark_granule_od=(0.55, 1.90, 0.95),
)
_BLUISH = SmearStyle(
    lamp_bgr=(200, 190, 182),
    red_cell_od=(0.22, 0.42, 0.46),
    nucleus_dark_od=(0.35, 1.60, 1.30),
    nucleus_light_od=(0.22, 1.00, 0.85),
    blue_plasm_od=(0.06, 0.36, 0.40),
    pink_plasm_od=(0.08, 0.25, 0.20),
    eosin_granule_od=(0.36, 0.70, 0.30),
    purple_granule_od=(0.22, 0.95, 0.75),
    dark_granule_od=(0.38, 1.60, 1.25),
)
_LOOKS = (SmearStyle(), _GREY_GREEN, _ROSE, _BLUISH)


def _mix(triples: list[Triple], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(weights @ np.asarray(triples, dtype=np.float64), dtype=np.float64)


def _dye_shift(rng: Generator) -> Floats:
    """How much of a dye a slide took (all channels) and how its hue differs (each channel)."""
    return np.asarray(np.exp(rng.normal(0, 0.18) + rng.normal(0, 0.12, 3)), dtype=np.float32)


def _triple(values: NDArray[np.float64]) -> Triple:
    blue, green, red = (float(value) for value in values)
    return blue, green, red


# ---------------------------------------------------------------------------------------------------- the outline
@dataclass(frozen=True, slots=True)
class _Build:
    """Size and outline of a class. radius_um: mean and spread; waves: amplitude by number of bumps round the cell."""

    radius_um: tuple[float, float]
    stretch: float
    waves: Mapping[int, float]


_BUILDS: dict[str, _Build] = {
    RED_CELL: _Build((3.65, 0.0), 0.045, {2: 0.02, 3: 0.014, 4: 0.008, 5: 0.005}),
    PLATELET: _Build((1.45, 0.28), 0.14, {2: 0.05, 3: 0.06, 4: 0.05, 5: 0.05, 7: 0.04, 9: 0.03}),
    "basophil": _Build((6.2, 0.6), 0.06, {2: 0.02, 3: 0.02, 5: 0.015, 9: 0.015, 13: 0.015}),
    "eosinophil": _Build((6.5, 0.55), 0.06, {2: 0.02, 3: 0.015, 5: 0.006}),
    "erythroblast": _Build((4.8, 0.55), 0.06, {2: 0.03, 3: 0.03, 4: 0.015, 6: 0.01}),
    "ig": _Build((7.2, 0.8), 0.06, {2: 0.02, 3: 0.018, 4: 0.01, 6: 0.006}),
    "lymphocyte": _Build((5.0, 0.5), 0.06, {2: 0.02, 3: 0.02, 4: 0.015, 6: 0.012, 9: 0.008}),
    "monocyte": _Build((7.9, 0.7), 0.10, {2: 0.04, 3: 0.05, 4: 0.03, 5: 0.02, 7: 0.012, 10: 0.008}),
    "neutrophil": _Build((6.6, 0.5), 0.06, {2: 0.025, 3: 0.02, 4: 0.01, 6: 0.006}),
}
CELL_CLASSES: tuple[str, ...] = tuple(name for name in _BUILDS if name != RED_CELL)
"""The eight classes that are not mature red cells."""


def draw_radius_um(rng: Generator, class_name: str, style: SmearStyle) -> float:
    """The size of one cell of a class, mean radius in um."""
    mean, spread = _BUILDS[class_name].radius_um
    if class_name == RED_CELL:
        spread = mean * style.anisocytosis
    return float(np.clip(rng.normal(mean, spread), mean - 2.2 * spread, mean + 2.2 * spread))


def outline_um(class_name: str, radius_um: float, seed: int, style: SmearStyle) -> NDArray[np.float64]:
    """Corners of the cell's outline about its centre, shape (96, 2), um. The same seed gives the same outline."""
    rng = np.random.default_rng(seed)
    build = _BUILDS[class_name]
    distance = np.ones(OUTLINE_POINTS)
    for bumps, amplitude in build.waves.items():
        distance += rng.normal(0, amplitude) * np.cos(bumps * _TURN + rng.uniform(0, 2 * np.pi))
    if class_name == RED_CELL:
        distance += _red_cell_deformity(rng, style)
    elif rng.random() < (0.35 if class_name in ("lymphocyte", "monocyte", PLATELET) else 0.08):
        distance += _bleb(rng)
    distance = np.clip(distance, 0.45, 1.8)
    stretch = abs(rng.normal(0, build.stretch))
    turn = rng.uniform(0, np.pi)
    along = distance * np.cos(_TURN) * (1 + stretch)
    across = distance * np.sin(_TURN) / (1 + stretch)
    return radius_um * _turned(along, across, turn)


def _red_cell_deformity(rng: Generator, style: SmearStyle) -> NDArray[np.float64]:
    lot = rng.random()
    if lot < style.crenation:
        bumps = int(rng.integers(8, 16))
        return 0.05 * np.abs(np.cos(bumps / 2 * _TURN + rng.uniform(0, 3))) + rng.normal(0, 0.012, OUTLINE_POINTS)
    if lot > 0.97:  # a tear drop
        return _bleb(rng)
    return np.zeros(OUTLINE_POINTS)


def _bleb(rng: Generator) -> NDArray[np.float64]:
    """A protrusion to one side; now and then a second one."""
    bump = np.zeros(OUTLINE_POINTS)
    for _ in range(int(rng.integers(1, 3))):
        away = np.angle(np.exp(1j * (_TURN - rng.uniform(0, 2 * np.pi))))
        bump += rng.uniform(0.08, 0.35) * np.exp(-((away / rng.uniform(0.12, 0.4)) ** 2))
    return bump


# ---------------------------------------------------------------------------------------------------- the canvas
@dataclass(frozen=True, slots=True, eq=False)
class Sprite:
    """One drawn cell. od: float32, shape (height, width, 3), at least 0; x_px, y_px: its corner in slide pixels."""

    od: Floats
    x_px: int
    y_px: int


@dataclass(frozen=True, slots=True, eq=False)
class _Canvas:
    """The patch of the slide's pixel grid on which one cell is drawn; points are um from the cell's centre."""

    width_px: int
    height_px: int
    centre_px: tuple[float, float]
    px_per_um: float
    half_um: float

    def to_px(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(points * self.px_per_um + np.asarray(self.centre_px), dtype=np.float64)

    def blank(self) -> NDArray[np.uint8]:
        return np.zeros((self.height_px, self.width_px), dtype=np.uint8)

    def fixed(self, points: NDArray[np.float64]) -> NDArray[np.int32]:
        """Pixel coordinates in the fixed point form of OpenCV; half a pixel off, for it counts from pixel centres."""
        return np.round((self.to_px(points) - 0.5) * (1 << _SUBPIXEL_BITS)).astype(np.int32)

    def length(self, um: float) -> int:
        return max(1, round(um * self.px_per_um * (1 << _SUBPIXEL_BITS)))

    def filled(self, points: NDArray[np.float64]) -> Floats:
        mask = self.blank()
        cv2.fillPoly(mask, [self.fixed(points)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        return _unit(mask)

    def dots(self, centres: NDArray[np.float64], radii: NDArray[np.float64]) -> Floats:
        mask = self.blank()
        for (x, y), radius in zip(self.fixed(centres).tolist(), radii.tolist(), strict=True):
            cv2.circle(mask, (x, y), self.length(radius), 255, -1, cv2.LINE_AA, _SUBPIXEL_BITS)
        return _unit(mask)

    def grains(self, centres: NDArray[np.float64], radii: NDArray[np.float64]) -> Floats:
        """Dots with soft edges; never sharper than the pixel grid can show, else small ones turn into diamonds."""
        return self.soft(self.dots(centres, radii), max(0.06, 0.6 / self.px_per_um))

    def soft(self, mask: Floats, um: float) -> Floats:
        sigma = um * self.px_per_um
        return mask if sigma < 0.25 else _floats(cv2.GaussianBlur(mask, (0, 0), sigma))

    def mottle(self, rng: Generator, grain_um: float) -> Floats:
        """Smooth noise of unit spread whose grain is fixed in um."""
        count = max(4, int(np.ceil(2 * self.half_um / grain_um)))
        coarse = rng.standard_normal((count, count), dtype=np.float32)
        return _floats(cv2.resize(coarse, (self.width_px, self.height_px), interpolation=cv2.INTER_CUBIC))


def _floats(values: NDArray[Any]) -> Floats:
    return np.asarray(values, dtype=np.float32)


def _unit(mask: NDArray[np.uint8]) -> Floats:
    return _floats(np.multiply(mask, np.float32(1 / 255), dtype=np.float32))


def _step(values: Floats, low: float, high: float) -> Floats:
    t = np.clip((values - low) / (high - low), 0, 1)
    return _floats(t * t * (3 - 2 * t))


def _lay(od: Floats, mask: Floats, colour: Floats) -> None:
    """Replace what lies under the mask by a colour: (3,) or (height, width, 3)."""
    od += mask[..., None] * (colour - od)


def _od(triple: Triple) -> Floats:
    return np.asarray(triple, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------- the cells
def draw_cell(
    class_name: str,
    centre_um: tuple[float, float],
    radius_um: float,
    seed: int,
    style: SmearStyle,
    px_per_um: float,
) -> Sprite:
    """One cell in optical density on the pixel grid of the slide."""
    outline = outline_um(class_name, radius_um, seed, style)
    half_um = float(np.abs(outline).max()) + 1.0
    x_px = int(np.floor((centre_um[0] - half_um) * px_per_um))
    y_px = int(np.floor((centre_um[1] - half_um) * px_per_um))
    side_px = int(np.ceil(2 * half_um * px_per_um)) + 1
    centre_px = (centre_um[0] * px_per_um - x_px, centre_um[1] * px_per_um - y_px)
    canvas = _Canvas(side_px, side_px, centre_px, px_per_um, half_um)
    rng = np.random.default_rng((seed, 1))
    body = canvas.soft(canvas.filled(outline), style.edge_um * 0.6)
    pen = _Pen(canvas, outline, body, radius_um, style, rng)
    od = _PAINTERS[class_name](pen)
    return Sprite(np.maximum(od, 0, out=od), x_px, y_px)


@dataclass(frozen=True, slots=True, eq=False)
class _Pen:
    """What a painter needs: canvas, outline, the outline filled, size, look and chance."""

    canvas: _Canvas
    outline: NDArray[np.float64]
    body: Floats
    radius_um: float
    style: SmearStyle
    rng: Generator

    def points_inside(self, count: int, low: float = 0.0, high: float = 0.94) -> NDArray[np.float64]:
        """Places spread evenly over the cell; low and high: share of the way from the centre to the outline."""
        corner = self.rng.integers(0, OUTLINE_POINTS, count)
        share = np.sqrt(self.rng.uniform(low**2, high**2, count))
        return np.asarray(self.outline[corner] * share[:, None], dtype=np.float64)

    def plasm(self, colour: Triple, mottle: float = 0.12, grain_um: float = 0.45) -> Floats:
        """Cytoplasm over the whole cell, a little denser at its membrane."""
        canvas, rng = self.canvas, self.rng
        texture = 1 + mottle * canvas.mottle(rng, grain_um) + 0.8 * mottle * canvas.mottle(rng, 2.2)
        membrane = 0.5 * np.clip(self.body - canvas.soft(self.body, 0.3), 0, 1)
        strength = np.float32(np.exp(rng.normal(0, 0.1)))
        return _floats((self.body * (texture + membrane) * strength)[..., None] * _od(colour))

    def organic(self, mask: Floats, um: float = 0.28) -> Floats:
        """A mask whose corners and joints are rounded as those of living things."""
        return _step(self.canvas.soft(mask, um), 0.36, 0.64)

    def nucleus(
        self, od: Floats, mask: Floats, density: float = 1.0, clumps: float = 1.0, grain_um: float = 0.5
    ) -> None:
        """Lay a nucleus with chromatin into the cell. density: of the stain; clumps: contrast of the chromatin."""
        style, canvas, rng = self.style, self.canvas, self.rng
        mask = mask * self.body
        pattern = canvas.mottle(rng, grain_um) + 0.6 * canvas.mottle(rng, grain_um * 2.3)
        light = _step(pattern, 0.15, 1.5) * np.float32(style.chromatin * min(1.0, clumps))
        rim = mask - canvas.soft(mask, 0.4)
        light = light * np.clip(1 - 2.2 * rim, 0, 1)  # the membrane is lined with dense chromatin
        dark_od, light_od = _od(style.nucleus_dark_od), _od(style.nucleus_light_od)
        strength = density * np.exp(rng.normal(0, 0.06))
        shade = (1 + 0.35 * np.clip(rim, 0, 1) + 0.06 * canvas.mottle(rng, 0.3)).astype(np.float32)
        colour = (dark_od + light[..., None] * (light_od * 0.85 - dark_od)) * np.float32(strength) * shade[..., None]
        _lay(od, mask, colour)

    def granules(
        self, od: Floats, count: int, radius_um: tuple[float, float], colour: Triple, amount: float, low: float = 0.0
    ) -> None:
        """Strew granules over the cell. radius_um: from, to; amount: 0 to 1, how far they cover."""
        radii = self.rng.uniform(*radius_um, count)
        mask = self.canvas.grains(self.points_inside(count, low), radii)
        vary = np.clip(0.85 + 0.25 * self.canvas.mottle(self.rng, 0.6), 0, 1)
        _lay(od, (mask * vary * np.float32(amount)).astype(np.float32), _od(colour))

    def vacuoles(self, od: Floats, count: int, radius_um: tuple[float, float], places: NDArray[np.float64]) -> None:
        radii = self.rng.uniform(*radius_um, count)
        mask = self.canvas.soft(self.canvas.dots(places[:count], radii), 0.08)
        _lay(od, mask * np.float32(0.9), _od((0.02, 0.04, 0.03)))

    def blob(
        self,
        size: float,
        offset: tuple[float, float],
        stretch: float,
        turn: float,
        dents: tuple[tuple[float, float, float], ...],
    ) -> Floats:
        """A rounded nucleus. size: share of the cell's radius; dents: (direction, depth 0 to 1, width)."""
        distance = np.full(OUTLINE_POINTS, size)
        for bumps, amplitude in ((2, 0.02), (3, 0.025), (5, 0.015), (7, 0.01)):
            distance *= 1 + self.rng.normal(0, amplitude) * np.cos(bumps * _TURN + self.rng.uniform(0, 2 * np.pi))
        for direction, depth, width in dents:
            away = np.angle(np.exp(1j * (_TURN - direction)))
            distance *= 1 - depth * np.exp(-((away / width) ** 2))
        along = distance * np.cos(_TURN) * (1 + stretch)
        across = distance * np.sin(_TURN) / (1 + stretch)
        return self.canvas.filled(self.radius_um * (_turned(along, across, turn) + np.asarray(offset)))

    def lobes(self, path: NDArray[np.float64], sizes: NDArray[np.float64], thread_um: float) -> Floats:
        """Lobes along a path, joined by threads. path: (n, 2) um; sizes: radii um."""
        canvas = self.canvas
        mask = canvas.blank()
        corners = canvas.fixed(path)
        for index, size in enumerate(sizes):
            before, after = path[max(index - 1, 0)], path[min(index + 1, len(path) - 1)]
            heading = float(np.arctan2(*(after - before)[::-1])) + self.rng.normal(0, 0.45)
            lobe = _lump(self.rng, float(size), self.rng.uniform(1.0, 1.6), heading)
            cv2.fillPoly(mask, [canvas.fixed(path[index] + lobe)], 255, cv2.LINE_AA, _SUBPIXEL_BITS)
        width = max(1, round(thread_um * canvas.px_per_um))
        cv2.polylines(mask, [corners], False, 255, width, cv2.LINE_AA, _SUBPIXEL_BITS)
        return self.organic(_unit(mask), 0.2)


def _lump(rng: Generator, size_um: float, aspect: float, turn: float) -> NDArray[np.float64]:
    """An uneven oval about the origin, as lobes of nuclei are."""
    distance = np.full(OUTLINE_POINTS, size_um)
    for bumps, amplitude in ((2, 0.05), (3, 0.07), (4, 0.04), (5, 0.03)):
        distance *= 1 + rng.normal(0, amplitude) * np.cos(bumps * _TURN + rng.uniform(0, 2 * np.pi))
    return _turned(distance * np.cos(_TURN) * np.sqrt(aspect), distance * np.sin(_TURN) / np.sqrt(aspect), turn)


def _turned(along: NDArray[np.float64], across: NDArray[np.float64], turn: float) -> NDArray[np.float64]:
    """Points (n, 2) of a shape given along and across its own axis, which is turned by `turn` radians."""
    x = along * np.cos(turn) - across * np.sin(turn)
    y = along * np.sin(turn) + across * np.cos(turn)
    return np.stack([x, y], axis=1)


def _arc(rng: Generator, count: int, radius_um: float, span: float) -> NDArray[np.float64]:
    """Points along an open bow about the middle of the cell."""
    turn = rng.uniform(0, 2 * np.pi) + np.linspace(-span / 2, span / 2, count)
    reach = radius_um * (1 + rng.normal(0, 0.10, count))
    bend = radius_um * rng.uniform(0, 0.25) * np.asarray([np.cos(turn.mean()), np.sin(turn.mean())])
    return np.asarray(np.stack([reach * np.cos(turn), reach * np.sin(turn)], axis=1) - bend, dtype=np.float64)


def _paint_red_cell(pen: _Pen) -> Floats:
    canvas, style, rng = pen.canvas, pen.style, pen.rng
    body = pen.body
    # Depth below the outline, 0 at the edge and 1 in the middle, follows any shape of the outline.
    depth = cv2.distanceTransform((body > 0.5).astype(np.uint8), cv2.DIST_L2, 3) / (pen.radius_um * canvas.px_per_um)
    depth = canvas.soft(depth.astype(np.float32), 0.25)
    pallor = float(np.clip(rng.normal(style.pallor, 0.22), 0, 0.97))
    outer = rng.uniform(0.32, 0.6)
    inner = outer + rng.uniform(0.12, 0.42)  # a small difference: a sharply cut pallor
    thickness = 1 - np.float32(pallor) * _step(depth, outer, inner)
    edge = np.exp(-((depth / 0.12) ** 2))
    thickness = (
        thickness
        * (0.8 + 0.2 * _step(depth, 0.0, 0.22))
        * (1 + np.float32(style.rim) * edge)
        * (1 + 0.018 * canvas.mottle(rng, 0.8))
    )
    slope = np.linspace(-1, 1, canvas.width_px, dtype=np.float32)
    thickness = thickness * (1 + np.float32(rng.normal(0, 0.05)) * slope)
    amount = body * thickness * np.float32(np.exp(rng.normal(0, 0.09)))
    od = amount[..., None] * (_od(style.red_cell_od) * np.exp(rng.normal(0, 0.03, 3))).astype(np.float32)
    if style.glow:
        outside = canvas.soft(body, 0.4) - body
        od -= np.float32(style.glow) * np.clip(outside, 0, 1)[..., None]
    return _floats(od)


def _paint_platelet(pen: _Pen) -> Floats:
    rng, style, canvas = pen.rng, pen.style, pen.canvas
    body = canvas.soft(pen.body, 0.12)
    hyalomere = _blend(style.blue_plasm_od, style.purple_granule_od, rng.uniform(0.05, 0.3))
    od = _floats((body * np.clip(0.9 + 0.3 * canvas.mottle(rng, 0.4), 0.2, 2))[..., None] * _od(hyalomere))
    core = body * canvas.soft(canvas.filled(pen.outline * rng.uniform(0.5, 0.85)), 0.3)
    _lay(od, core * np.float32(rng.uniform(0.3, 0.9)), _od(_scale(style.purple_granule_od, rng.uniform(0.5, 0.85))))
    count = int(rng.integers(14, 55))
    grains = body * canvas.grains(pen.points_inside(count, 0, rng.uniform(0.6, 0.95)), rng.uniform(0.07, 0.2, count))
    colour = _blend(style.purple_granule_od, style.nucleus_dark_od, rng.uniform(0, 0.9))
    _lay(od, grains * np.float32(rng.uniform(0.4, 0.95)), _od(colour))
    return od


def _paint_lymphocyte(pen: _Pen) -> Floats:
    rng, style = pen.rng, pen.style
    od = pen.plasm(_scale(style.blue_plasm_od, rng.uniform(0.75, 1.3)), 0.16)
    size = rng.uniform(0.8, 0.95) if rng.random() < 0.75 else rng.uniform(0.64, 0.8)
    spare = 0.97 - size
    towards, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
    dents = ((rng.uniform(0, 2 * np.pi), rng.uniform(0.08, 0.3), rng.uniform(0.2, 0.5)),) if rng.random() < 0.35 else ()
    offset = (spare * rng.uniform(0, 0.9) * np.cos(towards), spare * rng.uniform(0, 0.9) * np.sin(towards))
    nucleus = pen.organic(pen.blob(size, offset, abs(rng.normal(0, 0.04)), turn, dents))
    if rng.random() < 0.15:
        pen.granules(od, int(rng.integers(3, 9)), (0.15, 0.3), style.purple_granule_od, 0.8, 0.6)
    pen.nucleus(od, nucleus, rng.uniform(0.9, 1.1), rng.uniform(0.25, 0.8), rng.uniform(0.5, 0.9))
    return od


def _paint_monocyte(pen: _Pen) -> Floats:
    rng, style = pen.rng, pen.style
    grey = _blend(style.blue_plasm_od, style.pink_plasm_od, rng.uniform(0.05, 0.4))
    od = pen.plasm(_scale(grey, rng.uniform(0.75, 1.15)), 0.2, 0.35)
    pen.granules(od, int(rng.integers(40, 140)), (0.07, 0.14), style.purple_granule_od, 0.45)
    towards, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
    dents = [(rng.choice([-1, 1]) * np.pi / 2 + rng.normal(0, 0.3), rng.uniform(0.25, 0.65), rng.uniform(0.25, 0.6))]
    for _ in range(int(rng.integers(0, 3))):
        dents.append((rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.35), rng.uniform(0.15, 0.4)))
    offset = (0.14 * np.cos(towards), 0.14 * np.sin(towards))
    nucleus = pen.organic(pen.blob(rng.uniform(0.62, 0.76), offset, rng.uniform(0.03, 0.2), turn, tuple(dents)), 0.35)
    pen.nucleus(od, nucleus, rng.uniform(0.72, 0.92), 1.0, rng.uniform(0.35, 0.55))
    if rng.random() < 0.6:
        count = int(rng.integers(2, 14))
        pen.vacuoles(od, count, (0.18, 0.62), pen.points_inside(count, 0.45, 0.9))
    return od


def _paint_ig(pen: _Pen) -> Floats:
    """Promyelocyte, myelocyte or metamyelocyte."""
    rng, style = pen.rng, pen.style
    ripeness = rng.random()
    plasm = _blend(style.blue_plasm_od, style.pink_plasm_od, np.clip(ripeness + rng.normal(0, 0.15), 0.1, 0.9))
    od = pen.plasm(_scale(plasm, rng.uniform(0.85, 1.15)), 0.14)
    pen.granules(od, int(rng.integers(140, 340)), (0.1, 0.2), style.purple_granule_od, rng.uniform(0.45, 0.85))
    towards, turn = rng.uniform(0, 2 * np.pi), rng.uniform(0, np.pi)
    size = 0.78 - 0.14 * ripeness + rng.normal(0, 0.03)
    reach = (0.95 - size) * rng.uniform(0.4, 1.0)
    dents: tuple[tuple[float, float, float], ...] = ()
    if ripeness > 0.55:  # a metamyelocyte is indented on the side of the cell's middle
        dents = ((towards + np.pi - turn, rng.uniform(0.2, 0.55), rng.uniform(0.35, 0.6)),)
    offset = (reach * np.cos(towards), reach * np.sin(towards))
    nucleus = pen.organic(pen.blob(size, offset, rng.uniform(0, 0.12), turn, dents), 0.35)
    pen.nucleus(od, nucleus, rng.uniform(0.75, 0.98), 0.9, rng.uniform(0.38, 0.6))
    if ripeness < 0.3:
        pen.granules(od, int(rng.integers(60, 160)), (0.1, 0.18), style.dark_granule_od, 0.5)
    return od


def _paint_erythroblast(pen: _Pen) -> Floats:
    rng, style = pen.rng, pen.style
    ripeness = rng.uniform(0, 0.8)
    plasm = _blend(_scale(style.blue_plasm_od, 1.25), style.red_cell_od, ripeness)
    od = pen.plasm(plasm, 0.09)
    size = 0.76 - 0.26 * ripeness + rng.normal(0, 0.03)
    towards = rng.uniform(0, 2 * np.pi)
    reach = (0.92 - size) * rng.uniform(0.1, 0.9)
    nucleus = pen.organic(
        pen.blob(size, (reach * np.cos(towards), reach * np.sin(towards)), abs(rng.normal(0, 0.04)), 0.0, ())
    )
    pen.nucleus(
        od, nucleus, rng.uniform(1.05, 1.3), rng.uniform(0.15, 0.85) * (1 - 0.5 * ripeness), rng.uniform(0.5, 0.8)
    )
    return od


def _paint_neutrophil(pen: _Pen) -> Floats:
    rng, style = pen.rng, pen.style
    od = pen.plasm(_scale(style.pink_plasm_od, rng.uniform(0.8, 1.25)), 0.18, 0.3)
    pen.granules(od, int(rng.integers(120, 300)), (0.07, 0.15), style.purple_granule_od, rng.uniform(0.15, 0.5))
    if rng.random() < 0.22:
        nucleus = _band(pen)
    else:
        count = int(rng.choice([2, 3, 4, 5], p=[0.2, 0.45, 0.27, 0.08]))
        radius = pen.radius_um
        path = _arc(rng, count, radius * rng.uniform(0.36, 0.5), rng.uniform(0.7, 1.0) * (1.3 + 0.85 * count))
        sizes = radius * (0.40 - 0.03 * count) * np.exp(rng.normal(0, 0.14, count))
        nucleus = pen.lobes(path, sizes, float(rng.choice([rng.uniform(0.25, 0.8), rng.uniform(0.8, 2.2)])))
    pen.nucleus(od, nucleus, rng.uniform(0.92, 1.1), rng.uniform(0.7, 1.0), rng.uniform(0.34, 0.55))
    return od


def _band(pen: _Pen) -> Floats:
    """The rod of a band form: C, U or S without a thread."""
    rng, radius = pen.rng, pen.radius_um
    span = rng.uniform(2.6, 4.6)
    path = _arc(rng, 14, radius * rng.uniform(0.42, 0.52), span)
    path = np.asarray(cv2.blur(path, (1, 5), borderType=cv2.BORDER_REPLICATE), dtype=np.float64)
    if rng.random() < 0.25:  # an S
        path[7:] = path[7] - 0.7 * (path[7:] - path[7])
        path -= path.mean(axis=0)
    sizes = radius * rng.uniform(0.19, 0.26) * (1 + 0.22 * np.abs(np.linspace(-1, 1, 14)))
    return pen.organic(pen.canvas.dots(path, sizes), 0.3)


def _paint_eosinophil(pen: _Pen) -> Floats:
    rng, style = pen.rng, pen.style
    od = pen.plasm(_scale(style.pink_plasm_od, 1.2), 0.1)
    tone = _scale(style.eosin_granule_od, rng.uniform(0.8, 1.2))
    pen.granules(od, int(rng.integers(330, 620)), (0.2, 0.36), tone, 0.95)
    pen.granules(od, int(rng.integers(100, 260)), (0.1, 0.22), _scale(tone, 1.35), 0.5)
    if rng.random() < 0.35:
        count = int(rng.integers(2, 10))
        pen.vacuoles(od, count, (0.15, 0.45), pen.points_inside(count, 0.3, 0.95))
    count = int(rng.choice([2, 3], p=[0.78, 0.22]))
    radius = pen.radius_um
    path = _arc(rng, count, radius * rng.uniform(0.44, 0.56), rng.uniform(1.5, 2.9) * (1 if count == 2 else 1.25))
    sizes = radius * (0.40 if count == 2 else 0.32) * np.exp(rng.normal(0, 0.1, count))
    pen.nucleus(
        od,
        pen.lobes(path, sizes, float(rng.uniform(0.3, 1.6))),
        rng.uniform(0.92, 1.08),
        rng.uniform(0.7, 1.0),
        rng.uniform(0.36, 0.55),
    )
    return od


def _paint_basophil(pen: _Pen) -> Floats:
    rng, style = pen.rng, pen.style
    od = pen.plasm(_blend(style.pink_plasm_od, style.purple_granule_od, rng.uniform(0.1, 0.6)), 0.2)
    radius = pen.radius_um
    path = _arc(rng, int(rng.integers(2, 4)), radius * rng.uniform(0.3, 0.42), rng.uniform(1.6, 3.2))
    sizes = radius * 0.42 * np.exp(rng.normal(0, 0.12, len(path)))
    pen.nucleus(od, pen.lobes(path, sizes, radius * 0.4), rng.uniform(0.65, 0.95), 0.9, 0.45)
    count = int(rng.integers(140, 480))
    colour = _blend(style.dark_granule_od, style.purple_granule_od, rng.uniform(0, 0.3))
    pen.granules(od, count, (0.15, 0.36), colour, rng.uniform(0.85, 1.0), 0.15)
    pen.granules(od, count // 3, (0.15, 0.34), _blend(colour, style.purple_granule_od, 0.5), 0.8, 0.6)
    return od


_PAINTERS: dict[str, Callable[[_Pen], Floats]] = {
    RED_CELL: _paint_red_cell,
    PLATELET: _paint_platelet,
    "basophil": _paint_basophil,
    "eosinophil": _paint_eosinophil,
    "erythroblast": _paint_erythroblast,
    "ig": _paint_ig,
    "lymphocyte": _paint_lymphocyte,
    "monocyte": _paint_monocyte,
    "neutrophil": _paint_neutrophil,
}


def _blend(first: Triple, second: Triple, share: float) -> Triple:
    return _triple(np.asarray(first, dtype=np.float64) * (1 - share) + np.asarray(second, dtype=np.float64) * share)


def _scale(colour: Triple, factor: float) -> Triple:
    return colour[0] * factor, colour[1] * factor, colour[2] * factor
