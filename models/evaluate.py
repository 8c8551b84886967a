"""Figures of the shipped files, measured through the agent's own inference.

    python -m models.evaluate detector --split test
    python -m models.evaluate classifier --split test --json
    python -m models.evaluate two-stage --split test
    python -m models.evaluate eight-classes --split test
    python -m models.evaluate microscopes --split test
    python -m models.evaluate no-cell --split test

detector: mAP on the `complete` fields of each source and of all; the half-labelled BCCD fields stand apart, and all
BCCD fields once more with the labels that their authors published. classifier: each PBC picture as `hematovision
classify` takes it: names, calibration, what a reject option gains, and the attributes of those that have any.
two-stage: as the agent counts on a field, with its thresholds and rules; a cell that it does not find or not trust is
wrong. eight-classes: mAP of both together on the PBC fields, one box and one name a cell, as the study reports it.
microscopes: cells of other microscopes' fields that we named by eye, in the boxes of the label files. no-cell: crops of
red cells, background and ruined cells, which should get no name.
Splits are by image (no patient or slide is known), so that figures inside one source are optimistic.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.crops import central_detection, cut_crop
from agent.camera.camera import SYSTEM_CLOCKS, make_frame
from agent.camera.decoding import decode_file
from agent.config import Config, ModelsSection
from agent.domain import (
    Attribute,
    Box,
    Cell,
    CellStatus,
    Classification,
    ClockReading,
    FrameQuality,
    Pixels,
    SampleState,
)
from agent.inference.models import Models, open_models
from agent.pipeline import Bench, Stopwatch, analyse_frame, make_bench
from models.common.labels import (
    DETECTOR_CLASSES,
    CellImage,
    FieldImage,
    NamedBox,
    read_attributes,
    read_boxes,
    read_cells,
    read_fields,
    read_foreign_cells,
    read_published_boxes,
)
from models.common.metrics import (
    FieldBoxes,
    accuracy_at_coverage,
    area_under_roc,
    box_overlaps,
    class_figures_by_name,
    detection_figures,
    expected_calibration_error,
)

EVALUATION_SCORE = 0.01  # low enough that the precision-recall curve reaches its end
MAX_MEGAPIXELS = 80
MISSED = "missed"
NUCLEATED = DETECTOR_CLASSES[0]
COVERAGES = (1.0, 0.98, 0.95, 0.9, 0.8)
SAME_CELL = 0.3  # overlap from which a box is that of a cell whose class nobody knows
RUIN_SHARE = 0.055
"""Sigma of the blur that takes a cell its name, as a share of the crop's side: 7 px of 128."""


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
    if args.write_confusion:
        write_confusion(args.models, figures)


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
    pairs = {name: [measured[field.path] for field in group] for name, group in groups.items() if group}
    pairs |= published_pairs({field: measured[field.path] for field in fields if field.source == "bccd"})
    classes = models.manifest.detector.classes
    return {
        "fields": {name: len(found) for name, found in pairs.items()},
        "groups": {
            name: {key: dataclasses.asdict(value) for key, value in detection_figures(found, classes).items()}
            for name, found in pairs.items()
        },
    }


def published_pairs(measured: Mapping[FieldImage, FieldBoxes]) -> dict[str, list[FieldBoxes]]:
    """BCCD with the labels that its authors published, which leave about half of the red cells out.

    Beside the detector's boxes stand, as the most that anybody can reach who finds every cell, those of the new labels.
    """
    published, perfect = [], []
    for field, (found, true) in ((field, (m.found, m.true)) for field, m in measured.items()):
        height, width = decode_file(field.path, MAX_MEGAPIXELS).shape[:2]
        labelled = read_published_boxes(field, width, height)
        published.append(FieldBoxes(found, labelled))
        if field.is_complete:
            sure = np.insert(true, 1, 1.0, axis=1)
            perfect.append(FieldBoxes(sure, labelled))
    named = {"bccd, published labels": published, "bccd, published labels against complete ones": perfect}
    return {name: found for name, found in named.items() if found}


def boxes_of(models: Models, field: FieldImage) -> FieldBoxes:
    """What the shipped detector finds in a field, and what the label file says."""
    return field_boxes(models, decode_file(field.path, MAX_MEGAPIXELS), field)


def field_boxes(models: Models, pixels: Pixels, field: FieldImage) -> FieldBoxes:
    """The same for pixels of that field, which may have been changed since."""
    true = read_boxes(field, pixels.shape[1], pixels.shape[0])
    return FieldBoxes(found_boxes(models, pixels, EVALUATION_SCORE), true)


def found_boxes(models: Models, pixels: Pixels, min_score: float) -> NDArray[np.float32]:
    """What the shipped detector finds, (found, 6): class, score, x_min, y_min, x_max, y_max in px; best first."""
    classes = models.manifest.detector.classes
    found = [
        (classes.index(d.class_name), d.score, d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)
        for d in models.detector.detect(pixels, min_score)
    ]
    return np.array(found, np.float32).reshape(-1, 6)


def evaluate_classifier(models: Models, data: Path, split: str) -> dict[str, Any]:
    """Names, calibration, the reject option and the attributes on the PBC pictures."""
    named = name_pictures(models, data, split)
    attributes = read_attributes(data)
    pairs = zip(named.cells, named.answers, strict=True)
    told = [(attributes[cell.key], answer.morphology) for cell, answer in pairs if cell.key in attributes]
    return {
        **class_figures_by_name(named.pairs, models.manifest.classifier.classes),
        **confidence_figures(named, models.manifest.classifier.thresholds.temperature),
        "morphology": morphology_figures(told),
    }


@dataclasses.dataclass(frozen=True, slots=True)
class NamedPictures:
    """PBC pictures and what `hematovision classify` answers to each."""

    cells: Sequence[CellImage]
    answers: Sequence[Classification]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """True and given name of each."""
        return [(cell.class_name, answer.class_name) for cell, answer in zip(self.cells, self.answers, strict=True)]

    @property
    def is_right(self) -> NDArray[np.bool_]:
        return np.array([true == given for true, given in self.pairs])

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """Of the given name, (pictures,), 0 to 1."""
        return np.array([answer.probability for answer in self.answers])

    @property
    def confidences(self) -> NDArray[np.float64]:
        """Of the given name and of being a cell at all, (pictures,), 0 to 1: what the reject option goes by."""
        return self.probabilities * np.array([answer.cell_probability for answer in self.answers])


def name_pictures(models: Models, data: Path, split: str) -> NamedPictures:
    """Each PBC picture of a split as `hematovision classify` takes it."""
    cells = read_cells(data, split)
    answers = [models.name_central_cell(decode_file(c.path, MAX_MEGAPIXELS)) for c in progress(cells, "pictures")]
    return NamedPictures(cells, answers)


def confidence_figures(named: NamedPictures, temperature: float) -> dict[str, Any]:
    """Calibration error before and after the temperature, and accuracy of the more confident part."""
    raw = np.array([list(answer.probabilities.values()) for answer in named.answers]) ** temperature
    before = (raw / raw.sum(1, keepdims=True)).max(1)
    return {
        "calibration_error": {
            "before": expected_calibration_error(before, named.is_right),
            "after": expected_calibration_error(named.probabilities, named.is_right),
        },
        "accuracy_at_coverage": accuracy_at_coverage(named.confidences, named.is_right, COVERAGES),
    }


def morphology_figures(told: Sequence[tuple[Mapping[str, str], Mapping[str, Attribute]]]) -> dict[str, Any] | None:
    """Accuracy and macro-F1 of each attribute, and their means; None where the model does not describe cells."""
    told = [pair for pair in told if pair[1]]
    if not told:
        return None
    figures = {}
    for name in told[0][0]:
        pairs = [(true[name], given[name].value) for true, given in told]
        by_value = class_figures_by_name(pairs, sorted({true for true, _ in pairs}))
        figures[name] = {key: by_value[key] for key in ("accuracy", "macro_f1")}
    means = {f"mean_{key}": float(np.mean([f[key] for f in figures.values()])) for key in ("accuracy", "macro_f1")}
    return {"n": len(told), **means, "attributes": figures}


def evaluate_microscopes(models: Models, data: Path, split: str) -> dict[str, Any]:
    """Names of nucleated cells from other microscopes, which `models/data/README.md` tells of, by source."""
    cells = [cell for cell in read_foreign_cells(data, (split,)) if cell.class_name is not None]
    by_source: dict[str, list[tuple[NamedBox, Classification]]] = {}
    for cell in progress(cells, "cells"):
        by_source.setdefault(cell.source, []).append((cell, classify_box(models, cell.path, cell.box)))
    classes = models.manifest.classifier.classes
    rules = models.naming_rules()
    sources = {}
    for source, pairs in by_source.items():
        names = [(str(cell.class_name), answer.class_name) for cell, answer in pairs]
        accepted = np.array([rules.believes(answer) for _, answer in pairs])
        is_right = np.array([true == given for true, given in names])
        figures = class_figures_by_name(names, classes)
        sources[source] = {
            "n": figures["n"],
            "accuracy": figures["accuracy"],
            "accepted": float(accepted.mean()),
            "accuracy_of_accepted": float(is_right[accepted].mean()) if accepted.any() else None,
            "classes": {name: f for name, f in figures["classes"].items() if f["n"]},
        }
    return {"sources": sources}


def classify_box(models: Models, path: Path, box: tuple[float, float, float, float]) -> Classification:
    """The classifier's answer for a box of a field, cut as the agent cuts it."""
    return classify_place(models, decode_file(path, MAX_MEGAPIXELS), Box(*box))


def classify_place(models: Models, pixels: Pixels, box: Box) -> Classification:
    """The same for decoded pixels."""
    return models.classifier.classify(cut_crop(pixels, box, models.manifest.classifier.crop.margin))


def evaluate_no_cell(models: Models, data: Path, split: str) -> dict[str, Any]:
    """How many crops of what is no cell get a name all the same, by kind, and how well the two are told apart."""
    rules = models.naming_rules()
    scores: dict[str, list[float]] = {"cell": [], "red cell": [], "background": [], "ruined cell": []}
    accepted: dict[str, list[bool]] = {kind: [] for kind in scores}
    rng = np.random.default_rng(11)
    for field in progress([f for f in read_fields(data, split) if f.is_complete], "fields"):
        pixels = decode_file(field.path, MAX_MEGAPIXELS)
        for kind, crop in kinds_of_crops(pixels, field, models.manifest.classifier.crop.margin, rng):
            answer = models.classifier.classify(crop)
            scores[kind].append(answer.cell_probability)
            accepted[kind].append(rules.believes(answer))
    cells = np.array(scores["cell"])
    return {
        "kinds": {
            kind: {
                "n": len(scores[kind]),
                "named": float(np.mean(accepted[kind])),
                "auroc": None if kind == "cell" else area_under_roc(cells, np.array(scores[kind])),
            }
            for kind in scores
        }
    }


def kinds_of_crops(
    pixels: Pixels, field: FieldImage, margin: float, rng: np.random.Generator
) -> Iterator[tuple[str, Pixels]]:
    """Nucleated cells of a field, the same ruined by blur, two of its red cells, one place without any box."""
    height, width = pixels.shape[:2]
    boxes = read_boxes(field, width, height)
    nucleated, red = boxes[boxes[:, 0] == 0, 1:], boxes[boxes[:, 0] == 1, 1:]
    for corners in nucleated:
        crop = cut_crop(pixels, Box(*(float(v) for v in corners)), margin)
        yield "cell", crop
        yield "ruined cell", np.asarray(cv2.GaussianBlur(crop, (0, 0), crop.shape[0] * RUIN_SHARE), np.uint8)
    for index in rng.permutation(len(red))[:2]:
        box = red[index]
        if not len(nucleated) or box_overlaps(box[None], nucleated).max() < 0.02:
            yield "red cell", cut_crop(pixels, Box(*(float(v) for v in box)), margin)
    for _ in range(50):
        side = rng.uniform(30, 120)
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
        place = np.array([[x, y, x + side, y + side]], np.float32)
        if box_overlaps(place, boxes[:, 1:]).max(initial=0) < 0.01:
            yield "background", cut_crop(pixels, Box(x, y, x + side, y + side), margin)
            return


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


def evaluate_eight_classes(models: Models, data: Path, split: str) -> dict[str, Any]:
    """The study's table: each cell one box with one of the eight names, on the PBC fields.

    A box's score is the detector's times the probability of the name. Of the nucleated cells of a field only the one in
    the middle has a known class; boxes of the others are left out of the count. Classes without any box are not there.
    """
    classes = models.manifest.classifier.classes
    named = {cell.path.stem: cell.class_name for cell in read_cells(data, split)}
    fields = [field for field in read_fields(data, split) if field.source == "pbc" and field.path.stem in named]
    measured = [named_boxes(models, field, named[field.path.stem]) for field in progress(fields, "fields")]
    figures = detection_figures(measured, classes)
    return {
        "fields": {"pbc": len(fields)},
        "groups": {"pbc": {name: dataclasses.asdict(f) for name, f in figures.items()}},
    }


def named_boxes(models: Models, field: FieldImage, class_name: str) -> FieldBoxes:
    """Boxes of the classifier's classes in a field whose middle cell is known, and what the two models say together."""
    pixels = decode_file(field.path, MAX_MEGAPIXELS)
    manifest = models.manifest
    classes = manifest.classifier.classes
    labelled = read_boxes(field, pixels.shape[1], pixels.shape[0])
    nucleated, platelets = (
        labelled[labelled[:, 0] == DETECTOR_CLASSES.index(name)] for name in (NUCLEATED, "platelet")
    )
    middle = np.array([pixels.shape[1] / 2, pixels.shape[0] / 2])
    away_px = np.linalg.norm((nucleated[:, 1:3] + nucleated[:, 3:]) / 2 - middle, axis=1)
    order = np.argsort(away_px)
    known = np.concatenate((nucleated[order[:1]], platelets))
    known[:, 0] = classes.index("platelet")
    known[: len(order[:1]), 0] = classes.index(class_name)
    found = []
    for d in models.detector.detect(pixels, EVALUATION_SCORE):
        if d.class_name in manifest.detector.classified:
            answer = classify_place(models, pixels, d.box)
            corners = (d.box.x_min, d.box.y_min, d.box.x_max, d.box.y_max)
            found.append((classes.index(answer.class_name), d.score * answer.probability, *corners))
    rows = np.array(found, np.float32).reshape(-1, 6)
    unknown = nucleated[order[1:], 1:]
    is_unknown = (box_overlaps(rows[:, 2:], unknown) > SAME_CELL).any(1) if len(unknown) else np.zeros(len(rows), bool)
    return FieldBoxes(rows[~is_unknown], known)


def write_confusion(folder: Path, figures: dict[str, Any]) -> None:
    """Put the measured confusion into the folder's manifest; only `two-stage` measures it."""
    if "for_manifest" not in figures:
        raise SystemExit("--write-confusion goes with two-stage: only it measures what the agent counts")
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["classifier"]["confusion"] = figures["for_manifest"]
    file.write_text(json.dumps(manifest, indent=2) + "\n")


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
    if "sources" in figures:
        table = Table("microscope", "cells", "accuracy", "accepted", "accuracy of accepted")
        for key, f in figures["sources"].items():
            shares = ("-" if f[k] is None else f"{f[k]:.3f}" for k in ("accuracy", "accepted", "accuracy_of_accepted"))
            table.add_row(key, str(f["n"]), *shares)
        console.print(table)
        return
    if "kinds" in figures:
        table = Table("crop of", "n", "gets a name", "AUROC against cells")
        for key, f in figures["kinds"].items():
            table.add_row(key, str(f["n"]), f"{f['named']:.3f}", "-" if f["auroc"] is None else f"{f['auroc']:.4f}")
        console.print(table)
        return
    summary = f"accuracy {figures['accuracy']:.4f}, macro-F1 {figures['macro_f1']:.4f}, n {figures['n']}"
    if "missed" in figures:
        summary += f", not found {figures['missed']}, unidentified {figures['unidentified']}"
    table = Table("class", "n", "P", "R", "F1", title=summary)
    for key, f in figures["classes"].items():
        table.add_row(key, str(f["n"]), *(f"{f[k]:.4f}" for k in ("precision", "recall", "f1")))
    console.print(table)
    if "calibration_error" in figures:
        error = figures["calibration_error"]
        console.print(f"calibration error {error['before']:.4f} before, {error['after']:.4f} after the temperature")
        kept = ", ".join(f"{float(k):.0%}: {v:.4f}" for k, v in figures["accuracy_at_coverage"].items())
        console.print(f"accuracy of the most confident part: {kept}")
    if figures.get("morphology"):
        morphology = figures["morphology"]
        means = f"mean accuracy {morphology['mean_accuracy']:.4f}, macro-F1 {morphology['mean_macro_f1']:.4f}"
        table = Table("attribute", "accuracy", "macro-F1", title=f"{means}, n {morphology['n']}")
        for key, f in morphology["attributes"].items():
            table.add_row(key, f"{f['accuracy']:.4f}", f"{f['macro_f1']:.4f}")
        console.print(table)


def progress(sequence: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar on a terminal's standard error."""
    console = Console(stderr=True)
    return track(list(sequence), what, console=console, disable=not console.is_terminal)


EVALUATIONS: dict[str, Callable[[Models, Path, str], dict[str, Any]]] = {
    "detector": evaluate_detector,
    "classifier": evaluate_classifier,
    "two-stage": evaluate_two_stage,
    "eight-classes": evaluate_eight_classes,
    "microscopes": evaluate_microscopes,
    "no-cell": evaluate_no_cell,
}


def add_options(parser: argparse.ArgumentParser, split: str = "test") -> None:
    """What every evaluation of shipped files is asked with. split: the default."""
    parser.add_argument("--split", choices=("train", "val", "test"), default=split)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=EVALUATIONS)
    add_options(parser)
    parser.add_argument("--write-confusion", action="store_true", help="two-stage: note the confusion in the manifest")
    return parser.parse_args()


if __name__ == "__main__":
    main()
