"""The latest frame, as whoever looks on sees it: newest wins, large ones are made small, fast ones are passed over."""

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from agent.domain import Frame, SampleState
from agent.latest import LONGEST_SIDE_PX, Latest
from agent.pipeline import process_frame
from tests.frames import CLOCK, make_bench, make_frame


def large_frame(seed: int = 1) -> Frame:
    return make_frame(seed, pixels=np.full((1200, 2 * LONGEST_SIDE_PX, 3), seed, np.uint8))


def test_the_newest_frame_and_the_newest_field_are_kept() -> None:
    latest = Latest()
    assert latest.read() == (None, None)
    outcome = process_frame(make_frame(1), SampleState("s-1"), make_bench(), CLOCK)
    latest.show(make_frame(1), "s-1", outcome.field, None)
    latest.show(make_frame(2), "s-1", None, "blurred")
    frame, field = latest.read()
    assert frame is not None
    assert field is not None
    assert (frame.number, frame.dropped, frame.cells) == (2, "blurred", ())
    assert (field.number, field.dropped, len(field.cells), field.sid) == (1, None, 2, "s-1")


def test_a_large_frame_is_kept_small_and_its_boxes_refer_to_the_frame() -> None:
    latest = Latest()
    latest.show(large_frame(), "s-1", None, "dark")
    (frame, _) = latest.read()
    assert frame is not None
    assert (frame.width_px, frame.height_px) == (2 * LONGEST_SIDE_PX, 1200)
    assert frame.pixels_bgr.shape == (600, LONGEST_SIDE_PX, 3)


def test_a_fast_camera_with_large_frames_does_not_have_each_of_them_made_small() -> None:
    now_s = [10.0]
    latest = Latest(lambda: now_s[0])
    field: Any = SimpleNamespace(cells=(), quality=None, place=None, timing_ms=MappingProxyType({"total": 5.0}))
    for seed in (1, 2, 3):
        latest.show(large_frame(seed), "s-1", None, "no-sample")
    assert latest.read()[0].number == 1  # type: ignore[union-attr]
    latest.show(large_frame(4), "s-1", field, None)
    assert latest.read()[1].took_ms == 5.0, "a field is always shown"  # type: ignore[union-attr]
    now_s[0] += 1
    latest.show(large_frame(5), "s-1", None, "no-sample")
    assert latest.read()[0].number == 3  # type: ignore[union-attr]
