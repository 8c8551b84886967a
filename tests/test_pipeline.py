"""What one frame gives on the main path; the models are doubles that say what the test wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from agent.analysis.crops import CropCutter, cut_crop
from agent.analysis.preprocessing import TAUGHT_LOOK, preprocess
from agent.bench import make_bench as bench_from_config
from agent.config import ModelsSection, PreprocessingSection, loads
from agent.domain import Classification, Detection, Pixels, SampleState
from agent.inference.models import open_models
from agent.pipeline import STAGES_OF_A_FRAME, Outcome, process_frame
from tests.frames import CLOCK, RED, WHITE, make_bench, make_frame, make_models, make_pixels


def test_a_frame_gives_its_cells_named_and_counted() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1", next_cell_number=8), make_bench(), CLOCK)
    assert outcome.field is not None
    white, red = outcome.field.cells
    assert (white.cell_id, white.class_name, white.probability) == ("s-1-8", "round", 0.75)
    assert (red.cell_id, red.class_name, red.classification) == ("s-1-9", "red", None)
    assert outcome.field.counts == {"red": 1, "round": 1}
    assert outcome.field.clock == CLOCK
    assert (outcome.sample.next_cell_number, outcome.sample.fields) == (10, 1)
    assert outcome.sample.counts == {"red": 1, "round": 1}


def test_every_stage_of_a_field_is_timed_and_the_whole_is_not_less_than_its_parts() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(), CLOCK)
    assert outcome.field is not None
    timing_ms = outcome.field.timing_ms
    assert set(timing_ms) == set(STAGES_OF_A_FRAME)
    assert timing_ms["total"] >= sum(timing_ms[stage] for stage in STAGES_OF_A_FRAME if stage != "total") - 0.001
    assert timing_ms["classify"] > 0


def test_stages_that_had_nothing_to_do_took_no_time() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(make_models((RED,))), CLOCK)
    assert outcome.field is not None
    assert outcome.field.timing_ms["crop"] == outcome.field.timing_ms["classify"] == 0


def test_the_classifier_sees_the_look_that_the_manifest_asks_for_and_messages_the_frame_as_it_came() -> None:
    seen: list[Pixels] = []

    def classify(crop: Pixels) -> Classification:
        seen.append(crop)
        return Classification("round", 0.75, {"round": 0.75, "lobed": 0.25})

    models = make_models((WHITE,), classify)
    given: list[object] = []

    def cutter(pixels: Pixels, detections: Sequence[Detection]) -> CropCutter:
        given.extend(detections)
        return CropCutter(pixels, 0.2, TAUGHT_LOOK)

    models.cutter = cutter
    frame = make_frame()
    outcome = process_frame(frame, SampleState("s-1"), make_bench(models), CLOCK)
    assert outcome.field is not None
    assert np.array_equal(seen[0], CropCutter(frame.pixels_bgr, 0.2, TAUGHT_LOOK).around(WHITE.box))
    assert not np.array_equal(seen[0], cut_crop(frame.pixels_bgr, WHITE.box, 0.2))
    assert given == [WHITE]  # which say whether the stain can be told
    assert np.array_equal(outcome.field.frame.pixels_bgr, make_pixels(1))


def test_the_models_see_the_preprocessed_frame_and_everybody_else_the_frame_as_it_came() -> None:
    seen: list[Pixels] = []

    def classify(crop: Pixels) -> Classification:
        seen.append(crop)
        return Classification("round", 0.75, {"round": 0.75, "lobed": 0.25})

    frame, section = make_frame(), PreprocessingSection(white_balance=True)
    bench = replace(make_bench(make_models((WHITE,), classify)), preprocessing=section)
    outcome = process_frame(frame, SampleState("s-1"), bench, CLOCK)
    assert outcome.field is not None
    assert np.array_equal(seen[0], cut_crop(preprocess(frame.pixels_bgr, section), WHITE.box, 0.2))
    assert not np.array_equal(seen[0], cut_crop(frame.pixels_bgr, WHITE.box, 0.2))
    assert np.array_equal(outcome.field.frame.pixels_bgr, make_pixels(1))
    assert outcome.field.timing_ms["preprocess"] > 0


def test_the_configured_probability_goes_before_the_manifests() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(min_probability=0.9), CLOCK)
    assert outcome.field is not None
    assert outcome.field.counts == {"red": 1, "unidentified": 1}


def test_a_field_without_cells_is_a_result_too() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(make_models(())), CLOCK)
    assert outcome.field is not None
    assert outcome.field.counts == {}
    assert len(outcome.drafts) == 1


def test_a_frame_that_repeats_the_last_one_is_not_analysed() -> None:
    def fail(_crop: Pixels) -> Classification:
        raise AssertionError("a frozen frame was analysed")

    bench = make_bench(make_models((WHITE,), fail))
    frozen = process_frame(make_frame(key="k", repeats_last=True), SampleState("s-1"), bench, CLOCK)
    assert (frozen.field, frozen.dropped, frozen.finished_key) == (None, "frozen", "k")


def test_a_repeat_is_known_after_a_restart_from_the_samples_state() -> None:
    frame = make_frame(key="k")
    sample = process_frame(frame, SampleState("s-1"), make_bench(), CLOCK).sample
    again = process_frame(frame, sample, make_bench(), CLOCK)
    assert (again.field, again.dropped) == (None, "frozen")
    assert again.sample == replace(sample, refused={"frozen": 1})


def test_a_dark_frame_is_refused_by_its_reason_and_is_done_with() -> None:
    dark = make_frame(pixels=np.full((48, 64, 3), 3, np.uint8), key="k")
    outcome = process_frame(dark, SampleState("s-1"), make_bench(), CLOCK)
    assert (outcome.field, outcome.dropped, outcome.finished_key, outcome.drafts) == (None, "dark", "k", ())
    assert outcome.sample.refused == {"dark": 1}


@pytest.mark.parametrize("size_px", [(1, 1), (2, 1), (1, 300), (5000, 3)])
def test_frames_of_strange_shapes_pass(size_px: tuple[int, int]) -> None:
    pixels = make_pixels(3, *size_px)
    outcome = process_frame(make_frame(pixels=pixels), SampleState("s-1"), make_bench(make_models(())), CLOCK)
    assert isinstance(outcome, Outcome)


def test_the_gate_learns_a_device_and_not_a_folder_that_is_read_once() -> None:
    models = open_models(ModelsSection())
    cameras = {"{kind: usb}": True, "{kind: folder, folder: {path: /x}}": False}
    cameras["{kind: folder, folder: {path: /x, watch: true}}"] = True
    for camera, is_learning in cameras.items():
        config = loads(f"camera: {camera}", "test", environment={})
        assert bench_from_config(config, models).quality.learn is is_learning
