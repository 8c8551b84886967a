"""Adapt the classifier to a microscope without any labels.

    python -m models.adapt --images fields/ --output my-models [--minutes 8] [--data ../shared/data]

images: a few hundred fields of the laboratory's own microscope. The detector finds their cells; then the norms'
statistics move towards those of the new cells (Schneider et al., arXiv 2006.16971), and the net learns from the cells
that it is sure of when it sees them in several ways (self-training). The int8 ranges are taken from the new cells.
Prints how many cells have a trusted name before and after, and how many kept their name; with --data also the accuracy
on PBC `val`, and nothing is written if that falls by more than a point (exit status 1).
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.errors import FrameUnreadable
from agent.inference.models import Models, open_models
from models.classifier import crops, tuning
from models.classifier.locate import read_boxes
from models.common.labels import NUCLEATED, Rgb, read_cells
from models.common.programs import CONVERTER, FOUND_WANTING, end, run_program
from models.evaluation.asking import MAX_MEGAPIXELS, add_classifier, progress
from models.finetune import CropsUnfit, others_words, pictures_among
from models.nets.cellnet import CellNet

FEWEST_CELLS = 60
SOURCE_WEIGHT = 256
"""Cells that the old statistics count for: with as many new cells both count the same."""
MOST_BYTES = 3 * 2**30
"""Of the cells with their surroundings, in memory: 4000 white cells of a fine camera."""
SURE = 0.9
VIEWS = 6
WORST_LOSS = 0.01


def main() -> None:
    args = parse()
    models = open_models(ModelsSection(folder=args.models, classifier=args.classifier))
    torch.manual_seed(1)
    cells = find_cells(models, args.images, tuning.wording_of(models.manifest.classifier))
    base = tuning.open_base(args.models, cells, args.classifier)
    move_norms(base.net, list(tuning.agent_squares(base.entry, cells)))
    taught = sure_cells(base, cells)
    known = known_cells(args, base.wording)
    if taught:
        tuning.tune(base, taught + known, args.minutes, args.rate)
    work = args.output.with_name(args.output.name + ".part")
    chosen = cells + known
    new = tuning.write_models(base, chosen[:: max(1, len(chosen) // 200)], work, "adapted", {})
    facts = compare(models, new, cells) | {"cells_learnt_from": len(taught)}
    facts |= pbc_accuracy(args, models, new, base.wording)
    (work / "signoff.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    if facts.get("pbc_before", 0) - facts.get("pbc_after", 0) > WORST_LOSS:
        end(f"the adapted classifier has forgotten too much of PBC: nothing is changed (see {work})", FOUND_WANTING)
    if args.output.exists():
        raise CropsUnfit(
            f"{args.output} exists already; the adapted models lie in {work}: move them where you want them"
        )
    work.rename(args.output)
    print(f"written: {args.output}. {tuning.NEXT}", file=sys.stderr)


def find_cells(models: Models, folder: Path, wording: crops.Wording) -> list[crops.Example]:
    """What the detector hands to the classifier, in all pictures of a folder."""
    if not folder.is_dir():
        raise CropsUnfit(f"{folder}: no such folder; give one with fields of the microscope")
    paths, others = pictures_among(folder.rglob("*"))
    classified = models.manifest.detector.classified
    found: list[crops.Example] = []
    bytes_kept = 0
    for path in progress(paths, "fields"):
        try:
            pixels = decode_file(path, MAX_MEGAPIXELS)
        except FrameUnreadable as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        rgb = np.ascontiguousarray(pixels[..., ::-1])
        detections = models.detector.detect(pixels)
        small = crops.small_picture(rgb)
        tells_stain = any(detection.class_name == NUCLEATED for detection in detections)
        for detection in detections:
            if detection.class_name in classified:
                box = (*detection.box.centre_px, detection.box.width_px, detection.box.height_px)
                has_nucleus = detection.class_name == NUCLEATED
                example = crops.Example(
                    rgb, box, crops.UNKNOWN, wording.no_attributes, has_nucleus=has_nucleus, is_in_field=tells_stain
                )
                kept = example.without_the_rest(small)  # all whole fields together take many gigabytes
                bytes_kept += kept.pixels.nbytes
                found.append(kept)
        if bytes_kept > MOST_BYTES:
            raise CropsUnfit(
                f"{folder}: {len(found)} cells up to {path.name} take more than {MOST_BYTES / 2**30:g} GB of memory;"
                " take fewer pictures, a few hundred do"
            )
    if len(found) < FEWEST_CELLS:
        raise CropsUnfit(
            f"{folder}: {len(found)} cells in {len(paths)} pictures; {FEWEST_CELLS} cells are the least"
            f"{others_words(others)}"
        )
    return found


def move_norms(net: CellNet, squares: Sequence[Rgb]) -> None:
    """Each norm's statistics become a mean of the old ones and those of the new cells, by their numbers."""
    pictures = torch.stack([crops.picture_tensor(square) for square in squares])
    share = len(squares) / (len(squares) + SOURCE_WEIGHT)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    old = [(norm.running_mean.clone(), norm.running_var.clone(), norm.momentum) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
    net.train()
    with torch.no_grad():
        for batch in pictures.split(64):
            if len(batch) > 1:
                net(batch.float() / 255)
    net.eval()
    for norm, (mean, variance, momentum) in zip(norms, old, strict=True):
        norm.running_mean.lerp_(mean, 1 - share)
        norm.running_var.lerp_(variance, 1 - share)
        norm.momentum = momentum


@torch.inference_mode()
def sure_cells(base: tuning.Base, cells: Sequence[crops.Example]) -> list[crops.Example]:
    """Cells whose name is the same and sure, as a mean over turned and mirrored views, with that name as label."""
    taught = []
    for cell, pixels in zip(cells, tuning.agent_squares(base.entry, cells), strict=True):
        square = crops.picture_tensor(pixels).float() / 255
        views = [square.rot90(k % 4, (1, 2)) if k < 4 else square.flip(k - 3) for k in range(VIEWS)]
        shares = base.net(torch.stack(views)).classes.softmax(1)
        mean = shares.mean(0)
        if float(mean.max()) >= SURE and bool((shares.argmax(1) == mean.argmax()).all()):
            taught.append(dataclasses.replace(cell, label=int(mean.argmax())))
    return taught


def known_cells(args: argparse.Namespace, wording: crops.Wording) -> list[crops.Example]:
    """PBC training cells to learn along, where the data are at hand."""
    if args.data is None:
        return []
    cells = read_cells(args.data, "train")
    chosen = np.random.default_rng(1).permutation(len(cells))[:400]
    return crops.pbc_examples(args.data, [cells[k] for k in chosen], read_boxes(args.boxes), wording)


def compare(old: Models, new: Models, cells: Sequence[crops.Example]) -> dict[str, float]:
    """How many cells have a trusted name before and after, and how many kept their name."""
    before, after = (tuning.answers_to(models, cells) for models in (old, new))
    trusted = []
    for models, answers in ((old, before), (new, after)):
        rules = models.naming_rules()
        trusted.append(np.mean([p >= rules.min_probability and c >= rules.min_cell_probability for _, p, c in answers]))
    same = float(np.mean([a[0] == b[0] for a, b in zip(before, after, strict=True)]))
    return {
        "cells": len(cells),
        "trusted_before": float(trusted[0]),
        "trusted_after": float(trusted[1]),
        "same_name": same,
    }


def pbc_accuracy(args: argparse.Namespace, old: Models, new: Models, wording: crops.Wording) -> dict[str, float]:
    """Accuracy on PBC `val` before and after; nothing without the data."""
    if args.data is None:
        return {}
    examples = crops.pbc_examples(args.data, read_cells(args.data, "val")[::3], read_boxes(args.boxes), wording)
    return {"pbc_before": tuning.share_of_right(old, examples), "pbc_after": tuning.share_of_right(new, examples)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of fields of the microscope")
    parser.add_argument("--output", type=Path, required=True, help="new folder of models")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of models to begin with")
    add_classifier(parser)
    parser.add_argument("--data", type=Path, default=None, help="folder with pbc.csv, to forget less")
    parser.add_argument("--boxes", type=Path, default=None, help="from models.classifier.locate")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--rate", type=float, default=2e-4, help="peak learning rate of the heads")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
