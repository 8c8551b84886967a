"""Each step does what it says, leaves its input alone, and does nothing where it is off."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import cv2
import numpy as np
import pytest

from agent.analysis.preprocessing import (
    GROUND_BGR,
    LOOK_LAB,
    balance_white,
    denoise,
    level_contrast,
    look_lab,
    normalise_stain,
    preprocess,
)
from agent.analysis.quality import ground_colour, look
from agent.camera.camera import open_camera
from agent.config import CameraSection, PreprocessingSection, SimulatedSection
from agent.domain import Frame, Pixels

ALL_STEPS: dict[str, Any] = {"denoise": 20, "white_balance": True, "stain": True, "contrast": 2}


@pytest.fixture(scope="module")
def field() -> Pixels:
    """A field of the simulated slide."""
    section = CameraSection(simulated=SimulatedSection(interval_s=0, fields=1, noise=0))
    with closing(open_camera(section)) as camera:
        frame = camera.read()
    assert isinstance(frame, Frame)
    return frame.pixels_bgr


def in_other_light(pixels: Pixels, *gains_bgr: float) -> Pixels:
    return np.clip(pixels * np.array(gains_bgr), 0, 255).astype(np.uint8)


def test_a_frame_stays_the_same_array_while_all_steps_are_off(field: Pixels) -> None:
    assert preprocess(field, PreprocessingSection()) is field


@pytest.mark.parametrize(("step", "value"), ALL_STEPS.items())
def test_a_step_that_is_on_changes_a_copy(field: Pixels, step: str, value: Any) -> None:
    before = field.copy()
    after = preprocess(field, PreprocessingSection(**{step: value}))
    assert np.array_equal(field, before)
    assert after.shape == field.shape
    assert after.dtype == np.uint8
    assert not np.array_equal(after, field)


def test_all_steps_together_are_the_steps_one_after_the_other(field: Pixels) -> None:
    expected = level_contrast(normalise_stain(balance_white(denoise(field, 20))), 2)
    assert np.array_equal(preprocess(field, PreprocessingSection(**ALL_STEPS)), expected)


@pytest.mark.parametrize("gains", [(0.7, 0.95, 1.0), (1.0, 0.9, 0.75), (0.55, 0.55, 0.55)])
def test_whatever_the_lamp_the_balanced_ground_has_the_colour_of_the_reference(
    field: Pixels, gains: tuple[float, float, float]
) -> None:
    lit = in_other_light(field, *gains)
    assert np.abs(np.subtract(ground_colour(lit), GROUND_BGR)).max() > 30
    assert np.abs(np.subtract(ground_colour(balance_white(lit)), GROUND_BGR)).max() <= 3


def test_the_ground_that_is_balanced_is_the_one_that_the_gate_judges(field: Pixels) -> None:
    assert ground_colour(field) == look(field).colour.ground_bgr


@pytest.mark.parametrize("shape", [(1, 1, 3), (2, 9, 3), (40, 40, 3)])
def test_a_tiny_picture_is_balanced_too(shape: tuple[int, int, int]) -> None:
    balanced = balance_white(np.full(shape, 130, np.uint8))
    assert np.abs(balanced.reshape(-1, 3) - np.array(GROUND_BGR)).max() < 2


def test_a_frame_in_another_light_is_balanced_to_the_same_pixels(field: Pixels) -> None:
    here, there = balance_white(field), balance_white(in_other_light(field, 0.8, 0.9, 0.95))
    assert np.abs(here.astype(int) - there.astype(int)).mean() < 2


def test_a_black_frame_is_not_lit_up_by_more_than_a_lamp_could_need() -> None:
    dark = np.full((60, 60, 3), 8, np.uint8)
    assert balance_white(dark).max() <= 21


def test_normalised_stains_have_the_mean_and_spread_of_the_reference(field: Pixels) -> None:
    pale = np.clip(255 - (255 - field.astype(float)) * 0.5, 0, 255).astype(np.uint8)
    for (mean, spread), (goal, goal_spread) in zip(look_lab(normalise_stain(pale)), LOOK_LAB, strict=True):
        assert mean == pytest.approx(goal, abs=6)  # what leaves 0 to 255 is cut
        assert spread == pytest.approx(goal_spread, rel=0.35)


def test_a_frame_of_one_colour_is_no_division_by_nothing() -> None:
    even = np.full((64, 80, 3), 130, np.uint8)
    for after in (normalise_stain(even), balance_white(even), level_contrast(even, 2), denoise(even, 20)):
        assert after.shape == even.shape
        assert np.ptp(after.reshape(-1, 3), axis=0).max() == 0


def test_denoising_takes_more_of_the_noise_than_of_the_edges(field: Pixels) -> None:
    noise = np.random.default_rng(1).normal(0, 10, field.shape)
    noisy = np.clip(field + noise, 0, 255).astype(np.uint8)
    smooth = denoise(noisy, 30)
    assert np.abs(smooth.astype(int) - field).mean() < 0.7 * np.abs(noisy.astype(int) - field).mean()
    edges = cv2.Canny(field, 60, 120)
    assert np.count_nonzero(edges & cv2.dilate(cv2.Canny(smooth, 60, 120), np.ones((3, 3), np.uint8))) > 0.8 * (
        np.count_nonzero(edges)
    )


def test_contrast_is_raised_where_it_is_low(field: Pixels) -> None:
    faint = (200 + (field.astype(float) - 200) * 0.3).astype(np.uint8)
    assert cv2.cvtColor(level_contrast(faint, 3), cv2.COLOR_BGR2GRAY).std() > 1.3 * (
        cv2.cvtColor(faint, cv2.COLOR_BGR2GRAY).std()
    )
