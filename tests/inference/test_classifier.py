"""The shipped classifier."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from agent.analysis.crops import CropCutter
from agent.camera.simulated import render_training_crop
from agent.config import ModelsSection
from agent.domain import Box, Classification, Detection, Pixels
from agent.inference.classifier import Classifier
from agent.inference.models import Models, open_models

DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="module")
def models() -> Models:
    return open_models(ModelsSection())


def test_probabilities_are_shares_in_the_manifests_order(models: Models) -> None:
    answer = models.classifier.classify(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    assert tuple(answer.probabilities) == models.manifest.classifier.classes
    assert sum(answer.probabilities.values()) == pytest.approx(1)
    assert answer.probability == max(answer.probabilities.values()) == answer.probabilities[answer.class_name]
    assert 0 <= answer.margin <= 1


@pytest.mark.skipif(not DATA.is_dir(), reason="the labelled images of ../shared/data are not on this machine")
def test_nine_in_ten_real_test_cells_are_named_rightly(models: Models) -> None:
    from models.common.labels import read_cells

    cells = read_cells(DATA, "test")[::40]
    right = sum(models.name_central_cell(cv2.imread(str(cell.path))).class_name == cell.class_name for cell in cells)
    assert right / len(cells) > 0.9


@pytest.mark.skipif(not DATA.is_dir(), reason="the labelled images of ../shared/data are not on this machine")
@pytest.mark.parametrize("width", [1.0, 3.0, 5.0])
def test_nine_in_ten_cells_are_named_rightly_however_much_a_picture_shows(width: float, models: Models) -> None:
    """From pictures that the cell fills to half a field, at whose edge it may lie."""
    from models.common.labels import read_foreign_cells
    from models.evaluation.names import cut_picture

    cells = [cell for cell in read_foreign_cells(DATA, ("test",)) if cell.class_name is not None][::4]
    pictures = [cut_picture(cv2.imread(str(cell.path)), cell.box, width) for cell in cells]
    names = [models.name_central_cell(picture).class_name for picture in pictures]
    assert np.mean([name == cell.class_name for name, cell in zip(names, cells, strict=True)]) > 0.9


def test_each_attribute_has_a_value_of_its_own_and_the_cell_is_described(models: Models) -> None:
    morphology = models.manifest.classifier.morphology
    assert morphology is not None
    answer = models.classifier.classify(render_training_crop(np.random.default_rng(2), "eosinophil", 128)[..., ::-1])
    assert list(answer.morphology) == list(morphology.attributes)
    for name, attribute in answer.morphology.items():
        assert attribute.value in morphology.attributes[name]
        assert 1 / len(morphology.attributes[name]) <= attribute.probability <= 1
    assert models.describe(answer)


def test_of_a_pictures_cell_both_models_are_heard_and_the_detector_tells_of_the_stain(models: Models) -> None:
    pixels = np.ascontiguousarray(render_training_crop(np.random.default_rng(2), "lymphocyte", 128)[..., ::-1])
    crops: list[Pixels] = []

    def classify(crop: Pixels) -> Classification:
        crops.append(crop)
        return Classification("platelet", 0.7, {"platelet": 0.7, "lymphocyte": 0.3})

    def name(detector_class: str) -> str:
        found = Detection(Box(40, 40, 90, 90), detector_class, 0.9)
        detector: Any = SimpleNamespace(detect=lambda *_: [found])
        classifier: Any = SimpleNamespace(classify=classify)
        both = dataclasses.replace(models, detector=detector, classifier=classifier)
        return both.name_central_cell(pixels).class_name

    assert (name("WBC"), name("platelet")) == ("lymphocyte", "platelet")
    stained, lit = crops
    assert not np.array_equal(stained, lit)
    whole = models.manifest.classifier.crop.as_look()
    assert whole is not None
    cut = CropCutter(pixels, models.manifest.classifier.crop.margin, whole.without_stain).around(Box(40, 40, 90, 90))
    assert np.array_equal(lit, cut)


def test_no_cell_can_be_said_as_surely_as_a_cell(models: Models) -> None:
    """What never came in calibration is clipped: a file once had no number for less than a probability of 0.3."""
    (output,) = (o for o in models.manifest.classifier.outputs if o.kind == "cell_logit")
    least, most = (output.scale * (stored - output.zero_point) for stored in (-128, 127))
    assert least < -4 < 4 < most


def test_an_empty_field_of_glass_is_no_cell(models: Models) -> None:
    glass = np.full((120, 120, 3), (215, 222, 228), np.uint8)
    rng = np.random.default_rng(2)
    cells = [
        np.ascontiguousarray(render_training_crop(rng, name, 128)[..., ::-1])
        for name in models.manifest.classifier.classes
    ]
    assert models.classifier.classify(glass).cell_probability < 0.5
    assert np.median([models.classifier.classify(cell).cell_probability for cell in cells]) > 0.5


def asked_below(models: Models, sure_probability: float, doubtful_probability: float = 0.0) -> Classifier:
    entry = models.classifier.entry
    bounds = {"sure_probability": sure_probability, "doubtful_probability": doubtful_probability}
    thresholds = entry.thresholds.model_copy(update=bounds)
    classifier = copy.copy(models.classifier)
    classifier.entry = entry.model_copy(update={"thresholds": thresholds})
    return classifier


@pytest.fixture(scope="module")
def noise(models: Models) -> Pixels:
    """Of the input's side: resizing would round rows otherwise than columns."""
    side_px = models.classifier.entry.input.shape[1]
    return np.random.default_rng(3).integers(0, 256, (side_px, side_px, 3), np.uint8)


@pytest.mark.parametrize(("doubtful_probability", "count"), [(0.0, 4), (1.0, 8)])
def test_a_doubtful_cell_is_looked_at_from_more_sides_and_their_mean_answers(
    models: Models, noise: Pixels, doubtful_probability: float, count: int
) -> None:
    once, always = asked_below(models, 0.0), asked_below(models, 1.0, doubtful_probability)
    mirrored = (noise, noise[:, ::-1], noise[::-1], noise[::-1, ::-1])
    sides = [np.ascontiguousarray(side) for side in (*mirrored, *(np.rot90(side) for side in mirrored))][:count]
    logs = np.mean([np.log(list(once.classify(side).probabilities.values())) for side in sides], axis=0)
    shares = np.exp(logs) / np.exp(logs).sum()
    assert list(once.classify(noise).probabilities.values()) != pytest.approx(shares, rel=0.1)
    for side in sides:
        assert list(always.classify(side).probabilities.values()) == pytest.approx(shares, rel=1e-6)


def test_a_cell_is_looked_at_until_it_is_named_surely_enough(
    models: Models, noise: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    once, four = (asked_below(models, sure).classify(noise).probability for sure in (0.0, 1.0))
    for sure, doubtful, looks in (
        (once - 0.01, 1.0, 1),
        (once + 0.01, 0.0, 4),
        (once + 0.01, four - 0.01, 4),
        (once + 0.01, four + 0.01, 8),
    ):
        classifier, runs = asked_below(models, sure, doubtful), []
        ask = classifier._ask
        monkeypatch.setattr(classifier, "_ask", lambda view, ask=ask, runs=runs: runs.append(1) or ask(view))
        classifier.classify(noise)
        assert len(runs) == looks
