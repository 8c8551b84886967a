"""A frame made more like those that the models learnt from: four steps, each off unless it is configured.

The pixels that go into messages, review lists and reports stay as the camera gave them. What each step brings and
costs, measured on clean and on spoilt fields: docs/preprocessing.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import cv2
import numpy as np

from agent.analysis.quality import ground_colour, shrink
from agent.config import PreprocessingSection
from agent.domain import Pixels

Triple = tuple[float, float, float]
"""For B, G and R."""

LabLook = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
"""Mean and spread of L, a and b."""

GROUND_BGR: Final = (201.1, 226.7, 253.2)
"""Grey levels of B, G, R where no cell lies, as the gate finds them: the median of the PBC training fields (`python -m
models.robustness --reference`)."""

LOOK_LAB: Final = ((202.0, 41.6), (139.0, 9.8), (135.4, 14.8))
"""Mean and standard deviation of L, a and b in the same fields, as `look_lab` gives them."""

MOST_GAIN: Final = 2.5
"""A ground that needs more than this is no lamp's colour but a fault that the gate should see."""

CLAHE_TILES: Final = (8, 8)
BILATERAL_REACH_PX: Final = 5


def preprocess(pixels_bgr: Pixels, section: PreprocessingSection) -> Pixels:
    """The frame as the models are to see it; the same array where every step is off.

    pixels_bgr: uint8, (height, width, 3), B G R; not modified.
    """
    if section.denoise > 0:
        pixels_bgr = denoise(pixels_bgr, section.denoise)
    if section.white_balance:
        pixels_bgr = balance_white(pixels_bgr)
    if section.stain:
        pixels_bgr = normalise_stain(pixels_bgr)
    if section.contrast > 0:
        pixels_bgr = level_contrast(pixels_bgr, section.contrast)
    return pixels_bgr


def denoise(pixels_bgr: Pixels, levels: float) -> Pixels:
    """Noise of the sensor smoothed, edges kept: the bilateral filter (Tomasi & Manduchi 1998).

    levels: grey levels; differences well above it are edges and stay.
    """
    smooth = cv2.bilateralFilter(pixels_bgr, BILATERAL_REACH_PX, levels, BILATERAL_REACH_PX / 2)
    return np.asarray(smooth, np.uint8)


def balance_white(pixels_bgr: Pixels) -> Pixels:
    """Each channel scaled so that the ground between the cells has the colour of GROUND_BGR."""
    return scale_channels(pixels_bgr, ground_gains(pixels_bgr, GROUND_BGR))


def ground_gains(pixels_bgr: Pixels, goal_bgr: Triple) -> Triple:
    """By what B, G and R must be scaled for the ground between the cells to have this colour; 1 / MOST_GAIN to
    MOST_GAIN.
    """
    gains = np.clip(np.array(goal_bgr) / ground_colour(pixels_bgr), 1 / MOST_GAIN, MOST_GAIN)
    return float(gains[0]), float(gains[1]), float(gains[2])


def scale_channels(pixels_bgr: Pixels, gains_bgr: Triple) -> Pixels:
    """Each channel times its gain, in 0 to 255."""
    tables = np.clip(np.arange(256)[:, None] * np.array(gains_bgr) + 0.5, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels_bgr, tables.reshape(1, 256, 3)), np.uint8)


def normalise_stain(pixels_bgr: Pixels) -> Pixels:
    """Mean and spread of lightness and of both colour axes brought to those of LOOK_LAB.

    Source: Reinhard et al., "Color transfer between images", 2001, in CIELAB as usual in histology. Macenko's two
    stains were tried and are not here: on blood films their directions jump from field to field.
    """
    return restain(pixels_bgr, look_lab(pixels_bgr), LOOK_LAB)


def restain(pixels_bgr: Pixels, look: LabLook, goal: LabLook) -> Pixels:
    """Pixels of a picture of one look in another: `normalise_stain` for a part of a picture."""
    lab = cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2LAB)
    tables = np.empty((256, 3), np.uint8)
    for channel, ((mean, spread), (goal_mean, goal_spread)) in enumerate(zip(look, goal, strict=True)):
        scale = np.clip(goal_spread / max(spread, 1e-6), 1 / MOST_GAIN, MOST_GAIN)
        tables[:, channel] = np.clip((np.arange(256) - mean) * scale + goal_mean + 0.5, 0, 255)
    return np.asarray(cv2.cvtColor(cv2.LUT(lab, tables.reshape(1, 256, 3)), cv2.COLOR_LAB2BGR), np.uint8)


@dataclass(frozen=True, slots=True)
class Look:
    """Light and stain of the pictures that a classifier was taught on.

    ground_bgr: grey levels where no cell lies. lab: mean and spread of the whole picture, as `look_lab` gives them;
    None = it knows this laboratory's stain.
    """

    ground_bgr: Triple
    lab: LabLook | None

    @property
    def without_stain(self) -> Look:
        """The same light, for pictures whose stain cannot be told."""
        return replace(self, lab=None)


TAUGHT_LOOK: Final = Look(GROUND_BGR, LOOK_LAB)


@dataclass(frozen=True, slots=True)
class Relook:
    """How the pixels of one picture come to another look: first its light, then its stain.

    gains_bgr: for its ground. stain: its look under the new light, and the one that it is brought to; None = it stays.
    """

    gains_bgr: Triple
    stain: tuple[LabLook, LabLook] | None

    @classmethod
    def of(cls, pixels_bgr: Pixels, look: Look) -> Relook:
        """From a whole picture, uint8 (height, width, 3), B G R."""
        small = shrink(pixels_bgr, LOOK_SIDE_PX, 1)
        gains = ground_gains(small, look.ground_bgr)
        return cls(gains, None if look.lab is None else (look_lab(scale_channels(small, gains)), look.lab))

    def cell(self, part_bgr: Pixels, share: float) -> Pixels:
        """The part of the picture around a cell in the new look.

        share: longer side of the cell's box over the shorter one of the picture. Of a picture that one cell fills the
        stain cannot be told (a lymphocyte's would be all nucleus), and stays.
        """
        lit = scale_channels(part_bgr, self.gains_bgr)
        return lit if self.stain is None or share >= LARGEST_SHARE else restain(lit, *self.stain)


LARGEST_SHARE: Final = 0.75
"""See `Relook.cell`."""


LOOK_SIDE_PX: Final = 360
"""px; larger frames are shrunk to less than this before their look is taken: it is a mean of everything."""


def look_lab(pixels_bgr: Pixels) -> LabLook:
    """Mean and standard deviation of L, a and b, each as OpenCV stores it in 0 to 255."""
    means, spreads = cv2.meanStdDev(cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2LAB))
    (l_mean, a_mean, b_mean), (l_spread, a_spread, b_spread) = means.ravel().tolist(), spreads.ravel().tolist()
    return (l_mean, l_spread), (a_mean, a_spread), (b_mean, b_spread)


def level_contrast(pixels_bgr: Pixels, clip: float) -> Pixels:
    """Lightness evened out tile by tile: contrast-limited adaptive histogram equalisation (Zuiderveld 1994).

    clip: how far a tile's histogram may be stretched, 1 = hardly, 4 = strongly.
    """
    lab = cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2LAB)
    lab[..., 0] = cv2.createCLAHE(clip, CLAHE_TILES).apply(lab[..., 0])
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2BGR), np.uint8)
