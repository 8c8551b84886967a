"""`python -m models.evaluate` as a researcher runs it, on a small data folder made from the simulated slide."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.bench import make_bench
from agent.camera.simulated import render_training_crop
from agent.config import Config, ModelsSection
from agent.domain import Box
from agent.inference.models import open_models
from models.common.labels import FieldImage, read_boxes, read_cells, read_fields, read_foreign_cells
from models.common.metrics import FieldBoxes, box_overlaps, detection_figures
from models.evaluation import boxes, names
from models.evaluation.boxes import boxes_of_middle, boxes_of_sheet, named_boxes, published_pairs
from models.evaluation.no_cells import KINDS, moved_aside, unions
from models.robustness import LOOKS, STEPS, lamp, look_at, measure_one

TOP = Path(__file__).parents[2]
CLASSES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")


def evaluate(what: str, data: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "models.evaluate", what, "--split", "test", "--data", str(data), "--json"]
    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def test_the_detectors_figures_keep_complete_and_half_labelled_fields_apart(data: Path) -> None:
    figures = evaluate("detector", data)
    assert figures["fields"] == {"complete": 3, "complete, made": 3, "rbc-incomplete": 1}
    assert figures["groups"]["complete"] == figures["groups"]["complete, made"]
    assert 0.5 < figures["groups"]["complete"]["all"]["map50"] <= 1
    assert figures["groups"]["complete"]["all"]["map50_95"] <= figures["groups"]["complete"]["all"]["map50"]


def test_labels_that_are_put_right_have_a_row_of_their_own(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    field = next(field for field in read_fields(data, "test") if field.is_complete)
    labelled = read_boxes(field, 480, 360)
    (wrong, *_) = labelled[labelled[:, 0] == 0, 1:]
    monkeypatch.setattr(boxes, "mistakes", lambda *_: {field.path: wrong[None]})
    groups = boxes.evaluate_detector(open_models(ModelsSection()), data, "test")["groups"]
    before, after = groups["complete"], groups["complete, labels put right"]
    assert after["WBC"]["cells"] == before["WBC"]["cells"] - 1
    assert after["RBC"]["cells"] == before["RBC"]["cells"] + 1


def test_the_classifiers_figures_count_every_picture_once(data: Path) -> None:
    figures = evaluate("classifier", data)
    assert figures["n"] == 16
    assert set(figures["classes"]) == set(CLASSES)
    right = sum(figures["confusion"][k][k] for k in range(8))
    assert figures["accuracy"] == pytest.approx(right / 16)
    assert right >= 8
    assert 0 <= figures["calibration_error"]["after"] <= 1
    assert figures["accuracy_at_coverage"]["1"] == pytest.approx(figures["accuracy"])
    assert figures["morphology"] is None or figures["morphology"]["n"] == 2


def test_what_is_no_cell_is_told_by_kind(data: Path) -> None:
    figures = evaluate("no-cell", data)
    kinds = figures["kinds"]
    assert set(kinds) <= set(KINDS)
    assert {"cell", "red cell", "background", "ruined cell", "smeared cell"} <= set(kinds)
    assert kinds["cell"]["n"] == kinds["ruined cell"]["n"] == kinds["smeared cell"]["n"] > 0
    assert kinds["cell"]["named"] >= 0.5
    for kind in ("red cell", "background", "ruined cell"):
        assert kinds[kind]["named"] <= 0.2
        assert kinds[kind]["auroc"] >= 0.9
    assert kinds["cell"]["auroc"] is None
    for taken in figures["in_fields"].values():
        assert taken["n"] > 0
        assert 0 <= taken["named"] <= taken["boxed"] <= 1


def test_a_pair_of_red_cells_is_what_lies_around_two_that_overlap() -> None:
    red = np.array([(0, 0, 40, 40), (30, 10, 70, 50), (200, 200, 240, 240)], np.float32)
    assert unions(red).tolist() == [[0, 0, 70, 50]]
    assert unions(red[:0]).shape == (0, 4)


def test_a_cut_cell_reaches_into_its_box_by_a_quarter() -> None:
    cell = np.array((100, 200, 140, 280), np.float32)
    places = {tuple(moved_aside(cell, np.random.default_rng(seed)).tolist()) for seed in range(20)}
    assert places == {(130, 200, 170, 280), (70, 200, 110, 280), (100, 260, 140, 340), (100, 140, 140, 220)}


def write_field(data: Path, class_name: str, boxes: Sequence[tuple[int, Box]], pixels: np.ndarray) -> None:
    """One PBC field whose middle cell has this class, in the layout of the labelled data."""
    height, width = pixels.shape[:2]
    for name in ("fields/images", "fields/labels"):
        (data / name).mkdir(parents=True)
    cv2.imwrite(str(data / "fields/images/X_1.png"), pixels)
    lines = []
    for label, box in boxes:
        (x, y), size = box.centre_px, (box.width_px, box.height_px)
        lines.append(f"{label} {x / width} {y / height} {size[0] / width} {size[1] / height}")
    (data / "fields/labels/X_1.txt").write_text("\n".join(lines))
    (data / "fields.csv").write_text("path,source,split,labels\nfields/images/X_1.png,pbc,test,complete\n")
    (data / "pbc.csv").write_text(f"path,class,split,prefix\npbc/{class_name}/X_1.png,{class_name},test,X\n")


def test_boxes_of_eight_classes_count_when_place_and_name_are_right(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    pixels = np.full((300, 300, 3), 225, np.uint8)
    cell = render_training_crop(rng, "lymphocyte", 110)
    pixels[95:205, 95:205] = cell
    models = open_models(ModelsSection())
    detections = models.detector.detect(pixels, 0.3)
    (found,) = [d for d in detections if d.class_name == "WBC" and 120 < d.box.centre_px[0] < 180]
    named = models.classifier.classify(models.cutter(pixels, detections).around(found.box)).class_name
    other = next(name for name in CLASSES if name != named)
    for truth, expected in ((named, 1.0), (other, 0.0)):
        write_field(tmp_path / truth, truth, [(0, found.box)], pixels)
        group = evaluate("eight-classes", tmp_path / truth)["groups"]["pbc"]
        assert set(group) == {truth, "all"}
        assert group[truth]["map50"] == pytest.approx(expected)


def test_a_nucleated_cell_of_unknown_class_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    pixels = np.full((300, 600, 3), 225, np.uint8)
    rng = np.random.default_rng(4)
    for left in (245, 445):
        pixels[95:205, left : left + 110] = render_training_crop(rng, "lymphocyte", 110)
    models = open_models(ModelsSection())
    detections = models.detector.detect(pixels, 0.3)
    nucleated = [d for d in detections if d.class_name == "WBC"]
    middle = min(nucleated, key=lambda d: abs(d.box.centre_px[0] - 300))
    away = max(nucleated, key=lambda d: abs(d.box.centre_px[0] - 300))
    named = models.classifier.classify(models.cutter(pixels, detections).around(middle.box)).class_name
    write_field(tmp_path, named, [(0, middle.box), (0, away.box)], pixels)
    (field,) = read_fields(tmp_path, "test")
    answer = named_boxes(models, field, named)
    assert len(answer.true) == 1
    assert (
        box_overlaps(
            answer.found[:, 2:], np.array([[away.box.x_min, away.box.y_min, away.box.x_max, away.box.y_max]])
        ).max()
        < 0.3
    )


def test_the_platelets_of_fields_are_judged_under_a_source_of_their_own(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "read_foreign_cells", lambda *_: [])
    cells = names.cells_of_fields(data, "test")
    labelled = sum((read_boxes(field, 480, 360)[:, 0] == 2).sum() for field in read_fields(data, "test"))
    assert len(cells) == labelled > 0
    assert {(cell.source, cell.class_name) for cell in cells} == {("made, platelets", "platelet")}
    figures = names.evaluate_microscopes(open_models(ModelsSection()), data, "test")["sources"]
    assert figures["made, platelets"]["n"] == labelled


def test_fields_side_by_side_carry_their_boxes_along(data: Path) -> None:
    models = open_models(ModelsSection())
    field = read_fields(data, "test")[1]
    single = read_boxes(field, 480, 360)
    sheet = boxes_of_sheet(models, [field] * 4, 2)
    assert len(sheet.true) == 4 * len(single)
    assert sheet.true[-len(single) :, 1:] - single[:, 1:] == pytest.approx(np.array([480, 360] * 2) + 0 * single[:, 1:])
    overlaps = box_overlaps(sheet.true[:, 1:], sheet.found[sheet.found[:, 1] > 0.3, 2:])
    assert (overlaps.max(1) > 0.5).mean() > 0.7


def test_the_middle_of_a_field_keeps_the_boxes_that_lie_there(data: Path) -> None:
    models = open_models(ModelsSection())
    field = read_fields(data, "test")[1]
    whole = boxes_of_middle(models, cv2.imread(str(field.path)), field, 1.0)
    middle = boxes_of_middle(models, cv2.imread(str(field.path)), field, 0.5)
    assert 0 < len(middle.true) < len(whole.true)
    assert middle.true[:, 1:].min() >= 0
    assert (middle.true[:, 3:].max(0) <= (240, 180)).all()
    assert set(evaluate("close-ups", data)["fields"]) == {"made, 0.4 of each side", "made, 0.6 of each side"}


def test_a_random_split_takes_its_share_and_goes_with_the_classifier_alone(data: Path) -> None:
    command = [sys.executable, "-m", "models.evaluate", "classifier", "--split", "train", "--data", str(data), "--json"]
    done = subprocess.run([*command, "--random-split", "4"], cwd=TOP, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["n"] == len(CLASSES)  # one of two pictures each
    command[3] = "detector"
    refused = subprocess.run([*command, "--random-split", "4"], cwd=TOP, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "classifier" in refused.stderr


def test_published_labels_stand_beside_what_a_perfect_answer_reaches_there(tmp_path: Path) -> None:
    for name in ("fields/images", "fields/labels", "bccd-original-labels"):
        (tmp_path / name).mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "fields/images/a.png"), np.full((100, 100, 3), 220, np.uint8))
    (tmp_path / "bccd-original-labels/a.txt").write_text("1 0.3 0.3 0.2 0.2\n")  # one of the two red cells
    field = FieldImage(tmp_path / "fields/images/a.png", "bccd", "test", is_complete=True)
    true = np.array([[1, 20, 20, 40, 40], [1, 60, 60, 80, 80]], np.float32)
    nothing = FieldBoxes(np.zeros((0, 6), np.float32), true)
    pairs = published_pairs({field: nothing})
    figures = {name: detection_figures(found, ("WBC", "RBC", "platelet"))["RBC"] for name, found in pairs.items()}
    assert [(f.cells, f.recall) for f in figures.values()] == [(1, 0), (1, 1)]
    assert list(figures.values())[1].precision == 0.5


def test_a_picture_as_it_is_without_any_step_has_the_figures_of_the_other_evaluations(data: Path) -> None:
    bench = make_bench(Config(), open_models(ModelsSection()))
    fields, cells = [f for f in read_fields(data, "test") if f.is_complete], read_cells(data, "test")
    bench = replace(bench, preprocessing=STEPS["none"])
    plain = measure_one(bench, look_at(LOOKS["as it is"], fields, cells, []))
    assert plain["detector"] == pytest.approx(evaluate("detector", data)["groups"]["complete"]["all"]["map50"])
    assert plain["agent"] == pytest.approx(evaluate("two-stage", data)["accuracy"])
    assert plain["agent"] <= plain["classifier"]
    night = measure_one(bench, look_at(lamp(0.01, 0.01, 0.01), fields, cells, []))
    assert (night["agent"], night["detector"]) == (0, 0)


@pytest.mark.parametrize("look", LOOKS)
def test_every_look_changes_a_picture_and_spares_its_size(look: str) -> None:
    pixels = np.random.default_rng(2).integers(60, 200, (240, 320, 3)).astype(np.uint8)
    before = pixels.copy()
    changed = LOOKS[look](pixels, np.random.default_rng(1))
    assert (changed.shape, changed.dtype) == (pixels.shape, np.uint8)
    assert np.array_equal(changed, before) == (look == "as it is")
    assert np.array_equal(pixels, before)


def test_each_cell_that_we_named_by_eye_lies_in_its_field(real_data: Path) -> None:
    for cell in read_foreign_cells(real_data):
        picture = cv2.imread(str(cell.path))
        x_min, y_min, x_max, y_max = cell.box
        assert picture is not None, cell.path
        assert 0 <= x_min < x_max <= picture.shape[1] + 0.1
        assert 0 <= y_min < y_max <= picture.shape[0] + 0.1
        assert cell.class_name is None or cell.class_name in CLASSES


def test_a_cell_that_the_detector_misses_is_wrong_in_two_stages(data: Path, tmp_path: Path) -> None:
    figures = evaluate("two-stage", data)
    assert figures["missed"] + figures["unidentified"] < 12
    assert set(figures["fields_unidentified"]) == {"made"}
    empty = tmp_path / "empty"
    (empty / "pbc").mkdir(parents=True)
    cv2.imwrite(str(empty / "pbc/blank.png"), np.full((160, 160, 3), 230, np.uint8))
    (empty / "fields.csv").write_text("path,source,split,labels\n")
    (empty / "pbc.csv").write_text("path,class,split,prefix\npbc/blank.png,monocyte,test,X\n")
    nothing = evaluate("two-stage", empty)
    assert (nothing["missed"], nothing["accuracy"]) == (1, 0)
