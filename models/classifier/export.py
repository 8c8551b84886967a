"""The trained classifier as the int8 file that is shipped, and its entry in the manifest.

python -m models.classifier.export --checkpoint runs/classifier/best.pt --data ../shared/data
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.classifier.locate import read_boxes
from models.classifier.train import SIZE_PX
from models.common.datasets import CellCrops
from models.common.labels import read_cells
from models.common.quantize import describe_tensors, export_float, quantize_file, update_manifest
from models.nets.shufflenetv2 import ShuffleNetV2, fold_batch_norm

FILE = "classifier/shufflenetv2.tflite"
CROP_MARGIN = 0.2


class ChannelsLast(nn.Module):
    """NHWC in, logits out."""

    def __init__(self, net: ShuffleNetV2):
        super().__init__()
        self.net = fold_batch_norm(net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.permute(0, 3, 1, 2))


def main() -> None:
    args = parse()
    checkpoint = torch.load(args.checkpoint, weights_only=True)
    classes = tuple(checkpoint["classes"])
    net = ShuffleNetV2(len(classes))
    net.load_state_dict(checkpoint["average"])
    args.command = args.command or checkpoint["command"]
    float_file, int8_file = args.float_models / FILE, args.models / FILE
    export_float(ChannelsLast(net.eval()), SIZE_PX, float_file)
    quantize_file(float_file, int8_file, calibration(args.data, classes, args.pictures, args.boxes))
    for folder in (args.float_models, args.models):
        write_entry(folder, classes, args)


def write_entry(folder: Path, classes: tuple[str, ...], args: argparse.Namespace) -> None:
    """The classifier's entry in the manifest of a folder, float or int8."""
    entry, (logits,) = describe_tensors(folder / FILE)
    update_manifest(
        folder,
        "classifier",
        name="shufflenetv2-x1.0",
        version=args.version,
        file=FILE,
        input={**entry, "meaning": "the square crop of one cell, real values 0 to 1", "colour_order": "RGB"},
        outputs=[{**logits, "kind": "class_logits", "meaning": "logit of each class"}],
        classes=classes,
        crop={"margin": CROP_MARGIN},
        thresholds={"min_probability": args.min_probability, "temperature": args.temperature},
        data="PBC (Acevedo et al. 2020), split train, and the simulated slide",
        command=args.command,
    )


def calibration(data: Path, classes: tuple[str, ...], count: int, boxes: Path | None) -> Iterator[NDArray[np.float32]]:
    """Training crops, augmented as in training, the classes evenly."""
    torch.manual_seed(3)
    cells = read_cells(data, "train")
    rng = np.random.default_rng(3)
    rng.shuffle(cells)
    chosen = [
        c for name in classes for c in [x for x in cells if x.class_name == name][: max(1, count // len(classes))]
    ]
    crops = CellCrops(chosen, classes, SIZE_PX, read_boxes(boxes))
    for index in range(len(crops)):
        yield crops[index][0].permute(1, 2, 0)[None].numpy().astype(np.float32) / 255


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/classifier/best.pt"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--float-models", type=Path, default=Path("runs/float"), help="the same before quantisation")
    parser.add_argument("--boxes", type=Path, default=None, help="where the cells are: models.classifier.locate")
    parser.add_argument("--version", default="0.1.0")
    parser.add_argument("--pictures", type=int, default=160, help="calibration pictures")
    parser.add_argument("--min-probability", type=float, default=0.5, help="below it a cell is unidentified")
    parser.add_argument("--temperature", type=float, default=1.0, help="softmax temperature, fitted on val")
    parser.add_argument("--command", default=None, help="how it was trained; default: what the checkpoint says")
    return parser.parse_args()


if __name__ == "__main__":
    main()
