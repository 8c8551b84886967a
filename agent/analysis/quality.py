"""The gate: whether a frame is worth the models' time. A refused frame is a value with its reasons, not an error.

    pixels --look--> FrameReading --judge, with what the gate remembers--> FrameQuality, GateMemory

| reason        | measured                                                     | against                            |
|---------------|--------------------------------------------------------------|------------------------------------|
| `dark`        | mean brightness                                              | a fixed limit                      |
| `saturated`   | share of pixels at full white                                | a fixed limit                      |
| `empty`       | share of the field that is darker than the ground around it  | a fixed limit                      |
| `colour-cast` | colour of the ground, where no cell lies                     | grey, and this device's usual      |
| `moving`      | gradients that are missing along one direction; the frame    | a fixed limit                      |
|               | before, where a live camera gave one a moment ago            |                                    |
| `blurred`     | fine detail as a share of coarse detail, at the cells' edges | a fixed limit, and the device's    |
|               |                                                              | usual; with hysteresis             |
| `unchanged`   | the last analysed field, seen again                          | a shift below a fortieth of it     |

Focus is a ratio, so that neither stain, lamp nor number of cells moves it much; what is left differs from microscope to
microscope, and is learnt while the agent runs. An empty glass has no detail at any scale: it is `empty`, never
`blurred`. The limits were chosen on the train and val fields of the three devices of the public data; how well they
decide: `python -m tests.proofs.gate`.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.config import QualitySection
from agent.domain import Frame, FrameColour, FrameQuality, Pixels

Floats = NDArray[np.float32]

WORKING_SIDE_PX: Final = 320
"""px; longest side at which detail is measured: frames of one optics at two camera resolutions then have comparable
figures, and 80 megapixels cost little more than one. Never above half the frame: the finest detail of a camera is its
noise, its colour mosaic and its sharpening."""

GLANCE_SIDE_PX: Final = 80
"""px; longest side of the picture in which brightness, ground, cells and movement are looked for: a red cell is still
some ten of them wide, and noise is averaged away."""

FULL_WHITE: Final = 253
"""A pixel counts as clipped when all its channels reach this: JPEG moves full white by a level or two."""

CLIPPING_SAMPLE_PX: Final = 40_000
"""Pixels that are looked at for clipping; a share of 70 % is then known to 0.3 %. They are picked, not averaged: the
mean of a white and a grey pixel is no longer white."""

SHADE: Final = 0.06
"""Natural logarithm; what lets this much less light through than the ground around it is something. Red cells of the
public data let 0.15 and more less through, the middle of pale ones 0.08."""

STREAK_AT_MOST: Final = 0.37
"""0 (detail in all directions alike) to 1 (in one only). Of the real fields 99 % stay below 0.32; of those smeared over
a fifth of a red cell 99 % have 0.45 and more."""

UNCHANGED: Final = "unchanged"

MOVED_SHARE: Final = 0.0125
UNCHANGED_SHARE: Final = 0.025
"""Of the frame's longer side: one glance pixel between two frames is movement; two since the last analysed field bring
nothing new, a stage that creeps on is followed."""

ALIKE: Final = 0.016
"""Mean difference of two glances of one place, as a share of the brightness: noise, and half a glance pixel of shift.
Two fields differ by 0.1."""

SHARPER_FACTOR: Final = 1.5
"""A field that was analysed once is analysed again when its focus has risen by this: somebody has turned the knob."""

LEARNING_FRAMES: Final = 6
"""Accepted frames before the device's usual figures count: the limits alone decide until then."""

LEARNING_RATE: Final = 1 / 16
FOCUS_SPREAD: Final = 4.3
"""The device's usual focus divided by this is blurred. The least sharp 1 % of each device's good fields lie at
usual / 3.8; of those blurred by 6 % of a red cell and more, on the least sharp device, 98 % lie below usual / 4.4."""

FOCUS_RETURN: Final = 1.15
"""Hysteresis: to be sharp again the focus must lie this factor above the limit under which it was called blurred."""

CAST_DRIFT: Final = 0.25
"""Natural logarithm of a ratio of two channels of the ground; good fields of a device lie within 0.21 of its usual."""

RELEARN_AFTER: Final = 100
"""Frames refused in a row only because this device is usually otherwise: then it is the usual that has changed (another
objective, another lamp), and it is learnt anew. The fixed limits hold all the time."""


@dataclass(frozen=True, slots=True, eq=False)
class Glance:
    """A frame, small and grey: float32, longest side GLANCE_SIDE_PX, brightness divided by its mean, read-only."""

    grey: Floats
    captured_monotonic_ns: int
    focus: float


@dataclass(frozen=True, slots=True, eq=False)
class FrameReading:
    """What a frame's pixels say, all that the gate decides by.

    brightness: grey levels.  clipped_pct, shaded_pct: 0 to 100 of the frame.  streak: 0 to 1.  focus: fine as a share
    of coarse detail, in thousandths; None for a frame of less than 64 px, which is too small to tell.
    """

    brightness: float
    clipped_pct: float
    shaded_pct: float
    colour: FrameColour
    streak: float
    focus: float | None
    glance: Floats

    @property
    def cast(self) -> tuple[float, float]:
        """Ln(blue/green), ln(red/green) of the ground."""
        return cast_of(self.colour)


@dataclass(frozen=True, slots=True)
class Usual:
    """What is usual on this device, learnt from accepted frames. log_focus: natural logarithm."""

    frames: int = 0
    log_focus: float = 0.0
    cast: tuple[float, float] = (0.0, 0.0)

    @property
    def is_known(self) -> bool:
        return self.frames >= LEARNING_FRAMES


@dataclass(frozen=True, slots=True, eq=False)
class GateMemory:
    """What the gate takes from frame to frame; `usual` is kept over a restart.

    unusual_in_a_row: frames refused since the last accepted one only because they differ from the usual.
    last: the frame before; analysed: the last accepted one.
    """

    usual: Usual = Usual()
    is_blurred: bool = False
    unusual_in_a_row: int = 0
    last: Glance | None = None
    analysed: Glance | None = None


def assess_frame(frame: Frame, section: QualitySection, memory: GateMemory) -> tuple[FrameQuality, GateMemory]:
    """The gate's verdict on a frame, and what it remembers for the next one."""
    reading = look(frame.pixels_bgr)
    glance = Glance(reading.glance, frame.captured_monotonic_ns, reading.focus or 0.0)
    # Only a live camera shows one place twice on its way; stored pictures were each taken on purpose.
    before = memory.last if frame.origin_key is None else None
    reasons = _fixed_faults(reading, section)
    if not reasons and section.skip_unchanged and _shows_the_same(glance, memory.analysed):
        reasons = (UNCHANGED,)
    if not reasons and before is not None and _is_on_its_way(before, glance, section.motion_window_s):
        reasons = ("moving",)
    unusual = () if reasons else _unusual_faults(reading, memory, section)
    quality = _quality(reading, reasons or unusual)
    after = replace(memory, last=glance)
    if unusual:
        return quality, _mark_unusual(after, is_blurred="blurred" in unusual)
    if reasons:
        return quality, after
    usual = _learn(memory.usual, reading)
    return quality, replace(after, usual=usual, is_blurred=False, unusual_in_a_row=0, analysed=glance)


def to_text(memory: GateMemory) -> str:
    """What the gate should still know after a restart, in one line of JSON."""
    usual = memory.usual
    return json.dumps({"frames": usual.frames, "log_focus": round(usual.log_focus, 4), "cast": usual.cast})


def from_text(text: str | None) -> GateMemory:
    """The memory again; an empty one where there is none, or it cannot be read: what is usual is soon learnt anew."""
    try:
        stored = json.loads(text or "")
        blue, red = stored["cast"]
        return GateMemory(Usual(int(stored["frames"]), float(stored["log_focus"]), (float(blue), float(red))))
    except (ValueError, TypeError, KeyError):
        return GateMemory()


def assess_quality(pixels_bgr: Pixels, section: QualitySection) -> FrameQuality:
    """The verdict on a single picture from a device of which nothing is known."""
    reading = look(pixels_bgr)
    return _quality(reading, _fixed_faults(reading, section))


# ------------------------------------------------------------------------------------------------------ judging


def _quality(reading: FrameReading, reasons: tuple[str, ...]) -> FrameQuality:
    return FrameQuality(not reasons, reasons, reading.focus or 0.0, reading.clipped_pct, reading.colour)


def _fixed_faults(reading: FrameReading, section: QualitySection) -> tuple[str, ...]:
    """Faults that need no memory. Without light, or without anything in it, a picture tells no more."""
    if reading.brightness < section.min_brightness:
        return ("dark",)
    if reading.clipped_pct > section.max_clipped_pct:
        return ("saturated",)
    if reading.shaded_pct < section.min_shaded_pct:
        return ("empty",)
    faults = {
        "colour-cast": max(map(abs, reading.cast)) > section.max_colour_cast,
        "moving": reading.streak > STREAK_AT_MOST,
        "blurred": reading.focus is not None and reading.focus < section.min_focus,
    }
    return tuple(reason for reason, is_so in faults.items() if is_so)


def _unusual_faults(reading: FrameReading, memory: GateMemory, section: QualitySection) -> tuple[str, ...]:
    """Faults against what is usual on this device."""
    usual = memory.usual
    if not usual.is_known or not section.learn:
        return ()
    limit = math.exp(usual.log_focus) / FOCUS_SPREAD * (FOCUS_RETURN if memory.is_blurred else 1)
    drift = max(abs(now - then) for now, then in zip(reading.cast, usual.cast, strict=True))
    faults = {"colour-cast": drift > CAST_DRIFT, "blurred": reading.focus is not None and reading.focus < limit}
    return tuple(reason for reason, is_so in faults.items() if is_so)


def _mark_unusual(memory: GateMemory, *, is_blurred: bool) -> GateMemory:
    in_a_row = memory.unusual_in_a_row + 1
    if in_a_row >= RELEARN_AFTER:
        return replace(memory, usual=Usual(), is_blurred=False, unusual_in_a_row=0)
    return replace(memory, is_blurred=is_blurred, unusual_in_a_row=in_a_row)


def _learn(usual: Usual, reading: FrameReading) -> Usual:
    """The mean of the first frames, then a slow one. A far sharper frame shows that the first were out of focus."""
    if reading.focus is None:
        return usual
    log_focus = math.log(max(reading.focus, 1e-3))
    if usual.is_known and log_focus > usual.log_focus + math.log(FOCUS_SPREAD):
        return Usual(1, log_focus, reading.cast)
    rate = max(LEARNING_RATE, 1 / (usual.frames + 1))
    blue, red = (then + rate * (now - then) for now, then in zip(reading.cast, usual.cast, strict=True))
    return Usual(usual.frames + 1, usual.log_focus + rate * (log_focus - usual.log_focus), (blue, red))


def _shows_the_same(now: Glance, analysed: Glance | None) -> bool:
    if analysed is None or now.focus > SHARPER_FACTOR * analysed.focus:
        return False
    return _shift(now, analysed) < UNCHANGED_SHARE


def _is_on_its_way(before: Glance, now: Glance, window_s: float) -> bool:
    if not 0 <= now.captured_monotonic_ns - before.captured_monotonic_ns < window_s * 1e9:
        return False  # longer ago: it may have been moved and have come to rest
    return _shift(now, before) > MOVED_SHARE


def _shift(now: Glance, before: Glance) -> float:
    """How far the field has moved, as a share of the longer side; infinite where the two show different things."""
    if now.grey.shape != before.grey.shape or min(now.grey.shape) < 8:
        return math.inf
    unaligned = _differ(now.grey, before.grey)
    if unaligned < ALIKE / 4:
        return 0.0
    height, width = now.grey.shape
    # Copies: OpenCV 4 multiplies its arguments by the window in place, read-only or not.
    (x, y), _ = cv2.phaseCorrelate(before.grey.copy(), now.grey.copy(), _window(width, height))
    if max(abs(x), abs(y)) > min(height, width) / 4:
        return math.inf
    back = np.asarray([[1, 0, -x], [0, 1, -y]], np.float32)
    moved = _floats(cv2.warpAffine(now.grey, back, (width, height), borderMode=cv2.BORDER_REPLICATE))
    rim = math.ceil(max(abs(x), abs(y))) + 1
    inside = np.s_[rim : height - rim, rim : width - rim]
    is_same = _differ(moved[inside], before.grey[inside]) < max(ALIKE, 0.4 * unaligned)
    return math.hypot(x, y) / max(width, height) if is_same else math.inf


def _differ(first: Floats, second: Floats) -> float:
    return float(cv2.norm(first, second, cv2.NORM_L1)) / first.size


@lru_cache(maxsize=4)
def _window(width: int, height: int) -> Floats:
    return np.asarray(cv2.createHanningWindow((width, height), cv2.CV_32F), np.float32)


# ------------------------------------------------------------------------------------------------------ looking


def look(pixels_bgr: Pixels) -> FrameReading:
    """Measure a frame. Cheap things first; a frame in which there is nothing to focus on is not searched for detail."""
    small = shrink(pixels_bgr, WORKING_SIDE_PX, 2)
    glance = shrink(small, GLANCE_SIDE_PX, 1)
    grey = np.asarray(cv2.cvtColor(glance, cv2.COLOR_BGR2GRAY), np.float32)
    brightness = float(grey.mean())
    shade = _shade(grey)
    streak, focus = _detail(small)
    grey /= max(brightness, 1.0)
    grey.flags.writeable = False
    return FrameReading(
        brightness=brightness,
        clipped_pct=_clipped_pct(pixels_bgr),
        shaded_pct=100.0 * float(np.count_nonzero(shade < -SHADE)) / shade.size,
        colour=_colour(glance, shade),
        streak=streak,
        focus=focus,
        glance=grey,
    )


def ground_colour(pixels_bgr: Pixels) -> tuple[float, float, float]:
    """B, G, R where no cell lies, grey levels of at least 1: what the gate judges and the white balance evens out."""
    glance = shrink(shrink(pixels_bgr, WORKING_SIDE_PX, 2), GLANCE_SIDE_PX, 1)
    grey = np.asarray(cv2.cvtColor(glance, cv2.COLOR_BGR2GRAY), np.float32)
    return _ground(glance, _shade(grey))


def cast_of(colour: FrameColour) -> tuple[float, float]:
    """Ln(blue/green), ln(red/green) of the ground: 0 where it is grey."""
    blue, green, red = colour.ground_bgr
    return math.log(blue / green), math.log(red / green)


def _colour(glance: Pixels, shade: Floats) -> FrameColour:
    """The colours of ground and stain. What lies in between is the soft edge of something, and is neither."""
    ground = _ground(glance, shade)
    stained = (shade < -SHADE).astype(np.uint8)
    if not stained.any():
        return FrameColour(ground, None)
    blue, green, red, _ = cv2.mean(cv2.LUT(glance, _DENSITIES), stained)
    densities = (d - math.log10(255 / level) for d, level in zip((blue, green, red), ground, strict=True))
    blue_od, green_od, red_od = densities
    return FrameColour(ground, (blue_od, green_od, red_od))


def _ground(glance: Pixels, shade: Floats) -> tuple[float, float, float]:
    blue, green, red, _ = cv2.mean(glance, (shade > -SHADE / 2).astype(np.uint8))
    return max(blue, 1.0), max(green, 1.0), max(red, 1.0)


_DENSITIES: Final = np.log10(255 / np.maximum(np.arange(256), 1)).astype(np.float32)
"""Optical density of each grey level against full white."""


def shrink(pixels_bgr: Pixels, side_px: int, least_factor: int) -> Pixels:
    """The means of squares of n x n pixels, n the least that brings the longer side to `side_px`; a rim may be lost.

    A whole number, because OpenCV is then several times as fast.
    """
    height_px, width_px = pixels_bgr.shape[:2]
    factor = max(least_factor, math.ceil(max(height_px, width_px) / side_px))
    size = (width_px // factor, height_px // factor)
    if factor == 1 or min(size) < 1:
        return pixels_bgr
    whole = pixels_bgr[: size[1] * factor, : size[0] * factor]
    return np.asarray(cv2.resize(whole, size, interpolation=cv2.INTER_AREA), np.uint8)


def _shade(grey: Floats) -> Floats:
    """Ln of each pixel's light over that of the ground there: 0 on the ground, below it on what is stained.

    The ground is a parabola through the brightest pixels, fitted three times: a lamp is brighter in the middle. Every
    third pixel is enough for six numbers.
    """
    logs = _floats(cv2.log(np.maximum(grey, 1.0))).reshape(-1, 1)
    shapes = _parabola(*grey.shape)
    few_logs, few_shapes = logs[::3], shapes[::3]
    is_ground = few_logs[:, 0] >= _quantile(few_logs, 0.6)
    terms = np.zeros((shapes.shape[1], 1), np.float32)
    for _ in range(3):
        chosen = few_shapes[is_ground]
        normal = chosen.T @ chosen + 1e-3 * np.eye(shapes.shape[1], dtype=np.float32)
        terms = np.linalg.solve(normal, chosen.T @ few_logs[is_ground])
        is_ground = (few_logs - few_shapes @ terms)[:, 0] > -SHADE / 2
    return np.asarray((logs - shapes @ terms).reshape(grey.shape), np.float32)


@lru_cache(maxsize=4)
def _parabola(height: int, width: int) -> Floats:
    """The six terms of a parabola at each pixel; float32, (height * width, 6)."""
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], -1).reshape(-1, 6).astype(np.float32)


def _detail(small: Pixels) -> tuple[float, float | None]:
    """How one-sided the detail of a picture of working size is (0 to 1), and its focus in thousandths."""
    level = cv2.cvtColor(small, cv2.COLOR_BGR2GRAY).astype(np.float32)
    if min(level.shape) < 32:
        return 0.0, None
    levels = [level]
    for _ in range(4):
        level = _floats(cv2.pyrDown(level))
        levels.append(level)
    bands = [fine - cv2.pyrUp(coarse, dstsize=fine.shape[::-1]) for fine, coarse in itertools.pairwise(levels)]
    return _streak(bands[0]), _focus(bands)


def _focus(bands: list[Floats]) -> float:
    """Energy of the finest band over that of the two coarsest, where the coarse ones are strong: at the edges of cells.

    Of these places the sharpest 5 % speak, since a smear is not flat. Noise, as the finest band has it on empty ground,
    is taken off first.
    """
    height, width = bands[0].shape
    grid = (width // 4, height // 4)
    fine = _floats(cv2.resize(bands[0] * bands[0], grid, interpolation=cv2.INTER_AREA))
    coarse = _floats(sum(cv2.resize(band * band, grid, interpolation=cv2.INTER_LINEAR) for band in bands[2:]))
    edges = coarse >= max(_quantile(coarse, 0.7), 0.1 * _quantile(coarse, 0.995))  # of a lonely cell, its own
    noise = _quantile(fine, 0.05)
    ratios = np.maximum(fine[edges] - noise, 0) / (coarse[edges] + 1e-3)
    return 1000.0 * _quantile(ratios, 0.95)


def _streak(band: Floats) -> float:
    """Anisotropy of the gradients of the finest band (structure tensor), 0 to 1: movement leaves those across its way.

    No place weighs more than a strong edge of a cell, so that the black rim of a picture does not decide.
    """
    x = cv2.Sobel(band, cv2.CV_32F, 1, 0)
    y = cv2.Sobel(band, cv2.CV_32F, 0, 1)
    grid = (band.shape[1] // 4, band.shape[0] // 4)
    products = (x * x, y * y, x * y)
    xx, yy, xy = (_floats(cv2.resize(product, grid, interpolation=cv2.INTER_AREA)) for product in products)
    energy = xx + yy
    strong, weak = energy >= _quantile(energy, 0.7), energy <= _quantile(energy, 0.1)
    weight = np.minimum(1.0, _quantile(energy, 0.95) / np.maximum(energy[strong], 1e-6))
    noise = float(energy[weak].mean()) / 2
    across, along = (float(((part[strong] - noise) * weight).mean()) for part in (xx, yy))
    slant = float((xy[strong] * weight).mean())
    return math.hypot(across - along, 2 * slant) / max(across + along, 1e-6)


def _floats(values: object) -> Floats:
    return np.asarray(values, np.float32)


def _quantile(values: Floats, share: float) -> float:
    place = min(values.size - 1, int(share * values.size))
    return float(np.partition(values, place, axis=None)[place])


def _clipped_pct(pixels_bgr: Pixels) -> float:
    """Share of pixels at full white, 0 to 100, from an even sample."""
    height_px, width_px = pixels_bgr.shape[:2]
    factor = min(1.0, (CLIPPING_SAMPLE_PX / (height_px * width_px)) ** 0.5)
    size = (max(1, round(width_px * factor)), max(1, round(height_px * factor)))
    sample = cv2.resize(pixels_bgr, size, interpolation=cv2.INTER_NEAREST)
    white = cv2.inRange(sample, (FULL_WHITE,) * 3, (255,) * 3)
    return 100.0 * cv2.countNonZero(white) / white.size
