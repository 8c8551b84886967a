"""What thresholds are chosen by, where it can be told without the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from agent.config import ModelsSection
from agent.inference.models import open_models
from models import choose_thresholds
from models.choose_thresholds import contradicted_share
from models.common.labels import DETECTOR_CLASSES, CellImage, read_complete_fields
from models.common.manifests import change_entry


def test_how_often_a_detectors_class_contradicts_the_name_is_never_told_as_never() -> None:
    seen = [("platelet", 0)] * 10 + [("platelet", 2)] * 90 + [("platelet", None)] * 5 + [("monocyte", 0)] * 700
    assert contradicted_share(seen, 0, ("monocyte", "lymphocyte")) == pytest.approx(11 / 102, abs=1e-4)
    assert contradicted_share(seen, 2, ("platelet",)) == pytest.approx(1 / 702, abs=1e-4)


def test_what_the_middle_cells_are_seen_as_is_counted_on_the_pictures(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two platelets and a lymphocyte, each seen as what it is."""
    white, platelet = DETECTOR_CLASSES.index("WBC"), DETECTOR_CLASSES.index("platelet")
    pictures = {"a": ("platelet", platelet), "b": ("platelet", platelet), "c": ("lymphocyte", white)}
    cells = [CellImage(key, Path(key), name, "val") for key, (name, _) in pictures.items()]
    rows = {key: np.array([[seen, 0.9, 10, 10, 50, 50]], np.float32) for key, (_, seen) in pictures.items()}
    read = iter(rows.values())
    monkeypatch.setattr(
        choose_thresholds, "read_complete_fields", lambda data, _split: read_complete_fields(data, "test")
    )
    monkeypatch.setattr(choose_thresholds, "read_cells", lambda *_: cells)
    monkeypatch.setattr(choose_thresholds, "decode_file", lambda *_: np.zeros((60, 60, 3), np.uint8))
    monkeypatch.setattr(choose_thresholds, "found_boxes", lambda *_: next(read))
    chosen = choose_thresholds.choose_detector(open_models(ModelsSection()), data)
    assert chosen["contradicted"] == {"WBC": 0.25, "platelet": pytest.approx(1 / 3, abs=1e-4)}


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
