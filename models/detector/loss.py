"""The detector's loss: task-aligned assignment (arXiv 2108.07755), CIoU (arXiv 1911.08287), DFL (arXiv 2006.04388).

Both heads use the same matching metric with the same exponents, as YOLOv10's section 3.1 asks ("consistent dual
assignments"); they differ only in how many places a cell may claim: ten for one-to-many, one for one-to-one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from models.nets.yolov10 import BINS, decode_boxes, flatten

SCORE_POWER, OVERLAP_POWER = 0.5, 6.0
BOX_GAIN, SCORE_GAIN, BINS_GAIN = 7.5, 0.5, 1.5


def complete_iou(first: Tensor, second: Tensor) -> Tensor:
    """CIoU of boxes pair by pair, (pairs,): overlap less centre distance less difference of the aspect ratios."""
    overlap = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(0).prod(1)
    size_1, size_2 = first[:, 2:] - first[:, :2], second[:, 2:] - second[:, :2]
    iou = overlap / (size_1.prod(1) + size_2.prod(1) - overlap + 1e-7)
    hull = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    gap = (first[:, :2] + first[:, 2:] - second[:, :2] - second[:, 2:]).square().sum(1) / 4
    aspect = 4 / math.pi**2 * (torch.atan2(size_2[:, 0], size_2[:, 1]) - torch.atan2(size_1[:, 0], size_1[:, 1])) ** 2
    with torch.no_grad():
        weight = aspect / (aspect - iou + 1 + 1e-7)
    return iou - gap / (hull.square().sum(1) + 1e-7) - weight * aspect


@torch.no_grad()
def assign(
    scores: Tensor, boxes: Tensor, centres: Tensor, targets: Tensor, real: Tensor, claims: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which place answers for which cell, and how strongly.

    scores: (batch, places, classes) 0 to 1; boxes: (batch, places, 4); targets: (batch, cells, 5); real: which.
    Returns picture, place and cell index of each pair, (pairs,), and the pair's target score, (pairs,).
    """
    # Only places inside a cell's box may answer for it: work on those pairs alone, there are few.
    inside = (
        (centres[None, None, :, 0] > targets[:, :, None, 1])
        & (centres[None, None, :, 1] > targets[:, :, None, 2])
        & (centres[None, None, :, 0] < targets[:, :, None, 3])
        & (centres[None, None, :, 1] < targets[:, :, None, 4])
        & real[:, :, None]
    )
    picture, cell, place = inside.nonzero(as_tuple=True)
    overlap = complete_iou(boxes[picture, place], targets[picture, cell, 1:]).clamp(0)
    score = scores[picture, place, targets[picture, cell, 0].long()]
    metric = score**SCORE_POWER * overlap**OVERLAP_POWER

    dense = torch.full(inside.shape, -1.0, device=inside.device)
    dense[picture, cell, place] = metric
    best, where = dense.topk(min(claims, dense.shape[-1]), -1)  # (batch, cells, claims)
    picture, cell, rank = (best >= 0).nonzero(as_tuple=True)
    place, metric = where[picture, cell, rank], best[picture, cell, rank]
    overlap = complete_iou(boxes[picture, place], targets[picture, cell, 1:]).clamp(0)

    # A place that several cells claim answers for the one that it overlaps most.
    key = picture * centres.shape[0] + place
    order = torch.argsort(overlap, descending=True, stable=True)
    order = order[torch.argsort(key[order], stable=True)]
    first = torch.ones_like(order, dtype=torch.bool)
    first[1:] = key[order][1:] != key[order][:-1]
    kept = order[first]
    picture, cell, place, metric, overlap = (v[kept] for v in (picture, cell, place, metric, overlap))

    # Scores are aimed so that a cell's best place aims at the best overlap that the cell has reached.
    flat = picture * targets.shape[1] + cell
    cells = targets.shape[0] * targets.shape[1]
    top_metric = torch.zeros(cells, device=flat.device).scatter_reduce(0, flat, metric, "amax")
    top_overlap = torch.zeros(cells, device=flat.device).scatter_reduce(0, flat, overlap, "amax")
    return picture, place, cell, metric / (top_metric[flat] + 1e-9) * top_overlap[flat]


def head_loss(
    maps: list[tuple[Tensor, Tensor]], centres: Tensor, strides: Tensor, targets: Tensor, real: Tensor, claims: int
) -> Tensor:
    """Loss of one head, a mean over the batch's target scores."""
    distances, logits = flatten(maps)
    boxes = decode_boxes(distances, centres, strides)
    picture, place, cell, aim = assign(logits.detach().sigmoid(), boxes.detach(), centres, targets, real, claims)
    goal = torch.zeros_like(logits)
    goal[picture, place, targets[picture, cell, 0].long()] = aim
    total = goal.sum().clamp(min=1)
    score_loss = functional.binary_cross_entropy_with_logits(logits, goal, reduction="sum") / total
    if not len(picture):
        return SCORE_GAIN * score_loss

    box = targets[picture, cell, 1:]
    box_loss = ((1 - complete_iou(boxes[picture, place], box)) * aim).sum() / total
    centre, stride = centres[place], strides[place]
    sides = torch.cat((centre - box[:, :2], box[:, 2:] - centre), 1) / stride  # (pairs, 4) in strides
    sides = sides.clamp(0, BINS - 1 - 0.01)
    lower = sides.floor()
    fraction = sides - lower
    logs = distances[picture, place].log_softmax(-1)  # (pairs, 4, bins)
    low = logs.gather(-1, lower.long()[..., None])[..., 0]
    high = logs.gather(-1, lower.long()[..., None] + 1)[..., 0]
    bins_loss = (-(low * (1 - fraction) + high * fraction).mean(1) * aim).sum() / total
    return SCORE_GAIN * score_loss + BOX_GAIN * box_loss + BINS_GAIN * bins_loss
