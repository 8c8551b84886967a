"""Adapt the classifier to a microscope without any labels.

    python -m models.adapt --images fields/ --output my-models [--minutes 8] [--data ../shared/data]

images: a few hundred fields of the laboratory's own microscope. The detector finds their cells; then the norms'
statistics move towards those of the new cells (Schneider et al., arXiv 2006.16971), and the net learns from the cells
that it is sure of when it sees them in several ways (self-training). The int8 ranges are taken from the new cells.
Prints which share of the cells has a trusted name before and after, and which kept its name; with --data also the
accuracy on PBC `val`. The new folder is written unless of the cells whose name was trusted more than a fifth lost it,
or the accuracy on PBC fell by more than a point. Without labels nothing tells whether the names became better.

Exit status 1: it is worse, and nothing is changed.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.errors import FrameUnreadable
from agent.inference.models import Models, open_models
from models.classifier import crops, tuning
from models.classifier.locate import read_boxes
from models.common.labels import NUCLEATED, Rgb
from models.common.programs import CONVERTER, FOUND_WANTING, end, run_program
from models.evaluation.asking import MAX_MEGAPIXELS, progress
from models.finetune import CropsUnfit, others_words, pictures_among
from models.nets.cellnet import CellNet

FEWEST_CELLS = 60
SOURCE_WEIGHT = 256
"""Cells that the old statistics count for: with as many new cells both count the same."""
MOST_BYTES = 3 * 2**30
"""Of the cells with their surroundings, in memory: 4000 white cells of a fine camera."""
SURE = 0.9
VIEWS = 6
FEWEST_TRUSTED = 20
"""Cells with a trusted name to judge by: of fewer a single one would be more than 5 %."""
LEAST_KEPT = 0.8
"""Of the cells whose name is trusted, the share that must keep it and stay trusted.

On microscopes that a net never saw, four trusted names in five are right (models/README.md, what tuning brought). If
all the wrong ones were mended or no longer trusted, a fifth would change. So where more does, more right names are lost
than wrong ones can be mended. Cells in doubt are not asked: their names are what adapting is to change.
"""
WORST_LOSS = 0.01
"""Of the accuracy on PBC `val`."""

NAME_CROPS = "name some crops and use models.finetune, which is judged by them, see models/README.md"
"""What a person does whom adapting does not help."""


def main() -> None:
    args = parse()
    tuning.require_new(args.output)
    models = open_models(ModelsSection(folder=args.models, classifier=args.classifier))
    torch.manual_seed(1)
    wording = tuning.wording_of(models.manifest.classifier)
    known, judged = known_cells(args, wording)
    cells = find_cells(models, args.images, wording)
    before = Names.of(models, cells)
    if before.trusted.sum() < FEWEST_TRUSTED:
        raise CropsUnfit(
            f"{args.images}: of {len(cells)} cells {before.trusted.sum()} have a trusted name, where {FEWEST_TRUSTED}"
            f" are the least to judge by: take more pictures, or {NAME_CROPS}"
        )
    base = tuning.open_base(args.models, cells, args.classifier)
    move_norms(base.net, list(tuning.agent_squares(base.entry, cells)))
    taught = sure_cells(base, cells)
    if taught:
        tuning.tune(base, taught + known, args.minutes, args.rate)
    work = args.output.with_name(args.output.name + ".part")
    chosen = cells + known
    new = tuning.write_models(base, chosen[:: max(1, len(chosen) // 200)], work, "adapted", {})
    facts = compare(before, Names.of(new, cells)) | {"cells_learnt_from": len(taught)}
    facts |= pbc_accuracy(models, new, judged)
    (work / "signoff.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    print(in_words(facts), file=sys.stderr)
    if faults := what_is_wanting(facts):
        end(
            f"{'; '.join(faults)}: nothing is changed (see {work}). Fields of more slides may help; or {NAME_CROPS}",
            FOUND_WANTING,
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
    if others:
        print(f"{folder}{others_words(others)}", file=sys.stderr)
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


def known_cells(args: argparse.Namespace, wording: crops.Wording) -> tuple[list[crops.Example], list[crops.Example]]:
    """PBC cells to learn along, and to judge by what is forgotten, where the data are at hand."""
    if args.data is None:
        return [], []
    learnt, judged = (tuning.known_cells(args.data, split, wording.classes) for split in ("train", "val"))
    chosen = np.random.default_rng(1).permutation(len(learnt))[:400]
    boxes = read_boxes(args.boxes)
    return (
        crops.pbc_examples(args.data, [learnt[k] for k in chosen], boxes, wording),
        crops.pbc_examples(args.data, judged[::3], boxes, wording),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Names:
    """What a classifier says of the cells. classes, trusted: (cells,), class index and whether the name is trusted."""

    classes: NDArray[np.int64]
    trusted: NDArray[np.bool_]

    @classmethod
    def of(cls, models: Models, cells: Sequence[crops.Example]) -> Names:
        """As the agent asks a folder's int8 classifier."""
        classes, sure, is_cell = (np.array(told) for told in zip(*tuning.answers_to(models, cells), strict=True))
        rules = models.naming_rules()
        return cls(classes, (sure >= rules.min_probability) & (is_cell >= rules.min_cell_probability))


def compare(before: Names, after: Names) -> dict[str, float]:
    """Shares of the cells that have a trusted name before and after, that kept their name, and trusted ones that did.

    before: with a trusted name at least.
    """
    same = before.classes == after.classes
    return {
        "cells": len(same),
        "trusted_before": float(before.trusted.mean()),
        "trusted_after": float(after.trusted.mean()),
        "same_name": float(same.mean()),
        "trusted_kept": float((same & after.trusted)[before.trusted].mean()),
    }


def what_is_wanting(facts: Mapping[str, float]) -> list[str]:
    """Each figure that is beyond its bound, with the bound; none = the classifier may be written."""
    faults = []
    if facts["trusted_kept"] < LEAST_KEPT:
        faults.append(
            f"of the cells whose name was trusted {facts['trusted_kept']:.1%} keep it, where {LEAST_KEPT:.0%} are the"
            " least"
        )
    if facts.get("pbc_before", 0) - facts.get("pbc_after", 0) > WORST_LOSS:
        faults.append(
            f"of the PBC pictures {facts['pbc_after']:.1%} are named right, {facts['pbc_before']:.1%} before, where"
            f" {100 * WORST_LOSS:g} point is the most that may be lost"
        )
    return faults


def in_words(facts: Mapping[str, float]) -> str:
    """The figures in a sentence."""
    return (
        f"of {facts['cells']} cells {facts['trusted_before']:.1%} had a trusted name, {facts['trusted_after']:.1%} have"
        f" one now; of those that had one, {facts['trusted_kept']:.1%} keep it"
    )


def pbc_accuracy(old: Models, new: Models, judged: Sequence[crops.Example]) -> dict[str, float]:
    """Accuracy on PBC `val` before and after; nothing without the data."""
    if not judged:
        return {}
    return {"pbc_before": tuning.share_of_right(old, judged), "pbc_after": tuning.share_of_right(new, judged)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of fields of the microscope")
    tuning.add_options(parser, minutes=8, rate=2e-4)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
