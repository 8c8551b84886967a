"""What the manifest promises is checked before a model runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from agent.config import ModelsSection, models_folder
from agent.errors import ModelError
from agent.inference.manifest import ClassifierEntry, load_manifest, read_model_file
from agent.inference.models import open_models

SHIPPED = models_folder(ModelsSection())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped models that a test may spoil."""
    manifest = load_manifest(SHIPPED)
    for name in ("manifest.json", manifest.detector.file, manifest.classifier.file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(SHIPPED / name, tmp_path / name)
    return tmp_path


def edit_manifest(folder: Path, role: str, **changes: object) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[role].update(changes)
    path.write_text(json.dumps(manifest))


def test_shipped_files_match_their_manifest_and_run() -> None:
    models = open_models(ModelsSection())
    assert models.runtime.split()[0] in ("ai-edge-litert", "tflite-runtime")
    assert models.delegate in ("xnnpack", "none", "unknown")
    assert len(models.manifest.classifier.classes) == 8


def test_how_the_shipped_files_were_made_names_no_place_of_one_machine() -> None:
    manifest = load_manifest(SHIPPED)
    for entry in manifest.entries:
        assert entry.command.startswith("python -m models.")
        assert " /" not in entry.command
        assert "=/" not in entry.command


@pytest.mark.parametrize("classifier", load_manifest(SHIPPED).classifiers, ids=lambda entry: entry.name)
def test_a_shipped_classifier_tells_names_and_looks_in_fine_steps(classifier: ClassifierEntry) -> None:
    """Pictures of glass once took nearly all of the steps: names lost a little by it, looks much."""
    steps = {output.kind: output.scale for output in classifier.outputs}
    assert steps["class_logits"] < 0.1
    assert steps["attribute_logits"] < 0.2


def test_shipped_detector_is_int8_throughout_with_a_scale_for_each_map() -> None:
    detector = load_manifest(SHIPPED).detector
    assert {output.dtype for output in detector.outputs} == {"int8"}
    assert detector.input.dtype == "int8"
    scores = [output for output in detector.outputs if output.kind == "class_scores"]
    boxes = [output for output in detector.outputs if output.kind == "box_distances"]
    assert len(scores) == len(boxes) == 3
    assert not {output.name for output in scores} & {output.name for output in boxes}
    # A logit step below 0.25 keeps scores apart in steps of at most 6 %: one scale shared with boxes would not.
    assert all(0 < output.scale < 0.25 for output in scores)


def test_one_flipped_byte_refuses_the_file(folder: Path) -> None:
    entry = load_manifest(folder).detector
    content = bytearray((folder / entry.file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / entry.file).write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256"):
        read_model_file(folder, entry)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    entry = load_manifest(folder).classifier
    (folder / entry.file).write_bytes((folder / entry.file).read_bytes()[:-1000])
    with pytest.raises(ModelError, match="truncated"):
        open_models(ModelsSection(folder=folder))


def test_swapped_files_are_refused(folder: Path) -> None:
    manifest = load_manifest(folder)
    shutil.copyfile(folder / manifest.classifier.file, folder / manifest.detector.file)
    with pytest.raises(ModelError, match=manifest.detector.file):
        open_models(ModelsSection(folder=folder))


def test_a_missing_file_says_which(folder: Path) -> None:
    (folder / load_manifest(folder).detector.file).unlink()
    with pytest.raises(ModelError, match=r"detector/.*cannot be read"):
        open_models(ModelsSection(folder=folder))


def add_classifier(folder: Path, **changes: object) -> None:
    """Beside the first one of the same file, under another name."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["other_classifiers"] = [{**manifest["classifier"], "name": "another", **changes}]
    path.write_text(json.dumps(manifest))


def test_the_configuration_names_the_classifier_that_is_used(folder: Path) -> None:
    add_classifier(folder, version="7.7")
    first = load_manifest(folder).classifier
    assert open_models(ModelsSection(folder=folder)).classifier.identity.name == first.name
    assert open_models(ModelsSection(folder=folder, classifier=first.name)).answers_name == "golden.json"
    models = open_models(ModelsSection(folder=folder, classifier="another"))
    assert models.classifier.identity.version == models.manifest.classifier.version == "7.7"
    assert models.answers_name == "golden-another.json"
    assert {entry.name for entry in models.manifest.classifiers} == {first.name, "another"}


def test_a_classifier_that_is_not_there_is_told_with_those_that_are(folder: Path) -> None:
    add_classifier(folder)
    first = load_manifest(folder).classifier.name
    with pytest.raises(ModelError, match=f"no classifier resnet, but another, {first}: name one"):
        open_models(ModelsSection(folder=folder, classifier="resnet"))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"name": None}, "two classifiers of one name"),
        ({"classes": ["basophil"]}, "its last size is not the classes'"),
        (
            {"crop": {"margin": 0.2, "look": {"ground_bgr": [1, 1, 1], "told_by": ["cat"]}}},
            r"another\.crop\.look\.told_by",
        ),
        ({"name": "../another"}, "names no file"),
    ],
)
def test_another_classifier_must_fit_as_the_first_does(folder: Path, changes: dict[str, object], told: str) -> None:
    first = load_manifest(folder).classifier.name
    add_classifier(folder, **{key: first if value is None else value for key, value in changes.items()})
    with pytest.raises(ModelError, match=told):
        load_manifest(folder)


def test_a_missing_manifest_says_where(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"manifest\.json: there is no model manifest"):
        open_models(ModelsSection(folder=tmp_path))


def test_a_broken_manifest_says_the_line(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"manifest": 1,\n oops')
    with pytest.raises(ModelError, match="line 2"):
        load_manifest(folder)


def test_an_unknown_key_in_the_manifest_is_refused(folder: Path) -> None:
    edit_manifest(folder, "detector", surprise=1)
    with pytest.raises(ModelError, match=r"detector\.surprise"):
        load_manifest(folder)


def test_tensors_that_differ_from_the_manifest_are_refused(folder: Path) -> None:
    entry = json.loads((folder / "manifest.json").read_text())["classifier"]
    entry["outputs"][0]["scale"] *= 2
    edit_manifest(folder, "classifier", outputs=entry["outputs"])
    with pytest.raises(ModelError, match="scale"):
        open_models(ModelsSection(folder=folder))


def test_a_file_that_is_no_model_is_refused_in_words(folder: Path) -> None:
    import hashlib

    entry = load_manifest(folder).classifier
    (folder / entry.file).write_bytes(b"not a model" * 100)
    edit_manifest(folder, "classifier", sha256=hashlib.sha256(b"not a model" * 100).hexdigest())
    with pytest.raises(ModelError, match="cannot run this model"):
        open_models(ModelsSection(folder=folder))


def test_tflite_runtime_is_refused_beside_numpy_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numpy.__version__", "2.0.1")
    with pytest.raises(ModelError, match=r"found numpy 2\.0\.1"):
        open_models(ModelsSection(runtime="tflite-runtime"))


def test_a_runtime_that_is_not_installed_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.inference.interpreter.RUNTIMES", (("ai-edge-litert", "no_such_module"),))
    with pytest.raises(ModelError, match="pip install"):
        open_models(ModelsSection(runtime="ai-edge-litert"))


@pytest.mark.parametrize(
    ("role", "changes", "fault"),
    [
        ("classifier", {"classes": ["a", "b", "c", "d", "e", "f", "g"]}, "last size is not the classes"),
        ("detector", {"classes": ["WBC", "RBC"], "classified": ["WBC"]}, "last size is not the classes"),
        ("detector", {"classified": ["wbc"]}, "detector.classified: unknown class"),
        ("detector", {"agreeing": {"WBC": ["monocite"]}}, "unknown class"),
        ("detector", {"largest_in_red_cells": {"thrombocyte": 1.5}}, "unknown class"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    folder: Path, role: str, changes: dict[str, object], fault: str
) -> None:
    edit_manifest(folder, role, **changes)
    with pytest.raises(ModelError, match=fault):
        load_manifest(folder)


def test_a_wrong_stride_is_refused(folder: Path) -> None:
    outputs = json.loads((folder / "manifest.json").read_text())["detector"]["outputs"]
    for output in outputs:
        output["stride_px"] *= 2
    edit_manifest(folder, "detector", outputs=outputs)
    with pytest.raises(ModelError, match="rows times stride_px"):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("role", "shape", "told"),
    [
        ("detector", [], "detector.outputs.0.shape"),
        ("detector", [1, 52], "must be 1, rows, columns, values"),
        ("detector", [1, 0, 52, 64], "detector.outputs.0.shape.1"),
        ("classifier", [], "classifier.outputs.0.shape"),
    ],
)
def test_an_output_without_the_sizes_it_needs_is_refused(folder: Path, role: str, shape: list[int], told: str) -> None:
    """Found by `tests.proofs.fuzz --seed 11`: an empty shape ended the start in an IndexError."""
    outputs = json.loads((folder / "manifest.json").read_text())[role]["outputs"]
    outputs[0]["shape"] = shape
    edit_manifest(folder, role, outputs=outputs)
    with pytest.raises(ModelError, match=told):
        load_manifest(folder)


@pytest.mark.parametrize("role", ["detector", "classifier"])
def test_the_colour_order_of_the_manifest_is_what_the_model_gets(folder: Path, role: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (416, 416, 3), np.uint8)
    entry = json.loads((folder / "manifest.json").read_text())[role]["input"]

    def stored(colour_order: str) -> np.ndarray:
        edit_manifest(folder, role, input={**entry, "colour_order": colour_order})
        models = open_models(ModelsSection(folder=folder))
        model = getattr(models, role)
        given: list[np.ndarray] = []
        run = model._interpreter.run
        model._interpreter.run = lambda values: (given.append(values.copy()), run(values))
        models.detector.detect(pixels) if role == "detector" else models.classifier.classify(pixels)
        return given[0]

    blue_first, red_first = stored("BGR"), stored("RGB")
    assert np.array_equal(blue_first, red_first[..., ::-1])
    # What is stored is the level with its top bit flipped; 416 px is the detector's own size.
    sized = cv2.resize(pixels, blue_first.shape[2:0:-1], interpolation=cv2.INTER_AREA)
    assert np.array_equal(blue_first[0], (sized ^ 0x80).view(np.int8))


@pytest.mark.parametrize("classifier", load_manifest(SHIPPED).classifiers, ids=lambda entry: entry.name)
def test_the_shipped_confusion_was_measured_on_the_shipped_classifier(classifier: ClassifierEntry) -> None:
    assert classifier.own_confusion is not None
    assert set(classifier.own_confusion.counts) == set(classifier.classes)


def test_a_confusion_of_another_file_is_not_used(folder: Path) -> None:
    edit_manifest(folder, "classifier", sha256="0" * 64)
    assert load_manifest(folder).classifier.own_confusion is None


def test_kinds_are_given_to_classes_that_are_counted_only(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cell_kinds"]["WBC"] = "leukocyte"  # goes on to the classifier, which names it
    path.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="cell_kinds: a class that is never counted"):
        load_manifest(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"manifest": ' + "9" * 10_000 + "}", "[]", "null", "\x00"])
def test_a_manifest_that_no_one_can_have_written_is_refused_in_words(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ModelError, match=r"manifest\.json: not "):
        load_manifest(folder)


@pytest.mark.parametrize(
    ("attributes", "phrases", "words"),
    [
        ({"nucleus_shape": ["round", "irregular"]}, [], "its values are not the output's"),
        (None, ["{tail_length} tail"], "unknown attribute tail_length"),
    ],
)
def test_a_morphology_that_does_not_fit_its_output_is_refused(
    folder: Path, attributes: dict[str, list[str]] | None, phrases: list[str], words: str
) -> None:
    shipped = json.loads((folder / "manifest.json").read_text())["classifier"]["morphology"]
    changed = {"attributes": attributes or shipped["attributes"], "phrases": phrases}
    edit_manifest(folder, "classifier", morphology=changed)
    with pytest.raises(ModelError, match=words):
        load_manifest(folder)


def test_two_outputs_of_one_kind_are_refused(folder: Path) -> None:
    outputs = json.loads((folder / "manifest.json").read_text())["classifier"]["outputs"]
    (logits,) = [output for output in outputs if output["kind"] == "class_logits"]
    edit_manifest(folder, "classifier", outputs=[logits, {**logits, "name": "again"}], morphology=None)
    with pytest.raises(ModelError, match="two of one kind"):
        load_manifest(folder)


LOOK = {"ground_bgr": [200, 226, 253], "lab": [[202, 41], [139, 9], [135, 14]]}


def test_the_stain_is_told_by_the_classes_that_the_look_names_and_the_light_by_any_picture(folder: Path) -> None:
    crop = {"margin": 0.2, "look": {**LOOK, "told_by": ["WBC"]}}
    edit_manifest(folder, "classifier", crop=crop)
    told = load_manifest(folder).classifier.crop
    whole = told.as_look()
    assert whole is not None
    assert told.look_for(["RBC", "WBC"]) == whole
    assert told.look_for(["RBC", "platelet"]) == whole.without_stain
    assert told.look_for([]) == whole.without_stain
    edit_manifest(folder, "classifier", crop={"margin": 0.2, "look": LOOK})
    assert load_manifest(folder).classifier.crop.look_for([]) == whole
    edit_manifest(folder, "classifier", crop={"margin": 0.2})
    assert load_manifest(folder).classifier.crop.look_for(["WBC"]) is None


def test_a_look_or_a_weight_of_a_class_that_the_detector_does_not_know_is_refused(folder: Path) -> None:
    edit_manifest(folder, "classifier", crop={"margin": 0.2, "look": {**LOOK, "told_by": ["leukocyte"]}})
    with pytest.raises(ModelError, match="told_by: unknown class"):
        load_manifest(folder)
    edit_manifest(folder, "classifier", crop={"margin": 0.2})
    edit_manifest(folder, "detector", contradicted={"leukocyte": 0.1})
    with pytest.raises(ModelError, match="contradicted: unknown class"):
        load_manifest(folder)
