"""Average precision of boxes, and how often a named class is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agent.inference.merging import best_of_each, box_overlaps

OVERLAPS = np.arange(0.5, 0.96, 0.05)
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, slots=True, eq=False)
class FieldBoxes:
    """What was found, (found, 6) class, score, x_min..y_max, and what is there, (true, 5) class, x_min..y_max."""

    found: NDArray[np.float32]
    true: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """Detection figures of one class; precision and recall at the score of the best F1 and overlap 0.5."""

    cells: int
    precision: float
    recall: float
    map50: float
    map50_95: float


def merge_boxes(found: NDArray[np.float32], overlap: float) -> NDArray[np.float32]:
    """Boxes of one cell merged as the agent would: of those that overlap by more the best stands. found: as in
    `FieldBoxes`; the best come first.
    """
    order = np.argsort(-found[:, 1], kind="stable")
    return found[best_of_each(found[:, 2:], order, overlap)]


def middle_score(found: NDArray[np.float32], wanted: Sequence[int], width_px: int, height_px: int) -> float:
    """Best score of the boxes of these classes that hold a picture's middle; 0 = none does.

    found: as in `FieldBoxes`.
    """
    return float(_over_the_middle(found, wanted, width_px, height_px)[:, 1].max(initial=0.0))


def middle_class(
    found: NDArray[np.float32], wanted: Sequence[int], width_px: int, height_px: int, *, min_score: float
) -> int | None:
    """The class of that box, if its score is no less; None = there is none."""
    holding = _over_the_middle(found, wanted, width_px, height_px)
    holding = holding[holding[:, 1] >= min_score]
    return int(holding[holding[:, 1].argmax(), 0]) if len(holding) else None


def _over_the_middle(
    found: NDArray[np.float32], wanted: Sequence[int], width_px: int, height_px: int
) -> NDArray[np.float32]:
    x, y = width_px / 2, height_px / 2
    holds = (found[:, 2] <= x) & (x <= found[:, 4]) & (found[:, 3] <= y) & (y <= found[:, 5])
    return found[holds & np.isin(found[:, 0], wanted)]


def detection_figures(fields: Sequence[FieldBoxes], classes: Sequence[str]) -> dict[str, ClassFigures]:
    """Figures for each class that occurs, and their mean as `all`; AP over 101 recall points as COCO defines it."""
    figures = {}
    for index, name in enumerate(classes):
        cells = sum(int((field.true[:, 0] == index).sum()) for field in fields)
        if cells:
            figures[name] = _class_figures(fields, index, cells)
    values = list(figures.values())
    mean = [float(np.mean([getattr(v, key) for v in values])) for key in ("precision", "recall", "map50", "map50_95")]
    figures["all"] = ClassFigures(sum(v.cells for v in values), *mean)
    return figures


def _class_figures(fields: Sequence[FieldBoxes], index: int, cells: int) -> ClassFigures:
    precision, recall = precision_and_recall(fields, index, cells)
    averages = [_average_precision(recall[:, k], precision[:, k]) for k in range(len(OVERLAPS))]
    f1 = 2 * precision[:, 0] * recall[:, 0] / (precision[:, 0] + recall[:, 0] + 1e-9)
    best = int(f1.argmax()) if len(f1) else None
    return ClassFigures(
        cells,
        float(precision[best, 0]) if best is not None else 0.0,
        float(recall[best, 0]) if best is not None else 0.0,
        averages[0],
        float(np.mean(averages)),
    )


def precision_and_recall(
    fields: Sequence[FieldBoxes], index: int, cells: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Precision and recall of one class at every score that occurs, the highest first, (scores, overlaps of OVERLAPS).

    cells: how many there are.
    """
    scores, hit = _ranked(fields, index)
    right, answered = hit.cumsum(0), np.arange(1, len(hit) + 1)
    is_last = np.append(scores[1:] != scores[:-1], True)[: len(hit)]  # no threshold lies between boxes of one score
    return right[is_last] / answered[is_last, None], right[is_last] / cells


def _matches(overlaps: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Which found boxes (best score first) take a true box that none before took, at each overlap of OVERLAPS."""
    hits = np.zeros((len(overlaps), len(OVERLAPS)), bool)
    for k, least in enumerate(OVERLAPS):
        free = np.ones(overlaps.shape[1], bool)
        for row in range(len(overlaps)):
            candidates = np.where(free, overlaps[row], 0)
            if candidates.size and candidates.max() >= least:
                free[candidates.argmax()] = False
                hits[row, k] = True
    return hits


def _average_precision(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    positions = np.searchsorted(recall, RECALLS, side="left")
    return float(np.mean([envelope[p] if p < len(envelope) else 0.0 for p in positions]))


def class_figures_by_name(answers: Sequence[tuple[str, str]], classes: Sequence[str]) -> dict[str, Any]:
    """Accuracy, macro-F1 and precision / recall / F1 of each class from pairs of (true, answered) names."""
    figures = {}
    for name in classes:
        right = sum(true == answer == name for true, answer in answers)
        true_count = sum(true == name for true, _ in answers)
        answered = sum(answer == name for _, answer in answers)
        precision = right / answered if answered else 0.0
        recall = right / true_count if true_count else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        figures[name] = {"n": true_count, "precision": precision, "recall": recall, "f1": f1}
    return {
        "n": len(answers),
        "accuracy": sum(true == answer for true, answer in answers) / max(1, len(answers)),
        "macro_f1": float(np.mean([f["f1"] for f in figures.values()])),
        "classes": figures,
        "confusion": [[sum(a == (t, n) for a in answers) for n in classes] for t in classes],
    }


def f1_curve(fields: Sequence[FieldBoxes], classes: Sequence[str], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 at overlap 0.5 for each of the score thresholds, (len(scores),), as a mean over the classes that occur."""
    curves = []
    for index in range(len(classes)):
        cells = sum(int((field.true[:, 0] == index).sum()) for field in fields)
        if not cells:
            continue
        found, hits = _ranked(fields, index)
        right = np.array([hits[found >= least, 0].sum() for least in scores])
        answered = np.array([(found >= least).sum() for least in scores])
        curves.append(2 * right / (answered + cells))
    mean: NDArray[np.float64] = np.mean(curves, 0)
    return mean


def _ranked(fields: Sequence[FieldBoxes], index: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Scores of all boxes found of one class, best first, (found,), and which overlaps each reaches."""
    scores, hits = [], []
    for field in fields:
        found = field.found[field.found[:, 0] == index]
        found = found[np.argsort(-found[:, 1], kind="stable")]
        true = field.true[field.true[:, 0] == index, 1:]
        scores.append(found[:, 1])
        hits.append(_matches(box_overlaps(found[:, 2:], true)))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return np.concatenate(scores)[order], np.concatenate(hits)[order]


CALIBRATION_BINS = 15


def expected_calibration_error(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """How far confidence is from accuracy, 0 to 1: mean gap over 15 bins of equal width, weighted by what they hold.

    Source: Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, equation 3.
    """
    bins = confidence_bins(confidences, is_right)
    return float(sum(count * abs(right - said) for count, said, right in bins) / len(confidences))


def confidence_bins(confidences: NDArray[np.float64], is_right: NDArray[np.bool_]) -> list[tuple[int, float, float]]:
    """Of each of the bins that holds answers: how many, their mean confidence, and the share that is right."""
    bins = np.clip(np.ceil(confidences * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    members = (bins == k for k in np.unique(bins))
    return [(int(m.sum()), float(confidences[m].mean()), float(is_right[m].mean())) for m in members]


def accuracy_at_coverage(
    confidences: NDArray[np.float64], is_right: NDArray[np.bool_], coverages: Sequence[float]
) -> dict[str, float]:
    """Accuracy among the most confident share of the answers, for each share (El-Yaniv & Wiener, JMLR 11, 2010)."""
    ranked = is_right[np.argsort(-confidences, kind="stable")]
    return {f"{share:g}": float(ranked[: max(1, round(share * len(ranked)))].mean()) for share in coverages}


def area_under_roc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """Probability that a positive scores above a negative, ties counted half (Mann-Whitney)."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left")
    not_above = np.searchsorted(ordered, positive, "right")
    return float((below + not_above).mean() / 2 / len(negative))
