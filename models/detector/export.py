"""The trained detector as the int8 file that is shipped, and its entry in the manifest.

python -m models.detector.export --checkpoint runs/smaller-fields/best.pt --version 0.4.0
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from agent.inference.letterbox import letterbox
from agent.inference.manifest import load_manifest
from models.common.datasets import AugmentedFields, load_fields
from models.common.labels import DETECTOR_CLASSES, SOURCES, cell_classes, read_complete_fields, read_rgb
from models.common.programs import CONVERTER, run_program
from models.common.quantize import (
    begin_folder,
    describe_tensors,
    export_float,
    quantize_file,
    renew_entry,
    update_manifest,
)
from models.common.warm_start import save_norms
from models.detector.train import FILL, SIZE_PX, averaged_net
from models.nets.yolov10 import STRIDES, YoloV10n, fold_batch_norm

FILE = "detector/yolov10n.tflite"
SCORE_FLOOR = -8.0
"""Logit; a score of 0.0003. The empty background reaches -60, and would leave the cells steps of a quarter logit."""
LARGEST_PLATELET = 1.5
"""Sides of a typical red cell; of the platelets in 679 PBC pictures (`train`, `val`) the largest has 1.41."""
MIN_SCORE, SAME_CELL_IOU = 0.5, 0.5
"""Of a file whose own are not chosen yet: those of the shipped one. A file holds the one-to-many head, which gives each
cell several boxes: unmerged they are 111 to 211 in PBC pictures of 12 to 24 cells."""
KINDS = ("box_distances", "class_scores")
MEANINGS = {
    "box_distances": "distances to left, top, right and bottom side in strides, each a raw distribution over 16 bins",
    "class_scores": "logit of each class",
}


class RawMaps(nn.Module):
    """NHWC in, six raw NHWC maps out.

    Boxes and scores stay apart and undecoded, so that each map keeps a scale of its own: one shared scale for pixels
    and probabilities would leave the scores two steps.
    """

    def __init__(self, net: YoloV10n):
        super().__init__()
        self.net = fold_batch_norm(net)
        del self.net.one_to_many

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.net(x.permute(0, 3, 1, 2))
        return tuple(part.permute(0, 2, 3, 1) for pair in maps for part in pair)


def main() -> None:
    args = parse()
    net, command = averaged_net(args.checkpoint)
    args.command = args.command or command
    args.version = args.version or load_manifest(args.models).detector.version
    begin_folder(args.models, args.float_models)
    write_files(net, args.float_models / FILE, args.models / FILE, args.data, args.pictures)
    for folder in (args.float_models, args.models):
        write_entry(folder, args)


def write_files(
    net: YoloV10n,
    float_file: Path,
    int8_file: Path,
    data: Path,
    pictures: int,
    size_px: int = SIZE_PX,
    sources: Sequence[str] = SOURCES,
) -> None:
    """The net as a float and an int8 file for squares of a size, with the head that `averaged_net` ships.

    pictures: how many to calibrate with, from the fields of `sources`.
    """
    export_float(RawMaps(net.eval()), size_px, float_file)
    _, outputs = describe_tensors(float_file)
    floors = {o["name"]: SCORE_FLOOR for o in outputs if role(o["shape"], size_px)["kind"] == "class_scores"}
    quantize_file(float_file, int8_file, calibration(data, pictures, size_px, sources), floors)
    save_norms(net, int8_file)


def own_folder(
    net: YoloV10n,
    folder: Path,
    args: argparse.Namespace,
    size_px: int = SIZE_PX,
    sources: Sequence[str] = SOURCES,
    **changes: str,
) -> Path:
    """A folder of models in which this net is the int8 detector, to be measured beside others.

    args: `models`, the folder that the rest comes from; `data`; `pictures`, to calibrate with. changes: of its entry.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, perhaps of other models
    begin_folder(args.models, folder)
    float_file = folder.with_name(f"{folder.name}.float.tflite")
    write_files(net, float_file, folder / FILE, args.data, args.pictures, size_px, sources)
    renew_entry(folder, "detector", lambda output: role(output["shape"], size_px), **changes)
    return folder


def write_entry(folder: Path, args: argparse.Namespace) -> None:
    """The detector's entry in the manifest of a folder, float or int8."""
    entry, outputs = describe_tensors(folder / FILE)
    update_manifest(
        folder,
        "detector",
        name="yolov10n",
        version=args.version,
        file=FILE,
        input={
            **entry,
            "meaning": "a frame in a square, real values 0 to 1",
            "colour_order": "RGB",
            "letterbox": {"align": "centre", "fill": FILL},
        },
        outputs=[{**output, **role(output["shape"])} for output in outputs],
        classes=DETECTOR_CLASSES,
        classified=["WBC", "platelet"],
        agreeing={
            "WBC": [name for name in cell_classes(args.data) if name != "platelet"],
            "platelet": ["platelet"],
        },
        largest_in_red_cells={"platelet": LARGEST_PLATELET},
        thresholds={"min_score": args.min_score, "same_cell_iou": args.same_cell_iou, "max_cells": 1000},
        data="TXL-PBC fields (BCCD, PBC, Raabin; complete labels, split train); PBC pictures (split train) with boxes "
        "that an earlier version found; the simulated slide",
        command=args.command,
    )


def role(shape: list[int], size_px: int = SIZE_PX) -> dict[str, object]:
    """Which map an output is: known by its shape, since the classes are fewer than the bins."""
    stride = size_px // shape[1]
    kind = KINDS[shape[3] == len(DETECTOR_CLASSES)]
    if stride not in STRIDES:
        raise SystemExit(f"output of shape {shape} is none of the detector's maps")
    return {"kind": kind, "stride_px": stride, "meaning": MEANINGS[kind]}


def calibration(
    data: Path, count: int, size_px: int = SIZE_PX, sources: Sequence[str] = SOURCES
) -> Iterator[NDArray[np.float32]]:
    """Training fields: half as they are, half as augmentation changes them, so that foreign looks are not clipped."""
    fields = read_complete_fields(data, "train", sources)
    rng = np.random.default_rng(3)
    chosen = [fields[k] for k in rng.permutation(len(fields))[: count // 2]]
    for field in chosen:
        yield letterbox(read_rgb(field.path), size_px, FILL)[0][None].astype(np.float32) / 255
    augmented = iter(AugmentedFields([(load_fields(chosen), 1.0)], size_px, seed=3))
    for _ in range(count - count // 2):
        yield next(augmented)[0].permute(1, 2, 0)[None].numpy().astype(np.float32) / 255


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("runs/smaller-fields/best.pt"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    parser.add_argument("--float-models", type=Path, default=Path("runs/float"), help="the same before quantisation")
    parser.add_argument("--version", help="default: that of the detector in the manifest")
    parser.add_argument("--pictures", type=int, default=60, help="calibration pictures")
    parser.add_argument(
        "--min-score",
        type=float,
        default=MIN_SCORE,
        help="least score of a box, until models.choose_thresholds chooses one on val; default: %(default)s",
    )
    parser.add_argument(
        "--same-cell-iou",
        type=float,
        default=SAME_CELL_IOU,
        help="overlap from which two boxes are one cell's, chosen likewise; default: %(default)s",
    )
    parser.add_argument("--command", default=None, help="how it was trained; default: what the checkpoint says")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main, CONVERTER)
