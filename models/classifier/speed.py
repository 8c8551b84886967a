"""What each classifier of a folder costs beside the detector: the files that are shipped, in one run.

    python -m models.classifier.speed

Medians of one look at a cell and of one look at a field, taken in turns over the golden fields and told as a share of
the field's time; the machine's own milliseconds say little elsewhere. A cell that is named with less than
`sure_probability` takes four looks, then with less than `doubtful_probability` eight.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agent.config import ModelsSection
from agent.domain import Pixels
from agent.inference.classifier import Classifier
from agent.inference.golden import read_fields
from agent.inference.interpreter import load_runtime
from agent.inference.manifest import ClassifierEntry, load_manifest, read_model_file
from agent.inference.models import Models, open_models
from models.common.programs import run_program
from models.evaluation.asking import add_threads

ROUNDS = 12


def main() -> None:
    args = parse()
    models = open_models(ModelsSection(folder=args.models, threads=args.threads, most_tiles=1))
    pairs = fields_with_crops(models)
    named = {entry.name: one_look(args.models, entry, args.threads) for entry in load_manifest(args.models).classifiers}
    field_s: list[float] = []
    cell_s: dict[str, list[float]] = {name: [] for name in named}
    for _ in range(ROUNDS):
        for field, crop in pairs:
            field_s.append(seconds(models.detector.detect, field))
            for name, classifier in named.items():
                cell_s[name].append(seconds(classifier.classify, crop))
    table = Table("classifier", "input, px", "file, MB", "one cell, share of a field's time", "ms here")
    for name, classifier in named.items():
        median_s, size = float(np.median(cell_s[name])), (args.models / classifier.entry.file).stat().st_size
        row = (f"{size / 1e6:.2f}", f"{median_s / float(np.median(field_s)):.3f}", f"{1e3 * median_s:.2f}")
        table.add_row(name, str(classifier.entry.input.shape[1]), *row)
    Console().print(table)


def fields_with_crops(models: Models) -> list[tuple[Pixels, Pixels]]:
    """Golden fields and of each the crop of one cell that goes on to the classifier."""
    pairs = []
    for pixels in read_fields().values():
        found = models.detector.detect(pixels)
        going_on = [d for d in found if d.class_name in models.manifest.detector.classified]
        if going_on:
            pairs.append((pixels, models.cutter(pixels, found).around(going_on[0].box)))
    return pairs


def one_look(folder: Path, entry: ClassifierEntry, threads: int) -> Classifier:
    """The classifier, that asks about no cell again."""
    thresholds = entry.thresholds.model_copy(update={"sure_probability": 0.0, "doubtful_probability": 0.0})
    content = read_model_file(folder, entry)
    return Classifier(load_runtime("auto"), content, entry.model_copy(update={"thresholds": thresholds}), threads)


def seconds(ask: Callable[[Pixels], object], pixels: Pixels) -> float:
    begun_s = time.perf_counter()
    ask(pixels)
    return time.perf_counter() - begun_s


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    add_threads(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
