"""Teach the classifier a laboratory's own cells.

    python -m models.finetune crops/ --output my-models [--minutes 10] [--data ../shared/data]

crops: a folder with one folder for each class, named as in the manifest, of crops as the agent cuts them, such as
`hematovision review export` writes; `no-cell` may hold crops of what is none. One crop in four is kept back to judge
by. With --data the PBC pictures are learnt along, so that less is forgotten. The new folder is written unless the int8
file names fewer of the crops that were kept back right than before, by more than chance explains; both counts are told,
with what they say and what they do not. Set `models.folder` to it, or stage it with `model.stage`, as a device needs on
which models were activated before.

Exit status 1: it is worse, and nothing is changed.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from agent.analysis.intervals import LEVEL, binomial_interval
from agent.camera.decoding import MIN_CROP_SIDE_PX, decode_file
from agent.camera.replay import PICTURE_SUFFIXES
from agent.config import ModelsSection
from agent.errors import FrameUnreadable
from agent.inference.manifest import load_manifest
from agent.inference.models import open_models
from models.classifier import crops, tuning
from models.classifier.locate import read_boxes
from models.common.labels import Rgb
from models.common.programs import CONVERTER, FOUND_WANTING, Unfit, end, run_program
from models.evaluation.asking import MAX_MEGAPIXELS

NO_CELL = "no-cell"
FEWEST = 20
"""Fewer crops teach nothing that could be judged."""

CHANCE = 0.05
"""How often a tuned classifier that is as good as the old one may be taken for a worse, or for a better one."""


class CropsUnfit(Unfit):
    """The folder of crops cannot be learnt from."""


def main() -> None:
    args = parse()
    tuning.require_new(args.output)
    wording = tuning.wording_of(load_manifest(args.models).choosing(args.classifier).classifier)
    learnt, judged = read_crops(args.crops, wording)
    # Crops show no field whose stain could be told: the net learns the laboratory's, and the manifest says so.
    base = tuning.with_own_stain(tuning.open_base(args.models, learnt, args.classifier))
    torch.manual_seed(1)
    examples = learnt + rehearsal(args, wording, len(learnt))
    tuning.tune(base, examples, args.minutes, args.rate)
    named = [e for e in judged if e.is_cell]
    old = open_models(ModelsSection(folder=args.models, classifier=args.classifier))
    work = args.output.with_name(args.output.name + ".part")
    new = tuning.write_models(base, examples[:: max(1, len(examples) // 200)], work, "tuned", {})
    found = Comparison.of(tuning.named_right(old, named), tuning.named_right(new, named))
    facts = {"crops_learnt": len(learnt), **found.facts}
    (work / "signoff.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(json.dumps(facts))
    print(found.words, file=sys.stderr)
    if found.is_worse:
        end(
            f"nothing is changed (see {work}). More crops, or more of the classes that are confused, may help",
            FOUND_WANTING,
        )
    work.rename(args.output)
    print(f"written: {args.output}. {tuning.NEXT}", file=sys.stderr)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The old and the tuned classifier on the same crops, which neither has learnt from.

    won: crops that the tuned one alone names right; lost: that the old one alone does.
    """

    judged: int
    right_before: int
    won: int
    lost: int

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> Comparison:
        """From whether each crop is named right."""
        pairs = list(zip(before, after, strict=True))
        return cls(len(pairs), sum(before), pairs.count((False, True)), pairs.count((True, False)))

    @property
    def right_after(self) -> int:
        return self.right_before + self.won - self.lost

    @property
    def is_worse(self) -> bool:
        """Whether more is lost than chance explains.

        Only the crops that the two name differently tell (McNemar, Psychometrika 12, 1947); of those each is as likely
        to be lost as to be won where both are as good.
        """
        return exceeds_half(self.lost, self.won + self.lost)

    @property
    def is_better(self) -> bool:
        """The same the other way round."""
        return exceeds_half(self.won, self.won + self.lost)

    @property
    def verdict(self) -> str:
        """What the counts say, and what they do not."""
        if self.is_worse:
            return "the tuned classifier is worse, by more than chance explains"
        if self.right_before == self.judged:
            left = "nothing was left to gain: the old classifier names all of them right"
            return left if not self.lost else f"{left}, and what was lost may be chance"
        if self.is_better:
            return "the tuned classifier is better, by more than chance explains"
        return "they differ by no more than chance explains: which is the better one only more crops would tell"

    @property
    def words(self) -> str:
        """Counts, intervals and verdict in a sentence."""
        before, after = (told_share(right, self.judged) for right in (self.right_before, self.right_after))
        return (
            f"of {self.judged} crops that were kept back the old classifier names {before} right, the tuned one"
            f" {after}; {self.won} are won, {self.lost} lost: {self.verdict}"
        )

    @property
    def facts(self) -> dict[str, object]:
        """What goes into `signoff.json`; accuracies and their intervals 0 to 1."""
        return {
            "crops_judged": self.judged,
            "right_before": self.right_before,
            "right_after": self.right_after,
            "won": self.won,
            "lost": self.lost,
            "accuracy_before": self.right_before / self.judged,
            "accuracy_after": self.right_after / self.judged,
            "interval_before": binomial_interval(self.right_before, self.judged),
            "interval_after": binomial_interval(self.right_after, self.judged),
            "verdict": self.verdict,
        }


def exceeds_half(count: int, of: int) -> bool:
    """Whether so many of them are more than a half, by more than chance explains: the exact test on one side."""
    return binomial_interval(count, of, 1 - 2 * CHANCE)[0] > 0.5


def told_share(right: int, judged: int) -> str:
    """A count with its share and the interval that the truth lies in, in %."""
    low, high = binomial_interval(right, judged)
    return f"{right} ({right / judged:.1%}, {LEVEL:.0%} interval {low:.1%} to {high:.1%})"


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
            pixels = read_crop(path)
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


def read_crop(path: Path) -> Rgb:
    """A crop as the agent would decode it: transparent parts white, files that are cut off refused."""
    try:
        return np.ascontiguousarray(decode_file(path, MAX_MEGAPIXELS, MIN_CROP_SIDE_PX)[..., ::-1])
    except FrameUnreadable as error:
        raise CropsUnfit(f"{error}; mend or remove it") from error


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
    cells = tuning.known_cells(args.data, "train", wording.classes)
    chosen = np.random.default_rng(1).permutation(len(cells))[: max(200, count)]
    return crops.pbc_examples(args.data, [cells[k] for k in chosen], read_boxes(args.boxes), wording)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("crops", type=Path, help="folder with one folder for each class")
    tuning.add_options(parser, minutes=10, rate=4e-4)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
