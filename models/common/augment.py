"""Looks of other laboratories: stain, lamp, optics and sensor varied at random, in place of microscopes that we lack.

All functions take and give uint8 RGB, (height, width, 3), and leave their input alone.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from models.common.labels import Rgb

# Rows: absorbance in R, G, B of haematoxylin (near the azure of a Giemsa stain), eosin, and DAB as the third direction.
# Source: Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution", 2001.
STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]], np.float32)
UNMIX = np.linalg.inv(STAINS).astype(np.float32)
OPTICAL_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)


def vary_stain(pixels: Rgb, rng: Generator, strength: float) -> Rgb:
    """Stain amounts scaled and shifted one by one, the hues turned a little. strength: 0 none, 1 very strong."""
    scales = np.exp(rng.normal(0, 0.35 * strength, 3)).astype(np.float32)
    shifts = rng.normal(0, 0.06 * strength, 3).astype(np.float32)
    turn = np.eye(3, dtype=np.float32) + rng.normal(0, 0.09 * strength, (3, 3)).astype(np.float32)
    return restain(pixels, np.diag(scales), turn, shifts)


def restain(
    pixels: Rgb,
    scales: NDArray[np.float32],
    turn: NDArray[np.float32] | None = None,
    shifts: NDArray[np.float32] | None = None,
) -> Rgb:
    """The picture in other amounts of stain.

    scales: (3, 3), from old amounts to new. turn: (3, 3), of the hues in optical density. shifts: (3,), to the amounts.
    """
    mix = UNMIX @ scales @ STAINS
    if turn is not None:
        mix = mix @ turn
    density = OPTICAL_DENSITY[pixels].reshape(-1, 3) @ mix
    if shifts is not None:
        density = density + shifts @ STAINS
    return np.clip(np.exp(-density) * 256 - 1, 0, 255).astype(np.uint8).reshape(pixels.shape)


def vary_lamp(pixels: Rgb, rng: Generator, strength: float) -> Rgb:
    """White balance, brightness and gamma, as one table for each channel; sometimes light falls off to a side."""
    gains = np.exp(rng.normal(0, 0.14 * strength, 3) + rng.normal(0, 0.12 * strength))
    gamma = np.exp(rng.normal(0, 0.22 * strength))
    levels = np.arange(256) / 255
    tables = np.clip(levels[:, None] ** gamma * gains * 255, 0, 255).astype(np.uint8)
    lit = cv2.LUT(pixels, tables.reshape(1, 256, 3))
    if rng.random() < 0.3:
        height, width = lit.shape[:2]
        angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.4 * strength)
        ramp = np.cos(angle) * np.linspace(-1, 1, width)[None] + np.sin(angle) * np.linspace(-1, 1, height)[:, None]
        lit = (lit * (1 - fall * (ramp[..., None] + 1.4) / 2.8)).astype(np.uint8)
    return lit


def vary_colour(pixels: Rgb, rng: Generator, strength: float) -> Rgb:
    """Hue and saturation."""
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV)
    hue = (np.arange(256) + rng.normal(0, 7 * strength)) % 180
    saturation = np.clip(np.arange(256) * np.exp(rng.normal(0, 0.35 * strength)), 0, 255)
    tables = np.stack((hue, saturation, np.arange(256)), 1).astype(np.uint8)
    return cv2.cvtColor(cv2.LUT(hsv, tables.reshape(1, 256, 3)), cv2.COLOR_HSV2RGB)


def vary_optics(pixels: Rgb, rng: Generator) -> Rgb:
    """Focus, resolution, sensor noise and JPEG, each sometimes."""
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.8))
    elif rng.random() < 0.15:
        soft = cv2.GaussianBlur(pixels, (0, 0), 1.5)
        amount = rng.uniform(0.3, 1.2)
        pixels = cv2.addWeighted(pixels, 1 + amount, soft, -amount, 0)
    if rng.random() < 0.2:
        pixels = coarsen(pixels, rng.uniform(0.35, 0.9))
    if rng.random() < 0.2:
        noise = rng.normal(0, rng.uniform(2, 12), pixels.shape).astype(np.float32)
        pixels = np.clip(pixels + noise, 0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        _, coded = cv2.imencode(".jpg", pixels, (cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 90))))
        pixels = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    return pixels


def soften(pixels: Rgb, rng: Generator) -> Rgb:
    """As if the cell had been 0.2 to 0.6 times as many pixels wide: a platelet's crop always is, others may be."""
    return coarsen(pixels, rng.uniform(0.2, 0.6))


def coarsen(pixels: Rgb, factor: float) -> Rgb:
    """The picture with the detail of one that is `factor` times as wide."""
    height, width = pixels.shape[:2]
    small = cv2.resize(pixels, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


def vary_look(pixels: Rgb, rng: Generator, strength: float = 1.0, plain_share: float = 0.125) -> Rgb:
    """The whole chain as training uses it. plain_share: of the pictures, stays as it was."""
    if rng.random() < plain_share:
        return pixels
    if rng.random() < 0.7:
        pixels = vary_stain(pixels, rng, strength)
    if rng.random() < 0.5:
        pixels = vary_colour(pixels, rng, strength)
    if rng.random() < 0.6:
        pixels = vary_lamp(pixels, rng, strength)
    return vary_optics(pixels, rng)
