"""`python -m models.evaluate` as a researcher runs it, on a small data folder made from the simulated slide."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from models.common.labels import read_foreign_cells

TOP = Path(__file__).parents[2]
DATA = TOP.parent / "shared" / "data"
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
    kinds = evaluate("no-cell", data)["kinds"]
    assert set(kinds) == {"cell", "red cell", "background", "ruined cell"}
    assert kinds["cell"]["n"] == kinds["ruined cell"]["n"] > 0
    assert all(0 <= kind["named"] <= 1 for kind in kinds.values())
    assert kinds["cell"]["auroc"] is None


@pytest.mark.skipif(not DATA.exists(), reason=f"needs the labelled data in {DATA.name}")
def test_each_cell_that_we_named_by_eye_lies_in_its_field() -> None:
    for cell in read_foreign_cells(DATA):
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
