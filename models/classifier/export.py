"""The trained classifier as the int8 file that is shipped, and its entry in the manifest.

python -m models.classifier.export runs/varied-blended/best.pt --data ../shared/data
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor, nn

from agent.analysis.preprocessing import TAUGHT_LOOK
from agent.inference.manifest import load_manifest
from models.classifier import crops
from models.classifier.locate import read_boxes
from models.classifier.train import FACTS, load_net
from models.common.checkpoints import read_run_checkpoint
from models.common.labels import NUCLEATED, read_cells
from models.common.programs import CONVERTER, run_program
from models.common.quantize import begin_folder, describe_tensors, export_float, quantize_file, update_manifest
from models.common.warm_start import save_norms
from models.nets.cellnet import CellNet, fold_batch_norm

KINDS = {
    "class_logits": "logit of each class",
    "attribute_logits": "logit of each value of each attribute, attribute by attribute",
    "cell_logit": "logit of: this is a cell that has a name",
}
SURE_PROBABILITY = 0.99
"""One PBC `val` cell in eight is named with less. A look from four sides at these makes of the 95 % surest names 0.9975
right where it was 0.9956, as much as a look at all cells does."""
DOUBTFUL_PROBABILITY = 0.9
"""One PBC `val` cell in 40 is named with less from four sides. Eight take the negative log-likelihood of all cells from
.053 to .051, as much as eight sides of every cell that is not sure."""
WORDING = Path(__file__).with_name("wording.yaml")


class ChannelsLast(nn.Module):
    """NHWC in, the logits of each head out, each with a scale of its own."""

    def __init__(self, net: CellNet):
        super().__init__()
        self.net = fold_batch_norm(net)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(x.permute(0, 3, 1, 2)))


def main() -> None:
    args = parse()
    checkpoint = read_run_checkpoint(args.checkpoint, FACTS)
    wording = crops.Wording(checkpoint["classes"], checkpoint["values"])
    net = load_net(args.checkpoint, wording)
    name = checkpoint["backbone"]
    file = f"classifier/{args.file or name.split('-')[0]}.tflite"
    float_file, int8_file = args.float_models / file, args.models / file
    side_px = checkpoint["side_px"]
    require_own_file(args.models, name, file)
    known = {entry.name: entry.version for entry in load_manifest(args.models).classifiers}
    args.version = args.version or known.get(name, "0.1.0")
    begin_folder(args.models, args.float_models)
    export_float(ChannelsLast(net), side_px, float_file)
    settings = yaml.safe_load(checkpoint["settings"])
    pictures = within_reach(net, *calibration(args.data, wording, side_px, args.pictures, args.boxes, settings))
    quantize_file(float_file, int8_file, pictures)
    save_norms(net, int8_file)
    for folder in (args.float_models, args.models):
        write_entry(folder, file, name, wording, args, checkpoint["command"], settings)


def require_own_file(folder: Path, name: str, file: str) -> None:
    """Raises SystemExit where a classifier of another name has this file: its entry would no longer be true."""
    holder = {entry.file: entry.name for entry in load_manifest(folder).classifiers}.get(file, name)
    if holder != name:
        raise SystemExit(f"{file} is the file of {holder} in the manifest: give {name} another with --file NAME")


def write_entry(
    folder: Path,
    file: str,
    name: str,
    wording: crops.Wording,
    args: argparse.Namespace,
    command: str,
    settings: dict[str, Any],
) -> None:
    """The classifier's entry in the manifest of a folder, float or int8."""
    entry, outputs = describe_tensors(folder / file)
    sizes = {"class_logits": len(wording.classes), "attribute_logits": sum(wording.sizes), "cell_logit": 1}
    by_size = {size: kind for kind, size in sizes.items()}
    described = [
        {**output, "kind": by_size[output["shape"][-1]], "meaning": KINDS[by_size[output["shape"][-1]]]}
        for output in outputs
    ]
    foreign = settings.get("foreign", ())
    sources = "PBC (Acevedo et al. 2020), split train" + (
        f"; cells of {', '.join(foreign)} fields that we named by eye, split train" if foreign else ""
    )
    update_manifest(
        folder,
        "classifier",
        name=name,
        version=args.version,
        file=file,
        input={**entry, "meaning": "the square crop of one cell, real values 0 to 1", "colour_order": "RGB"},
        outputs=described,
        classes=wording.classes,
        crop={"margin": crops.MARGIN, "look": {**dataclasses.asdict(TAUGHT_LOOK), "told_by": [NUCLEATED]}},
        thresholds={
            "min_probability": 0.5,
            "temperature": 1.0,
            "min_cell_probability": 0.5,
            "sure_probability": SURE_PROBABILITY,
            "doubtful_probability": DOUBTFUL_PROBABILITY,
        },
        morphology={"attributes": wording.values, **yaml.safe_load(WORDING.read_text())},
        data=f"{sources}; attributes: WBCAtt; the simulated slide",
        command=command,
    )


def calibration(
    data: Path, wording: crops.Wording, side_px: int, count: int, boxes: Path, settings: Mapping[str, Any]
) -> tuple[list[Picture], list[Picture]]:
    """Training crops as the agent cuts them, half of them in the look, the classes evenly, every source; and such of
    what is no cell: what never comes in calibration is clipped, and ranges that augmentation widens are steps lost to
    all others. settings: the run's.
    """
    torch.manual_seed(3)
    cells = read_cells(data, "train", settings.get("random_split"))
    rng = np.random.default_rng(3)
    rng.shuffle(cells)
    each = max(1, count // len(wording.classes))
    chosen = [c for name in wording.classes for c in [x for x in cells if x.class_name == name][:each]]
    pbc, foreign = crops.pbc_examples(data, chosen, read_boxes(boxes), wording), settings.get("foreign", ())
    others = crops.foreign_examples(data, foreign, ("train",), wording)
    no_cell = crops.without_cells(data, ("pbc", *foreign), rng, wording)
    shown = pbc + crops.some(others, count // 3, rng)
    not_shown = crops.some(no_cell, count // 5, rng) + crops.ruined(pbc, rng, count // 8)
    not_shown += crops.under_debris(no_cell, rng, count // 8)
    return cut(shown, side_px), cut(not_shown, side_px)


Picture = NDArray[np.float32]
"""(1, side, side, 3), 0 to 1."""


def cut(examples: Sequence[crops.Example], side_px: int) -> list[Picture]:
    """As the agent cuts them, which trusts no microscope; half of them in the look."""
    asked = [dataclasses.replace(example, has_look=False) for example in examples]
    training = crops.TrainingCrops(asked, side_px, plain_share=1.0, normalised_share=0.5)
    return [
        training[index][0].permute(1, 2, 0)[None].numpy().astype(np.float32) / 255 for index in range(len(training))
    ]


@torch.inference_mode()
def within_reach(net: nn.Module, shown: Sequence[Picture], not_shown: Sequence[Picture]) -> list[Picture]:
    """The pictures at which no name or look is more than twice as loud as at the median cell.

    shown: pictures of cells. not_shown: others. To empty glass a net may answer with logits forty times as large as to
    any cell: they would take nearly all steps of all layers. Clipped they still say that it is no cell.
    """
    pictures = [*shown, *not_shown]
    loudness = [max(float(part.abs().max()) for part in net(as_batch(p))[:2]) for p in pictures]
    limit = 2 * float(np.median(loudness[: len(shown)]))
    kept = [p for p, found in zip(pictures, loudness, strict=True) if found <= limit]
    print(f"calibration: {len(kept)} of {len(pictures)} pictures, logits up to {limit:.1f}", file=sys.stderr)
    return kept


def as_batch(picture: Picture) -> Tensor:
    return torch.from_numpy(picture).permute(0, 3, 1, 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="best.pt of a run")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--float-models", type=Path, default=Path("runs/float"), help="the same before quantisation")
    parser.add_argument("--boxes", type=Path, default=Path("runs/boxes.json"), help="from models.classifier.locate")
    parser.add_argument("--file", default=None, help="name of the file without its ending; default: the net's")
    parser.add_argument("--version", help="default: that of the net's entry in the manifest, 0.1.0 for a new one")
    parser.add_argument("--pictures", type=int, default=160, help="calibration pictures")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
