"""What a microscope that was never seen costs the classifier, and what a laboratory can win back with its own cells.

    python -m models.classifier.train models/classifier/recipes/unseen/pbc-alone.yaml
    python -m models.unseen bccd runs/pbc-alone/best.pt [--json]

The source took no part in that run. Its net becomes int8 as the shipped one does; then a laboratory with this
microscope does what `models/README.md` tells it to, without the PBC pictures: `models.adapt` on the fields of `train`,
`models.finetune` on the crops of `train` that we named by eye. Figures: the named cells of `val` and `test`, and once
of all splits, cut as the agent cuts them.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
from rich.console import Console
from rich.table import Table

from agent.analysis.crops import cut_crop
from agent.camera.decoding import decode_file
from agent.config import ModelsSection
from agent.domain import Box
from agent.inference.manifest import load_manifest
from agent.inference.models import Models, open_models
from models.common.checkpoints import read_run_checkpoint
from models.common.labels import NamedBox, read_fields
from models.common.manifests import change_entry
from models.common.programs import CONVERTER, run_program
from models.common.quantize import begin_folder
from models.evaluation.asking import MAX_MEGAPIXELS
from models.evaluation.names import answer_in_fields, named_cells, trust_in

JUDGED = ("val", "test")
SPLITS = ("train", *JUDGED)


def main() -> None:
    args = parse()
    shipped = load_manifest(args.models).classifier
    backbone = read_run_checkpoint(args.checkpoint).get("backbone")
    if backbone != shipped.name:
        raise SystemExit(
            f"{args.checkpoint}: holds {backbone or 'a detector'}; give a run of {shipped.name}, the first classifier"
        )
    work = args.work / args.source
    shutil.rmtree(work, ignore_errors=True)
    fields, crops = work / "fields", work / "crops"
    gather_fields(args.data, args.source, fields)
    gather_crops(cells_of(args.data, args.source, ("train",)), crops, shipped.crop.margin)
    begin_folder(args.models, work / "begun")
    run("models.classifier.export", str(args.checkpoint), f"--models={work}/begun", f"--float-models={work}/float")
    change_entry(work / "begun", "classifier", {"thresholds": shipped.thresholds.model_dump()})
    minutes = () if args.minutes is None else (f"--minutes={args.minutes:g}",)
    folders = {"as it is": work / "begun"}
    for name, module, given in (("adapted", "adapt", f"--images={fields}"), ("tuned", "finetune", str(crops))):
        output = work / name
        run(f"models.{module}", given, f"--models={work}/begun", f"--output={output}", *minutes)
        # A folder that the command did not sign off is measured all the same.
        folders[name] = output if output.exists() else work / f"{name}.part"
    cells = cells_of(args.data, args.source, JUDGED)
    opened = {name: open_models(ModelsSection(folder=folder)) for name, folder in folders.items()}
    judged = {"light and stain as they are": without_look(opened["as it is"]), **opened}
    rows = {name: judge(models, cells) for name, models in judged.items()}
    rows["as it is, all named cells"] = judge(opened["as it is"], cells_of(args.data, args.source, SPLITS))
    figures: dict[str, Any] = {"source": args.source, "rows": rows}
    show(figures, is_json=args.json)


def run(module: str, *arguments: str) -> None:
    """One of the documented commands; what it says goes to standard error."""
    print(f"{module} {' '.join(arguments)}", file=sys.stderr)
    done = subprocess.run([sys.executable, "-m", module, *arguments], stdout=sys.stderr, check=False)
    if done.returncode and module.endswith("export"):
        raise SystemExit(done.returncode)  # it has said why


def cells_of(data: Path, source: str, splits: Sequence[str]) -> list[NamedBox]:
    return [cell for cell in named_cells(data, splits) if cell.source == source]


def gather_fields(data: Path, source: str, folder: Path) -> None:
    """Links to the source's `train` fields."""
    folder.mkdir(parents=True)
    for field in read_fields(data, "train"):
        if field.source == source:
            (folder / field.path.name).symlink_to(field.path.resolve())


def gather_crops(cells: Sequence[NamedBox], folder: Path, margin: float) -> None:
    """Crops as the agent cuts them, in a folder for each class."""
    for number, cell in enumerate(cells):
        place = folder / str(cell.class_name)
        place.mkdir(parents=True, exist_ok=True)
        crop = cut_crop(decode_file(cell.path, MAX_MEGAPIXELS), Box(*cell.box), margin)
        cv2.imwrite(str(place / f"{number}.png"), crop)


def without_look(models: Models) -> Models:
    """The same models, whose classifier takes light and stain as they are."""
    entry = models.manifest.classifier
    entry = entry.model_copy(update={"crop": entry.crop.model_copy(update={"look": None})})
    return dataclasses.replace(models, manifest=models.manifest.model_copy(update={"classifier": entry}))


def judge(models: Models, cells: Sequence[NamedBox]) -> dict[str, Any]:
    """Names of cells in their fields."""
    return trust_in(answer_in_fields(models, cells), models.naming_rules())


def show(figures: dict[str, Any], *, is_json: bool) -> None:
    if is_json:
        print(json.dumps(figures))
        return
    table = Table(f"{figures['source']}, never seen", "cells", "accuracy", "accepted", "accuracy of accepted")
    for name, found in figures["rows"].items():
        values = (found[key] for key in ("accuracy", "accepted", "accuracy_of_accepted"))
        table.add_row(name, str(found["n"]), *("-" if v is None else f"{v:.3f}" for v in values))
    Console().print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=("bccd", "raabin"))
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run without that source")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="the shipped folder: detector, thresholds")
    parser.add_argument("--work", type=Path, default=Path("runs/unseen"), help="where the folders of models are made")
    parser.add_argument(
        "--minutes", type=float, help="of adapting, and of tuning; else as long as these take by themselves"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
