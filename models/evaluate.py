"""Figures of the shipped files, measured through the agent's own inference.

    python -m models.evaluate detector --split test
    python -m models.evaluate large-frames --split test
    python -m models.evaluate close-ups --split test
    python -m models.evaluate classifier --split test --json
    python -m models.evaluate two-stage --split test
    python -m models.evaluate eight-classes --split test
    python -m models.evaluate microscopes --split test
    python -m models.evaluate framings --split test
    python -m models.evaluate no-cell --split test

detector: mAP on the `complete` fields of each source and of all; the half-labelled BCCD fields stand apart, and all
BCCD fields once more with the labels that their authors published. large-frames: the same fields, nine and sixteen side
by side, as a large sensor shows them; close-ups: their middles (both with `--most-tiles 1` for the detector alone).
classifier: each PBC picture as
`hematovision classify` takes it: names, calibration, what a reject option gains, and the attributes of those that have
any.
two-stage: as the agent counts on a field, with its thresholds and rules; a cell that it does not find or not trust is
wrong. eight-classes: mAP of both together on the PBC fields, one box and one name a cell, as the study reports it.
microscopes: cells of other microscopes' fields that we named by eye, in the boxes of the label files. framings: the
same as pictures cut tightly or widely, as `hematovision classify` takes them. no-cell: crops of red cells, of pairs
of them, of background, of cells cut, smeared or out of focus, and of debris drawn, which should get no name.
Splits are by image (no patient or slide is known), so that figures inside one source are optimistic.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agent.inference.models import Models, open_models
from models.common.labels import LAYOUT
from models.common.manifests import find_entry, read_manifest, write_manifest
from models.common.programs import run_program
from models.evaluation.asking import add_classifier, add_options, section_of
from models.evaluation.boxes import (
    evaluate_close_ups,
    evaluate_detector,
    evaluate_eight_classes,
    evaluate_large_frames,
)
from models.evaluation.counts import evaluate_two_stage
from models.evaluation.names import evaluate_classifier, evaluate_framings, evaluate_microscopes
from models.evaluation.no_cells import evaluate_no_cell


def main() -> None:
    args = parse()
    models = open_models(section_of(args))
    measure = EVALUATIONS[args.what]
    if args.random_split is not None:
        if measure is not evaluate_classifier:
            raise SystemExit("--random-split goes with classifier: nothing else is split by PBC picture alone")
        measure = partial(evaluate_classifier, random_seed=args.random_split)
    figures = measure(models, args.data, args.split)
    figures = {
        "what": args.what,
        "split": args.split,
        "runtime": models.runtime,
        "delegate": models.delegate,
        "names": {"detector": models.detector.identity.name, "classifier": models.classifier.identity.name},
        "sha256": {"detector": models.detector.identity.sha256, "classifier": models.classifier.identity.sha256},
        **figures,
    }
    print(json.dumps(figures)) if args.json else show(figures)
    if args.write_confusion:
        write_confusion(args.models, figures, args.classifier)


def write_confusion(folder: Path, figures: dict[str, Any], classifier: str | None = None) -> None:
    """Put the measured confusion into the folder's manifest; only `two-stage` measures it."""
    if "for_manifest" not in figures:
        raise SystemExit("--write-confusion goes with two-stage: only it measures what the agent counts")
    manifest = read_manifest(folder)
    find_entry(manifest, "classifier", classifier)["confusion"] = figures["for_manifest"]
    write_manifest(folder, manifest)


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
    if "sources" in figures or "framings" in figures:
        first = "microscope" if "sources" in figures else "picture, in boxes of the cell"
        table = Table(first, "cells", "accuracy", "accepted", "accuracy of accepted")
        for key, f in (figures.get("sources") or figures["framings"]).items():
            shares = ("-" if f[k] is None else f"{f[k]:.3f}" for k in ("accuracy", "accepted", "accuracy_of_accepted"))
            table.add_row(key, str(f["n"]), *shares)
        console.print(table)
        return
    if "kinds" in figures:
        table = Table("crop of", "n", "gets a name", "AUROC against cells")
        for key, f in figures["kinds"].items():
            table.add_row(key, str(f["n"]), f"{f['named']:.3f}", "-" if f["auroc"] is None else f"{f['auroc']:.4f}")
        console.print(table)
        table = Table("debris in a field", "n", "boxed as nucleated or platelet", "counted")
        for key, f in figures["in_fields"].items():
            table.add_row(key, str(f["n"]), f"{f['boxed']:.3f}", f"{f['named']:.3f}")
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


EVALUATIONS: dict[str, Callable[[Models, Path, str], dict[str, Any]]] = {
    "detector": evaluate_detector,
    "large-frames": evaluate_large_frames,
    "close-ups": evaluate_close_ups,
    "classifier": evaluate_classifier,
    "two-stage": evaluate_two_stage,
    "eight-classes": evaluate_eight_classes,
    "microscopes": evaluate_microscopes,
    "framings": evaluate_framings,
    "no-cell": evaluate_no_cell,
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=LAYOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=EVALUATIONS)
    add_options(parser)
    add_classifier(parser)
    parser.add_argument(
        "--random-split", type=int, metavar="SEED", help="classifier: a 70/10/20 split as the study draws"
    )
    parser.add_argument("--write-confusion", action="store_true", help="two-stage: note the confusion in the manifest")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
