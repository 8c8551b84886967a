"""Splits at random as the study draws them, and the labels that BCCD's authors published."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from models.common.labels import (
    CellImage,
    FieldImage,
    mistakes,
    put_right,
    read_cells,
    read_fields,
    read_label_file,
    read_published_boxes,
    split_at_random,
)


def cells(**counts: int) -> list[CellImage]:
    return [CellImage(f"{name}/{k}", Path(), name, "train") for name, count in counts.items() for k in range(count)]


def test_a_random_split_shares_out_each_class() -> None:
    drawn = split_at_random(cells(basophil=200, platelet=50), seed=3)
    assert Counter((cell.class_name, cell.split) for cell in drawn) == {
        ("basophil", "train"): 140, ("basophil", "val"): 20, ("basophil", "test"): 40,
        ("platelet", "train"): 35, ("platelet", "val"): 5, ("platelet", "test"): 10,
    }  # fmt: skip


def test_a_random_split_follows_its_seed_and_keeps_the_order() -> None:
    found = cells(basophil=40, platelet=30)
    first, again, other = (split_at_random(found, seed) for seed in (1, 1, 2))
    assert first == again
    assert [cell.split for cell in first] != [cell.split for cell in other]
    assert [cell.key for cell in first] == [cell.key for cell in found]


def test_the_parts_of_a_random_split_are_all_cells_once(data: Path) -> None:
    parts = [cell.key for split in ("train", "val", "test") for cell in read_cells(data, split, random_seed=5)]
    assert sorted(parts) == sorted(cell.key for cell in read_cells(data, "test"))


def test_published_boxes_are_read_from_their_own_folder(tmp_path: Path) -> None:
    (tmp_path / "bccd-original-labels").mkdir()
    (tmp_path / "bccd-original-labels" / "a.txt").write_text("2 0.5 0.25 0.2 0.1\n\n")
    field = FieldImage(tmp_path / "fields" / "images" / "a.jpg", "bccd", "test", is_complete=True)
    boxes = read_published_boxes(field, 100, 200)
    assert boxes.tolist() == [pytest.approx([2, 40, 40, 60, 60])]


def test_a_red_cell_that_a_label_file_calls_nucleated_is_put_right_and_nothing_else() -> None:
    boxes = np.array([[0, 10.4, 20.3, 60.2, 70], [0, 100, 20, 150, 70], [1, 10, 20, 60, 70]], np.float32)
    righted = put_right(boxes, np.array([[10, 20, 60, 70]], np.float32))
    assert righted[:, 0].tolist() == [1, 0, 1]
    assert righted[:, 1:].tolist() == boxes[:, 1:].tolist()
    assert boxes[0, 0] == 0
    assert put_right(boxes, None) is boxes


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_mistake_that_we_saw_is_found_in_its_label_file(real_data: Path, split: str) -> None:
    wrong = mistakes(real_data, split)
    sizes = {field.path: field for field in read_fields(real_data, split)}
    changed = 0
    for path, boxes in wrong.items():
        size = 575 if sizes[path].source == "raabin" else 640
        labelled = read_label_file(path.parents[1] / "labels" / f"{path.stem}.txt", size, 480 if size == 640 else 575)
        changed += int((put_right(labelled, boxes)[:, 0] != labelled[:, 0]).sum())
    assert changed == sum(len(boxes) for boxes in wrong.values()) > 0
