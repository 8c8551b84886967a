"""What each classifier of a folder costs beside the detector: the files that are shipped, in one run.

    python -m models.classifier.speed

Medians of one look at a cell and of one look at a field, taken in turns over the golden fields and told as a share of
the field's time; the machine's own milliseconds say little elsewhere. A cell that is named with less than
`sure_probability` takes four looks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from agent.config import ModelsSection
from agent.inference.classifier import Classifier
from agent.inference.golden import read_fields
from agent.inference.interpreter import load_runtime
from agent.inference.manifest import load_manifest, read_model_file
from agent.inference.models import open_models

ROUNDS = 12


def main() -> None:
    args = parse()
    models = open_models(ModelsSection(folder=args.models, threads=args.threads, most_tiles=1))
    runtime = load_runtime("auto")
    fields = [pixels for pixels in read_fields().values() if models.detector.detect(pixels)]
    crops = [models.cutter(p, found).around(found[0].box) for p in fields for found in [models.detector.detect(p)]]
    asked: dict[str, Callable[[Any], object]] = {"detector": models.detector.detect}
    sizes = {}
    for entry in load_manifest(args.models).classifiers:
        content = read_model_file(args.models, entry)
        one_look = entry.thresholds.model_copy(update={"sure_probability": 0.0})
        asked[entry.name] = Classifier(
            runtime, content, entry.model_copy(update={"thresholds": one_look}), args.threads
        ).classify
        sizes[entry.name] = (len(content), entry.input.shape[1])
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(ROUNDS):
        for field, crop in zip(fields, crops, strict=True):
            for name, ask in asked.items():
                begun_s = time.perf_counter()
                ask(field if name == "detector" else crop)
                taken[name].append(time.perf_counter() - begun_s)
    medians = {name: float(np.median(spent)) for name, spent in taken.items()}
    table = Table("classifier", "input, px", "file, MB", "one cell, share of a field's time", "ms here")
    for name, (size, side_px) in sizes.items():
        share = medians[name] / medians["detector"]
        table.add_row(name, str(side_px), f"{size / 1e6:.2f}", f"{share:.3f}", f"{1e3 * medians[name]:.2f}")
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    main()
