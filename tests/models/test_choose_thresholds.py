"""What thresholds are chosen by, where it can be told without the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from models.choose_thresholds import change_entry, contradicted_share


def test_how_often_a_detectors_class_contradicts_the_name_is_never_told_as_never() -> None:
    seen = [("platelet", 0)] * 10 + [("platelet", 2)] * 90 + [("platelet", None)] * 5 + [("monocyte", 0)] * 700
    assert contradicted_share(seen, 0, ("monocyte", "lymphocyte")) == pytest.approx(11 / 102, abs=1e-4)
    assert contradicted_share(seen, 2, ("platelet",)) == pytest.approx(1 / 702, abs=1e-4)


def test_a_change_leaves_the_rest_of_an_entry_as_it_is(tmp_path: Path) -> None:
    entry = {"name": "yolo", "thresholds": {"min_score": 0.3, "max_cells": 9}}
    (tmp_path / "manifest.json").write_text(json.dumps({"manifest": 1, "detector": entry}))
    change_entry(tmp_path, "detector", {"thresholds": {"min_score": 0.5}, "contradicted": {"WBC": 0.1}})
    changed = json.loads((tmp_path / "manifest.json").read_text())
    assert changed["manifest"] == 1
    assert changed["detector"] == {
        "name": "yolo",
        "thresholds": {"min_score": 0.5, "max_cells": 9},
        "contradicted": {"WBC": 0.1},
    }
