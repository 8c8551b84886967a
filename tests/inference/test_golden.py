"""The self-test: the shipped models as they are, then broken in every way that a device can break them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.config import ModelsSection, models_folder
from agent.domain import Detection, Pixels
from agent.errors import ModelError
from agent.inference.golden import (
    ANSWERS_NAME,
    FIELDS_FOLDER,
    MEAN_SCORE_TOLERANCE,
    SCORE_TOLERANCE,
    GoldenCell,
    GoldenField,
    Numbers,
    answers_names,
    differences,
    read_answers,
    read_fields,
)
from agent.inference.manifest import load_manifest
from agent.inference.models import Models, open_models
from agent.inference.selftest import GoldenTest, make_answers

SHIPPED = models_folder(ModelsSection())

pytestmark = pytest.mark.skipif(
    not (SHIPPED / "manifest.json").exists(), reason="the shipped models are not in models/"
)


@pytest.fixture(scope="module")
def models() -> Models:
    return open_models(ModelsSection(threads=1))


@pytest.fixture(scope="module")
def own_answers(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of this machine: those that were shipped may be another's."""
    folder = tmp_path_factory.mktemp("answers")
    make_answers(models, folder)
    return folder / ANSWERS_NAME


@pytest.fixture
def folder(own_answers: Path, tmp_path: Path) -> Path:
    shutil.copyfile(own_answers, tmp_path / ANSWERS_NAME)
    return tmp_path


class Detector:
    """The real detector with a fault. change: of the detections; flip: of the stored numbers."""

    def __init__(
        self,
        real: Any,
        change: Callable[[tuple[Detection, ...]], tuple[Detection, ...]] = lambda found: found,
        *,
        flips: bool = False,
    ) -> None:
        self._real = real
        self._change = change
        self._flips = flips
        self.identity = real.identity

    def detect(self, pixels: Pixels, min_score: float | None = None) -> tuple[Detection, ...]:
        return self._change(self._real.detect(pixels, min_score))

    @property
    def last_input(self) -> bytes:
        return bytes(self._real.last_input)

    @property
    def last_outputs(self) -> bytes:
        stored = bytearray(self._real.last_outputs)
        stored[0] ^= self._flips
        return bytes(stored)


def broken(models: Models, *, delegate: str | None = None, **fault: Any) -> Models:
    detector: Any = Detector(models.detector, **fault)
    return dataclasses.replace(models, detector=detector, delegate=delegate or models.delegate)


def less_sure(by: float) -> Callable[[tuple[Detection, ...]], tuple[Detection, ...]]:
    return lambda found: tuple(dataclasses.replace(one, score=max(0.0, one.score - by)) for one in found)


@pytest.mark.parametrize("classifier", [entry.name for entry in load_manifest(SHIPPED).classifiers])
def test_the_shipped_models_answer_as_they_are_known_to(classifier: str) -> None:
    """After new model files: `hematovision selftest --models models --make-answers`, with `--classifier` for others."""
    verdict = GoldenTest(SHIPPED).run(open_models(ModelsSection(classifier=classifier, threads=1)))
    assert verdict.is_passed, verdict.detail
    assert {field.name for field in verdict.fields} == {path.stem for path in FIELDS_FOLDER.glob("*.png")}


def test_the_golden_fields_ask_every_class(models: Models) -> None:
    answers = read_answers(SHIPPED)
    named = {cell.name for field in answers.fields.values() for cell in field.cells}
    alone = set(models.manifest.detector.classes) - set(models.manifest.detector.classified)
    assert alone <= named
    assert len(named) >= len(models.manifest.classifier.classes) * 0.75
    assert answers.fields["empty"].cells == ()


def test_on_the_machine_that_made_the_answers_each_field_is_compared_bit_by_bit(models: Models, folder: Path) -> None:
    verdict = GoldenTest(folder).run(models)
    assert verdict.is_passed
    assert all(field.is_exact for field in verdict.fields)
    assert "bit by bit" in verdict.detail


def test_one_flipped_bit_of_one_output_fails_where_bits_are_compared(models: Models, folder: Path) -> None:
    verdict = GoldenTest(folder).run(broken(models, flips=True))
    assert not verdict.is_passed
    assert "field a: the detector is given the same numbers as ever and makes others of them" in verdict.detail
    assert "models.runtime" in verdict.detail, "how to mend it"


def test_another_delegate_may_round_otherwise_within_the_tolerance(models: Models, folder: Path) -> None:
    other = broken(models, delegate="gpu", flips=True, change=less_sure(MEAN_SCORE_TOLERANCE / 2))
    verdict = GoldenTest(folder).run(other)
    assert verdict.is_passed, verdict.detail
    assert "within the tolerance" in verdict.detail
    assert not any(field.is_exact for field in verdict.fields)


def test_another_delegate_that_sees_less_fails(models: Models, folder: Path) -> None:
    verdict = GoldenTest(folder).run(broken(models, delegate="gpu", change=less_sure(2 * MEAN_SCORE_TOLERANCE)))
    assert not verdict.is_passed
    assert "on average" in verdict.detail


def test_another_delegate_that_sees_nothing_fails(models: Models, folder: Path) -> None:
    verdict = GoldenTest(folder).run(broken(models, delegate="gpu", change=lambda _found: ()))
    assert not verdict.is_passed
    assert "is not found" in verdict.detail
    assert " more: not as these models are known to answer" in verdict.detail


def test_what_passed_within_the_tolerance_must_stay_the_same_bit_by_bit(models: Models, folder: Path) -> None:
    golden = GoldenTest(folder)
    assert golden.run(broken(models, delegate="gpu")).is_passed
    assert golden.run(broken(models, delegate="gpu")).is_passed
    verdict = golden.run(broken(models, delegate="gpu", flips=True))
    assert not verdict.is_passed
    assert "makes others of them" in verdict.detail


def test_numbers_that_are_no_shares_fail_and_do_not_crash(models: Models, folder: Path) -> None:
    verdict = GoldenTest(folder).run(broken(models, change=less_sure(float("nan"))))
    assert not verdict.is_passed
    nan = broken(models, change=lambda found: tuple(dataclasses.replace(one, score=float("nan")) for one in found))
    assert "not with numbers and shares" in GoldenTest(folder).run(nan).detail


@pytest.mark.parametrize("role", ["detector", "classifier"])
def test_other_models_need_other_answers_and_are_told_which_and_how(role: str, models: Models, folder: Path) -> None:
    text = json.loads((folder / ANSWERS_NAME).read_text())
    text[f"{role}_sha256"] = "0" * 64
    (folder / ANSWERS_NAME).write_text(json.dumps(text))
    verdict = GoldenTest(folder).run(models)
    assert not verdict.is_passed
    assert f"the known answers are those of another {role} (SHA-256 0000000000000000..., in use is" in verdict.detail
    assert "hematovision selftest --make-answers" in verdict.detail


def test_models_without_answers_fail(models: Models, tmp_path: Path) -> None:
    verdict = GoldenTest(tmp_path).run(models)
    assert not verdict.is_passed
    assert f"{tmp_path / ANSWERS_NAME}: these models have no known answers" in verdict.detail


@pytest.mark.parametrize("text", ["", "{", "[]", '{"golden": 2}', '{"golden": 1, "more": 3}', "9" * 5000, "[" * 5000])
def test_answers_that_cannot_be_read_fail_and_name_the_file(text: str, tmp_path: Path) -> None:
    (tmp_path / ANSWERS_NAME).write_text(text)
    with pytest.raises(ModelError, match=r"golden\.json: .*--make-answers"):
        read_answers(tmp_path)


def test_a_changed_golden_field_has_no_known_answer(
    models: Models, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {name: pixels.copy() for name, pixels in read_fields().items()}
    changed["b"][0, 0] ^= 1
    monkeypatch.setattr("agent.inference.selftest.read_fields", lambda: changed)
    verdict = GoldenTest(folder).run(models)
    assert not verdict.is_passed
    assert "no known answer to the golden field b" in verdict.detail


def test_missing_and_damaged_golden_fields_are_told(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="golden fields are missing"):
        read_fields(tmp_path)
    for name, content in (("empty.png", b""), ("half.png", (FIELDS_FOLDER / "empty.png").read_bytes()[:40])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=f"{name}: .*install the package again"):
            read_fields(tmp_path)
        (tmp_path / name).unlink()


def test_answers_are_replaced_whole(models: Models, folder: Path) -> None:
    before = read_answers(folder)
    make_answers(models, folder)
    assert read_answers(folder) == before
    assert [path.name for path in folder.iterdir()] == [ANSWERS_NAME]
    with pytest.raises(ModelError, match="cannot be written"):
        make_answers(models, folder / "nowhere")


def test_the_golden_fields_are_those_that_the_command_draws() -> None:
    from models.draw_golden import draw

    stored = read_fields()
    drawn = draw()
    assert stored.keys() == drawn.keys()
    for name, pixels in drawn.items():
        assert int(cv2.absdiff(stored[name], pixels).max()) <= 1, "another machine may round a grey level otherwise"


# -------------------------------------------------------------------------------------------------- the tolerance


def make_cell(x: float = 10.0, *, score: float = 0.9, **keys: Any) -> GoldenCell:
    return GoldenCell(box=(x, 10, x + 40, 50), found_as="WBC", score=score, **keys)


def make_field(*cells: GoldenCell) -> GoldenField:
    nothing = Numbers(inputs_sha256="0" * 64, outputs_sha256="0" * 64)
    return GoldenField(pixels_sha256="0" * 64, detector=nothing, classifier=nothing, cells=cells)


MANY = tuple(make_cell(100.0 * number) for number in range(20))
NAMED: dict[str, Any] = {
    "probabilities": {"x": 0.9, "y": 0.1},
    "cell_probability": 0.99,
    "looks": {"shape": {"value": "round", "probability": 0.9}},
}


@pytest.mark.parametrize(
    ("known", "found", "words"),
    [
        ((make_cell(),), (make_cell(),), ()),
        ((make_cell(),), (make_cell(11.9),), ()),
        ((make_cell(),), (make_cell(13.0),), ("its box is off by 3.0 px",)),
        ((make_cell(),), (), ("the WBC at 30, 30 px is not found",)),
        ((), (make_cell(),), ("the WBC at 30, 30 px is found and should not be",)),
        ((), (make_cell(score=0.2),), ()),
        ((*MANY, make_cell(5000, score=0.2)), MANY, ()),
        (MANY, (*MANY, *(make_cell(3000 + 100 * k, score=0.2) for k in range(3))), ("3 faint cells of 20",)),
        ((*MANY, make_cell(5000)), (*MANY, make_cell(5000, score=0.9 - SCORE_TOLERANCE - 0.01)), ("score 0.640",)),
        ((make_cell(**NAMED),), (make_cell(**{**NAMED, "probabilities": {"x": 0.8, "y": 0.2}}),), ()),
        ((make_cell(**NAMED),), (make_cell(**{**NAMED, "probabilities": {"x": 0.7, "y": 0.3}}),), ("x with 0.700",)),
        ((make_cell(**NAMED),), (make_cell(**{**NAMED, "cell_probability": 0.5}),), ("a cell with 0.500",)),
        ((make_cell(**NAMED),), (make_cell(),), ("a cell with 0.000", "shape is not told")),
        (
            (make_cell(**NAMED),),
            (make_cell(**{**NAMED, "looks": {"shape": {"value": "lobed", "probability": 0.9}}}),),
            ("shape is lobed, not round",),
        ),
        ((make_cell(),), (make_cell().model_copy(update={"found_as": "RBC"}),), ("found as RBC, not WBC",)),
    ],
)
def test_what_is_within_the_tolerance_and_what_is_not(
    known: tuple[GoldenCell, ...], found: tuple[GoldenCell, ...], words: tuple[str, ...]
) -> None:
    faults = differences(make_field(*known), make_field(*found), min_score=0.15)
    assert len(faults) >= len(words)
    for word in words:
        assert any(word in fault for fault in faults), faults
    assert bool(faults) == bool(words)


def test_the_answers_name_the_shipped_files(models: Models) -> None:
    answers = read_answers(SHIPPED)
    assert answers.detector_sha256 == models.detector.identity.sha256
    assert answers.classifier_sha256 == models.classifier.identity.sha256


def test_the_packaged_models_bring_their_answers(tmp_path: Path) -> None:
    """The wheel holds what pyproject.toml names: the answers stand beside the manifest."""
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    manifest = load_manifest(SHIPPED)
    for name in (*answers_names(manifest), *(entry.file for entry in manifest.entries)):
        assert f'"models/{name}" = "agent/_packaged/models/{name}"' in text
    packaged = re.findall(r'^"(models/[^"]+)" = ', text, re.MULTILINE)
    assert [name for name in packaged if not (SHIPPED.parent / name).is_file()] == []
    shutil.copyfile(SHIPPED / ANSWERS_NAME, tmp_path / ANSWERS_NAME)
    assert read_answers(tmp_path) == read_answers(SHIPPED)
    assert all(np.asarray(pixels).shape == (360, 480, 3) for pixels in read_fields().values())
