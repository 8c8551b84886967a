"""Train ShuffleNetV2 on single-cell images.

    python -m models.classifier.train --data ../shared/data --run runs/classifier --minutes 25

Killed and started again with the same --run, it goes on from the last epoch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, WeightedRandomSampler

from models.classifier.locate import read_boxes
from models.common.augment import vary_look
from models.common.datasets import CellCrops, CentredBox, central_box
from models.common.labels import CellImage, cell_classes, read_cells, read_rgb
from models.common.simulated import simulated_crops
from models.common.training import Run
from models.nets.shufflenetv2 import ShuffleNetV2

SIZE_PX = 128
BATCH = 64


def main() -> None:
    args = parse()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    classes = cell_classes(args.data)
    net = ShuffleNetV2(len(classes)).to(memory_format=torch.channels_last)
    run = Run(args.run, net, args.rate, args.minutes, args.init)
    loader = train_loader(args, classes)
    views = val_views(read_cells(args.data, "val"), read_boxes(args.boxes))
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    run.schedule.start()
    while not run.is_finished:
        net.train()
        losses = []
        for pixels, labels in loader:
            x = pixels.to(memory_format=torch.channels_last).float() / 255
            loss = loss_of(net(x), labels)
            run.step(loss)
            losses.append(loss.item())
            if run.is_finished:
                break
        figures = {name: accuracy(run.average.net, view, classes) for name, view in views.items()}
        score = sum(figures.values()) / len(figures)
        run.end_epoch(score, {"classes": classes}, loss=float(np.mean(losses)), **figures)


def train_loader(args: argparse.Namespace, classes: tuple[str, ...]) -> DataLoader[tuple[torch.Tensor, int]]:
    """An epoch: as many crops as there are pictures, rare classes drawn more often (by the root of their rarity)."""
    simulated = simulated_crops(args.simulated, classes, args.run.parent) if args.simulated else []
    crops = CellCrops(read_cells(args.data, "train"), classes, SIZE_PX, read_boxes(args.boxes), simulated)
    counts = np.bincount(crops.labels, minlength=len(classes))
    weights = torch.from_numpy(1 / np.sqrt(counts[crops.labels]))
    sampler = WeightedRandomSampler(weights.tolist(), len(crops))
    return DataLoader(crops, BATCH, sampler=sampler, num_workers=1, drop_last=True, persistent_workers=True)


def val_views(cells: list[CellImage], boxes: Mapping[str, CentredBox]) -> dict[str, list[tuple[torch.Tensor, str]]]:
    """Three fixed views of `val`: whole pictures, crops as the agent cuts them, and those in foreign colours.

    The third stands in for other laboratories, which `val` itself cannot show.
    """
    rng = np.random.default_rng(0)
    whole, cut, foreign = [], [], []
    for cell in cells:
        picture = read_rgb(cell.path)
        whole.append(
            (tensor(square(picture, picture.shape[1] / 2, picture.shape[0] / 2, max(picture.shape))), cell.class_name)
        )
        x, y, width, height = boxes.get(cell.key) or central_box(picture)
        crop = square(picture, x, y, 1.2 * max(width, height))
        cut.append((tensor(crop), cell.class_name))
        foreign.append((tensor(vary_look(crop, rng, 1.3)), cell.class_name))
    return {"whole": whole, "cut": cut, "foreign": foreign}


def square(pixels: np.ndarray, x: float, y: float, side: float) -> np.ndarray:
    """A square of `side` pixels around x, y, with the picture's edge repeated outside, SIZE_PX wide."""
    import cv2

    scale = SIZE_PX / side
    matrix = np.array([[scale, 0, SIZE_PX / 2 - scale * x], [0, scale, SIZE_PX / 2 - scale * y]])
    if scale < 0.6:
        pixels = cv2.GaussianBlur(pixels, (0, 0), 0.35 / scale)
    return cv2.warpAffine(pixels, matrix, (SIZE_PX, SIZE_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


@torch.inference_mode()
def accuracy(net: nn.Module, view: list[tuple[torch.Tensor, str]], classes: tuple[str, ...]) -> float:
    """Share of right first answers."""
    right = 0
    for start in range(0, len(view), 128):
        part = view[start : start + 128]
        answers = net(torch.stack([x for x, _ in part]).float() / 255).argmax(1)
        right += sum(classes[a] == name for a, (_, name) in zip(answers.tolist(), part, strict=True))
    return right / len(view)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with pbc.csv")
    parser.add_argument("--run", type=Path, default=Path("runs/classifier"), help="folder for checkpoints and log")
    parser.add_argument("--init", type=Path, default=None, help="checkpoint whose weights a new run begins with")
    parser.add_argument("--boxes", type=Path, default=None, help="where the cells are: models.classifier.locate")
    parser.add_argument("--minutes", type=float, default=25, help="training time in all")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--simulated", type=int, default=150, help="simulated crops of each class; 0 = none")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
