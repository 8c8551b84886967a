from __future__ import annotations

import time
from collections import Counter
from datetime import datetime, timezone
from itertools import pairwise

import cv2
import numpy as np
import pytest

from agent.camera.camera import NOTHING_YET, Clocks
from agent.camera.hashing import hash_pixels
from agent.camera.simulated import (
    CellDensity,
    SimulatedCamera,
    SimulatedSlide,
    expose,
    open_simulated,
    render_training_crop,
    render_training_field,
)
from agent.camera.simulated import Optics as SlideOptics
from agent.camera.smear import CELL_CLASSES, PLATELET, RED_CELL, SmearStyle
from agent.config import CameraSection, SimulatedSection
from agent.domain import Box, Frame
from agent.errors import CameraError, ConfigError

EVEN_SHARES = {name: 1.0 for name in CELL_CLASSES if name != PLATELET}


class FakeTime:
    """Clock and sleep that pass without waiting."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000_000
        self.slept_s: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_ns += round(seconds * 1e9)

    def clocks(self) -> Clocks:
        return Clocks(utc=lambda: datetime(2026, 1, 1, tzinfo=timezone.utc), monotonic_ns=lambda: self.now_ns)


def section(**changes: object) -> SimulatedSection:
    """Small, quick frames unless told otherwise."""
    small = {"frame_width_px": 320, "frame_height_px": 240, "interval_s": 0, "red_cells_per_field": 6, "fields": 12}
    return SimulatedSection.model_validate(small | changes)


def camera(*, um_per_px: float | None = None, done: tuple[str, ...] = (), **changes: object) -> SimulatedCamera:
    fake = FakeTime()
    return SimulatedCamera(section(**changes), um_per_px, done=done, clocks=fake.clocks(), sleep=fake.sleep)


def all_frames(source: SimulatedCamera) -> list[Frame]:
    frames = []
    while (frame := source.read()) is not None:
        if isinstance(frame, Frame):
            frames.append(frame)
    return frames


# ---------------------------------------------------------------------------------------------------- the slide
def test_the_same_seed_gives_the_same_slide_and_another_seed_another() -> None:
    first = SimulatedSlide(7).render(-30, 12, 320, 240)
    assert np.array_equal(first, SimulatedSlide(7).render(-30, 12, 320, 240))
    assert not np.array_equal(first, SimulatedSlide(8).render(-30, 12, 320, 240))


def test_the_slide_does_not_depend_on_the_order_of_visits() -> None:
    straight, crooked = SimulatedSlide(3), SimulatedSlide(3)
    for x_um, y_um in ((500, 300), (-90, -70), (35, 80), (70, 0)):
        crooked.render(x_um, y_um, 320, 240)
    assert straight.cells_in(0, 0, 120, 90) == crooked.cells_in(0, 0, 120, 90)
    assert np.array_equal(straight.render(40, 40, 320, 240), crooked.render(40, 40, 320, 240))


def test_a_forgotten_tile_comes_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SimulatedSlide, "TILES_KEPT", 4)
    monkeypatch.setattr(SimulatedSlide, "SPRITES_KEPT_BYTES", 100_000)
    slide = SimulatedSlide(3)
    before = slide.render(0, 0, 320, 240)
    for step in range(1, 12):
        slide.render(step * 400, 0, 160, 120)
    assert len(slide._tiles) < 400
    assert slide._sprite_bytes <= 100_000
    assert np.array_equal(before, slide.render(0, 0, 320, 240))


def test_windows_that_overlap_show_the_same_pixels() -> None:
    slide = SimulatedSlide(5, density=CellDensity(12, 2, 2), shares=EVEN_SHARES)
    left = slide.render(100.0, 50.0, 320, 240)
    right = slide.render(100.0 + 110 / slide.px_per_um, 50.0 + 37 / slide.px_per_um, 320, 240)
    assert np.array_equal(left[37:, 110:], right[:-37, :-110])


def test_mean_numbers_of_cells_are_those_asked_for() -> None:
    slide = SimulatedSlide(1, density=CellDensity(red_cells=9, nucleated_cells=1.5, platelets=1))
    side_um = 400.0
    inside = [c for c in slide.cells_in(0, 0, side_um, side_um) if min(c.centre_um) >= 0 and max(c.centre_um) < side_um]
    counts = Counter(c.class_name if c.class_name in (RED_CELL, PLATELET) else "nucleated" for c in inside)
    for name, wanted in ((RED_CELL, 9 * 160), ("nucleated", 1.5 * 160), (PLATELET, 160)):
        assert abs(counts[name] - wanted) < 5 * np.sqrt(wanted)


def test_identifiers_are_unique_and_nucleated_cells_rarely_touch_each_other() -> None:
    slide = SimulatedSlide(2, density=CellDensity(9, 1.0, 1), shares=EVEN_SHARES)
    cells = slide.cells_in(0, 0, 400, 400)
    assert len({cell.identifier for cell in cells}) == len(cells)
    nucleated = [cell for cell in cells if cell.class_name not in (RED_CELL, PLATELET)]
    places = np.asarray([cell.centre_um for cell in nucleated])
    radii = np.asarray([cell.radius_um for cell in nucleated])
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1)) - radii[:, None] - radii[None]
    touching = (apart[np.triu_indices(len(nucleated), 1)] < 0).sum()
    assert touching <= 0.04 * len(nucleated)


@pytest.mark.parametrize("class_name", [RED_CELL, *CELL_CLASSES])
def test_the_true_outline_bounds_what_is_drawn(class_name: str) -> None:
    """Alone on the slide a cell differs from the empty ground inside its box and nowhere else, and fills the box."""
    is_red, is_platelet = class_name == RED_CELL, class_name == PLATELET
    density = CellDensity(0.3 * is_red, 0.3 * (not is_red and not is_platelet), 0.3 * is_platelet)
    shares = {class_name: 1.0} if not (is_red or is_platelet) else EVEN_SHARES
    slide = SimulatedSlide(4, density=density, shares=shares)
    cells = slide.cells_in(0, 0, 200, 200)
    assert cells
    scale = slide.px_per_um
    for cell in cells[:4]:
        area = cell.outline_area
        margin_px = 14
        left, top = round(area.x_min_um * scale) - margin_px, round(area.y_min_um * scale) - margin_px
        width = round((area.x_max_um - area.x_min_um) * scale) + 2 * margin_px
        height = round((area.y_max_um - area.y_min_um) * scale) + 2 * margin_px
        if len(slide.cells_in(left / scale, top / scale, (left + width) / scale, (top + height) / scale)) > 1:
            continue
        pixels = slide.render(left / scale, top / scale, width, height).astype(int)
        drawn = np.abs(pixels - np.asarray(slide.style.lamp_bgr)).max(axis=2) > 12
        ys, xs = np.nonzero(drawn)
        found = np.asarray([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(found - [margin_px, margin_px, width - margin_px, height - margin_px]).max() <= 4
        assert drawn.sum() > 0.3 * (width - 2 * margin_px) * (height - 2 * margin_px)


# ---------------------------------------------------------------------------------------------------- the camera
def test_the_camera_ends_after_its_fields_and_numbers_them_without_gaps() -> None:
    source = camera(fields=5)
    frames = all_frames(source)
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5]
    assert source.read() is None
    assert source.is_live is False


def test_a_frame_carries_time_hash_place_scale_and_key() -> None:
    frame = camera(seed=9, um_per_px=0.1).read()
    assert isinstance(frame, Frame)
    assert frame.pixels_bgr.shape == (240, 320, 3)
    assert frame.pixels_bgr.dtype == np.uint8
    assert not frame.pixels_bgr.flags.writeable
    assert frame.sha256 == hash_pixels(frame.pixels_bgr)
    assert frame.captured_at.tzinfo is timezone.utc
    assert frame.source == "simulated"
    assert frame.origin_key == "simulated:9:0"
    assert frame.stage_um == (0.0, 0.0)
    assert frame.um_per_px == pytest.approx(0.1)


def test_the_same_seed_gives_the_same_frames_noise_and_all() -> None:
    first, again = all_frames(camera(fields=3)), all_frames(camera(fields=3))
    assert [frame.sha256_16 for frame in first] == [frame.sha256_16 for frame in again]
    assert len({frame.sha256_16 for frame in first}) == 3


def test_the_stage_walks_forth_and_back_with_the_chosen_overlap() -> None:
    source = camera(overlap=0.25, um_per_px=0.1)
    places = [source.corner_um(visit) for visit in range(42)]
    assert places[1][0] == pytest.approx(0.75 * 320 * 0.1)
    assert places[20] == pytest.approx((places[19][0], 0.75 * 240 * 0.1))
    assert places[39] == pytest.approx((0.0, 0.75 * 240 * 0.1))
    assert len(set(places)) == 42


def test_overlapping_fields_show_the_same_cells() -> None:
    source = camera(overlap=0.5, blur_px=0, noise=0, vignetting=0, fields=2)
    first, second = all_frames(source)
    assert np.array_equal(first.pixels_bgr[:, 160:], second.pixels_bgr[:, :160])
    shared = {c.identifier for c in source.truth(1)} & {c.identifier for c in source.truth(2)}
    assert shared
    boxes = [{c.identifier: c.box for c in source.truth(number) if c.visible_share > 0.999} for number in (1, 2)]
    for identifier in shared & boxes[0].keys() & boxes[1].keys():
        assert boxes[0][identifier].x_min - 160 == pytest.approx(boxes[1][identifier].x_min)


def test_truth_boxes_hold_the_cells_of_the_frame() -> None:
    source = camera(noise=2.0, nucleated_cells_per_field=2, fields=4)
    for frame in all_frames(source):
        ground = np.percentile(frame.pixels_bgr.reshape(-1, 3), 90, axis=0)
        covered = np.zeros(frame.pixels_bgr.shape[:2], dtype=bool)
        for cell in source.truth(frame.number):
            box = cell.box
            assert 0 <= box.x_min < box.x_max <= frame.width_px
            assert 0 <= box.y_min < box.y_max <= frame.height_px
            rows = slice(int(box.y_min), int(np.ceil(box.y_max)))
            columns = slice(int(box.x_min), int(np.ceil(box.x_max)))
            covered[max(rows.start - 3, 0) : rows.stop + 3, max(columns.start - 3, 0) : columns.stop + 3] = True
            if cell.visible_share > 0.5:
                inside = np.abs(frame.pixels_bgr[rows, columns].astype(float) - ground).max(axis=2)
                assert (inside > 15).mean() > 0.35, cell
        smooth = cv2.GaussianBlur(frame.pixels_bgr, (0, 0), 2).astype(float)
        outside = np.abs(smooth - np.median(smooth[~covered], axis=0)).max(axis=2)[~covered]
        assert (outside > 30).mean() < 0.002


def test_truth_of_a_frame_that_was_never_delivered_is_refused() -> None:
    with pytest.raises(LookupError, match="frame 3 was not delivered"):
        camera().truth(3)


def test_frozen_frames_repeat_the_last_picture_byte_for_byte() -> None:
    source = camera(frozen_share=0.5, fields=30, red_cells_per_field=2)
    frames = all_frames(source)
    assert len(frames) == 30
    repeats = [(before, after) for before, after in pairwise(frames) if before.sha256_16 == after.sha256_16]
    assert 8 <= len(repeats) <= 22
    for before, after in repeats:
        assert np.array_equal(before.pixels_bgr, after.pixels_bgr)
        assert before.origin_key != after.origin_key
        assert source.truth(before.number) == source.truth(after.number)
    assert len({frame.sha256_16 for frame in frames}) == 30 - len(repeats)


def test_a_camera_that_is_always_frozen_shows_one_picture() -> None:
    assert len({frame.sha256_16 for frame in all_frames(camera(frozen_share=1, fields=6))}) == 1


def test_missing_frames_never_arrive() -> None:
    frames = all_frames(camera(missing_share=0.5, fields=30, red_cells_per_field=2))
    whole = all_frames(camera(fields=30, red_cells_per_field=2))
    assert 8 <= len(frames) <= 22
    assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
    by_key = {frame.origin_key: frame.sha256_16 for frame in whole}
    assert all(by_key[frame.origin_key] == frame.sha256_16 for frame in frames)


def test_a_camera_whose_frames_are_all_missing_says_so_without_blocking_for_ever() -> None:
    fake = FakeTime()
    source = SimulatedCamera(section(missing_share=1, fields=0), clocks=fake.clocks(), sleep=fake.sleep)
    assert source.read() is NOTHING_YET
    assert 0 < sum(fake.slept_s) <= 1


def test_a_restart_goes_on_behind_the_fields_that_are_done() -> None:
    for faults in ({}, {"frozen_share": 0.4, "missing_share": 0.3}, {"frozen_share": 1.0}):
        whole = all_frames(camera(**faults))
        done = tuple(frame.origin_key for frame in whole[:4] if frame.origin_key)
        rest = all_frames(camera(done=done, **faults))
        assert [(f.origin_key, f.sha256_16, f.stage_um) for f in rest] == [
            (f.origin_key, f.sha256_16, f.stage_um) for f in whole[4:]
        ]
        assert [frame.number for frame in rest] == list(range(1, len(rest) + 1))


def test_fields_come_at_the_interval_and_a_long_wait_is_cut_into_polls() -> None:
    fake = FakeTime()
    source = SimulatedCamera(section(interval_s=1.2, fields=3), clocks=fake.clocks(), sleep=fake.sleep)
    answers = []
    while (frame := source.read()) is not None:
        answers.append(frame)
    taken = [frame.captured_monotonic_ns for frame in answers if isinstance(frame, Frame)]
    assert np.diff(taken) == pytest.approx([1.2e9, 1.2e9])
    assert answers.count(NOTHING_YET) == 4
    assert max(fake.slept_s) <= 0.5


def test_dust_stays_at_the_same_pixel_while_the_stage_moves() -> None:
    """The mean of many clean fields over the mean of the same fields with dust leaves the dust alone."""
    knobs = {"noise": 0, "blur_px": 0, "vignetting": 0, "red_cells_per_field": 2, "fields": 6}
    clean, dusty = all_frames(camera(**knobs)), all_frames(camera(dust=8, **knobs))
    shadows = [c.pixels_bgr.astype(int) - d.pixels_bgr for c, d in zip(clean, dusty, strict=True)]
    specks = shadows[0].max(axis=2) > 40
    assert specks.sum() > 8 * 6
    for shadow in shadows:
        # Under a dark cell the same speck takes away less; nowhere else does anything change.
        assert (shadow.max(axis=2)[specks] > 8).mean() > 0.95
        assert shadow[~cv2.dilate(specks.astype(np.uint8), np.ones((11, 11))).astype(bool)].max() == 0


def test_the_lamp_the_lens_and_the_sensor_do_what_their_knobs_say() -> None:
    def mean(**knobs: object) -> float:
        frame = camera(red_cells_per_field=0, nucleated_cells_per_field=0, platelets_per_field=0, **knobs).read()
        assert isinstance(frame, Frame)
        return float(frame.pixels_bgr.mean())

    assert mean(illumination=0.5, noise=0) == pytest.approx(mean(noise=0) / 2, rel=0.02)
    assert mean(vignetting=0.6, noise=0) < mean(vignetting=0, noise=0) - 10

    sharp = SimulatedSlide(1).render(0, 0, 320, 240)
    rng = np.random.default_rng(0)
    blurred = expose(sharp, SlideOptics(blur_px=3), rng)
    noisy = expose(sharp, SlideOptics(noise=6), rng)
    assert cv2.Laplacian(blurred, cv2.CV_64F).var() < 0.3 * cv2.Laplacian(sharp, cv2.CV_64F).var()
    assert (noisy.astype(int) - sharp)[sharp < 230].std() == pytest.approx(6, rel=0.1)


def test_a_closed_camera_refuses_to_read() -> None:
    source = camera()
    source.close()
    source.close()
    with pytest.raises(CameraError, match="read after close"):
        source.read()


def test_a_scale_that_cannot_be_drawn_is_refused_with_the_allowed_range() -> None:
    with pytest.raises(ConfigError, match=r"camera\.um_per_px: found 40; .* 0\.02 to 0\.5"):
        open_simulated(CameraSection(um_per_px=40))


def test_open_simulated_takes_scale_and_done_from_its_caller() -> None:
    source = open_simulated(CameraSection(um_per_px=0.2, simulated=section()), done={"simulated:1:0"})
    frame = source.read()
    assert isinstance(frame, Frame)
    assert (frame.origin_key, frame.um_per_px) == ("simulated:1:1", pytest.approx(0.2))


# ---------------------------------------------------------------------------------------------------- for training
def test_training_fields_repeat_with_the_seed_and_their_boxes_lie_in_the_frame() -> None:
    classes: Counter[str] = Counter()
    for seed in range(12):
        pixels, boxes = render_training_field(np.random.default_rng(seed), 320, 256)
        again, same = render_training_field(np.random.default_rng(seed), 320, 256)
        assert np.array_equal(pixels, again)
        assert boxes == same
        assert pixels.shape == (256, 320, 3)
        assert pixels.dtype == np.uint8
        for class_name, box in boxes:
            assert isinstance(box, Box)
            assert 0 <= box.x_min < box.x_max <= 320
            assert 0 <= box.y_min < box.y_max <= 256
            classes[class_name] += 1
    assert set(classes) <= {RED_CELL, *CELL_CLASSES}
    assert len(classes) >= 7


@pytest.mark.parametrize("class_name", CELL_CLASSES)
def test_a_training_crop_shows_its_cell_in_the_middle(class_name: str) -> None:
    rng = np.random.default_rng(3)
    for _ in range(3):
        crop = render_training_crop(rng, class_name, 64)
        assert crop.shape == (64, 64, 3)
        assert crop.dtype == np.uint8
        ground = np.percentile(crop.reshape(-1, 3), 97, axis=0)
        assert np.abs(crop[26:38, 26:38].astype(float) - ground).max(axis=2).mean() > 20


def test_random_looks_differ_and_stay_drawable() -> None:
    rng = np.random.default_rng(0)
    looks = [SmearStyle.random(rng) for _ in range(50)]
    assert len({look.lamp_bgr for look in looks}) == 50
    for look in looks:
        assert all(90 <= channel <= 255 for channel in look.lamp_bgr)
        assert min(look.nucleus_dark_od) >= 0
        assert 6 < look.px_per_um < 20


def test_a_field_is_drawn_in_time_for_five_fields_a_second() -> None:
    """40 ms on one core of 2026; the best of five, in processor time, so that a busy machine does not fail it."""
    slide = SimulatedSlide(1)
    slide.render(0, 0, 640, 480)
    took_s = []
    for step in range(1, 6):
        start_s = time.thread_time()
        slide.render(step * 51.2, 0, 640, 480)
        took_s.append(time.thread_time() - start_s)
    assert min(took_s) < 0.15
