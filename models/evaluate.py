"""Figures of the shipped files, measured through the agent's own inference.

    python -m models.evaluate detector --split test
    python -m models.evaluate classifier --split test --json
    python -m models.evaluate two-stage --split test

detector: mAP on the `complete` fields of each source and of all; the half-labelled BCCD fields stand apart.
classifier: each PBC picture as `hematovision classify` takes it. two-stage: as the agent counts on a field, with its
thresholds and rules; a cell that it does not find or not trust is wrong. Splits are by image (no patient or slide is
known), so that figures inside one source are optimistic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.crops import central_detection
from agent.camera.camera import SYSTEM_CLOCKS, make_frame
from agent.camera.decoding import decode_file
from agent.config import Config, ModelsSection
from agent.domain import Cell, CellStatus, ClockReading, FrameQuality, Pixels, SampleState
from agent.inference.models import Models, open_models
from agent.pipeline import Bench, Stopwatch, analyse_frame, make_bench
from models.common.labels import DETECTOR_CLASSES, FieldImage, read_boxes, read_cells, read_fields
from models.common.metrics import FieldBoxes, class_figures_by_name, detection_figures

EVALUATION_SCORE = 0.01  # low enough that the precision-recall curve reaches its end
MAX_MEGAPIXELS = 80
MISSED = "missed"
NUCLEATED = DETECTOR_CLASSES[0]


def main() -> None:
    args = parse()
    models = open_models(ModelsSection(folder=args.models, threads=args.threads))
    figures = EVALUATIONS[args.what](models, args.data, args.split)
    figures = {
        "what": args.what,
        "split": args.split,
        "runtime": models.runtime,
        "delegate": models.delegate,
        "sha256": {"detector": models.detector.identity.sha256, "classifier": models.classifier.identity.sha256},
        **figures,
    }
    print(json.dumps(figures)) if args.json else show(figures)


def evaluate_detector(models: Models, data: Path, split: str) -> dict[str, Any]:
    """P, R, mAP50 and mAP50-95 for each source and class."""
    fields = read_fields(data, split)
    groups = {
        "complete": [field for field in fields if field.is_complete],
        **{
            f"complete, {source}": [field for field in fields if field.is_complete and field.source == source]
            for source in sorted({field.source for field in fields})
        },
        "rbc-incomplete": [field for field in fields if not field.is_complete],
    }
    measured = {field.path: boxes_of(models, field) for field in progress(fields, "fields")}
    classes = models.manifest.detector.classes
    return {
        "fields": {name: len(group) for name, group in groups.items()},
        "groups": {
            name: {
                key: dataclasses.asdict(value)
                for key, value in detection_figures([measured[field.path] for field in group], classes).items()
            }
            for name, group in groups.items()
            if group
        },
    }


def boxes_of(models: Models, field: FieldImage) -> FieldBoxes:
    """What the shipped detector finds in a field, and what the label file says."""
    pixels = decode_file(field.path, MAX_MEGAPIXELS)
    classes = models.manifest.detector.classes
    found = [
        (classes.index(d.class_name), d.score, d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)
        for d in models.detector.detect(pixels, EVALUATION_SCORE)
    ]
    true = read_boxes(field, pixels.shape[1], pixels.shape[0])
    return FieldBoxes(np.array(found, np.float32).reshape(-1, 6), true)


def evaluate_classifier(models: Models, data: Path, split: str) -> dict[str, Any]:
    """Accuracy, macro-F1 and P / R / F1 of each class on the PBC pictures."""
    answers = []
    for cell in progress(read_cells(data, split), "crops"):
        pixels = decode_file(cell.path, MAX_MEGAPIXELS)
        answers.append((cell.class_name, models.name_central_cell(pixels).class_name))
    return class_figures_by_name(answers, models.manifest.classifier.classes)


def evaluate_two_stage(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The cell in the middle of each picture as the agent counts it; one not found or not trusted is wrong."""
    bench = make_bench(Config(), models)
    answers = []
    for cell in progress(read_cells(data, split), "pictures"):
        answers.append((cell.class_name, name_as_agent(bench, decode_file(cell.path, MAX_MEGAPIXELS))))
    given = [answer for _, answer in answers]
    return {
        "missed": given.count(MISSED),
        "unidentified": given.count(UNIDENTIFIED),
        "fields_unidentified": unidentified_by_source(bench, data, split),
        "for_manifest": confusion_block(models, answers, f"split {split}"),
        **class_figures_by_name(answers, models.manifest.classifier.classes),
    }


def confusion_block(models: Models, answers: list[tuple[str, str]], measured_on: str) -> dict[str, Any]:
    """What stands in the manifest as `classifier.confusion`, measured on (true class, name given by the agent)."""
    counts: dict[str, Counter[str]] = {}
    for true, given in answers:
        counts.setdefault(true, Counter())[given] += 1
    return {
        "sha256": models.classifier.identity.sha256,
        "measured_on": measured_on,
        "counts": {true: dict(sorted(named.items())) for true, named in sorted(counts.items())},
    }


def name_as_agent(bench: Bench, pixels: Pixels) -> str:
    """What the agent counts the cell in the middle of a picture as."""
    cells = analyse_pixels(bench, pixels)
    central = central_detection(
        [cell.detection for cell in cells],
        bench.models.manifest.detector.classified,
        pixels.shape[1],
        pixels.shape[0],
    )
    if central is None:
        return MISSED
    (cell,) = [cell for cell in cells if cell.detection is central]
    return UNIDENTIFIED if cell.status is CellStatus.UNIDENTIFIED else cell.class_name


def unidentified_by_source(bench: Bench, data: Path, split: str) -> dict[str, list[int]]:
    """For the fields of each source: nucleated cells found, and how many of them have no class that is trusted.

    No field has class labels of its nucleated cells, so this is what can be said of other microscopes.
    """
    by_source: dict[str, list[int]] = {}
    for field in progress(read_fields(data, split), "fields"):
        count = by_source.setdefault(field.source, [0, 0])
        for cell in analyse_pixels(bench, decode_file(field.path, MAX_MEGAPIXELS)):
            if cell.detection.class_name == NUCLEATED:
                count[0] += 1
                count[1] += cell.status is CellStatus.UNIDENTIFIED
    return by_source


def analyse_pixels(bench: Bench, pixels: Pixels) -> tuple[Cell, ...]:
    """The cells of a picture, through the agent's own main path."""
    frame = make_frame(1, pixels, source="evaluation", clocks=SYSTEM_CLOCKS)
    quality = FrameQuality(is_accepted=True, reasons=(), focus=0.0, clipped_pct=0.0)
    clock = ClockReading(is_synchronised=False)
    return analyse_frame(frame, quality, bench, SampleState("evaluation"), clock, Stopwatch()).cells


def show(figures: dict[str, Any]) -> None:
    """The figures as tables."""
    console = Console()
    console.print(f"{figures['what']}, split {figures['split']}, {figures['runtime']} ({figures['delegate']})")
    if "groups" in figures:
        for name, group in figures["groups"].items():
            table = Table(
                "class", "cells", "P", "R", "mAP50", "mAP50-95", title=f"{name}: {figures['fields'][name]} fields"
            )
            for key, f in group.items():
                values = (f["precision"], f["recall"], f["map50"], f["map50_95"])
                table.add_row(key, str(f["cells"]), *(f"{v:.3f}" for v in values))
            console.print(table)
        return
    summary = f"accuracy {figures['accuracy']:.4f}, macro-F1 {figures['macro_f1']:.4f}, n {figures['n']}"
    if "missed" in figures:
        summary += f", not found {figures['missed']}, unidentified {figures['unidentified']}"
    table = Table("class", "n", "P", "R", "F1", title=summary)
    for key, f in figures["classes"].items():
        table.add_row(key, str(f["n"]), *(f"{f[k]:.4f}" for k in ("precision", "recall", "f1")))
    console.print(table)


def progress(sequence: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar on a terminal's standard error."""
    console = Console(stderr=True)
    return track(list(sequence), what, console=console, disable=not console.is_terminal)


EVALUATIONS: dict[str, Callable[[Models, Path, str], dict[str, Any]]] = {
    "detector": evaluate_detector,
    "classifier": evaluate_classifier,
    "two-stage": evaluate_two_stage,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=EVALUATIONS)
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


if __name__ == "__main__":
    main()
