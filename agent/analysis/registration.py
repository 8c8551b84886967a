"""Where one field lies against another, from their pictures alone.

    Frame --take_view--> View (small, grey)      two views --register--> Shift, or None: not the same place

Phase correlation (Kuglin and Hines 1975) proposes places, zero-padded so that a strip of overlap is enough, and the
outermost rows and columns of the one view, looked for near the opposite edge of the other, propose the narrow strips;
the grey values of the overlap must agree there (normalised correlation), more clearly the smaller it is; then small
patches are found again one by one, and a turn and a shift are fitted to those that agree. A proposal that the map or
the stage makes goes the same way. Where the picture alone is not enough, a witness may speak: the cells themselves.

Coordinates are pixels of the full frame. A `Shift` leads from the new frame to the old one: old = turn(new) + (x, y).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.domain import Pixels

Floats = NDArray[np.float32]

VIEW_SIDE_PX: Final = 128
"""px; longest side of a view. A red cell is ten or more of them wide at the magnifications of a smear, and a patch is
found to a tenth of one: half a pixel of the frame."""

JPEG_QUALITY: Final = 60
"""A stored view takes 2 to 4 kB; ten thousand of them 30 MB."""

PEAKS: Final = 16
PROPOSALS: Final = 4
"""Peaks of the phase correlation that are looked at in the halved views, and those of them that are verified. Dust on
the sensor makes one of its own, at no shift."""

LEAST_STRIP_PX: Final = 5
"""View pixels; a narrower overlap holds nothing to compare."""

PROPOSED: Final = (0.70, 5.0)
SEARCHED: Final = (0.85, 9.5)
"""Least normalised correlation of the overlap after the fit, and least evidence: its Fisher transform times the root of
the number of independent places in the overlap (one for each GRAIN_PX squared). One place seen twice, turned by 2
degrees and out of focus, has 0.85 and more. Where all shifts were looked at, chance had more chances."""

WITNESSED: Final = (0.80, 5.5)
"""The same where the cells of both fields agree that it is the place. Of fields that lie apart, pushed together so that
3 to 40 % seem common, 3 in 1,000 reach .7 and 5.0 without a witness (simulated slide, the worst of four devices)."""

GRAIN_PX: Final = 5.0
SEARCH_PX: Final = 5
PATCH_PX: Final = 15
PATCHES: Final = 16
PATCH_AGREEMENT: Final = 0.6

RIM_PX: Final = 5
"""View pixels: so many rows or columns of a view's rim are looked for in the other view."""
RIM_SHARE: Final = 0.2
RIM_SLIP: Final = 0.12
"""Of the view's side: how wide an overlap is looked for in this way, and how far fields may have slipped along it."""
RIM_PEAKS: Final = 2

MOST_TURN: Final = math.radians(4)
"""A slide that was taken out and put back lies turned by 2 degrees and less; more is a wrong fit."""


@dataclass(frozen=True, slots=True)
class Shift:
    """From pixels of a new frame to those of an old one. turn: radians. agreement: 0 to 1."""

    x: float
    y: float
    turn: float = 0.0
    agreement: float = 1.0

    def apply(self, x: float, y: float) -> tuple[float, float]:
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return cos * x - sin * y + self.x, sin * x + cos * y + self.y

    def apply_all(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """points: (n, 2)."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return np.asarray(points @ np.asarray([[cos, sin], [-sin, cos]]) + (self.x, self.y))

    def then(self, after: Shift) -> Shift:
        """First this one, then another: where the old frame itself lies."""
        x, y = after.apply(self.x, self.y)
        return Shift(x, y, self.turn + after.turn, min(self.agreement, after.agreement))

    def inverse(self) -> Shift:
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        return Shift(-cos * self.x - sin * self.y, sin * self.x - cos * self.y, -self.turn, self.agreement)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A field, small and grey. factor: frame pixels for one of the view. relief: what is left without slow changes of
    light, in standard deviations; float32, (height, width). half: the same at half the size. spectrum: flattened.
    """

    grey: NDArray[np.uint8]
    factor: int
    relief: Floats
    half: Floats
    spectrum: NDArray[np.complex64]


def take_view(pixels_bgr: Pixels) -> View:
    """The view of a frame."""
    height, width = pixels_bgr.shape[:2]
    factor = max(1, math.ceil(max(height, width) / VIEW_SIDE_PX))
    whole = pixels_bgr[: max(1, height // factor) * factor, : max(1, width // factor) * factor]
    size = (max(1, width // factor), max(1, height // factor))
    small = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
    return _view(np.asarray(cv2.cvtColor(small, cv2.COLOR_BGR2GRAY), np.uint8), factor)


def to_jpeg(view: View) -> bytes:
    _, coded = cv2.imencode(".jpg", view.grey, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    return coded.tobytes()


def from_jpeg(coded: bytes, factor: int) -> View:
    grey = cv2.imdecode(np.frombuffer(coded, np.uint8), cv2.IMREAD_GRAYSCALE)
    return _view(np.asarray(grey, np.uint8), factor)


def _view(grey: NDArray[np.uint8], factor: int) -> View:
    logs = np.asarray(cv2.log(np.maximum(grey, 8).astype(np.float32)), np.float32)
    relief = logs - cv2.GaussianBlur(logs, (0, 0), 14.0)
    deviation = float(relief.std())
    relief = np.clip(relief / max(deviation, 1e-3), -3.0, 3.0).astype(np.float32)
    height, width = relief.shape
    half = cv2.resize(relief, (max(1, width // 2), max(1, height // 2)), interpolation=cv2.INTER_AREA)
    return View(grey, factor, relief, np.asarray(half, np.float32), _spectrum(np.asarray(half, np.float32)))


def _spectrum(half: Floats) -> NDArray[np.complex64]:
    """Spectrum of the padded view, flattened. Not to bare phases: what is weak is noise (.6 found most strips)."""
    size = _padded(half.shape[0]), _padded(half.shape[1])
    spectrum = np.fft.rfft2(half - half.mean(), size)
    return np.asarray(spectrum / (np.abs(spectrum) ** 0.6 + 1e-3), np.complex64)


def _padded(side: int) -> int:
    """Twice the side, up to a number that is quick to transform."""
    return next(size for size in (16, 32, 64, 96, 128, 144, 160, 192, 256, 512) if size >= 2 * side)


Witness = Callable[["Shift"], bool | None]
"""Whether the cells of two fields agree that a shift is right: yes, no, or too few of them to say."""


def register(
    new: View,
    old: View,
    proposals: Iterable[Shift] = (),
    *,
    searches: bool = True,
    witness: Witness = lambda _shift: None,
) -> Shift | None:
    """Where the new view lies on the old one; None where they show no common place with certainty.

    proposals: places to look at first, right to some SEARCH_PX view pixels; a sure one ends the search.
    searches: whether to look everywhere else too. witness: asked for places that the pictures propose.
    """
    if new.relief.shape != old.relief.shape or new.factor != old.factor or min(new.relief.shape) < 16:
        return None
    for proposal in proposals:
        found = _verify(new, old, *_middle_shift(new, proposal), proposal.turn, PROPOSED)
        if found is not None and witness(found[1]) is not False:
            return found[1]
    if not searches:
        return None
    sure = []
    for x, y in (*_peaks(new, old), *_rims(new, old)):
        found = _verify(new, old, x, y, 0.0, WITNESSED)
        if found is not None:
            is_clear = found[1].agreement >= SEARCHED[0] and found[0] >= SEARCHED[1]
            word = witness(found[1])
            if word or (is_clear and word is None):
                sure.append(found)
    return max(sure, key=lambda found: found[0])[1] if sure else None


def _rims(new: View, old: View) -> list[tuple[float, float]]:
    """Shifts, view pixels, at which a rim of the new view is found again near the opposite edge of the old one."""
    found = []
    for is_upright in (True, False):
        # Turned so that the rim is a column: left of the new on the right of the old, and the reverse.
        a, b = (view.relief if is_upright else view.relief.T for view in (new, old))
        high, wide = a.shape
        slip, band = int(RIM_SLIP * high), max(RIM_PX + 2, int(RIM_SHARE * wide))
        for is_first in (True, False):
            rim = a[slip : high - slip, :RIM_PX] if is_first else a[slip : high - slip, wide - RIM_PX :]
            ground = b[:, wide - band :] if is_first else b[:, :band]
            if float(rim.std()) < 0.05:
                continue
            scores = cv2.matchTemplate(np.ascontiguousarray(ground), np.ascontiguousarray(rim), cv2.TM_CCOEFF_NORMED)
            for _ in range(RIM_PEAKS):
                _, best, _, (at_x, at_y) = cv2.minMaxLoc(scores)
                scores[max(0, at_y - 3) : at_y + 4, max(0, at_x - 3) : at_x + 4] = -1
                across = float(wide - band + at_x if is_first else at_x - (wide - RIM_PX))
                along = float(at_y - slip)
                found.append((best, across, along) if is_upright else (best, along, across))
    return [(x, y) for _, x, y in sorted(found, reverse=True)[:PROPOSALS]]


def _verify(
    new: View, old: View, x: float, y: float, turn: float, least: tuple[float, float]
) -> tuple[float, Shift] | None:
    """Evidence and shift, frame pixels, of a place near to a proposed one; None where the two do not agree there."""
    found = _slide(new.relief, old.relief, x, y, turn, SEARCH_PX)
    if found is None or found[0] < least[1] / 2:
        return None
    fitted = _fit_patches(new, old, *found[1:], turn)
    agreement, evidence = _agreement(new, old, fitted)
    if agreement < least[0] or evidence < least[1]:
        return None
    return evidence, Shift(fitted.x * new.factor, fitted.y * new.factor, fitted.turn, agreement)


@lru_cache(maxsize=4)
def _ones(height: int, width: int) -> Floats:
    return np.ones((height, width), np.float32)


def _evidence(agreement: float, pixels: int) -> float:
    return math.atanh(min(agreement, 0.999)) * math.sqrt(pixels) / GRAIN_PX


def _middle_shift(new: View, shift: Shift) -> tuple[float, float]:
    """How far the middle of a view moves by a shift of the frame, view pixels."""
    height, width = new.relief.shape
    x, y = shift.apply(width * new.factor / 2, height * new.factor / 2)
    return x / new.factor - width / 2, y / new.factor - height / 2


def _peaks(new: View, old: View) -> list[tuple[float, float]]:
    """The likeliest shifts, view pixels: peaks of the phase correlation, first where the halved views agree best."""
    padded = (new.spectrum.shape[0], 2 * (new.spectrum.shape[1] - 1))
    surface = np.fft.irfft2(old.spectrum * new.spectrum.conj(), padded).astype(np.float32)
    surface *= _rarity(padded, new.half.shape[0], new.half.shape[1])
    found = []
    for _ in range(PEAKS):
        _, _, _, (x, y) = cv2.minMaxLoc(surface)
        surface[max(0, y - 3) : y + 4, max(0, x - 3) : x + 4] = -1
        dx, dy = (value - size if value > size // 2 else value for value, size in ((x, padded[1]), (y, padded[0])))
        at = _slide(new.half, old.half, float(dx), float(dy), 0.0, 2)
        if at is not None:
            found.append(at)
    found.sort(reverse=True)
    return [(2 * x, 2 * y) for _, x, y in found[:PROPOSALS]]


@lru_cache(maxsize=4)
def _rarity(padded: tuple[int, int], height: int, width: int) -> Floats:
    """One over the root of the overlap at each shift: chance grows with the root of what is compared."""
    rows = np.maximum(height - np.minimum(np.arange(padded[0]), padded[0] - np.arange(padded[0])), 0)
    columns = np.maximum(width - np.minimum(np.arange(padded[1]), padded[1] - np.arange(padded[1])), 0)
    area = np.where(rows > 2, rows, 0)[:, None] * np.where(columns > 2, columns, 0)[None]
    return np.where(area > 0, 1 / np.sqrt(np.maximum(area, 1)), 0).astype(np.float32)


def _overlap(shape: tuple[int, ...], x: float, y: float) -> tuple[int, int, int, int] | None:
    """left, top, right, bottom in the old view of what both show; None where that is too narrow."""
    height, width = shape[:2]
    left, top = max(0, math.ceil(x)), max(0, math.ceil(y))
    right, bottom = min(width, math.floor(width + x)), min(height, math.floor(height + y))
    if min(right - left, bottom - top) < LEAST_STRIP_PX:
        return None
    return left, top, right, bottom


def _slide(new: Floats, old: Floats, x: float, y: float, turn: float, reach: int) -> tuple[float, float, float] | None:
    """The best place within `reach` of a proposed one: evidence, x, y. x, y: shift of the middle, pixels of these."""
    moved = new if abs(turn) < 0.003 else _turned(new, turn)
    height, width = moved.shape
    x0, y0 = round(x), round(y)
    if abs(x0) > width - LEAST_STRIP_PX or abs(y0) > height - LEAST_STRIP_PX:
        return None
    # The part of the new view that stays inside the old one wherever it is slid to, else as much as there is.
    left, right = max(0, -x0 + reach), min(width, width - x0 - reach)
    top, bottom = max(0, -y0 + reach), min(height, height - y0 - reach)
    if right - left < LEAST_STRIP_PX:
        left, right = max(0, -x0), min(width, width - x0)
    if bottom - top < LEAST_STRIP_PX:
        top, bottom = max(0, -y0), min(height, height - y0)
    piece = moved[top:bottom, left:right]
    if min(piece.shape) < LEAST_STRIP_PX or float(piece.std()) < 0.05:
        return None
    ground_left, ground_top = max(0, left + x0 - reach), max(0, top + y0 - reach)
    ground = old[ground_top : bottom + y0 + reach, ground_left : right + x0 + reach]
    scores = cv2.matchTemplate(ground, piece, cv2.TM_CCOEFF_NORMED)
    _, best, _, (at_x, at_y) = cv2.minMaxLoc(scores)
    fine_x = at_x + (_vertex(*scores[at_y, at_x - 1 : at_x + 2]) if 0 < at_x < scores.shape[1] - 1 else 0.0)
    fine_y = at_y + (_vertex(*scores[at_y - 1 : at_y + 2, at_x]) if 0 < at_y < scores.shape[0] - 1 else 0.0)
    return _evidence(best, piece.size), ground_left + fine_x - left, ground_top + fine_y - top


def _turned(relief: Floats, turn: float) -> Floats:
    """Turned about its middle, so that shifts of the middle stay what they are."""
    height, width = relief.shape
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), -math.degrees(turn), 1.0)
    return np.asarray(cv2.warpAffine(relief, matrix, (width, height), flags=cv2.INTER_LINEAR), np.float32)


def _fit_patches(new: View, old: View, x: float, y: float, turn: float) -> Shift:
    """The shift and turn, view pixels, on which most of the patches agree; the proposal where too few are found."""
    height, width = new.relief.shape
    middle = np.asarray([width / 2, height / 2])
    proposal = _about_middle(x, y, turn, middle)
    here, there = _find_patches(new, old, x, y, turn)
    if len(here) < 3:
        return proposal
    keep = np.ones(len(here), bool)
    fitted = proposal
    for limit in (4.0, 2.0, 1.2):
        fitted = _rigid(here[keep], there[keep], turn)
        miss = np.hypot(*(fitted.apply_all(here) - there).T)
        keep = miss < max(limit, 1.5 * float(np.median(miss)))
        if keep.sum() < 3:
            return proposal
    return fitted if abs(fitted.turn) <= MOST_TURN else proposal


def _about_middle(x: float, y: float, turn: float, middle: NDArray[np.float64]) -> Shift:
    plain = Shift(0.0, 0.0, turn)
    at_x, at_y = plain.apply(*middle)
    return Shift(float(middle[0] + x - at_x), float(middle[1] + y - at_y), turn)


def _find_patches(
    new: View, old: View, x: float, y: float, turn: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Middles of patches in the new view, and where they are in the old one; (n, 2) each, view pixels."""
    height, width = new.relief.shape
    bounds = _overlap((height, width), -x, -y)
    if bounds is None:
        return np.zeros((0, 2)), np.zeros((0, 2))
    left, top, right, bottom = bounds
    wide, high = min(PATCH_PX, right - left), min(PATCH_PX, bottom - top)
    squares = cv2.blur(new.relief * new.relief, (wide, high))
    corners = [
        (float(squares[corner_y + high // 2, corner_x + wide // 2]), corner_x, corner_y)
        for corner_y in range(top, bottom - high + 1, max(4, (bottom - top - high) // 5 or 1))
        for corner_x in range(left, right - wide + 1, max(4, (right - left - wide) // 5 or 1))
    ]
    about = _about_middle(x, y, turn, np.asarray([width / 2, height / 2]))
    here, there = [], []
    for _, corner_x, corner_y in sorted(corners, reverse=True)[:PATCHES]:
        to_x, to_y = about.apply(corner_x + wide / 2, corner_y + high / 2)
        at_x, at_y = round(to_x - wide / 2), round(to_y - high / 2)
        from_x, from_y = max(0, at_x - SEARCH_PX), max(0, at_y - SEARCH_PX)
        ground = old.relief[from_y : at_y + high + SEARCH_PX, from_x : at_x + wide + SEARCH_PX]
        if ground.shape[0] < high + 2 or ground.shape[1] < wide + 2:
            continue
        piece = new.relief[corner_y : corner_y + high, corner_x : corner_x + wide]
        scores = np.asarray(cv2.matchTemplate(ground, piece, cv2.TM_CCOEFF_NORMED), np.float32)
        _, best, _, (best_x, best_y) = cv2.minMaxLoc(scores)
        is_inside = 0 < best_x < scores.shape[1] - 1 and 0 < best_y < scores.shape[0] - 1
        if best < PATCH_AGREEMENT or not is_inside:
            continue
        fine_x = best_x + _vertex(*scores[best_y, best_x - 1 : best_x + 2])
        fine_y = best_y + _vertex(*scores[best_y - 1 : best_y + 2, best_x])
        here.append((corner_x + wide / 2, corner_y + high / 2))
        there.append((from_x + fine_x + wide / 2, from_y + fine_y + high / 2))
    return np.asarray(here, np.float64).reshape(-1, 2), np.asarray(there, np.float64).reshape(-1, 2)


def _vertex(before: float, at: float, after: float) -> float:
    """Where between three values the top of their parabola lies, -0.5 to 0.5."""
    bend = before - 2 * at + after
    return 0.0 if bend >= -1e-9 else float(np.clip((before - after) / (2 * bend), -0.5, 0.5))


def _rigid(here: NDArray[np.float64], there: NDArray[np.float64], prior_turn: float) -> Shift:
    """Least squares turn and shift (Kabsch 1976). Points close together say little of a turn: the prior then weighs."""
    middle, goal = here.mean(axis=0), there.mean(axis=0)
    a, b = here - middle, there - goal
    cos, sin = float((a * b).sum()), float((a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum())
    weight = 400.0  # view pixels squared: a pair of points 20 px from their middle says as much as the prior
    cos += weight * math.cos(prior_turn)
    sin += weight * math.sin(prior_turn)
    turn = Shift(0.0, 0.0, math.atan2(sin, cos))
    x, y = goal - np.asarray(turn.apply(*middle))
    return Shift(float(x), float(y), turn.turn)


def _agreement(new: View, old: View, shift: Shift) -> tuple[float, float]:
    """Normalised correlation of what both show, and the evidence that it gives."""
    height, width = new.relief.shape
    cos, sin = math.cos(shift.turn), math.sin(shift.turn)
    # Pixel centres lie half a pixel inside; OpenCV counts from centres.
    x, y = shift.apply(0.5, 0.5)
    matrix = np.asarray([[cos, -sin, x - 0.5], [sin, cos, y - 0.5]], np.float64)
    moved = cv2.warpAffine(new.relief, matrix, (width, height), flags=cv2.INTER_LINEAR)
    inside = cv2.warpAffine(_ones(height, width), matrix, (width, height), flags=cv2.INTER_LINEAR) > 0.999
    if int(inside.sum()) < LEAST_STRIP_PX * 16:
        return 0.0, 0.0
    a, b = moved[inside], old.relief[inside]
    a, b = a - a.mean(), b - b.mean()
    power = math.sqrt(float(a @ a) * float(b @ b))
    agreement = float(a @ b) / power if power > 1e-6 else 0.0
    return agreement, _evidence(agreement, a.size)
