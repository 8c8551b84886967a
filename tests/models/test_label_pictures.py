"""A picture's own label names its middle cell; what the detector is unsure of around it keeps the picture out."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the train extra (PyTorch)")

from agent.domain import Box, Detection
from models.common.labels import CellImage
from models.common.programs import Unfit
from models.detector.label_pictures import drawn, main, picture_boxes

pytestmark = pytest.mark.train

WBC, RBC, PLATELET = 0, 1, 2


def at(x: float, y: float, name: str, score: float, side: float = 20) -> Detection:
    return Detection(Box(x - side / 2, y - side / 2, x + side / 2, y + side / 2), name, score)


def classes(class_name: str, *detections: Detection) -> list[int] | None:
    found = picture_boxes(class_name, detections, 100, 100)
    return None if found is None else [int(row[0]) for row in found]


def test_the_middle_is_what_the_picture_says_and_not_what_the_detector_says() -> None:
    assert classes("platelet", at(50, 50, "WBC", 0.9), at(10, 10, "RBC", 0.8)) == [PLATELET, RBC]
    assert classes("erythroblast", at(52, 49, "RBC", 0.9)) == [WBC]


def test_an_unsure_box_in_the_middle_is_believed_since_a_cell_is_known_to_be_there() -> None:
    assert classes("platelet", at(50, 50, "RBC", 0.06)) == [PLATELET]


def test_the_middle_box_is_where_the_detector_put_it() -> None:
    found = picture_boxes("ig", [at(51, 48, "WBC", 0.7, side=30)], 100, 100)
    assert found is not None
    assert found[0, 1:] == pytest.approx([36, 33, 66, 63])


def test_the_middle_cell_by_another_name_is_not_a_second_cell() -> None:
    assert classes("platelet", at(50, 50, "WBC", 0.5), at(51, 50, "RBC", 0.4)) == [PLATELET]


def test_an_unsure_box_beside_it_keeps_the_picture_out() -> None:
    assert classes("ig", at(50, 50, "WBC", 0.9), at(10, 10, "platelet", 0.25)) is None


def test_what_is_less_than_unsure_is_nothing() -> None:
    assert classes("ig", at(50, 50, "WBC", 0.9), at(10, 10, "platelet", 0.1)) == [WBC]


def test_a_picture_in_whose_middle_nothing_is_found_is_not_used() -> None:
    assert classes("ig", at(10, 10, "RBC", 0.9)) is None
    assert picture_boxes("ig", [], 100, 100) is None


def test_boxes_are_float32_rows_of_five() -> None:
    found = picture_boxes("ig", [at(50, 50, "WBC", 0.9)], 100, 100)
    assert found is not None
    assert (found.dtype, found.shape) == (np.float32, (1, 5))


def cell(key: str, class_name: str) -> CellImage:
    return CellImage(key, Path(key), class_name, "train")


def test_of_each_class_as_many_pictures_are_drawn_as_asked_for_and_the_same_again() -> None:
    cells = [cell(f"{name}-{k}", name) for name in ("ig", "platelet") for k in range(20)]
    few = drawn(cells, {"ig": 3, "platelet": 3})
    more = drawn(cells, {"ig": 3, "platelet": 30})
    assert [c.class_name for c in more] == ["ig"] * 3 + ["platelet"] * 20
    assert few == more[:6]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("boxes", r"boxes: does not end in \.npz; give --output such a name"),
        ("folder.npz", "is a folder; --output takes the name of a file"),
        ("file/boxes.npz", "file; give another --output"),
    ],
)
def test_a_file_that_would_not_be_written_as_named_is_told_before_minutes_of_work(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    words = ["label_pictures", "--models", "models", "--data", "/nowhere/at/all", "--output", str(tmp_path / name)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Unfit, match=told):
        main()
