"""The gate: refuses what cannot be analysed, lets every real field through."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.analysis.quality import (
    FOCUS_RETURN,
    FOCUS_SPREAD,
    RELEARN_AFTER,
    GateMemory,
    Usual,
    assess_frame,
    assess_quality,
    from_text,
    look,
    to_text,
)
from agent.camera.camera import open_camera
from agent.camera.decoding import decode_file
from agent.camera.hashing import hash_pixels
from agent.config import CameraSection, QualitySection
from agent.domain import Box, Frame
from tests.proofs.degrading import BAD, GOOD, RealField

RED_CELL_PX = 91.0
"""Of the simulated slide: 7.3 um at 12.5 px/um."""

REAL_FIELDS = Path(__file__).parents[2].parent / "shared" / "data" / "fields" / "images"


def make_field(
    height_px: int = 480, width_px: int = 640, background: int = 200, cells: int = 20, seed: int = 3
) -> np.ndarray:
    """Round dark cells on a light ground, a little blurred, with a little noise."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height_px, width_px, 3), background, np.uint8)
    for _ in range(cells):
        centre = (int(rng.integers(0, width_px)), int(rng.integers(0, height_px)))
        cv2.circle(pixels, centre, max(3, width_px // 25), (background // 2,) * 3, -1)
    return np.clip(cv2.GaussianBlur(pixels, (3, 3), 0) + rng.normal(0, 1, pixels.shape), 0, 255).astype(np.uint8)


def make_frame(pixels: np.ndarray, at_s: float = 0.0, key: str | None = None) -> Frame:
    """A frame of a live camera, or with a key a stored picture."""
    now = datetime(2026, 11, 23, tzinfo=timezone.utc)
    return Frame(1, pixels, now, round(at_s * 1e9), hash_pixels(pixels), "test", origin_key=key)


def taught(fields: int = 10, **limits: Any) -> GateMemory:
    """A gate that has seen good fields of one device, two seconds apart."""
    memory = GateMemory()
    for number in range(fields):
        quality, memory = assess_frame(
            make_frame(make_field(seed=100 + number), at_s=2.0 * number), QualitySection(**limits), memory
        )
        assert quality.is_accepted
    return memory


def soft(pixels: np.ndarray, sigma_px: float) -> np.ndarray:
    return cv2.GaussianBlur(pixels, (0, 0), sigma_px)


def smear(pixels: np.ndarray, length_px: int) -> np.ndarray:
    return cv2.blur(pixels, (length_px, 1))


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
    y, x = np.mgrid[-1:1:480j, -1:1:640j]
    for share, told in ((0.6, ()), (0.75, ("saturated",))):
        pixels = make_field()
        pixels[np.pi / 4 * (x**2 + y**2) < share] = 255
        assert reasons(pixels) == told
        assert assess_quality(pixels, QualitySection()).clipped_pct == pytest.approx(100 * share, abs=1)


def test_strong_colour_is_not_full_white() -> None:
    pixels = make_field()
    pixels[:, :, 2] = 255
    assert assess_quality(pixels, QualitySection()).clipped_pct == 0


@pytest.mark.parametrize("noise", [0.0, 1.5, 4.0])
@pytest.mark.parametrize("vignetting", [0.0, 0.3])
def test_a_glass_without_cells_is_empty_and_not_out_of_focus(noise: float, vignetting: float) -> None:
    y, x = np.mgrid[-1:1:480j, -1:1:640j]
    light = 210 * (1 - vignetting * (x**2 + y**2) / 2)
    glass = light[..., None] + np.random.default_rng(1).normal(0, noise, (480, 640, 3))
    assert reasons(glass.clip(0, 255).astype(np.uint8)) == ("empty",)


@pytest.mark.parametrize("sigma_px", [8, 11, 16])
def test_cells_out_of_focus_are_blurred_and_not_empty(sigma_px: float) -> None:
    assert reasons(soft(make_field(), sigma_px)) == ("blurred",)


def test_a_single_small_cell_is_not_empty() -> None:
    assert reasons(make_field(cells=1)) == ()


def test_a_frame_that_is_smeared_in_one_direction_was_moving() -> None:
    assert "moving" in reasons(smear(make_field(), 19))
    assert "moving" in reasons(np.ascontiguousarray(smear(make_field(480, 480), 19).transpose(1, 0, 2)))


def test_a_black_rim_is_no_movement() -> None:
    pixels = make_field()
    pixels[:20] = 0
    assert reasons(pixels) == ()


def test_a_lamp_of_another_colour_is_told() -> None:
    tinted = (make_field() * np.asarray([0.5, 1.0, 1.0])).astype(np.uint8)
    assert reasons(tinted) == ("colour-cast",)
    assert reasons(tinted, max_colour_cast=1.0) == ()


def test_without_light_or_content_only_that_is_told() -> None:
    assert reasons(np.zeros((480, 640, 3), np.uint8)) == ("dark",)
    assert reasons(np.full((480, 640, 3), 255, np.uint8)) == ("saturated",)
    assert reasons(np.full((480, 640, 3), 128, np.uint8)) == ("empty",)


def test_focus_falls_with_blur_and_the_limit_of_the_configuration_refuses() -> None:
    sharp = make_field()
    scores = [
        assess_quality(soft(sharp, sigma) if sigma else sharp, QualitySection()).focus for sigma in (0, 1, 2, 3, 5)
    ]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 10 * scores[4]
    limit = (scores[0] + scores[4]) / 2
    assert reasons(sharp, min_focus=limit) == ()
    assert reasons(soft(sharp, 5), min_focus=limit) == ("blurred",)


def test_focus_hardly_depends_on_light_number_of_cells_or_the_cameras_resolution() -> None:
    usual = assess_quality(make_field(), QualitySection()).focus
    for other in (
        make_field(background=120),
        make_field(cells=5),
        cv2.resize(make_field(), (2560, 1920), interpolation=cv2.INTER_CUBIC),
    ):
        assert 0.5 < assess_quality(other, QualitySection()).focus / usual < 2


# ------------------------------------------------------------------------------------------ what the gate remembers


def test_what_is_blurred_for_this_device_is_refused_once_it_is_known() -> None:
    dull = make_frame(soft(make_field(), 2.5), at_s=100)
    assert assess_frame(dull, QualitySection(), GateMemory())[0].is_accepted
    assert assess_frame(dull, QualitySection(), taught())[0].reasons == ("blurred",)
    assert assess_frame(dull, QualitySection(learn=False), taught())[0].is_accepted


def test_between_sharp_and_blurred_the_last_verdict_stays() -> None:
    memory = taught()
    usual = math.exp(memory.usual.log_focus)
    between = next(
        frame
        for sigma in np.arange(0.5, 4, 0.02)
        if usual / FOCUS_SPREAD
        < assess_quality((frame := make_frame(soft(make_field(), sigma), at_s=100)).pixels_bgr, QualitySection()).focus
        < usual / FOCUS_SPREAD * FOCUS_RETURN
    )
    assert assess_frame(between, QualitySection(), memory)[0].is_accepted
    _, blurred = assess_frame(make_frame(soft(make_field(), 6), at_s=90), QualitySection(min_focus=0), memory)
    assert assess_frame(between, QualitySection(), blurred)[0].reasons == ("blurred",)


def test_the_colours_of_ground_and_stain_are_measured() -> None:
    pixels = make_field()
    stained = pixels[..., 1] < 150
    pixels[stained] = (pixels[stained] * (1.2, 0.8, 1.0)).astype(np.uint8)
    colour = look(pixels).colour
    assert colour.ground_bgr == pytest.approx((200, 200, 200), abs=2)
    assert colour.stain_od_bgr is not None
    expected = [np.log10(200 / (100 * factor)) for factor in (1.2, 0.8, 1.0)]
    # The soft edges of the cells are thinner.
    assert colour.stain_od_bgr == pytest.approx(expected, rel=0.3)
    assert colour.stain_od_bgr[1] > colour.stain_od_bgr[2] > colour.stain_od_bgr[0]


def test_bare_glass_has_no_stain() -> None:
    assert look(np.full((480, 640, 3), 200, np.uint8)).colour.stain_od_bgr is None


def test_a_changed_colour_of_the_ground_is_told_against_the_devices_usual() -> None:
    tinted = make_frame((make_field() * np.asarray([0.7, 1.0, 1.0])).astype(np.uint8), at_s=100)
    assert assess_frame(tinted, QualitySection(), GateMemory())[0].is_accepted
    assert assess_frame(tinted, QualitySection(), taught())[0].reasons == ("colour-cast",)


def test_what_is_usual_survives_a_restart_and_a_damaged_note_begins_anew() -> None:
    memory = taught()
    again = from_text(to_text(memory))
    assert again.usual.log_focus == pytest.approx(memory.usual.log_focus, abs=1e-3)
    assert again.usual.is_known
    for text in (None, "", "{", "[]", "7", '{"frames": 3}', '{"frames": 1, "log_focus": "x", "cast": [0, 0]}'):
        assert from_text(text).usual == Usual()


def test_another_objective_is_learnt_after_many_refusals() -> None:
    memory, section = taught(), QualitySection(skip_unchanged=False)
    verdicts = []
    for number in range(RELEARN_AFTER + 5):
        frame = make_frame(soft(make_field(seed=number % 7), 2.5), at_s=100 + 2 * number)
        quality, memory = assess_frame(frame, section, memory)
        verdicts.append(quality.is_accepted)
    assert verdicts == [False] * RELEARN_AFTER + [True] * 5


def test_a_device_that_began_out_of_focus_learns_from_the_first_sharp_frame() -> None:
    memory = GateMemory()
    for number in range(10):
        frame = make_frame(soft(make_field(seed=number), 3), at_s=2 * number)
        quality, memory = assess_frame(frame, QualitySection(), memory)
        assert quality.is_accepted
    for number in range(10):
        _, memory = assess_frame(
            make_frame(make_field(seed=50 + number), at_s=50 + 2 * number), QualitySection(), memory
        )
    assert assess_frame(make_frame(soft(make_field(), 3), at_s=100), QualitySection(), memory)[0].reasons == (
        "blurred",
    )


def test_a_field_at_rest_is_analysed_once() -> None:
    memory = GateMemory()
    verdicts = []
    for number in range(4):
        noisy = make_field() + np.random.default_rng(number).integers(-3, 4, (480, 640, 3))
        frame = make_frame(noisy.clip(0, 255).astype(np.uint8), at_s=number / 25)
        quality, memory = assess_frame(frame, QualitySection(), memory)
        verdicts.append(quality.reasons)
    assert verdicts == [(), ("unchanged",), ("unchanged",), ("unchanged",)]


def test_a_field_at_rest_is_analysed_again_when_it_has_been_focused() -> None:
    _, memory = assess_frame(make_frame(soft(make_field(), 2), at_s=1), QualitySection(), GateMemory())
    assert assess_frame(make_frame(soft(make_field(), 2), at_s=2), QualitySection(), memory)[0].reasons == (
        "unchanged",
    )
    assert assess_frame(make_frame(make_field(), at_s=2), QualitySection(), memory)[0].is_accepted


def test_a_live_stage_is_moving_until_two_frames_show_the_same_place() -> None:
    wide = make_field(480, 1200, cells=60)
    memory = GateMemory()
    verdicts = []
    for number, x in enumerate((0, 100, 200, 300, 400, 400)):
        frame = make_frame(np.ascontiguousarray(wide[:, x : x + 640]), at_s=number / 25)
        quality, memory = assess_frame(frame, QualitySection(), memory)
        verdicts.append(quality.reasons)
    assert verdicts == [(), ("moving",), ("moving",), ("moving",), ("moving",), ()]


def test_stored_pictures_and_a_triggered_camera_are_not_moving() -> None:
    for key, limits in (("file", {}), (None, {"motion_window_s": 0})):
        memory = GateMemory()
        for number in range(4):
            frame = make_frame(make_field(seed=number), at_s=number / 25, key=key and f"{key}{number}")
            quality, memory = assess_frame(frame, QualitySection(**limits), memory)
            assert quality.is_accepted


# ------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 5000, 3), (5000, 1, 3), (3000, 40, 3)])
def test_frames_of_odd_shape_get_a_verdict_too(shape: tuple[int, int, int]) -> None:
    assert reasons(np.zeros(shape, np.uint8)) == ("dark",)
    assert reasons(np.full(shape, 128, np.uint8)) == ("empty",)


def test_a_read_only_frame_is_judged_and_not_changed() -> None:
    pixels = make_field()
    before = pixels.copy()
    pixels.flags.writeable = False
    _, memory = assess_frame(make_frame(pixels, at_s=1), QualitySection(), GateMemory())
    assert memory.last is not None
    glance = memory.last.grey.copy()
    assess_frame(make_frame(make_field(seed=9), at_s=1.1), QualitySection(), memory)
    assert np.array_equal(memory.last.grey, glance)
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
    memory = GateMemory()
    for frame in frames:
        quality, memory = assess_frame(frame, QualitySection(), memory)
        assert quality.reasons == ()


def test_the_gate_decides_right_on_a_camera_that_it_never_saw() -> None:
    """The simulated slide had no part in choosing the limits."""
    section = CameraSection.model_validate({"simulated": {"interval_s": 0, "fields": 40, "seed": 77}})
    frames = [frame for frame in iter(open_camera(section).read, None) if isinstance(frame, Frame)]
    rng = np.random.default_rng(7)
    fields = [RealField("simulated", frame.pixels_bgr, (Box(0, 0, 640, 480),), RED_CELL_PX) for frame in frames]
    memory, wrong, decided = GateMemory(), [], 0
    for number, field in enumerate(fields):
        for making, make in (list(GOOD.items())[number % 5], list(BAD.items())[number % 6]):
            frame = make_frame(make(field, rng), at_s=2.0 * decided)
            quality, memory = assess_frame(frame, QualitySection(skip_unchanged=False), memory)
            decided += 1
            if quality.is_accepted != (making in GOOD):
                wrong.append((number, making, quality.reasons))
    assert len(wrong) <= 0.02 * decided, wrong
