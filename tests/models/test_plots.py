"""The pictures show the figures: read back from their axes, and written as a researcher would write them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs the train extra (matplotlib)")

from agent.config import ModelsSection
from models import plots
from models.common.metrics import FieldBoxes

pytestmark = pytest.mark.train


def test_a_bin_of_the_reliability_diagram_shows_what_was_said_and_what_was_right() -> None:
    said = np.array([0.62, 0.64, 0.97, 0.99])
    figure = plots.draw_reliability(said, np.array([True, False, True, True]))
    x, y = figure.axes[0].lines[1].get_data()
    assert x == pytest.approx([0.63, 0.98])
    assert y == pytest.approx([0.5, 1.0])
    assert [text.get_text() for text in figure.axes[0].texts] == ["2", "2"]


def test_coverage_begins_with_the_most_confident() -> None:
    figure = plots.draw_coverage(np.array([0.2, 0.9, 0.8, 0.5]), np.array([False, True, True, True]))
    x, y = figure.axes[0].lines[0].get_data()
    assert x == pytest.approx([0.25, 0.5, 0.75, 1])
    assert y == pytest.approx([0, 0, 0, 25])


def test_each_class_that_occurs_has_its_curve() -> None:
    found = np.array([[1, 0.9, 0, 0, 10, 10], [1, 0.8, 50, 50, 60, 60]], np.float32)
    true = np.array([[1, 0, 0, 10, 10], [1, 80, 80, 90, 90]], np.float32)
    (curve,) = plots.draw_precision_recall([FieldBoxes(found, true)], ("WBC", "RBC")).axes[0].lines
    assert curve.get_label() == "RBC, 2 cells"
    assert curve.get_xdata() == pytest.approx([0.5, 0.5])
    assert curve.get_ydata() == pytest.approx([1, 0.5])


def test_losses_and_figures_of_a_run_stand_apart_and_epochs_without_a_figure_leave_gaps() -> None:
    log = [{"epoch": 1, "progress": 0.5, "loss": 2.0}, {"epoch": 2, "progress": 1.0, "loss": 1.0, "val_accuracy": 0.9}]
    losses, judged = plots.draw_training(log).axes
    assert [tuple(line.get_ydata()) for line in losses.lines] == [(2.0, 1.0)]
    assert [tuple(line.get_xdata()) for line in judged.lines] == [(1.0,)]


def test_a_researcher_gets_every_picture(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "log.jsonl").write_text(json.dumps({"epoch": 1, "progress": 1.0, "loss": 1.0, "all_map50": 0.5}) + "\n")
    command = ["plots", str(tmp_path / "plots"), "--run", str(run), "--data", str(data), "--split", "test"]
    monkeypatch.setattr(sys, "argv", command)
    plots.main()
    names = {"training", "confusion", "precision-recall", "reliability", "coverage", "mistakes"}
    assert {file.stem for file in (tmp_path / "plots").iterdir()} == names
    for name in names - {"mistakes"}:
        assert cv2.imread(str(tmp_path / f"plots/{name}.png")).std() > 5


def test_the_most_confident_mistake_comes_first(data: Path) -> None:
    cells = plots.name_pictures(plots.open_models(ModelsSection()), data, "test")
    swapped = plots.NamedPictures(cells.cells, cells.answers[::-1])
    found = plots.mistakes(swapped)
    assert [m.probability for m in found] == sorted((m.probability for m in found), reverse=True)
    assert all(m.given != m.cell.class_name for m in found)
    sheet = plots.contact_sheet(found)
    assert sheet.shape == (-(-len(found) // plots.ACROSS) * (plots.TILE_PX + 26), plots.ACROSS * plots.TILE_PX, 3)


def test_a_run_without_a_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"log\.jsonl"):
        plots.read_log(tmp_path)
