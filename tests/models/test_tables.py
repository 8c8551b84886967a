"""The tables of the model cards come from measured figures alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.common.programs import Unfit
from models.tables import draw_classifiers, fill, main

TOP = Path(__file__).parents[2]
OF_THE_DETECTOR = ("detector", "large-frames", "close-ups")
"""Evaluations that ask no classifier."""

KINDS = {
    "kinds": {"red cell": {"n": 312, "named": 0.25, "auroc": 0.98894}},
    "in_fields": {"dirt": {"n": 75, "boxed": 0.1, "named": 0.04}},
}
CARD = "Text.\n\n<!-- figures: no-cell -->\n\nold\n\n<!-- end of figures -->\n\nMore.\n"


def test_a_card_gets_the_tables_between_its_marks_and_keeps_its_text(tmp_path: Path) -> None:
    (tmp_path / "no-cell.json").write_text(json.dumps(KINDS))
    card = tmp_path / "MODEL_CARD.md"
    card.write_text(CARD)
    subprocess.run([sys.executable, "-m", "models.tables", str(tmp_path), str(card)], cwd=TOP, check=True)
    lines = card.read_text().splitlines()
    assert "| red cell | 312 | 0.250 | 0.9889 |" in lines
    assert "| dirt | 75 | 0.100 | 0.040 |" in lines
    assert "old" not in lines
    assert (lines[0], lines[-1]) == ("Text.", "More.")
    again = fill(card.read_text(), {"no-cell": "new\n\n"})
    assert "| red cell | 312 | 0.250 | 0.9889 |" not in again
    assert again.count("<!-- end of figures -->") == 1


def test_what_was_not_measured_keeps_its_old_tables() -> None:
    assert fill(CARD, {"detector": "new"}) == CARD


def test_the_shipped_cards_have_a_place_for_each_evaluation() -> None:
    texts = [(TOP / f"models/{role}/MODEL_CARD.md").read_text() for role in ("detector", "classifier")]
    for what in ("detector", "classifier", "classifiers", "two-stage", "microscopes", "no-cell"):
        assert sum(f"<!-- figures: {what} -->" in text for text in texts) == 1, what


def test_the_cards_and_the_readme_say_what_was_measured_with_the_shipped_files(tmp_path: Path) -> None:
    figures = {file.stem: json.loads(file.read_text()) for file in (TOP / "models/figures").glob("*.json")}
    manifest = json.loads((TOP / "models/manifest.json").read_text())
    classifiers = {entry["name"]: entry for entry in (manifest["classifier"], *manifest["other_classifiers"])}
    int8 = {stem: found for stem, found in figures.items() if not stem.startswith("float-")}
    assert len(int8) >= 9 + 2 * (len(classifiers) - 1)
    for stem, found in int8.items():
        assert found["sha256"]["detector"] == manifest["detector"]["sha256"], stem
        if found["what"] not in OF_THE_DETECTOR:
            assert found["sha256"]["classifier"] == classifiers[found["names"]["classifier"]]["sha256"], stem
        assert found["split"] == "test", stem
    for role in ("detector", "classifier"):
        card = tmp_path / f"{role}.md"
        shutil.copy(TOP / f"models/{role}/MODEL_CARD.md", card)
        subprocess.run([sys.executable, "-m", "models.tables", "models/figures", str(card)], cwd=TOP, check=True)
        assert card.read_text() == (TOP / f"models/{role}/MODEL_CARD.md").read_text()
    readme = (TOP / "models/README.md").read_text()
    for named in ("classifier", *(f"classifier-{name}" for name in list(classifiers)[1:])):
        assert f"{figures[named]['accuracy']:.4f}".lstrip("0") in readme, named


def test_each_classifier_that_was_measured_has_a_line(tmp_path: Path) -> None:
    measured = {"macro_f1": 0.9, "accuracy_at_coverage": {"0.95": 0.99}, "calibration_error": {"after": 0.01}}
    for name, accuracy in (("first", 0.98), ("second", 0.96)):
        suffix = "" if name == "first" else f"-{name}"
        figures = {"names": {"classifier": name}, "accuracy": accuracy, **measured}
        (tmp_path / f"classifier{suffix}.json").write_text(json.dumps(figures))
    (tmp_path / "float-classifier-second.json").write_text(json.dumps({"accuracy": 0.965}))
    (tmp_path / "microscopes-second.json").write_text(json.dumps({"sources": {"raabin": {"accuracy": 0.75}}}))
    first, second = draw_classifiers(tmp_path).splitlines()[2:4]
    assert first == "| first | 0.9800 | - | 0.9000 | 0.9900 | 0.0100 | - | - | - |"
    assert second == "| second | 0.9600 | 0.9650 | 0.9000 | 0.9900 | 0.0100 | - | - | 0.7500 |"


def test_figures_that_are_not_whole_are_told_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models.evaluate ... > detector.json` that ended early leaves such a file; the card stays as it is."""
    (tmp_path / "detector.json").touch()
    card = tmp_path / "CARD.md"
    card.write_text("<!-- figures: detector -->\n\nold\n<!-- end of figures -->")
    monkeypatch.setattr("sys.argv", ["tables", str(tmp_path), str(card)])
    with pytest.raises(Unfit, match=r"detector\.json: not what `models\.evaluate --json` prints .*measure it again"):
        main()
    assert "old" in card.read_text()
