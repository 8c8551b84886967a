"""Train YOLOv10n on fields with boxes.

    python -m models.detector.train --data ../shared/data --run runs/detector --minutes 60

Killed and started again with the same --run, it goes on from the last epoch. The first part of the run works on small
pictures, which are cheap; the rest on pictures of the size that is shipped.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from agent.inference.letterbox import letterbox
from models.common.datasets import AugmentedFields, LabelledField, collate_fields, load_fields
from models.common.labels import DETECTOR_CLASSES, read_fields
from models.common.metrics import FieldBoxes, detection_figures
from models.common.simulated import simulated_fields
from models.common.training import Run
from models.detector.loss import head_loss
from models.nets.yolov10 import YoloV10n, decode_boxes, flatten, places

SIZE_PX = 416
SMALL_PX = 320
FILL = 114  # grey beside the frame; goes into the manifest
BATCH = 16
STEPS = 50  # an epoch: about the 700 complete training fields once
CLAIMS = 10


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    net = YoloV10n(len(DETECTOR_CLASSES)).to(memory_format=torch.channels_last)
    run = Run(args.run, net, args.rate, args.minutes)
    # Fields whose red cells are only half labelled would teach that the other half is background.
    train = load_fields([field for field in read_fields(args.data, "train") if field.is_complete])
    val = load_fields([field for field in read_fields(args.data, "val") if field.is_complete])
    simulated = simulated_fields(args.simulated, args.run.parent) if args.simulated else []
    batches, batch_size_px = None, 0
    run.schedule.start()
    while not run.is_finished:
        size_px = SMALL_PX if run.schedule.progress < args.small_share else SIZE_PX
        if size_px != batch_size_px:
            batch_size_px = size_px
            fields = AugmentedFields(train, simulated, size_px, args.seed + run.epoch, simulated_share=0.2)
            batches = iter(DataLoader(fields, BATCH, collate_fn=collate_fields, num_workers=1, prefetch_factor=4))
            centres, strides = places(size_px, size_px)
        net.train()
        losses = []
        for pixels, targets, real in itertools.islice(batches, STEPS):
            x = (pixels.float() / 255).to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                many, one = net.forward_both(x)
            loss = head_loss(many, centres, strides, targets, real, CLAIMS)
            loss = loss + head_loss(one, centres, strides, targets, real, 1)
            run.step(loss)
            losses.append(loss.item())
            if run.is_finished:
                break
        is_judged = run.is_finished or (run.epoch + 1) % args.val_every == 0
        figures = {name: f.map50 for name, f in evaluate(run.average.net, val).items()} if is_judged else {}
        run.end_epoch(figures.get("all"), size_px=size_px, loss=float(np.mean(losses)), **figures)


@torch.inference_mode()
def evaluate(net: YoloV10n, fields: list[LabelledField]) -> dict:
    """Figures of the float net, for choosing a checkpoint; what is reported is measured on the shipped file."""
    net.eval()
    centres, strides = places(SIZE_PX, SIZE_PX)
    results = []
    for field in fields:
        square, placed = letterbox(field.pixels, SIZE_PX, FILL)
        offset = torch.tensor([placed.offset_x_px, placed.offset_y_px] * 2)
        scale = torch.tensor([placed.scale_x, placed.scale_y] * 2)
        x = torch.from_numpy(square.transpose(2, 0, 1).copy())[None].float() / 255
        with torch.autocast("cpu", torch.bfloat16):
            maps = net(x.to(memory_format=torch.channels_last))
        distances, logits = flatten(maps)
        boxes = (decode_boxes(distances, centres, strides)[0] - offset) / scale
        score, index = logits[0].sigmoid().flatten().topk(300)
        place, label = index // logits.shape[-1], index % logits.shape[-1]
        found = torch.cat((label[:, None].float(), score[:, None], boxes[place]), 1).numpy()
        results.append(FieldBoxes(found, field.boxes))
    return detection_figures(results, DETECTOR_CLASSES)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with fields.csv")
    parser.add_argument("--run", type=Path, default=Path("runs/detector"), help="folder for checkpoints and log")
    parser.add_argument("--minutes", type=float, default=60, help="training time in all")
    parser.add_argument("--small-share", type=float, default=0.65, help="share of the run that uses small pictures")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--simulated", type=int, default=400, help="simulated fields; 0 = none")
    parser.add_argument("--val-every", type=int, default=5, help="epochs between two looks at `val`")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
