"""The gate: refuses what cannot be analysed, lets every real field through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.analysis.quality import assess_quality
from agent.camera.camera import open_camera
from agent.camera.decoding import decode_file
from agent.config import CameraSection, QualitySection
from agent.domain import Frame

REAL_FIELDS = Path(__file__).parents[2].parent / "shared" / "data" / "fields" / "images"


def make_field(height_px: int = 480, width_px: int = 640, background: int = 200, cells: int = 20) -> np.ndarray:
    """Round dark cells on a light ground, a little blurred."""
    rng = np.random.default_rng(3)
    pixels = np.full((height_px, width_px, 3), background, np.uint8)
    for _ in range(cells):
        centre = (int(rng.integers(0, width_px)), int(rng.integers(0, height_px)))
        cv2.circle(pixels, centre, max(3, width_px // 25), (background // 2,) * 3, -1)
    return cv2.GaussianBlur(pixels, (3, 3), 0)


def reasons(pixels: np.ndarray, **limits: Any) -> tuple[str, ...]:
    return assess_quality(pixels, QualitySection(**limits)).reasons


def test_a_usual_field_is_accepted_without_reasons() -> None:
    quality = assess_quality(make_field(), QualitySection())
    assert quality.is_accepted
    assert quality.reasons == ()
    assert quality.focus > 1
    assert quality.clipped_pct == 0


def test_a_field_with_the_lamp_off_is_dark() -> None:
    assert reasons(make_field(background=30)) == ()
    assert reasons(make_field(background=20)) == ("dark",)


def test_a_field_at_full_white_is_saturated() -> None:
    pixels = make_field()
    pixels[: 480 * 6 // 10] = 255
    assert reasons(pixels) == ()
    pixels[: 480 * 8 // 10] = 255
    assert reasons(pixels) == ("saturated",)
    assert assess_quality(pixels, QualitySection()).clipped_pct == pytest.approx(80, abs=0.5)


def test_strong_colour_is_not_full_white() -> None:
    pixels = make_field()
    pixels[:, :, 2] = 255
    assert assess_quality(pixels, QualitySection()).clipped_pct == 0


def test_a_closed_shutter_or_a_lens_cap_is_featureless() -> None:
    grey = np.full((480, 640, 3), 128, np.uint8)
    assert reasons(grey) == ("featureless",)
    noise = np.random.default_rng(1).normal(128, 1.5, grey.shape)
    assert reasons(noise.round().astype(np.uint8)) == ("featureless",)


def test_all_reasons_are_told_together() -> None:
    black = np.zeros((480, 640, 3), np.uint8)
    quality = assess_quality(black, QualitySection(min_focus=1))
    assert not quality.is_accepted
    assert quality.reasons == ("dark", "featureless", "blurred")
    assert reasons(np.full((480, 640, 3), 255, np.uint8)) == ("saturated", "featureless")


def test_focus_falls_with_blur_and_the_limit_of_the_configuration_refuses() -> None:
    sharp = make_field()
    scores = [
        assess_quality(cv2.GaussianBlur(sharp, (0, 0), sigma) if sigma else sharp, QualitySection()).focus
        for sigma in (0, 0.7, 1, 1.5, 2)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 10 * scores[4]
    limit = (scores[0] + scores[4]) / 2
    assert reasons(sharp, min_focus=limit) == ()
    assert reasons(cv2.GaussianBlur(sharp, (0, 0), 2), min_focus=limit) == ("blurred",)


def test_the_figures_of_one_field_hardly_depend_on_the_size_of_the_frame() -> None:
    small = assess_quality(make_field(), QualitySection())
    large = assess_quality(cv2.resize(make_field(), (2560, 1920), interpolation=cv2.INTER_CUBIC), QualitySection())
    assert large.focus == pytest.approx(small.focus, rel=0.2)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 5000, 3), (5000, 1, 3), (3000, 40, 3)])
def test_frames_of_odd_shape_get_a_verdict_too(shape: tuple[int, int, int]) -> None:
    assert reasons(np.zeros(shape, np.uint8)) == ("dark", "featureless")


def test_a_read_only_frame_is_judged_and_not_changed() -> None:
    pixels = make_field()
    before = pixels.copy()
    pixels.flags.writeable = False
    assess_quality(pixels, QualitySection())
    assert np.array_equal(pixels, before)


@pytest.mark.skipif(not REAL_FIELDS.is_dir(), reason="the real fields (../shared/data) are not here")
def test_every_real_field_passes_the_gate() -> None:
    paths = sorted(REAL_FIELDS.glob("*.jpg"))
    assert len(paths) >= 1000
    refused = {
        path.name: quality.reasons
        for path in paths
        if not (quality := assess_quality(decode_file(path, 80), QualitySection())).is_accepted
    }
    assert refused == {}


def test_every_field_of_the_default_simulated_slide_passes_the_gate() -> None:
    section = CameraSection.model_validate({"simulated": {"interval_s": 0, "fields": 30}})
    camera = open_camera(section)
    frames = [frame for frame in iter(camera.read, None) if isinstance(frame, Frame)]
    assert len(frames) == 30
    assert {assess_quality(frame.pixels_bgr, QualitySection()).reasons for frame in frames} == {()}
