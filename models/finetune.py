"""Teach the classifier a laboratory's own cells.

    python -m models.finetune crops/ --output my-models [--minutes 10] [--data ../shared/data]

crops: a folder with one folder for each class, named as in the manifest, of crops as the agent cuts them, such as
`hematovision review export` writes; `no-cell` may hold crops of what is none. One crop in four is kept back to judge
by. With --data the PBC pictures are learnt along, so that less is forgotten. The new folder is written only if the int8
file names the crops that were kept back better than before; set `models.folder` to it, or stage it with `model.stage`,
as a device needs on which models were activated before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from agent.camera.replay import PICTURE_SUFFIXES
from agent.config import ModelsSection
from agent.errors import ModelError
from agent.inference.manifest import load_manifest
from agent.inference.models import open_models
from models.classifier import crops, tuning
from models.classifier.locate import read_boxes
from models.common.labels import read_cells, read_rgb
from models.common.warm_start import FileDoesNotFit
from models.evaluation.asking import add_classifier

NO_CELL = "no-cell"
FEWEST = 20
"""Fewer crops teach nothing that could be judged."""


def main() -> None:
    args = parse()
    try:
        finetune(args)
    except (ModelError, FileDoesNotFit, CropsUnfit) as error:
        raise SystemExit(str(error)) from error


class CropsUnfit(Exception):
    """The folder of crops cannot be learnt from; says where, why and what to do."""


def finetune(args: argparse.Namespace) -> None:
    wording = tuning.wording_of(load_manifest(args.models).choosing(args.classifier).classifier)
    learnt, judged = read_crops(args.crops, wording)
    # Crops show no field whose stain could be told: the net learns the laboratory's, and the manifest says so.
    base = tuning.with_own_stain(tuning.open_base(args.models, learnt, args.classifier))
    torch.manual_seed(1)
    examples = learnt + rehearsal(args, wording, len(learnt))
    tuning.tune(base, examples, args.minutes, args.rate)
    named = [e for e in judged if e.is_cell]
    before = tuning.share_of_right(open_models(ModelsSection(folder=args.models, classifier=args.classifier)), named)
    facts = {"crops_learnt": len(learnt), "crops_judged": len(named), "accuracy_before": before}
    work = args.output.with_name(args.output.name + ".part")
    models = tuning.write_models(base, examples[:: max(1, len(examples) // 200)], work, "tuned", facts)
    after = tuning.share_of_right(models, named)
    facts["accuracy_after"] = after
    (work / "signoff.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    if after <= before:
        raise CropsUnfit(
            f"the tuned classifier names {after:.1%} of the crops that were kept back right, the old one {before:.1%}:"
            f" nothing is changed (see {work}). More crops, or more of the classes that are confused, may help"
        )
    if args.output.exists():
        raise CropsUnfit(f"{args.output} exists already; the tuned models lie in {work}: move them where you want them")
    work.rename(args.output)
    print(f"written: {args.output}. {tuning.NEXT}", file=sys.stderr)


def read_crops(folder: Path, wording: crops.Wording) -> tuple[list[crops.Example], list[crops.Example]]:
    """Examples to learn from and to judge by. Which is which hangs on the picture's bytes, so that it stays."""
    if not folder.is_dir():
        raise CropsUnfit(f"{folder}: no such folder; give one with a folder for each class")
    found = sorted(f for f in folder.iterdir() if f.is_dir())
    unknown = [f.name for f in found if f.name not in (*wording.classes, NO_CELL)]
    if unknown or not found:
        names = ", ".join((*wording.classes, NO_CELL))
        raise CropsUnfit(f"{folder}: folders must be named {names}; found {', '.join(unknown) or 'none'}")
    learnt: list[crops.Example] = []
    judged: list[crops.Example] = []
    others: Counter[str] = Counter()
    for place in found:
        paths, left_out = pictures_among(place.iterdir())
        others += left_out
        for path in paths:
            try:
                pixels = read_rgb(path)
            except Exception as error:  # OpenCV has one exception for everything
                raise CropsUnfit(f"{path}: is no picture that can be read; mend or remove it") from error
            height, width = pixels.shape[:2]
            box = (width / 2, height / 2, width / (1 + crops.MARGIN), height / (1 + crops.MARGIN))
            label = crops.UNKNOWN if place.name == NO_CELL else wording.classes.index(place.name)
            is_cell, has_nucleus = place.name != NO_CELL, place.name not in (NO_CELL, crops.PLATELET)
            example = crops.Example(pixels, box, label, wording.no_attributes, is_cell=is_cell, has_nucleus=has_nucleus)
            (judged if is_kept_back(path) else learnt).append(example)
    if len(learnt) < FEWEST:
        raise CropsUnfit(
            f"{folder}: {len(learnt) + len(judged)} crops are too few: {len(judged)} are kept back to judge by, and"
            f" {len(learnt)} are left to learn from, where {FEWEST} are the least{others_words(others)}"
        )
    if not any(e.is_cell for e in judged):
        cells = sum(e.is_cell for e in learnt)
        raise CropsUnfit(
            f"{folder}: {cells} crops of cells are too few: none of them is among those that are kept back to judge by"
            f" (one in four is); give more crops that are not in {NO_CELL}{others_words(others)}"
        )
    if others:
        print(f"{folder}{others_words(others)}", file=sys.stderr)
    return learnt, judged


def is_kept_back(path: Path) -> bool:
    """Whether a crop is to judge by: one in four, by its bytes."""
    return hashlib.sha256(path.read_bytes()).digest()[0] < 64


def pictures_among(files: Iterable[Path]) -> tuple[list[Path], Counter[str]]:
    """The pictures, in order, and how many files are left out because of their ending."""
    paths = sorted(p for p in files if p.is_file())
    others = Counter(p.suffix.lower() or p.name for p in paths if p.suffix.lower() not in PICTURE_SUFFIXES)
    return [p for p in paths if p.suffix.lower() in PICTURE_SUFFIXES], others


def others_words(others: Counter[str]) -> str:
    """What was left out because of its ending, to go behind other words; empty where nothing was."""
    told = ", ".join(f"{count} {ending}" for ending, count in sorted(others.items()))
    return f"; left out because of their ending: {told}" if told else ""


def rehearsal(args: argparse.Namespace, wording: crops.Wording, count: int) -> list[crops.Example]:
    """As many PBC training cells as there are crops of the laboratory's own, at least 200; none without the data."""
    if args.data is None:
        return []
    cells = read_cells(args.data, "train")
    chosen = np.random.default_rng(1).permutation(len(cells))[: max(200, count)]
    return crops.pbc_examples(args.data, [cells[k] for k in chosen], read_boxes(args.boxes), wording)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops", type=Path, help="folder with one folder for each class")
    parser.add_argument("--output", type=Path, required=True, help="new folder of models")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of models to begin with")
    add_classifier(parser)
    parser.add_argument("--data", type=Path, default=None, help="folder with pbc.csv, to forget less")
    parser.add_argument("--boxes", type=Path, default=None, help="from models.classifier.locate")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=4e-4, help="peak learning rate of the heads")
    return parser.parse_args()


if __name__ == "__main__":
    main()
