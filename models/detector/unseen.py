"""What a microscope that was never seen costs the detector: each source left out of the training once.

    for run in with-all without-bccd without-pbc without-raabin; do
        python -m models.detector.train models/detector/recipes/unseen/detector-$run.yaml
    done
    python -m models.detector.unseen [--json]

The four runs are equally long, and begin with nothing. Each net becomes int8 as the shipped one does, calibrated with
fields of its own sources; figures: the complete fields of the source, through the agent.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.config import ModelsSection
from agent.inference.models import Models, open_models
from models.common.labels import DETECTOR_CLASSES, SOURCES, read_complete_fields
from models.common.metrics import detection_figures
from models.common.programs import CONVERTER, run_program
from models.detector.export import own_folder
from models.detector.train import averaged_net
from models.evaluation.asking import add_options, progress
from models.evaluation.boxes import boxes_of
from models.tables import table

EVERY = "with-all"


def main() -> None:
    args = parse()
    kept = {f"without-{left_out}": tuple(s for s in SOURCES if s != left_out) for left_out in SOURCES}
    opened = {run: open_run(args, run, sources) for run, sources in {EVERY: SOURCES, **kept}.items()}
    figures = {
        source: {run: judge(opened[run], args, source) for run in (EVERY, f"without-{source}")} for source in SOURCES
    }
    print(json.dumps(figures)) if args.json else show(figures)


def open_run(args: argparse.Namespace, run: str, sources: tuple[str, ...]) -> Models:
    """The net of a run as an int8 file, in a folder of models of its own."""
    net, command = averaged_net(args.runs / f"detector-{run}" / "best.pt")
    folder = own_folder(net, args.work / run, args, sources=sources, version="0", command=command)
    return open_models(ModelsSection(folder=folder, threads=args.threads, most_tiles=args.most_tiles))


def judge(models: Models, args: argparse.Namespace, source: str) -> dict[str, Any]:
    """Figures of each class, and of all, in the complete fields of a source."""
    fields = progress(read_complete_fields(args.data, args.split, (source,)), source)
    measured = [boxes_of(models, field) for field in fields]
    return {name: asdict(found) for name, found in detection_figures(measured, DETECTOR_CLASSES).items()}


def show(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """The figures as a table in Markdown."""
    rows = []
    for source, runs in figures.items():
        for run, found in runs.items():
            by_class = [found[name]["map50"] if name in found else "-" for name in DETECTOR_CLASSES]
            rows.append((source, run, *by_class, found["all"]["map50"], found["all"]["map50_95"]))
    table(("fields of", "trained", *DETECTOR_CLASSES, "mean mAP50", "mean mAP50-95"), rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the four runs lie")
    parser.add_argument("--work", type=Path, default=Path("runs/unseen-detectors"), help="where their files go")
    parser.add_argument("--pictures", type=int, default=60, help="calibration pictures")
    add_options(parser, split="test")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
