"""Does the int8 file answer as the float net does? Fails the run where it does not.

    python -m models.common.parity                                     # models/ against runs/float, on all of `test`
    python -m models.common.parity --float runs/float --int8 models --split val

Both folders are measured as `models.evaluate` measures them, every classifier of the manifest. The bounds are the
largest losses that a shipped file may have; a gain is no loss. Exit status 1 = a loss is above its bound.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agent.config import ModelsSection
from agent.inference.manifest import MANIFEST_NAME, load_manifest
from agent.inference.models import open_models
from models.common.programs import Unfit, run_program
from models.evaluation.asking import add_threads
from models.evaluation.boxes import evaluate_detector
from models.evaluation.names import evaluate_classifier

ACCURACY = "accuracy"
BOUNDS: Mapping[str, float] = {ACCURACY: 0.002, "mAP50": 0.005, "mAP50-95": 0.01}
"""Largest loss from float to int8, as a share (0 to 1), by the last word of a figure's name."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure of both files, 0 to 1."""

    name: str
    float_value: float
    int8_value: float

    @property
    def loss(self) -> float:
        """What int8 costs; negative where it gains."""
        return self.float_value - self.int8_value

    @property
    def bound(self) -> float:
        return BOUNDS[self.name.split()[-1]]

    @property
    def is_within(self) -> bool:
        return self.loss <= self.bound


def main() -> None:
    args = parse()
    require_same_models(args.float, args.int8)
    before, after = (measure(folder, args.data, args.split, args.threads) for folder in (args.float, args.int8))
    comparisons = compare(before, after)
    show(comparisons)
    sys.exit(0 if all(c.is_within for c in comparisons) else 1)


def require_same_models(reference: Path, folder: Path) -> None:
    """Raises Unfit where there is no float net to compare each int8 classifier with: before what takes minutes."""
    if not (reference / MANIFEST_NAME).exists():
        raise Unfit(
            f"{reference}: no float models there; models.detector.export and models.classifier.export write them as"
            " they make the int8 files (--float-models)"
        )
    known, wanted = ({entry.name for entry in load_manifest(place).classifiers} for place in (reference, folder))
    if missing := sorted(wanted - known):
        raise Unfit(f"{reference}: has no {', '.join(missing)}; models.classifier.export writes it there")


def compare(before: Mapping[str, float], after: Mapping[str, float]) -> list[Comparison]:
    """Each figure of the int8 files beside that of the float ones. Raises KeyError where one was not measured."""
    return [Comparison(name, before[name], value) for name, value in after.items()]


def measure(folder: Path, data: Path, split: str, threads: int) -> dict[str, float]:
    """The bounded figures of a models folder, on a whole split: of the detector, and of each classifier behind it."""
    section = ModelsSection(folder=folder, threads=threads)
    found: dict[str, Any] = evaluate_detector(open_models(section), data, split)["groups"]["complete"]["all"]
    figures = {"detector mAP50": found["map50"], "detector mAP50-95": found["map50_95"]}
    for entry in load_manifest(folder).classifiers:
        models = open_models(section.model_copy(update={"classifier": entry.name}))
        figures[f"{entry.name} {ACCURACY}"] = evaluate_classifier(models, data, split)["accuracy"]
    return figures


def show(comparisons: list[Comparison]) -> None:
    table = Table("figure", "float", "int8", "loss", "bound", "")
    for c in comparisons:
        values = (c.float_value, c.int8_value, c.loss, c.bound)
        table.add_row(c.name, *(f"{v:.4f}" for v in values), "within" if c.is_within else "ABOVE")
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--float", type=Path, default=Path("runs/float"), help="folder of manifest.json, float files")
    parser.add_argument("--int8", type=Path, default=Path("models"), help="folder of manifest.json, int8 files")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    add_threads(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
