"""Which fields a recipe lets the detector learn from, and be chosen and calibrated by."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

import shutil
import sys
from pathlib import Path

import cv2
import numpy as np

from agent.config import ModelsSection
from agent.inference.golden import read_fields
from agent.inference.models import open_models
from models.common.labels import SOURCES
from models.detector import export
from models.detector.export import calibration
from models.detector.train import read_run, training_fields

pytestmark = pytest.mark.train

RECIPES = Path("models/detector/recipes")


@pytest.mark.parametrize("file", sorted(RECIPES.rglob("*.yaml")), ids=lambda file: file.stem)
def test_each_recipe_that_we_keep_can_be_read(file: Path) -> None:
    assert read_run(file).batch


@pytest.mark.parametrize("source", SOURCES)
def test_a_detector_that_never_saw_a_source_is_as_long_taught_as_the_one_that_saw_all(source: str) -> None:
    left_out, every = (
        read_run(RECIPES / "unseen" / f"detector-{name}.yaml") for name in (f"without-{source}", "with-all")
    )
    assert set(left_out.sources) == set(SOURCES) - {source}
    assert set(every.sources) == set(SOURCES)
    assert (left_out.epochs, left_out.steps, left_out.batch) == (every.epochs, every.steps, every.batch)
    assert left_out.init is None  # what it began with might know the source
    assert left_out.pictures is None  # those are PBC's


GREY_OF = {"bccd": 40, "pbc": 120, "raabin": 200}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A field of each source, of a grey of its own, with one cell."""
    rows = ["path,source,split,labels"]
    for source, grey in GREY_OF.items():
        picture = tmp_path / "images" / f"{source}.png"
        labels = tmp_path / "labels" / f"{source}.txt"
        for file in (picture, labels):
            file.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(picture), np.full((64, 64, 3), grey, np.uint8))
        labels.write_text("0 0.5 0.5 0.4 0.4\n")
        rows.append(f"images/{source}.png,{source},train,complete")
    (tmp_path / "fields.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_fresh_export_gives_each_cell_one_box_before_thresholds_are_chosen(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file holds the one-to-many head: unmerged each cell has many boxes, and nothing can be labelled with them."""
    folder = tmp_path / "models"
    shutil.copytree("models", folder, ignore=shutil.ignore_patterns("*.py", "recipes", "__pycache__"))
    (data / "pbc.csv").write_text("path,class,split\na.png,neutrophil,train\nb.png,platelet,train\n")
    monkeypatch.setattr(sys, "argv", ["export", "--data", str(data), "--version", "9", "--command", "none"])
    export.write_entry(folder, export.parse())
    shipped, exported = (open_models(ModelsSection(folder=place, most_tiles=1)) for place in (Path("models"), folder))
    thresholds = exported.manifest.detector.thresholds
    assert exported.manifest.detector.version == "9"
    assert thresholds.same_cell_iou is not None
    for pixels in read_fields().values():
        wanted, found = (len(models.detector.detect(pixels)) for models in (shipped, exported))
        assert found == pytest.approx(wanted, abs=1 + wanted // 4)


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_left_out_is_neither_learnt_from_nor_calibrated_with(source: str, data: Path) -> None:
    others = tuple(s for s in SOURCES if s != source)
    assert {int(field.pixels[0, 0, 0]) for field in training_fields(data, others)} == {GREY_OF[s] for s in others}
    plain = list(calibration(data, 4, 64, others))[:2]
    assert {round(float(picture.max() * 255)) for picture in plain} == {GREY_OF[s] for s in others}
