"""What both training scripts share: averaged weights, a schedule by time or steps, checkpoints that survive a kill."""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from models.common.logs import log_figures

PLACES = frozenset({"--data", "--runs", "--boxes"})
"""Options that say where things lie on this machine, and nothing of what is done."""


def told_command(arguments: Sequence[str]) -> str:
    """A command line as it is told to others: without the places of this machine. arguments: as in `sys.orig_argv`."""
    kept = [
        word
        for before, word in zip(("", *arguments[1:]), arguments[1:], strict=False)
        if before not in PLACES and word.partition("=")[0] not in PLACES
    ]
    return " ".join(("python", *kept))


COMMAND = told_command(sys.orig_argv)
"""How this process was started; goes with the weights into the manifest."""


def best_device() -> torch.device:
    """Where a run computes: on the GPU where PyTorch has one, else on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(net: nn.Module) -> torch.device:
    """Where a net's weights lie."""
    return next(net.parameters()).device


def bfloat16(device: torch.device, *, is_wanted: bool = True) -> torch.autocast:
    """Convolutions in bfloat16 where the device computes so; elsewhere it is emulated, ten times slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_wanted and _is_bfloat16_fast(device.type))


@cache
def _is_bfloat16_fast(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "avx512_bf16" in facts.read_text()


NO_FACTORS: Mapping[str, float] = MappingProxyType({})


class AveragedWeights:
    """Exponential moving average of a net's weights and batch-norm statistics; it is the average that is shipped."""

    def __init__(self, net: nn.Module, decay: float = 0.998):
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
    cosine; or, where runs are to be compared whatever else the machine does, after so many `steps`.
    """

    peak: float
    minutes: float
    steps: int | None = None
    warmup: float = 0.04
    spent_s: float = 0.0
    done_steps: int = 0
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """s; training time over all sessions of the run."""
        return self.spent_s + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """0 at the start of the run, 1 at its end."""
        if self.steps is not None:
            return min(1.0, self.done_steps / self.steps)
        return min(1.0, self.elapsed_s / (60 * self.minutes))

    def start(self) -> None:
        """The clock of this session runs from now: loading the data is not training."""
        self.started = time.monotonic()

    @property
    def rate(self) -> float:
        progress = self.progress
        if progress < self.warmup:
            return self.peak * max(0.02, progress / self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))
        return self.peak * (0.02 + 0.98 * cosine)


def split_parameters(net: nn.Module, weight_decay: float, factors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parameter groups: weight decay for kernels, none for biases and norms; rates by the start of the names."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        factor = next((share for start, share in factors.items() if name.startswith(start)), 1.0)
        groups.setdefault((factor, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [{"params": found, "weight_decay": decay, "factor": factor} for (factor, decay), found in groups.items()]


class Run:
    """A training run and its folder: net, averaged weights, optimiser, schedule. Killed, it resumes at the last epoch.

    folder: gets `last.pt` (to resume), `best.pt` (averaged weights of the best score) and `log.jsonl`.
    minutes, steps: its length, see `Schedule`. factors: share of the rate for parameters whose names begin so. A new
    run begins with the net as it is given, on the device where it lies. console: for the progress bar, which a terminal
    alone gets; None = standard error.
    """

    def __init__(
        self,
        folder: Path,
        net: nn.Module,
        rate: float,
        minutes: float,
        steps: int | None = None,
        factors: Mapping[str, float] = NO_FACTORS,
        console: Console | None = None,
    ):
        self.folder = folder
        self.net = net
        self.average = AveragedWeights(net)
        self.optimiser = torch.optim.AdamW(split_parameters(net, 0.02, factors), lr=rate)
        self.schedule = Schedule(rate, minutes, steps)
        self.epoch, self.best = 0, 0.0
        self._bar = RunBar(console or Console(stderr=True))
        if (folder / "last.pt").exists():
            self._resume(torch.load(folder / "last.pt", weights_only=True, map_location="cpu"))

    @property
    def is_finished(self) -> bool:
        return self.schedule.progress >= 1

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The clock of this session runs, and its progress is shown, until the block ends."""
        self.schedule.start()
        with self._bar.shown():
            yield

    def step(self, loss: Tensor) -> None:
        """One step down, at the schedule's rate."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.schedule.rate * group["factor"]
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 10)
        self.optimiser.step()
        self.schedule.done_steps += 1
        self.average.update(self.net)
        self._bar.tell_step(self.schedule.progress, self.epoch, loss)

    def end_epoch(
        self, score: float | None, facts: dict[str, Any] | None = None, *, error: float = 0.0, **figures: Any
    ) -> None:
        """Log the epoch, keep its weights when no epoch before it has a better `score`, make it the place to resume.

        score: None = this epoch was not judged. facts: go into `best.pt` beside the weights. error: standard error of
        the score: what is better by less may be chance, and then the later epoch is kept, which has learnt for longer
        at a lower rate. Source: the one-standard-error rule, Breiman et al., "Classification and Regression Trees".
        """
        self.epoch += 1
        self._bar.tell_score(score)
        judged = {} if score is None else {"score": score}
        log_figures(self.folder, epoch=self.epoch, progress=self.schedule.progress, **figures, **judged)
        if score is not None and score >= self.best - error:
            self.best = max(self.best, score)
            weights = self.average.net.state_dict()
            save_checkpoint(
                self.folder / "best.pt", average=weights, epoch=self.epoch, command=COMMAND, **(facts or {})
            )
        save_checkpoint(
            self.folder / "last.pt",
            net=self.net.state_dict(),
            average=self.average.net.state_dict(),
            updates=self.average.updates,
            optimiser=self.optimiser.state_dict(),
            epoch=self.epoch,
            best=self.best,
            spent_s=self.schedule.elapsed_s,
            done_steps=self.schedule.done_steps,
        )

    def _resume(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.average.net.load_state_dict(state["average"])
        self.average.updates = state["updates"]
        self.optimiser.load_state_dict(state["optimiser"])
        self.epoch, self.best = state["epoch"], state["best"]
        self.schedule.spent_s, self.schedule.done_steps = state["spent_s"], state["done_steps"]


class RunBar:
    """How far a run is, with its newest loss and its newest score on `val`; on a terminal only."""

    def __init__(self, console: Console):
        self._is_shown = console.is_terminal
        self._score = ""
        columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        # The log goes to standard output: it is led around the bar where both share the screen, and nowhere else.
        self._bar = Progress(
            *(*columns, TextColumn("loss {task.fields[loss]}{task.fields[score]}")),
            console=console,
            redirect_stdout=sys.stdout.isatty(),
            disable=not self._is_shown,
        )
        self._task = self._bar.add_task("run", total=1.0, epoch=1, loss="-", score="")

    @contextmanager
    def shown(self) -> Iterator[None]:
        with self._bar:
            yield

    def tell_step(self, progress: float, epoch: int, loss: Tensor) -> None:
        """progress: 0 to 1. epoch: how many have ended."""
        if self._is_shown:  # else nobody waits until the device has computed the number
            told = f"{loss.item():.3f}"
            self._bar.update(self._task, completed=progress, epoch=epoch + 1, loss=told, score=self._score)

    def tell_score(self, score: float | None) -> None:
        """None = the epoch was not judged, the score before stays."""
        if score is not None:
            self._score = f", val {score:.4f}"
            self._bar.update(self._task, score=self._score)


def save_checkpoint(path: Path, **states: Any) -> None:
    """Write a checkpoint whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    torch.save(states, part)
    part.replace(path)
