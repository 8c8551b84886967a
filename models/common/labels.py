"""What `../shared/data` holds, as its CSV and label files tell; needs no PyTorch.

The splits are taken as given.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]

FOREIGN_CELLS = Path(__file__).parents[1] / "data" / "foreign_cells.csv"

DETECTOR_CLASSES = ("WBC", "RBC", "platelet")  # the order of the label files


@dataclass(frozen=True, slots=True)
class CellImage:
    """One line of pbc.csv. key: its path as it stands there."""

    key: str
    path: Path
    class_name: str
    split: str


@dataclass(frozen=True, slots=True)
class NamedBox:
    """A cell of a field that we named by eye. class_name: None = it is no cell of the eight classes."""

    path: Path
    source: str
    split: str
    box: tuple[float, float, float, float]
    class_name: str | None


@dataclass(frozen=True, slots=True)
class FieldImage:
    """One line of fields.csv with its boxes: (boxes, 5) of class, x_min, y_min, x_max, y_max in pixels."""

    path: Path
    source: str
    split: str
    is_complete: bool


def read_cells(data: Path, split: str) -> list[CellImage]:
    """The labelled single-cell images of one split, in the order of the CSV file."""
    with (data / "pbc.csv").open() as lines:
        rows = [CellImage(row["path"], data / row["path"], row["class"], row["split"]) for row in csv.DictReader(lines)]
    return [row for row in rows if row.split == split]


def read_attributes(data: Path) -> dict[str, dict[str, str]]:
    """WBCAtt: for the key of an image its value of each attribute; five classes have them."""
    with (data / "attributes.csv").open() as lines:
        return {row.pop("path"): row for row in csv.DictReader(lines)}


def attribute_values(attributes: Mapping[str, Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    """The values that each attribute takes, sorted: this order goes into the manifest."""
    values: dict[str, set[str]] = {}
    for row in attributes.values():
        for name, value in row.items():
            values.setdefault(name, set()).add(value)
    return {name: tuple(sorted(found)) for name, found in values.items()}


def read_foreign_cells(data: Path, splits: Collection[str] = ("train", "val", "test")) -> list[NamedBox]:
    """Nucleated cells of the BCCD and Raabin fields that we named by eye; see `models/data/README.md`."""
    with FOREIGN_CELLS.open() as lines:
        rows = list(csv.DictReader(lines))
    return [
        NamedBox(
            data / row["path"],
            row["source"],
            row["split"],
            (float(row["x_min"]), float(row["y_min"]), float(row["x_max"]), float(row["y_max"])),
            None if row["class"] == "none" else row["class"],
        )
        for row in rows
        if row["split"] in splits
    ]


def read_fields(data: Path, split: str) -> list[FieldImage]:
    """The fields of one split, `rbc-incomplete` ones included."""
    with (data / "fields.csv").open() as lines:
        rows = [
            FieldImage(data / row["path"], row["source"], row["split"], row["labels"] == "complete")
            for row in csv.DictReader(lines)
        ]
    return [row for row in rows if row.split == split]


def cell_classes(data: Path) -> tuple[str, ...]:
    """The classifier's class names, sorted: this order goes into the manifest."""
    with (data / "pbc.csv").open() as lines:
        return tuple(sorted({row["class"] for row in csv.DictReader(lines)}))


def read_rgb(path: Path) -> Rgb:
    """A picture as uint8 RGB."""
    return cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def read_boxes(field: FieldImage, width_px: int, height_px: int) -> NDArray[np.float32]:
    """(boxes, 5): class, x_min, y_min, x_max, y_max in pixels of the field."""
    label = field.path.parent.parent / "labels" / f"{field.path.stem}.txt"
    rows = np.array([line.split() for line in label.read_text().splitlines() if line.strip()], np.float32).reshape(
        -1, 5
    )
    centre, half = rows[:, 1:3], rows[:, 3:5] / 2
    size = np.array([width_px, height_px, width_px, height_px], np.float32)
    return np.concatenate((rows[:, :1], np.concatenate((centre - half, centre + half), 1) * size), 1)
