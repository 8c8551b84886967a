"""What `../shared/data` holds, as its CSV and label files tell; needs no PyTorch.

The splits are taken as given, unless another is asked for.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.errors import FrameUnreadable
from models.common.programs import Unfit

Rgb = NDArray[np.uint8]
Found = TypeVar("Found")

FOREIGN_CELLS = Path(__file__).parents[1] / "data" / "foreign_cells.csv"

SOURCES = ("bccd", "pbc", "raabin")
"""Microscopes whose fields have boxes."""

DETECTOR_CLASSES = ("WBC", "RBC", "platelet")  # the order of the label files
NUCLEATED = DETECTOR_CLASSES[0]

LAYOUT = """\
The folder of labelled data:
  pbc.csv         path,class,split: a picture of a single cell in each line; path: below the folder,
                  class: as the manifest names it, split: train, val or test
  attributes.csv  path and a column for each morphological attribute, of some of these pictures; may be missing where
                  nothing is learnt
  fields.csv      path,source,split,labels: a field in each line, fields/images/NAME.png; labels: complete or
                  rbc-incomplete
  fields/labels/NAME.txt  its boxes: class x_center y_center width height, normalised; 0 WBC, 1 RBC, 2 platelet
To measure names on pictures of one's own pbc.csv is enough, with the split test in each line."""

COLUMNS = {
    "pbc.csv": ("path", "class", "split"),
    "attributes.csv": ("path",),
    "fields.csv": ("path", "source", "split", "labels"),
}


class DataUnfit(Unfit):
    """The labelled data cannot be used as they are."""


def read_rows(data: Path, name: str) -> list[dict[str, str]]:
    """The lines of one of the CSV files in COLUMNS, by its own first line. Raises DataUnfit."""
    file, columns = data / name, COLUMNS[name]
    told = f"--data takes a folder with {name}, its first line {','.join(columns)}"
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets put a mark before UTF-8
            reader = csv.DictReader(lines)
            named, rows = reader.fieldnames or (), list(reader)
    except FileNotFoundError as error:
        raise DataUnfit(f"{file}: not there; {told} (see python -m models.evaluate --help)") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataUnfit(f"{file}: cannot be read: {error}") from error
    if missing := [column for column in columns if column not in named]:
        raise DataUnfit(f"{file}: has no column {', '.join(missing)}; {told}")
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise DataUnfit(f"{file}: line {number} has not as many values as the first line has names")
    return rows


def require_some(found: Sequence[Found], data: Path, split: str) -> Sequence[Found]:
    """What was found, if it is anything. Raises DataUnfit: of nothing nothing can be measured."""
    if not found:
        raise DataUnfit(f"{data}: has nothing of split {split} that this measures; another --split or --data may")
    return found


@dataclass(frozen=True, slots=True)
class CellImage:
    """One line of pbc.csv. key: its path as it stands there."""

    key: str
    path: Path
    class_name: str
    split: str


@dataclass(frozen=True, slots=True)
class NamedBox:
    """A cell of a field with its name. class_name: None = it is no cell of the eight classes."""

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


def read_cells(data: Path, split: str, random_seed: int | None = None) -> list[CellImage]:
    """The labelled single-cell images of one split, in the order of the CSV file.

    random_seed: None = the splits as given; a number = the study's protocol, 70 / 10 / 20 % of each class drawn at
    random for train, val and test.
    """
    rows = [CellImage(r["path"], data / r["path"], r["class"], r["split"]) for r in read_rows(data, "pbc.csv")]
    if random_seed is not None:
        rows = split_at_random(rows, random_seed)
    return [row for row in rows if row.split == split]


def split_at_random(cells: Sequence[CellImage], seed: int) -> list[CellImage]:
    """The same cells in the same order, class by class split anew by RANDOM_SHARES."""
    rng = np.random.default_rng(seed)
    drawn = list(cells)
    for name in sorted({cell.class_name for cell in cells}):
        places = rng.permutation([k for k, cell in enumerate(cells) if cell.class_name == name])
        ends = np.rint(np.cumsum(list(RANDOM_SHARES.values())) * len(places)).astype(int)
        for split, part in zip(RANDOM_SHARES, np.split(places, ends[:-1]), strict=True):
            for k in part:
                drawn[k] = replace(cells[k], split=split)
    return drawn


RANDOM_SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}
"""As the study splits (doi 10.1186/s12911-025-03027-2): 70 % to learn from, 20 % to test, 10 % to choose on."""


def read_attributes(data: Path) -> dict[str, dict[str, str]]:
    """WBCAtt: for the key of an image its value of each attribute; five classes have them."""
    return {row.pop("path"): row for row in read_rows(data, "attributes.csv")}


def read_known_attributes(data: Path) -> dict[str, dict[str, str]]:
    """The same, none where the folder has no such file: a laboratory's own pictures have names only."""
    return read_attributes(data) if (data / "attributes.csv").exists() else {}


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


def read_field_platelets(data: Path, splits: Collection[str]) -> list[NamedBox]:
    """The platelets of fields, which their label files name: the single-cell images show those of one microscope."""
    found = []
    for field in (field for split in splits for field in read_fields(data, split)):
        height, width = read_rgb(field.path).shape[:2]
        for index, x_min, y_min, x_max, y_max in read_boxes(field, width, height).tolist():
            if DETECTOR_CLASSES[int(index)] == PLATELET:
                found.append(NamedBox(field.path, field.source, field.split, (x_min, y_min, x_max, y_max), PLATELET))
    return found


PLATELET = "platelet"
"""The class that the detector and the classifier have in common."""


def read_fields(data: Path, split: str) -> list[FieldImage]:
    """The fields of one split, `rbc-incomplete` ones included."""
    rows = [
        FieldImage(data / row["path"], row["source"], row["split"], row["labels"] == "complete")
        for row in read_rows(data, "fields.csv")
    ]
    return [row for row in rows if row.split == split]


def read_complete_fields(data: Path, split: str, sources: Sequence[str] | None = None) -> list[FieldImage]:
    """Those of one split in which every cell has its box. sources: None = all."""
    fields = [field for field in read_fields(data, split) if field.is_complete]
    return fields if sources is None else [field for field in fields if field.source in sources]


def cell_classes(data: Path) -> tuple[str, ...]:
    """The classifier's class names, sorted: this order goes into the manifest."""
    return tuple(sorted({row["class"] for row in read_rows(data, "pbc.csv")}))


def read_rgb(path: Path) -> Rgb:
    """A picture as uint8 RGB. Raises FrameUnreadable."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if pixels is None:
        raise FrameUnreadable(str(path), "not there, or no picture that OpenCV can read")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def read_boxes(field: FieldImage, width_px: int, height_px: int) -> NDArray[np.float32]:
    """(boxes, 5): class, x_min, y_min, x_max, y_max in pixels of the field."""
    return read_label_file(field.path.parents[1] / "labels" / f"{field.path.stem}.txt", width_px, height_px)


def mistakes(data: Path, split: str) -> dict[Path, NDArray[np.float32]]:
    """By field the boxes, (boxes, 4), that its label file calls nucleated and we saw to be red cells."""
    found: dict[Path, list[tuple[float, float, float, float]]] = {}
    for cell in read_foreign_cells(data, (split,)):
        if cell.class_name is None:
            found.setdefault(cell.path, []).append(cell.box)
    return {path: np.array(boxes, np.float32) for path, boxes in found.items()}


def put_right(boxes: NDArray[np.float32], wrong: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The boxes of a field, (boxes, 5), with those of `mistakes` as red cells; their corners are whole px there."""
    if wrong is None:
        return boxes
    is_near = np.abs(boxes[:, None, 1:] - wrong[None]).max(2) < SAME_CORNER_PX
    is_wrong = is_near.any(1) & (boxes[:, 0] == DETECTOR_CLASSES.index("WBC"))
    righted = boxes.copy()
    righted[is_wrong, 0] = DETECTOR_CLASSES.index("RBC")
    return righted


SAME_CORNER_PX = 2.0


def read_published_boxes(field: FieldImage, width_px: int, height_px: int) -> NDArray[np.float32]:
    """The same of a BCCD field as its authors published it; about half of the red cells have no box there."""
    file = field.path.parents[2] / "bccd-original-labels" / f"{field.path.stem}.txt"
    return read_label_file(file, width_px, height_px)


def read_label_file(file: Path, width_px: int, height_px: int) -> NDArray[np.float32]:
    """YOLO text, (boxes, 5): class, x_min, y_min, x_max, y_max in pixels of a picture of this size."""
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
    try:
        rows = np.array(lines, np.float32).reshape(len(lines), 5)
    except ValueError as error:
        raise DataUnfit(f"{file}: each line must be five numbers: class x_center y_center width height") from error
    centre, half = rows[:, 1:3], rows[:, 3:5] / 2
    size = np.array([width_px, height_px, width_px, height_px], np.float32)
    return np.concatenate((rows[:, :1], np.concatenate((centre - half, centre + half), 1) * size), 1)


def clip_boxes(boxes: NDArray[np.float32], width_px: int, height_px: int) -> NDArray[np.float32]:
    """Boxes cut to the picture; what keeps less than 15 % of its area or less than 3 px a side is dropped."""
    area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 4] - boxes[:, 2])
    clipped = boxes.copy()
    clipped[:, [1, 3]] = boxes[:, [1, 3]].clip(0, width_px)
    clipped[:, [2, 4]] = boxes[:, [2, 4]].clip(0, height_px)
    sides = clipped[:, 3:] - clipped[:, 1:3]
    keep = (sides.prod(1) >= 0.15 * area) & (sides.min(1, initial=1e9) >= 3)
    return clipped[keep]
