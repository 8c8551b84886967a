"""What both training scripts share: averaged weights, a schedule by time or steps, checkpoints that survive a kill."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


class AveragedWeights:
    """Exponential moving average of a net's weights and batch-norm statistics; it is the average that is shipped."""

    def __init__(self, net: nn.Module, decay: float = 0.999):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))  # follow fast at first
        for mean, value in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
            if mean.dtype.is_floating_point:
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)


@dataclass
class Schedule:
    """Learning rate over the run: short warm-up, then a cosine to 2 % of the peak.

    The run ends after `minutes` of training time (over all its sessions), so that a slow machine still sees the whole
    cosine.
    """

    peak: float
    minutes: float
    warmup: float = 0.04
    spent_s: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def progress(self) -> float:
        """0 at the start of the run, 1 at its end."""
        return min(1.0, (self.spent_s + time.monotonic() - self.started) / (60 * self.minutes))

    @property
    def rate(self) -> float:
        progress = self.progress
        if progress < self.warmup:
            return self.peak * max(0.02, progress / self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return self.peak * (0.02 + 0.98 * cosine)


def split_decay(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for kernels, none for biases and norms."""
    kernels = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    return [{"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def save_checkpoint(path: Path, **states: Any) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(states, part)
    part.replace(path)


def log_figures(path: Path, **figures: Any) -> None:
    """Append one line of figures to the run's log and print it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
    with path.open("a") as log:
        log.write(json.dumps(rounded) + "\n")
    print(json.dumps(rounded), flush=True)
