"""Thresholds and temperature of the shipped files, chosen on `val` and written into the manifest.

    python -m models.choose_thresholds [detector|classifier]

- detector: the score at which two figures have the highest sum: F1 at overlap 0.5, as a mean over the classes of the
  complete `val` fields, and the share of the PBC pictures whose middle cell is found. The fields show five of the eight
  classes, and a white cell that is missed is lost, while a box too many still has to pass the classifier. And whether
  two boxes of one cell should be merged, where that finds more. And, for each class that goes on to the classifier, the
  share of PBC cells that get it though their name contradicts it (Laplace's rule of succession: never none).
- classifier: the temperature with the least negative log-likelihood (Guo et al. 2017, arXiv 1706.04599) on the PBC
  crops that the agent cuts; the cell probability that one real cell in 200 falls below; then the least probability
  at which 99 % of the accepted names are right in PBC and 95 % of those of fields, platelets among them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agent.analysis.crops import central_detection
from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.domain import Classification
from agent.inference.manifest import MANIFEST_NAME, load_manifest
from agent.inference.models import Models, open_models
from models.common.labels import read_cells, read_complete_fields, require_some
from models.common.manifests import Changes, change_entry
from models.common.metrics import FieldBoxes, f1_curve, merge_boxes, middle_class, middle_score
from models.common.programs import run_program
from models.evaluation.asking import MAX_MEGAPIXELS, add_classifier, progress
from models.evaluation.boxes import boxes_of, found_boxes
from models.evaluation.names import SeenField, answer_in_fields, cells_of_fields

SCORES = np.arange(0.05, 0.96, 0.05)
NOTHING = np.empty((0, 5), np.float32)
OVERLAPS = (None, 0.5, 0.6, 0.7)
TEMPERATURES = np.exp(np.linspace(np.log(0.25), np.log(4), 97))
WANTED_ACCURACY = {"pbc": 0.99, "others": 0.95}
PROBABILITIES = np.arange(0.5, 0.96, 0.05)
"""From a half on: a name that is wrong more often than right is none, whatever `val` would allow."""

CELLS_GIVEN_UP = 0.005
MOST_CELL_PROBABILITY = 0.8
"""What is no cell gets less, nearly all of it: a higher bound would cost cells and keep nothing more out."""


def main() -> None:
    args = parse()
    chosen: dict[str, Changes] = {}
    folders = [args.models, *([args.float_models] if (args.float_models / MANIFEST_NAME).exists() else [])]
    for folder in folders:
        load_manifest(folder).choosing(args.classifier)  # before what takes minutes
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "models"
        shutil.copytree(args.models, folder)
        # First without any merging, then the classifier behind the detector as it will be.
        if args.role != "classifier":
            change_entry(folder, "detector", {"thresholds": {"same_cell_iou": None}})
            chosen["detector"] = choose_detector(open_models(ModelsSection(folder=folder)), args.data)
            change_entry(folder, "detector", chosen["detector"])
        if args.role != "detector":
            change_entry(folder, "classifier", {"thresholds": {"temperature": 1.0}}, args.classifier)
            models = open_models(ModelsSection(folder=folder, classifier=args.classifier))
            thresholds = choose_classifier(models, args.data)
            chosen["classifier"] = {"thresholds": thresholds}
    for folder in folders:
        for role, changes in chosen.items():
            change_entry(folder, role, changes, args.classifier if role == "classifier" else None)


def choose_detector(models: Models, data: Path) -> Changes:
    """min_score and same_cell_iou, and what the classes of its boxes are worth."""
    labelled = require_some(read_complete_fields(data, "val"), data, "val")
    cells = require_some(read_cells(data, "val"), data, "val")
    fields = [boxes_of(models, field) for field in progress(labelled, "val fields")]
    pictures: list[tuple[FieldBoxes, int, int]] = []
    for cell in progress(cells, "val pictures"):
        pixels = decode_file(cell.path, MAX_MEGAPIXELS)
        boxes = FieldBoxes(found_boxes(models, pixels, float(SCORES[0])), NOTHING)
        pictures.append((boxes, pixels.shape[1], pixels.shape[0]))
    detector = models.manifest.detector
    wanted = [detector.classes.index(name) for name in detector.classified]
    figures = {}
    for overlap in OVERLAPS:
        f1 = f1_curve([merged(field, overlap) for field in fields], detector.classes, SCORES)
        best = [middle_score(merged(boxes, overlap).found, wanted, *size_px) for boxes, *size_px in pictures]
        found = (np.array(best)[:, None] >= SCORES).mean(0)
        at = int((f1 + found).argmax())
        figures[overlap] = (float(f1[at] + found[at]), round(float(SCORES[at]), 2))
        told = {"f1": float(f1[at]), "middle_found": float(found[at]), "min_score": figures[overlap][1]}
        print(json.dumps({"same_cell_iou": overlap, **told}))
    chosen = max(OVERLAPS, key=lambda overlap: figures[overlap][0])
    min_score = figures[chosen][1]
    found_as = [
        middle_class(merged(boxes, chosen).found, wanted, *size_px, min_score=min_score) for boxes, *size_px in pictures
    ]
    seen = [(cell.class_name, index) for cell, index in zip(cells, found_as, strict=True)]
    return {
        "thresholds": {"min_score": min_score, "same_cell_iou": chosen},
        "contradicted": {
            name: contradicted_share(seen, detector.classes.index(name), agreeing)
            for name, agreeing in detector.agreeing.items()
        },
    }


def contradicted_share(seen: Sequence[tuple[str, int | None]], index: int, agreeing: Sequence[str]) -> float:
    """Of the cells that are found and whose true name is none of `agreeing`, those that get this detector class.

    seen: true name, and index of the detector's class, None = not found. By Laplace's rule of succession.
    """
    given = [found == index for name, found in seen if name not in agreeing and found is not None]
    return round((sum(given) + 1) / (len(given) + 2), 4)


def merged(field: FieldBoxes, overlap: float | None) -> FieldBoxes:
    """The field with boxes of one cell merged as the agent would."""
    return field if overlap is None else dataclasses.replace(field, found=merge_boxes(field.found, overlap))


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """Answers for crops of one source: logs of the probabilities (n, classes), true class (n,), cell probability
    (n,).
    """

    logs: NDArray[np.float64]
    truth: NDArray[np.intp]
    cell: NDArray[np.float64]

    @classmethod
    def of(cls, answers: Sequence[tuple[str, Classification]], classes: Sequence[str]) -> Judged:
        """From pairs of true class name and answer."""
        shares = [list(answer.probabilities.values()) for _, answer in answers]
        return cls(
            np.log(np.maximum(np.array(shares), 1e-12)),
            np.array([classes.index(name) for name, _ in answers]),
            np.array([answer.cell_probability for _, answer in answers]),
        )

    def accepted(self, temperature: float, least: float, least_cell: float) -> tuple[float, float]:
        """Accuracy of what is accepted, and its share of all."""
        shares = softmax(self.logs / temperature)
        is_accepted = (shares.max(1) >= least) & (self.cell >= least_cell)
        is_right = shares.argmax(1) == self.truth
        return float(is_right[is_accepted].mean()) if is_accepted.any() else 0.0, float(is_accepted.mean())


def choose_classifier(models: Models, data: Path) -> dict[str, float]:
    """temperature, min_cell_probability and min_probability; the folder's own temperature must be 1."""
    classes = models.manifest.classifier.classes
    pbc = Judged.of(pbc_answers(models, data), classes)
    named = answer_in_fields(models, cells_of_fields(data, "val"), SeenField.classify)
    others = Judged.of([(str(cell.class_name), answer) for cell, answer in named], classes)
    losses = [negative_log_likelihood(pbc.logs / t, pbc.truth) for t in TEMPERATURES]
    temperature = float(TEMPERATURES[int(np.argmin(losses))])
    least_cell = float(np.floor(np.quantile(np.concatenate((pbc.cell, others.cell)), CELLS_GIVEN_UP) * 100) / 100)
    print(json.dumps({"temperature": temperature, "nll_before": losses[48], "nll_after": min(losses)}))
    chosen = float(PROBABILITIES[-1])
    for least in PROBABILITIES:
        figures = {name: j.accepted(temperature, least, least_cell) for name, j in (("pbc", pbc), ("others", others))}
        print(json.dumps({"min_probability": round(float(least), 2), **figures}))
        if all(figures[name][0] >= wanted for name, wanted in WANTED_ACCURACY.items()):
            chosen = float(least)
            break
    return {
        "temperature": round(temperature, 4),
        "min_probability": round(chosen, 2),
        "min_cell_probability": min(MOST_CELL_PROBABILITY, least_cell),
    }


def pbc_answers(models: Models, data: Path) -> list[tuple[str, Classification]]:
    """Class name and answer of each `val` picture in which the detector finds the cell."""
    answers = []
    for cell in progress(require_some(read_cells(data, "val"), data, "val"), "val crops"):
        pixels = decode_file(cell.path, MAX_MEGAPIXELS)
        height, width = pixels.shape[:2]
        detections = models.detector.detect(pixels)
        found = central_detection(detections, models.manifest.detector.classified, width, height)
        if found is not None:
            crop = models.cutter(pixels, detections).around(found.box)
            answers.append((cell.class_name, models.classifier.classify(crop)))
    return answers


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def negative_log_likelihood(logits: NDArray[np.float64], truth: NDArray[np.intp]) -> float:
    """Mean over the rows."""
    return float(-np.log(softmax(logits)[np.arange(len(truth)), truth] + 1e-12).mean())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("role", nargs="?", choices=("detector", "classifier"), help="only this one; default: both")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    add_classifier(parser)
    parser.add_argument("--float-models", type=Path, default=Path("runs/float"), help="gets the same thresholds")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
