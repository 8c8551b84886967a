"""Where the cell is in each single-cell image, as the shipped detector sees it.

    python -m models.classifier.locate --data ../shared/data --output runs/boxes.json

The classifier then learns from crops as the agent cuts them. Where the detector finds nothing in the middle of one
the training guesses from the colours. A run with a random split of its own needs `--splits train val test`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from agent.analysis.crops import central_detection
from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.inference.models import open_models
from models.common.labels import read_cells
from models.common.programs import Unfit, require_writable, run_program
from models.evaluation.asking import MAX_MEGAPIXELS, progress

Boxes = Mapping[str, tuple[float, float, float, float]]


def main() -> None:
    args = parse()
    require_writable(args.output)
    models = open_models(ModelsSection(folder=args.models))
    cells = [cell for split in args.splits for cell in read_cells(args.data, split)]
    boxes = {}
    for cell in progress(cells, "pictures"):
        pixels = decode_file(cell.path, MAX_MEGAPIXELS)
        height, width = pixels.shape[:2]
        detections = models.detector.detect(pixels, args.min_score)
        found = central_detection(detections, models.manifest.detector.classified, width, height)
        if found is not None:
            boxes[cell.key] = (*found.box.centre_px, found.box.width_px, found.box.height_px)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(boxes))
    print(f"{len(boxes)} of {len(cells)} cells located")


def read_boxes(file: Path | None) -> Boxes:
    """Boxes by the key of the image: centre x, centre y, width, height in pixels. None = none are known."""
    if file is None:
        return {}
    try:
        return {key: tuple(box) for key, box in json.loads(file.read_text()).items()}
    except FileNotFoundError as error:
        raise Unfit(f"{file}: not there; python -m models.classifier.locate makes it") from error
    except ValueError as error:
        raise Unfit(f"{file}: not as python -m models.classifier.locate writes it: {error}") from error


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--min-score", type=float, default=0.2, help="a labelled picture shows a cell: ask for less")
    parser.add_argument("--splits", nargs="+", choices=("train", "val", "test"), default=("train", "val"))
    parser.add_argument("--output", type=Path, default=Path("runs/boxes.json"))
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
