"""Pictures of what was measured, as PNG: training, confusion, precision and recall, calibration, mistakes.

    python -m models.plots runs/plots                                  # of the shipped files, on `test`
    python -m models.plots runs/plots --run runs/classifier            # and the curves of a training run

training.png: every figure of the run's log over its progress. confusion.png: true and given names, shares of each true
class. precision-recall.png: each class of the detector on the complete fields, overlap 0.5. reliability.png: how often
an answer of a confidence is right (Guo et al., arXiv 1706.04599). coverage.png: the error among the most confident
share of the answers (El-Yaniv & Wiener, JMLR 11, 2010). mistakes.png: a contact sheet of the wrong names, the most
confident first. That one shows pictures of the data: it stays where their licence allows it.
"""

from __future__ import annotations

from models.common import needs_matplotlib  # isort: skip  # noqa: F401

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from agent.inference.models import open_models
from models.common.labels import CellImage, read_complete_fields, read_rgb
from models.common.logs import read_log
from models.common.metrics import FieldBoxes, class_figures_by_name, confidence_bins, precision_and_recall
from models.common.programs import run_program
from models.evaluation.asking import add_classifier, add_options, progress, section_of
from models.evaluation.boxes import boxes_of
from models.evaluation.names import NamedPictures, name_pictures

STYLE = {"figure.constrained_layout.use": True, "axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
TILE_PX = 128
ACROSS = 8
MOST_MISTAKES = 48


def main() -> None:
    args = parse()
    args.folder.mkdir(parents=True, exist_ok=True)
    mpl.rcParams.update(STYLE)
    models = open_models(section_of(args))
    fields = read_complete_fields(args.data, args.split)
    boxes = [boxes_of(models, field) for field in progress(fields, "fields")]
    named = name_pictures(models, args.data, args.split)
    figures = {
        "precision-recall": draw_precision_recall(boxes, models.manifest.detector.classes),
        "confusion": draw_confusion(named, models.manifest.classifier.classes),
        "reliability": draw_reliability(named.probabilities, named.is_right),
        "coverage": draw_coverage(named.confidences, named.is_right),
    }
    if args.run is not None:
        figures["training"] = draw_training(read_log(args.run))
    for name, figure in figures.items():
        figure.savefig(args.folder / f"{name}.png", dpi=130)
    cv2.imwrite(str(args.folder / "mistakes.png"), cv2.cvtColor(contact_sheet(mistakes(named)), cv2.COLOR_RGB2BGR))
    print(f"{len(figures) + 1} pictures in {args.folder}")


def draw_training(log: Sequence[dict[str, Any]]) -> Figure:
    """Losses above, what was judged on `val` below; an epoch that was not judged leaves no point."""
    figure = Figure(figsize=(7, 6))
    axes = figure.subplots(2, sharex=True)
    names = sorted({name for line in log for name in line} - {"epoch", "progress", "size_px"})
    for name in names:
        points = [(line["progress"], line[name]) for line in log if name in line]
        row = 0 if name.startswith("loss") else 1
        axes[row].plot(*zip(*points, strict=True), marker=".", label=name)
    axes[0].set_ylabel("loss")
    axes[1].set(xlabel="progress of the run", ylabel="on val")
    for ax in axes:
        ax.legend(fontsize=7, ncols=2)
    return figure


def draw_confusion(named: NamedPictures, classes: Sequence[str]) -> Figure:
    """Rows are true classes; the colour is the share of the row, the number the count."""
    counts = np.array(class_figures_by_name(named.pairs, classes)["confusion"])
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure, ax = one_plot((6, 5.2))
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        ax.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
    ax.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    ax.set_yticks(range(len(classes)), classes)
    ax.set(xlabel="given", ylabel="true")
    ax.spines[:].set_visible(False)
    return figure


def draw_precision_recall(boxes: Sequence[FieldBoxes], classes: Sequence[str]) -> Figure:
    """A curve for each class that occurs."""
    figure, ax = one_plot((5, 4))
    for index, name in enumerate(classes):
        cells = sum(int((field.true[:, 0] == index).sum()) for field in boxes)
        if cells:
            precision, recall = precision_and_recall(boxes, index, cells)
            ax.plot(recall[:, 0], precision[:, 0], label=f"{name}, {cells} cells")
    ax.set(xlabel="recall", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.01))
    ax.legend(loc="lower left")
    return figure


def draw_reliability(probabilities: NDArray[np.float64], is_right: NDArray[np.bool_]) -> Figure:
    """Share of right answers in each bin of confidence, and how many answers a bin holds."""
    bins = confidence_bins(probabilities, is_right)
    figure, ax = one_plot((5, 4))
    ax.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    ax.plot([said for _, said, _ in bins], [right for _, _, right in bins], marker="o")
    for count, said, right in bins:
        ax.annotate(str(count), (said, right), textcoords="offset points", xytext=(4, -10), fontsize=7)
    ax.set(xlabel="confidence", ylabel="right", xlim=(0, 1.01), ylim=(0, 1.01))
    return figure


def draw_coverage(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> Figure:
    """Error among the most confident share of the answers."""
    ranked = is_right[np.argsort(-confidences, kind="stable")]
    answered = np.arange(1, len(ranked) + 1)
    figure, ax = one_plot((5, 4))
    ax.plot(answered / len(ranked), 100 * (1 - ranked.cumsum() / answered))
    ax.set(xlabel="coverage", ylabel="error, %", xlim=(0, 1), ylim=(0, None))
    return figure


def one_plot(size_inch: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size_inch)
    return figure, figure.subplots()


@dataclass(frozen=True, slots=True)
class Mistake:
    """A picture with a wrong name. probability: of that name, 0 to 1."""

    cell: CellImage
    given: str
    probability: float


def mistakes(named: NamedPictures) -> list[Mistake]:
    """The wrong names, the most confident first."""
    answers = zip(named.cells, named.answers, strict=True)
    wrong = [Mistake(c, a.class_name, a.probability) for c, a in answers if a.class_name != c.class_name]
    return sorted(wrong, key=lambda mistake: -mistake.probability)


def contact_sheet(found: Sequence[Mistake]) -> NDArray[np.uint8]:
    """RGB; a tile for each mistake with the true name, the given one and its probability in %."""
    tiles = [tile(mistake) for mistake in found[:MOST_MISTAKES]]
    blank = np.full((TILE_PX + 26, TILE_PX, 3), 255, np.uint8)
    tiles += [blank] * (-len(tiles) % ACROSS or (ACROSS if not tiles else 0))
    return np.vstack([np.hstack(tiles[k : k + ACROSS]) for k in range(0, len(tiles), ACROSS)])


def tile(mistake: Mistake) -> NDArray[np.uint8]:
    picture = cv2.resize(read_rgb(mistake.cell.path), (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA)
    framed = cv2.copyMakeBorder(picture, 0, 26, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
    for line, text in enumerate((mistake.cell.class_name, f"{mistake.given} {100 * mistake.probability:.0f}")):
        cv2.putText(framed, text, (2, TILE_PX + 10 + 12 * line), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (0, 0, 0))
    return np.asarray(framed, np.uint8)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    parser.add_argument("--run", type=Path, help="folder of a training run, for its curves")
    add_options(parser)
    add_classifier(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
