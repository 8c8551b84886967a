"""A frame made more like those that the models learnt from: four steps, each off unless it is configured.

The pixels that go into messages, review lists and reports stay as the camera gave them. What each step brings and
costs, measured on clean and on spoilt fields: docs/preprocessing.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np

from agent.analysis.quality import ground_colour
from agent.config import PreprocessingSection
from agent.domain import Pixels

GROUND_BGR: Final = (201.1, 226.7, 253.2)
"""Grey levels of B, G, R where no cell lies, as the gate finds them: the median of the PBC training fields (`python -m
models.robustness --reference`)."""

LOOK_LAB: Final = ((202.0, 41.6), (139.0, 9.8), (135.4, 14.8))
"""Mean and standard deviation of L, a and b in the same fields, as `look_lab` gives them."""

Gains = tuple[float, float, float]
"""Of B, G and R."""

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


def ground_gains(pixels_bgr: Pixels, goal_bgr: Sequence[float]) -> Gains:
    """By what B, G and R must be scaled for the ground between the cells to have this colour; 1 / MOST_GAIN to
    MOST_GAIN.
    """
    gains = np.clip(np.array(goal_bgr) / ground_colour(pixels_bgr), 1 / MOST_GAIN, MOST_GAIN)
    return float(gains[0]), float(gains[1]), float(gains[2])


def scale_channels(pixels_bgr: Pixels, gains: Gains) -> Pixels:
    """Each channel times its gain, in 0 to 255."""
    tables = np.clip(np.arange(256)[:, None] * np.array(gains) + 0.5, 0, 255).astype(np.uint8)
    return np.asarray(cv2.LUT(pixels_bgr, tables.reshape(1, 256, 3)), np.uint8)


def normalise_stain(pixels_bgr: Pixels) -> Pixels:
    """Mean and spread of lightness and of both colour axes brought to those of LOOK_LAB.

    Source: Reinhard et al., "Color transfer between images", 2001, in CIELAB as usual in histology. Macenko's two
    stains were tried and are not here: on blood films their directions jump from field to field.
    """
    lab = cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2LAB)
    tables = np.empty((256, 3), np.uint8)
    for channel, ((mean, spread), (goal, goal_spread)) in enumerate(zip(look_lab(pixels_bgr), LOOK_LAB, strict=True)):
        scale = np.clip(goal_spread / max(spread, 1e-6), 1 / MOST_GAIN, MOST_GAIN)
        tables[:, channel] = np.clip((np.arange(256) - mean) * scale + goal + 0.5, 0, 255)
    return np.asarray(cv2.cvtColor(cv2.LUT(lab, tables.reshape(1, 256, 3)), cv2.COLOR_LAB2BGR), np.uint8)


def look_lab(pixels_bgr: Pixels) -> list[tuple[float, float]]:
    """Mean and standard deviation of L, a and b, each as OpenCV stores it in 0 to 255."""
    means, spreads = cv2.meanStdDev(cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2LAB))
    return [(float(mean), float(spread)) for mean, spread in zip(means.ravel(), spreads.ravel(), strict=True)]


def level_contrast(pixels_bgr: Pixels, clip: float) -> Pixels:
    """Lightness evened out tile by tile: contrast-limited adaptive histogram equalisation (Zuiderveld 1994).

    clip: how far a tile's histogram may be stretched, 1 = hardly, 4 = strongly.
    """
    lab = cv2.cvtColor(pixels_bgr, cv2.COLOR_BGR2LAB)
    lab[..., 0] = cv2.createCLAHE(clip, CLAHE_TILES).apply(lab[..., 0])
    return np.asarray(cv2.cvtColor(lab, cv2.COLOR_LAB2BGR), np.uint8)
