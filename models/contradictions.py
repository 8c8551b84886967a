"""Does a cell whose morphology contradicts its class deserve less trust? Measured, for the reject option.

    python -m models.contradictions --split test

How rare each value of an attribute is in a class comes from WBCAtt, split `train`. A cell that the agent would accept
is contradicted when a value that is told with SURE or more is rarer in its class than a bound. Beside it, as many cells
of the least confidence are set aside instead: the bound earns its place only if it finds more wrong names than that.
Classes without attributes contradict nothing.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from agent.analysis.morphology import SURE
from agent.camera.decoding import decode_file
from agent.domain import Classification
from agent.inference.models import open_models
from models.common.labels import read_attributes, read_cells
from models.common.programs import run_program
from models.evaluation.asking import MAX_MEGAPIXELS, add_classifier, add_options, progress, section_of
from models.evaluation.names import require_named

BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, slots=True)
class Rarity:
    """counts: by class, attribute and value the training pictures that show it."""

    counts: Mapping[tuple[str, str, str], int]
    totals: Mapping[tuple[str, str], int]

    def of(self, answer: Classification) -> float:
        """Share, 0 to 1, of the named class's pictures that show its rarest sure value; 1 where nothing is known."""
        shares = [
            (self.counts.get((answer.class_name, name, told.value), 0) + 0.5) / (total + 1)
            for name, told in answer.morphology.items()
            if told.probability >= SURE and (total := self.totals.get((answer.class_name, name), 0))
        ]
        return min(shares, default=1.0)


def main() -> None:
    args = parse()
    models = open_models(section_of(args))
    rules, rarity = models.naming_rules(), learn_rarity(args.data)
    right, confidence, rare = [], [], []
    classes = models.manifest.classifier.classes
    cells = require_named(read_cells(args.data, args.split), classes, args.data, args.split)
    for cell in progress(cells, "pictures"):
        answer = models.name_central_cell(decode_file(cell.path, MAX_MEGAPIXELS))
        if rules.believes(answer):
            right.append(answer.class_name == cell.class_name)
            confidence.append(answer.probability * answer.cell_probability)
            rare.append(rarity.of(answer))
    figures = compare(np.array(right), np.array(confidence), np.array(rare))
    if args.json:
        print(json.dumps({"what": "contradictions", "split": args.split, **figures}))
        return
    table = Table("rarer than", "contradicted", "of them wrong", "wrong among as many of least confidence")
    for row in figures["bounds"]:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(f"{figures['accepted']} accepted cells, {figures['wrong']} named wrongly", table)


def learn_rarity(data: Path) -> Rarity:
    """From the pictures of split `train` that have attributes."""
    attributes = read_attributes(data)
    counts: Counter[tuple[str, str, str]] = Counter()
    for cell in read_cells(data, "train"):
        counts.update((cell.class_name, name, value) for name, value in attributes.get(cell.key, {}).items())
    totals: Counter[tuple[str, str]] = Counter()
    for (class_name, name, _), count in counts.items():
        totals[class_name, name] += count
    return Rarity(counts, totals)


def compare(right: np.ndarray, confidence: np.ndarray, rare: np.ndarray) -> dict[str, object]:
    """For each bound: cells it sets aside, how many of them are wrong, and how many of as many unsure ones."""
    unsure_first = np.argsort(confidence, kind="stable")
    rows = []
    for bound in BOUNDS:
        is_contradicted = rare < bound
        count = int(is_contradicted.sum())
        rows.append(
            {
                "bound": bound,
                "contradicted": count,
                "wrong": int((is_contradicted & ~right).sum()),
                "wrong_of_unsure": int((~right[unsure_first[:count]]).sum()),
            }
        )
    return {"accepted": len(right), "wrong": int((~right).sum()), "bounds": rows}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_classifier(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
