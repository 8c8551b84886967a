"""The shipped detector on the simulated slide, whose truth is known: tolerant where the model is, exact in the code."""

from __future__ import annotations

import numpy as np
import pytest

from agent.camera.simulated import render_training_field
from agent.config import ModelsSection
from agent.domain import Box, Detection
from agent.inference.detector import _boxes
from agent.inference.models import Models, open_models


@pytest.fixture(scope="module")
def models() -> Models:
    return open_models(ModelsSection())


def overlap(first: Box, second: Box) -> float:
    width = min(first.x_max, second.x_max) - max(first.x_min, second.x_min)
    height = min(first.y_max, second.y_max) - max(first.y_min, second.y_min)
    shared = max(width, 0) * max(height, 0)
    return shared / (first.width_px * first.height_px + second.width_px * second.height_px - shared)


def test_most_nucleated_cells_of_simulated_fields_are_found_where_they_are(models: Models) -> None:
    rng = np.random.default_rng(11)
    found = total = 0
    for _ in range(6):
        pixels, truth = render_training_field(rng, 640, 480)
        detections = models.detector.detect(pixels)
        for name, box in truth:
            if name not in ("RBC", "platelet"):
                total += 1
                found += any(d.class_name == "WBC" and overlap(d.box, box) > 0.5 for d in detections)
    assert total > 5
    assert found / total > 0.8


def test_detections_are_inside_the_frame_and_ordered_by_score(models: Models) -> None:
    pixels, _ = render_training_field(np.random.default_rng(3), 576, 432)
    detections = models.detector.detect(pixels, 0.05)
    assert detections
    scores = [d.score for d in detections]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= 0.05 - 0.01
    for d in detections:
        assert 0 <= d.box.x_min < d.box.x_max <= 576
        assert 0 <= d.box.y_min < d.box.y_max <= 432
        assert d.class_name in models.manifest.detector.classes


def test_a_lower_threshold_only_adds(models: Models) -> None:
    pixels, _ = render_training_field(np.random.default_rng(4), 640, 480)

    def keys(detections: tuple[Detection, ...]) -> set[tuple[str, float]]:
        return {(d.class_name, d.score) for d in detections}

    assert keys(models.detector.detect(pixels, 0.5)) <= keys(models.detector.detect(pixels, 0.1))


def test_the_same_frame_gives_the_same_answer_and_is_left_alone(models: Models) -> None:
    pixels, _ = render_training_field(np.random.default_rng(5), 640, 480)
    before = pixels.copy()
    assert models.detector.detect(pixels) == models.detector.detect(pixels)
    assert np.array_equal(before, pixels)


def test_an_empty_field_has_no_cells(models: Models) -> None:
    assert models.detector.detect(np.full((480, 640, 3), 235, np.uint8)) == ()


def test_sharp_distributions_decode_to_their_bins() -> None:
    bins = np.full((1, 4, 16), -50.0, np.float32)
    for side, distance in enumerate((1, 2, 3, 4)):
        bins[0, side, distance] = 50
    assert _boxes(bins.reshape(1, 64), np.array([[10.5, 20.5]], np.float32)).tolist() == [[9.5, 18.5, 13.5, 24.5]]
