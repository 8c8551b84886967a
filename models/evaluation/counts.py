"""Both models together as the agent counts with them: its thresholds, its rules, its way through a frame."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.crops import central_detection
from agent.bench import Bench, make_bench
from agent.camera.camera import SYSTEM_CLOCKS, make_frame
from agent.camera.decoding import decode_file
from agent.config import Config
from agent.domain import Cell, CellStatus, ClockReading, FrameQuality, Pixels, SampleState
from agent.inference.models import Models
from agent.pipeline import Stopwatch, analyse_frame
from models.common.labels import NUCLEATED, read_cells, read_fields
from models.common.metrics import class_figures_by_name
from models.evaluation.asking import MAX_MEGAPIXELS, progress
from models.evaluation.names import require_named

MISSED = "missed"


def evaluate_two_stage(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The cell in the middle of each picture as the agent counts it; one not found or not trusted is wrong."""
    bench = make_bench(Config(), models)
    cells = require_named(read_cells(data, split), models.manifest.classifier.classes, data, split)
    answers = []
    for cell in progress(cells, "pictures"):
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
    cell = middle_cell(bench, pixels)
    if cell is None:
        return MISSED
    return UNIDENTIFIED if cell.status is CellStatus.UNIDENTIFIED else cell.class_name


def middle_cell(bench: Bench, pixels: Pixels) -> Cell | None:
    """The cell in the middle of a picture, as the agent sees it; None where it finds none there."""
    cells = analyse_pixels(bench, pixels)
    classified = bench.models.manifest.detector.classified
    central = central_detection([cell.detection for cell in cells], classified, pixels.shape[1], pixels.shape[0])
    return next((cell for cell in cells if cell.detection is central), None)


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
