"""A small folder of labelled data, drawn by the simulated slide."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from agent.camera.simulated import render_training_crop, render_training_field

CLASSES = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
LABELS = {"RBC": 1, "platelet": 2}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of the labelled data: fields with YOLO labels, single cells by class, two CSV files."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    for name in ("fields/images", "fields/labels", *(f"pbc/{name}" for name in CLASSES)):
        (folder / name).mkdir(parents=True)
    rows = ["path,source,split,labels"]
    for number in range(4):
        pixels, truth = render_training_field(rng, 480, 360)
        cv2.imwrite(str(folder / f"fields/images/{number}.png"), pixels)
        lines = []
        for name, box in truth:
            x, y = box.centre_px
            shares = (x / 480, y / 360, box.width_px / 480, box.height_px / 360)
            lines.append(f"{LABELS.get(name, 0)} {' '.join(map(str, shares))}")
        (folder / f"fields/labels/{number}.txt").write_text("\n".join(lines))
        rows.append(f"fields/images/{number}.png,made,test,{'complete' if number else 'rbc-incomplete'}")
    (folder / "fields.csv").write_text("\n".join(rows))
    cells = ["path,class,split,prefix"]
    for name in CLASSES:
        for number in range(2):
            cv2.imwrite(str(folder / f"pbc/{name}/{number}.png"), render_training_crop(rng, name, 160))
            cells.append(f"pbc/{name}/{number}.png,{name},test,X")
    (folder / "pbc.csv").write_text("\n".join(cells))
    described = ["path,nucleus_shape", "pbc/neutrophil/0.png,segmented-multilobed", "pbc/monocyte/0.png,irregular"]
    (folder / "attributes.csv").write_text("\n".join(described))
    return folder


REAL_DATA = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The labelled data itself."""
    if not (REAL_DATA / "fields.csv").exists():
        pytest.skip(f"needs the labelled data in {REAL_DATA}")
    return REAL_DATA
