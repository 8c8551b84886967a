"""Train YOLOv10n on fields with boxes, as one YAML file says.

    python -m models.detector.train models/detector/recipes/detector.yaml --data ../shared/data

Killed and started again, it goes on from the last epoch. The first part of the run works on small pictures, which are
cheap; the rest on pictures of the size that is shipped.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from agent.inference.letterbox import letterbox
from models.common.checkpoints import load_fitting, read_run_checkpoint, require_files
from models.common.datasets import AugmentedFields, LabelledField, collate_fields, load_fields
from models.common.labels import (
    DETECTOR_CLASSES,
    SOURCES,
    CellImage,
    Rgb,
    mistakes,
    put_right,
    read_cells,
    read_complete_fields,
    read_rgb,
)
from models.common.metrics import FieldBoxes, detection_figures, merge_boxes, middle_score
from models.common.programs import run_program
from models.common.simulated import simulated_fields
from models.common.training import Run, best_device, bfloat16, device_of
from models.common.warm_start import load_shipped
from models.detector.label_pictures import SURE, load_pictures
from models.detector.loss import head_loss
from models.nets.yolov10 import YoloV10n, decode_boxes, flatten, places

SIZE_PX = 416
FILL = 114  # grey beside the frame; goes into the manifest
CLAIMS = 10
VAL_CELLS_EVERY = (
    6  # of the 1,671 pictures of `val`: enough to see a class that is lost, quick enough at every fifth epoch
)
SAME_CELL_IOU = 0.6  # of boxes that overlap by more the best stands, as later in the agent


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """What a run's YAML says.

    init: `.pt` of ours (of a classifier whose backbone is this one's, too) or a foreign one, as far as it fits, or
    a shipped `.tflite`. minutes: of training, over all sessions. epochs: a run of so many instead, however long
    they take, to be compared with others. small_px, small_share: side of the pictures in the first share of the
    run. steps: of an epoch. mosaic_until: progress of the run at which mosaics end. scales: of a single field, 1 =
    as large as fits. plain_share: of the pictures, keeps the look of its own laboratory. debris_share: of them, shows
    dirt and grains of stain between the cells. shares: of the training
    pictures by kind (`fields`, `pictures` from `label_pictures`, `simulated`). sources: whose fields take part, in
    choosing the best epoch too; the others are never seen.
    """

    init: Path | None = None
    minutes: float = 60
    epochs: int | None = None
    rate: float = 2e-3
    small_px: int = 320
    small_share: float = 0.5
    batch: int = 16
    steps: int = 50
    mosaic_until: float = 0.85
    scales: tuple[float, float] = (0.5, 1.5)
    plain_share: float = 0.125
    debris_share: float = 0.0
    sources: tuple[str, ...] = SOURCES
    pictures: Path | None = None
    pictures_share: float = 0.0
    simulated: int = 200
    simulated_share: float = 0.2
    val_every: int = 5
    seed: int = 1
    threads: int = 2


def main() -> None:
    args = parse()
    settings = read_run(args.file)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    folder = args.runs / args.file.stem
    is_new = not (folder / "last.pt").exists()
    require_files(settings.init if is_new else None)
    train = training_fields(args.data, settings.sources)
    val = load_fields(read_complete_fields(args.data, "val", settings.sources))
    val_cells = read_cells(args.data, "val")[::VAL_CELLS_EVERY] if "pbc" in settings.sources else []
    pictures = load_pictures(settings.pictures, args.data) if settings.pictures else []
    simulated = simulated_fields(settings.simulated, args.runs) if settings.simulated else []
    net = YoloV10n(len(DETECTOR_CLASSES)).to(memory_format=torch.channels_last)
    if is_new:
        begin_with(net, settings, train)
    device = best_device()
    net.to(device)
    steps = settings.epochs * settings.steps if settings.epochs else None
    run = Run(folder, net, settings.rate, settings.minutes, steps)
    pools = [(train, 1 - settings.pictures_share - settings.simulated_share)]
    pools += [(pictures, settings.pictures_share), (simulated, settings.simulated_share)]
    batches, drawn_so = None, None
    with run.begun():
        while not run.is_finished:
            size_px = settings.small_px if run.schedule.progress < settings.small_share else SIZE_PX
            mosaic_share = 0.5 if run.schedule.progress < settings.mosaic_until else 0.0
            if drawn_so != (size_px, mosaic_share):
                drawn_so = size_px, mosaic_share
                seed = settings.seed + run.epoch
                fields = AugmentedFields(
                    pools,
                    size_px,
                    seed,
                    mosaic_share,
                    settings.scales,
                    settings.plain_share,
                    settings.debris_share,
                )
                loader = DataLoader(fields, settings.batch, collate_fn=collate_fields, num_workers=1, prefetch_factor=4)
                batches = iter(loader)
            net.train()
            losses = []
            for pixels, targets, real in itertools.islice(batches, settings.steps):
                loss = batch_loss(net, pixels.to(device), targets.to(device), real.to(device))
                run.step(loss)
                losses.append(loss.item())
                if run.is_finished:
                    break
            is_judged = run.is_finished or (run.epoch + 1) % settings.val_every == 0
            figures = evaluate(run.average.net, val) if is_judged else {}
            if is_judged:
                figures["middle_found"] = share_found(run.average.net, val_cells) if val_cells else 1.0
            # The fields show five of the eight classes: a net that misses the others is no better for its boxes.
            score = figures["all_map50_95"] * figures["middle_found"] if is_judged else None
            run.end_epoch(score, size_px=size_px, loss=float(np.mean(losses)), **figures)


def batch_loss(net: YoloV10n, pixels: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """Loss of both heads, where the net lies. pixels: uint8, (batch, 3, side, side); the others: `collate_fields`."""
    centres, strides = places(*pixels.shape[2:], pixels.device)
    x = (pixels.float() / 255).to(memory_format=torch.channels_last)
    with bfloat16(pixels.device):
        many, one = net.forward_both(x)
    loss = head_loss(many, centres, strides, targets, real, CLAIMS)
    return loss + head_loss(one, centres, strides, targets, real, 1)


def read_run(file: Path) -> RunFile:
    """The run's settings; unknown keys are refused."""
    try:
        found = yaml.safe_load(file.read_text())
        for key in ("init", "pictures"):
            if found.get(key):
                found[key] = Path(found[key])
        return RunFile(**found)
    except (OSError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise SystemExit(f"{file}: {error}; the keys are those of RunFile in models/detector/train.py") from error


def training_fields(data: Path, sources: tuple[str, ...]) -> list[LabelledField]:
    """Complete fields of `train`: a field whose red cells are half labelled would teach that the rest is background.

    Red cells that the label files call nucleated (we looked at each nucleated box of two sources) are put right.
    """
    chosen = read_complete_fields(data, "train", sources)
    wrong = mistakes(data, "train")
    return [
        replace(loaded, boxes=put_right(loaded.boxes, wrong.get(field.path)))
        for field, loaded in zip(chosen, load_fields(chosen), strict=True)
    ]


def begin_with(net: YoloV10n, settings: RunFile, fields: list[LabelledField]) -> None:
    """Give the net the weights that the run asks for."""
    if settings.init is None:
        return
    if settings.init.suffix == ".pt":
        print(f"{settings.init}: {load_fitting(net, settings.init)}")
        return
    squares = [letterbox(field.pixels, SIZE_PX, FILL)[0] for field in fields[:: max(1, len(fields) // 48)]]
    batch = torch.from_numpy(np.stack(squares).transpose(0, 3, 1, 2).copy()).float() / 255
    # Export merges each pair of a 7x7 and a 3x3 kernel into the large one, and leaves the one-to-many head out.
    load_shipped(net, settings.init, batch.split(8), is_stored=lambda name: ".small." not in name)
    net.one_to_many.load_state_dict(net.one_to_one.state_dict())


def averaged_net(checkpoint: Path) -> tuple[YoloV10n, str]:
    """The averaged net of a run as it is exported, and the command that made it.

    A file has one head, the one-to-many one: docs/decisions/0003-boxes-of-one-cell-are-merged.md
    """
    state = read_run_checkpoint(checkpoint)
    if "backbone" in state:
        raise SystemExit(f"{checkpoint}: is of a classifier; give best.pt of a detector's run")
    net = YoloV10n(len(DETECTOR_CLASSES))
    net.load_state_dict(state["average"])
    net.one_to_one.load_state_dict(net.one_to_many.state_dict())
    return net, state["command"]


@torch.inference_mode()
def find(net: YoloV10n, pixels: Rgb, least: float) -> NDArray[np.float32]:
    """Boxes of a float net in evaluation mode, (found, 6): class, score, x_min, y_min, x_max, y_max in px."""
    device = device_of(net)
    centres, strides = places(SIZE_PX, SIZE_PX)
    square, placed = letterbox(pixels, SIZE_PX, FILL)
    offset = torch.tensor([placed.offset_x_px, placed.offset_y_px] * 2)
    scale = torch.tensor([placed.scale_x, placed.scale_y] * 2)
    x = torch.from_numpy(square.transpose(2, 0, 1).copy())[None].float() / 255
    many, _ = net.forward_both(x.to(device, memory_format=torch.channels_last))  # the head that is shipped
    distances, logits = (part.cpu() for part in flatten(many))
    score, index = logits[0].sigmoid().max(-1)
    kept = score > least
    boxes = (decode_boxes(distances, centres, strides)[0, kept] - offset) / scale
    found = torch.cat((index[kept, None].float(), score[kept, None], boxes), 1).numpy()
    return merge_boxes(found, SAME_CELL_IOU)


def evaluate(net: YoloV10n, fields: list[LabelledField]) -> dict[str, float]:
    """Figures of the float net, for choosing a checkpoint; what is reported is measured on the shipped file."""
    net.eval()
    results = [FieldBoxes(find(net, field.pixels, 0.01), field.boxes) for field in fields]
    figures = detection_figures(results, DETECTOR_CLASSES)
    return {f"{name}_{key}": getattr(f, key) for name, f in figures.items() for key in ("map50", "map50_95")}


def share_found(net: YoloV10n, cells: Sequence[CellImage]) -> float:
    """Of single-cell pictures, the share whose middle lies in a sure box that is no red cell's."""
    net.eval()
    wanted = [k for k, name in enumerate(DETECTOR_CLASSES) if name != "RBC"]
    count = 0
    for cell in cells:
        pixels = read_rgb(cell.path)
        count += middle_score(find(net, pixels, SURE), wanted, pixels.shape[1], pixels.shape[0]) > 0
    return count / len(cells)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the run's YAML; see models/detector/recipes")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs and caches lie")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
