"""What the detector's input size costs and brings: the shipped net as int8 files of several sizes, in one run.

    python -m models.detector.sizes --sizes 320 416 512 640 --split val

The net is the shipped one (trained at 416 px, on cells scaled by a half to one and a half), so that the curve says what
another size brings without another training. Times are medians of `detect` over the same fields, taken in turns, and
told as ratios to the shipped size: letterbox, net and decoding, one look at each field.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.inference.models import Models, open_models
from models.common.labels import DETECTOR_CLASSES, read_complete_fields
from models.common.metrics import detection_figures
from models.common.programs import CONVERTER, run_program
from models.detector.export import FILE, own_folder
from models.detector.train import SIZE_PX, RunFile, begin_with, training_fields
from models.evaluation.asking import MAX_MEGAPIXELS, add_options, progress
from models.evaluation.boxes import boxes_of
from models.nets.yolov10 import STRIDES, YoloV10n

TIMED_FIELDS = 40


def main() -> None:
    args = parse()
    if wrong := [size for size in args.sizes if size % max(STRIDES)]:
        raise SystemExit(f"--sizes: {wrong[0]} is no multiple of {max(STRIDES)}")
    found = {size: open_size(args, size) for size in sorted({*args.sizes, SIZE_PX})}
    fields = read_complete_fields(args.data, args.split)
    times = times_ms(found, [decode_file(field.path, MAX_MEGAPIXELS) for field in fields[:TIMED_FIELDS]])
    figures = {}
    for size, models in found.items():
        measured = [boxes_of(models, field) for field in progress(fields, f"{size} px")]
        by_class = detection_figures(measured, DETECTOR_CLASSES)
        figures[size] = {
            "time": times[size] / times[SIZE_PX],
            "map50": by_class["all"].map50,
            "map50_95": by_class["all"].map50_95,
            **{f"map50 {name}": by_class[name].map50 for name in DETECTOR_CLASSES if name in by_class},
        }
    print(json.dumps(figures)) if args.json else show(figures)


def open_size(args: argparse.Namespace, size_px: int) -> Models:
    """The shipped detector for squares of this size, in a folder of models of its own."""
    net = YoloV10n(len(DETECTOR_CLASSES))
    begin_with(net, RunFile(init=args.models / FILE), training_fields(args.data, ("pbc",))[:48])
    folder = own_folder(net, args.work / str(size_px), args, size_px)
    return open_models(ModelsSection(folder=folder, threads=args.threads, most_tiles=1))


def times_ms(found: Mapping[int, Models], pictures: Sequence[Any]) -> dict[int, float]:
    """Median time of `detect` by size, the sizes in turns."""
    taken: dict[int, list[float]] = {size: [] for size in found}
    for pixels in pictures:
        for size, models in found.items():
            begun = time.perf_counter()
            models.detector.detect(pixels, None)
            taken[size].append(1e3 * (time.perf_counter() - begun))
    return {size: float(np.median(spent)) for size, spent in taken.items()}


def show(figures: Mapping[int, Mapping[str, float]]) -> None:
    names = list(next(iter(figures.values())))
    table = Table("input, px", *names)
    for size, found in figures.items():
        table.add_row(str(size), *(f"{found[name]:.3f}" for name in names))
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=(320, 416, 512, 640))
    parser.add_argument("--work", type=Path, default=Path("runs/sizes"), help="where the files of each size go")
    parser.add_argument("--pictures", type=int, default=60, help="calibration pictures")
    add_options(parser, split="val")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
