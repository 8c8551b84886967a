"""Boxes for single-cell pictures that have none, from a detector: self-training.

    python -m models.detector.label_pictures --data ../shared/data --output runs/pictures.npz

The boxed fields show no erythroblast, no immature granulocyte, and no platelet as large as a red cell; the PBC pictures
do. Each of them says what its middle cell is, and that is believed rather than the detector: only the box is asked for,
however unsure its score. Around it a picture is used only if there is nothing that the detector is unsure of. Only the
split `train` is looked at.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.domain import Detection
from agent.inference.models import open_models
from models.common.datasets import LabelledField
from models.common.labels import DETECTOR_CLASSES, PLATELET, CellImage, cell_classes, read_cells, read_rgb
from models.common.metrics import box_overlaps
from models.common.programs import Unfit, require_writable, run_program
from models.evaluation.asking import MAX_MEGAPIXELS, progress

SURE, UNSURE = 0.3, 0.2
"""A box with a score from UNSURE to SURE may be right or wrong: its picture teaches nothing and is left out."""

HINT = 0.05
"""Least score of a box in the middle, where the picture itself says that there is a cell."""

MIDDLE_SHARE = 0.12
"""The middle cell's centre is this near to the picture's middle, as a share of its longer side."""

SAME_CELL = 0.45
"""IoU above which a second box is the middle cell's again, by another name, and does not stand."""

SHEET = (8, 6)

ENDING = ".npz"
"""Of the file with the boxes: NumPy adds it where it is missing, and the file would not be where it was asked for."""


def main() -> None:
    args = parse()
    if args.output.suffix != ENDING:
        raise Unfit(f"{args.output}: does not end in {ENDING}; give --output such a name")
    require_writable(args.output)
    models = open_models(ModelsSection(folder=args.models))
    most = dict.fromkeys(cell_classes(args.data), args.each)
    if args.platelets is not None:
        most[PLATELET] = args.platelets
    chosen = drawn(read_cells(args.data, "train"), most)
    keys, boxes = [], []
    for cell in progress(chosen, "pictures"):
        pixels = decode_file(cell.path, MAX_MEGAPIXELS)
        height, width = pixels.shape[:2]
        found = picture_boxes(cell.class_name, models.detector.detect(pixels, HINT), width, height)
        if found is not None:
            keys.append(cell.key)
            boxes.append(found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    packed = np.empty(len(boxes), object)
    packed[:] = boxes
    np.savez(args.output, keys=np.array(keys), boxes=packed)
    print(f"{len(keys)} of {len(chosen)} pictures have boxes")
    draw_sheets(args.data, keys, boxes, args.output.parent / "pictures")


def drawn(cells: Sequence[CellImage], most: Mapping[str, int]) -> list[CellImage]:
    """Of each class as many pictures as asked for, where there are so many; the same ones each time."""
    rng = np.random.default_rng(5)
    chosen: list[CellImage] = []
    for name, count in most.items():
        same = [cell for cell in cells if cell.class_name == name]
        chosen += [same[k] for k in rng.permutation(len(same))[:count]]
    return chosen


def picture_boxes(
    class_name: str, detections: Sequence[Detection], width_px: int, height_px: int
) -> NDArray[np.float32] | None:
    """(boxes, 5): class, x_min, y_min, x_max, y_max in px; None where the picture is not to be used.

    class_name: of the cell in the middle. detections: with scores from HINT.
    """
    reach = MIDDLE_SHARE * max(width_px, height_px)
    near = [d for d in detections if math.dist(d.box.centre_px, (width_px / 2, height_px / 2)) < reach]
    if not near:
        return None
    middle = max(near, key=lambda d: d.score)
    others = [d for d in detections if d is not middle and d.score >= UNSURE]
    is_other_cell = box_overlaps(corners(others), corners([middle]))[:, 0] <= SAME_CELL
    around = [d for d, stands in zip(others, is_other_cell, strict=True) if stands]
    if any(d.score < SURE for d in around):
        return None
    names = [class_name if class_name in DETECTOR_CLASSES else DETECTOR_CLASSES[0], *(d.class_name for d in around)]
    indices = np.array([[DETECTOR_CLASSES.index(name)] for name in names], np.float32)
    return np.concatenate((indices, corners([middle, *around])), 1)


def corners(detections: Sequence[Detection]) -> NDArray[np.float32]:
    """(boxes, 4): x_min, y_min, x_max, y_max in px."""
    rows = [(d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max) for d in detections]
    return np.array(rows, np.float32).reshape(-1, 4)


def load_pictures(file: Path, data: Path) -> list[LabelledField]:
    """The pictures with their boxes, decoded."""
    if not file.exists():
        raise Unfit(f"{file}: not there; python -m models.detector.label_pictures makes it")
    stored = np.load(file, allow_pickle=True)
    return [
        LabelledField(read_rgb(data / key), boxes) for key, boxes in zip(stored["keys"], stored["boxes"], strict=True)
    ]


def draw_sheets(data: Path, keys: list[str], boxes: list[NDArray[np.float32]], folder: Path) -> None:
    """Contact sheets for a person to look over: WBC red, RBC grey, platelet blue."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, rows = SHEET
    colours = ((230, 0, 0), (120, 120, 120), (0, 0, 230))
    order = np.random.default_rng(1).permutation(len(keys))
    for number in range(3):
        tiles = []
        for k in order[number * columns * rows : (number + 1) * columns * rows]:
            tile = read_rgb(data / keys[k]).copy()
            for index, *corners in boxes[k]:
                x_min, y_min, x_max, y_max = (round(float(v)) for v in corners)
                cv2.rectangle(tile, (x_min, y_min), (x_max, y_max), colours[int(index)], 2)
            tiles.append(cv2.resize(tile, (128, 128)))
        if len(tiles) == columns * rows:
            sheet = np.vstack([np.hstack(tiles[r * columns : (r + 1) * columns]) for r in range(rows)])
            cv2.imwrite(str(folder / f"sheet-{number}.png"), sheet[..., ::-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--each", type=int, default=600, help="pictures of each class to try")
    parser.add_argument("--platelets", type=int, help="of platelets in place of --each: giant ones get lost most")
    parser.add_argument("--output", type=Path, default=Path("runs/pictures.npz"))
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
