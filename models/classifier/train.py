"""Train a classifier of single cells, as one YAML file says.

    python -m models.classifier.train models/classifier/recipes/varied.yaml --data ../shared/data

Killed and started again, it goes on from the last epoch. `best.pt` is the last epoch that none before it excels by more
than a standard error in the share of all `val` cells that it names right, each counted once, of PBC and of the other
microscopes that the run learns from. Those that it never sees are judged too, for the log alone: figures of a
microscope that was never seen must not be chosen on its cells.
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, WeightedRandomSampler

from agent.analysis.preprocessing import TAUGHT_LOOK
from models.classifier import crops
from models.classifier.locate import read_boxes
from models.common.checkpoints import load_fitting, read_run_checkpoint, require_files
from models.common.labels import CellImage, attribute_values, cell_classes, read_attributes, read_cells
from models.common.programs import run_program
from models.common.simulated import simulated_crops
from models.common.training import Run, best_device, bfloat16, device_of
from models.common.warm_start import FileDoesNotFit, load_shipped
from models.nets.cellnet import BACKBONES, Answers, CellNet


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """What a run's YAML says.

    init: `.pt` of ours or a foreign one, as far as it fits, or a shipped `.tflite`. teacher: `.pt` of a run of ours
    or a shipped `.tflite`, whose answers are learnt too. small_px: side to which crops shrink for the net (not for
    its teacher) until `small_until`, a share of the run: most is learnt in a half of the time (`val` is judged at
    side_px all along, which such a net does worse at). minutes: of training, over all sessions. epochs: a run of so
    many instead, however long they take, to be compared with others. rates: share of `rate` for parameters whose
    names begin so; 0 freezes them, their norms too. thaw_at: progress of the run at which the backbone begins to
    learn. foreign: sources of which the `train` cells that we named by eye take part, and the `val` cells in choosing
    the best epoch; the others are never seen. shares: of an epoch, by kind. weights: of the parts of the loss; those
    that are not given stay as in WEIGHTS. balance: inside a kind, how much more often a rare class is drawn: `even`
    (all classes as often), `root` (by the root of their rarity), `none`. undersample: the most pictures of a PBC class
    that take part; None = all. random_split: seed of a random split of the PBC pictures as the study draws it; None =
    as given. plain_share: of the crops, keeps the look of its own laboratory; the others get another stain, lamp and
    optics. normalised_share: of those of other microscopes, is brought to the taught look before, as by the agent;
    cut_share: of those, by what a piece of the picture shows, as people cut it. soft_share: of the crops, loses its
    fine detail, so that this alone makes no platelet. bf16: convolve in bfloat16 where the processor can: quicker for
    nets of full convolutions, slower for convolutions in depth.
    """

    backbone: str = "shufflenetv2-x1.0"
    init: Path | None = None
    teacher: Path | None = None
    side_px: int = 128
    small_px: int | None = None
    small_until: float = 0.6
    batch: int = 64
    minutes: float = 60
    epochs: int | None = None
    rate: float = 2e-3
    rates: Mapping[str, float] = field(default_factory=dict)
    thaw_at: float = 0.0
    epoch_crops: int = 10240
    foreign: tuple[str, ...] = ()
    shares: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=dict)
    simulated_each: int = 150
    balance: str = "root"
    undersample: int | None = None
    random_split: int | None = None
    plain_share: float = 0.125
    normalised_share: float = 0.0
    cut_share: float = 0.0
    soft_share: float = 0.0
    bf16: bool = False
    label_smoothing: float = 0.05
    seed: int = 1
    threads: int = 2


BALANCES = {"even": 1.0, "root": 0.5, "none": 0.0}
"""Power of a class's count by which each of its crops is drawn less often."""

WEIGHTS = {"classes": 1.0, "morphology": 0.3, "is_cell": 0.3, "teacher": 1.0, "teacher_morphology": 0.3}
TEACHER_TEMPERATURE = 2.0


def main() -> None:
    args = parse()
    settings = read_run(args.file)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    folder = args.runs / args.file.stem
    is_new = not (folder / "last.pt").exists()
    require_files(settings.init if is_new else None, settings.teacher)
    boxes = read_boxes(args.boxes)
    wording = crops.Wording(cell_classes(args.data), attribute_values(read_attributes(args.data)))
    examples = training_examples(settings, args, boxes, wording)
    net = CellNet(settings.backbone, len(wording.classes), wording.sizes).to(memory_format=torch.channels_last)
    if is_new:
        begin_with(net, settings, examples)
    device = best_device()
    net.to(device)
    teacher = None
    if settings.teacher:
        teacher = load_teacher(settings.teacher, examples, settings.side_px, wording).to(device)
    steps = settings.epochs * (settings.epoch_crops // settings.batch) if settings.epochs else None
    run = Run(folder, net, settings.rate, settings.minutes, steps, settings.rates)
    if run.epoch:  # else the crops of the first epochs would be drawn again
        torch.manual_seed(settings.seed + run.epoch)
    loader = train_loader(settings, examples, wording)
    views = val_views(args.data, settings, boxes, wording)
    facts = {"classes": wording.classes, "values": wording.values, "backbone": settings.backbone}
    facts |= {"side_px": settings.side_px, "settings": args.file.read_text()}
    weights = {**WEIGHTS, **settings.weights}
    with run.begun():
        while not run.is_finished:
            net.train()
            net.backbone.requires_grad_(run.schedule.progress >= settings.thaw_at)
            freeze(net, [start for start, share in settings.rates.items() if share == 0])
            losses = []
            for batch in loader:
                on_device = tuple(part.to(device) for part in batch)
                parts = batch_losses(net, teacher, on_device, settings, run.schedule.progress, wording)
                run.step(sum(weights[name] * part for name, part in parts.items()))
                losses.append({name: part.item() for name, part in parts.items()})
                if run.is_finished:
                    break
            means = {f"loss_{name}": float(np.mean([loss[name] for loss in losses])) for name in losses[0]}
            judged = judge(run.average.net, views, wording)
            score, error = pooled_accuracy(judged, views, taught_views(settings))
            figures = {**means, **{f"val_{name}": value for name, value in judged.items()}}
            run.end_epoch(score, facts, error=error, **figures)


Batch = tuple[Tensor, ...]
"""Of `crops.TrainingCrops`: pixels (b, 3, side, side), classes (b,), attributes (b, attributes), are cells (b,)."""


def batch_losses(
    net: CellNet, teacher: CellNet | None, batch: Batch, settings: RunFile, progress: float, wording: crops.Wording
) -> dict[str, Tensor]:
    """Each part of the loss, on the device where nets and batch lie. progress: of the run, 0 to 1."""
    pixels, labels, attributes, are_cells = batch
    x = pixels.to(memory_format=torch.channels_last).float() / 255
    with bfloat16(x.device, is_wanted=settings.bf16):
        answers = Answers(*(part.float() for part in net(as_seen(x, settings, progress))))
    parts = loss_parts(answers, labels, attributes, are_cells, wording, settings.label_smoothing)
    if teacher is not None:
        with torch.inference_mode(), bfloat16(x.device):
            told = Answers(*(part.float() for part in teacher(x)))
        parts |= teacher_losses(answers, told, labels, are_cells, wording)
    return parts


def as_seen(x: Tensor, settings: RunFile, progress: float) -> Tensor:
    """A batch as the net gets it at this point of the run, see `small_px`."""
    if settings.small_px is None or progress >= settings.small_until:
        return x
    return functional.interpolate(x, settings.small_px, mode="area")


def read_run(file: Path) -> RunFile:
    """The run's settings; unknown keys and names are refused."""
    try:
        found: dict[str, Any] = yaml.safe_load(file.read_text())
        for key in ("init", "teacher"):
            if found.get(key):
                found[key] = Path(found[key])
        settings = RunFile(**{**found, "foreign": tuple(found.get("foreign", ()))})
    except (OSError, AttributeError, TypeError, yaml.YAMLError) as error:
        raise SystemExit(f"{file}: {error}; the keys are those of RunFile in models/classifier/train.py") from error
    chosen = {"backbone": ({settings.backbone}, BACKBONES), "balance": ({settings.balance}, BALANCES)}
    listed = {"weights": (set(settings.weights), WEIGHTS), "foreign": (set(settings.foreign), FOREIGN_SOURCES)}
    for key, (names, known) in {**chosen, **listed}.items():
        if unknown := sorted(names - set(known)):
            raise SystemExit(f"{file}: {key}: {', '.join(unknown)} is none of {', '.join(known)}")
    return settings


def training_examples(
    settings: RunFile, args: argparse.Namespace, boxes: Mapping[str, Any], wording: crops.Wording
) -> dict[str, list[crops.Example]]:
    """By kind; see `shares`."""
    rng = np.random.default_rng(settings.seed)
    cells = read_cells(args.data, "train", settings.random_split)
    if settings.undersample is not None:
        cells = undersampled(cells, settings.undersample, rng)
    pbc = crops.pbc_examples(args.data, cells, boxes, wording)
    foreign = crops.foreign_examples(args.data, settings.foreign, ("train",), wording)
    no_cell = crops.without_cells(args.data, ("pbc", *settings.foreign), rng, wording)
    simulated = simulated_crops(settings.simulated_each, wording.classes, args.runs)
    found = {
        "pbc": pbc,
        "foreign": foreign,
        "simulated": crops.simulated_examples(simulated, wording),
        "platelets": crops.field_platelets(args.data, ("pbc", *settings.foreign), ("train",), wording),
        "no_cell": no_cell,
        "ruined": crops.ruined(pbc + [e for e in foreign if e.is_cell], rng, 2000),
        "debris": crops.under_debris(no_cell, rng, 2000),
    }
    return {kind: found[kind] for kind in settings.shares}


def undersampled(cells: Sequence[CellImage], most: int, rng: np.random.Generator) -> list[CellImage]:
    """At most so many cells of each class, drawn at random."""
    by_class: dict[str, list[CellImage]] = {}
    for k in rng.permutation(len(cells)):
        by_class.setdefault(cells[k].class_name, []).append(cells[k])
    return [cell for found in by_class.values() for cell in found[:most]]


def begin_with(net: CellNet, settings: RunFile, examples: Mapping[str, list[crops.Example]]) -> None:
    """Give the net the weights that the run asks for, and say what fitted."""
    if settings.init is None:
        return
    if settings.init.suffix == ".tflite":
        pictures = some_pictures(examples, settings.side_px)
        try:
            load_shipped(net, settings.init, pictures)
        except FileDoesNotFit:  # a file of version 0.1 has one head
            load_shipped(net, settings.init, pictures, is_stored=lambda name: not name.startswith(NEW_HEADS))
        return
    print(f"{settings.init}: {load_fitting(net, settings.init)}")


def some_pictures(examples: Mapping[str, list[crops.Example]], side_px: int) -> list[Tensor]:
    """Batches of PBC crops, for the norms of a shipped file that has none beside it."""
    pictures = [crops.square(e.pixels, e.box, side_px) for e in examples["pbc"][:: len(examples["pbc"]) // 256]]
    return list((torch.stack([crops.picture_tensor(p) for p in pictures]).float() / 255).split(64))


def freeze(net: nn.Module, starts: Sequence[str]) -> None:
    """What begins so neither learns nor moves its norms' statistics."""
    for name, module in net.named_modules():
        if name.startswith(tuple(starts)):
            module.eval().requires_grad_(False)


FACTS = ("classes", "values", "backbone", "side_px", "settings")
"""What a run writes beside its weights."""

NEW_HEADS = ("morphology", "is_cell")
"""Heads that files of version 0.1 do not have."""


def load_net(checkpoint: Path, wording: crops.Wording) -> CellNet:
    """The averaged net of a run, for answering only."""
    state = read_run_checkpoint(checkpoint, FACTS)
    net = CellNet(state["backbone"], len(wording.classes), wording.sizes)
    net.load_state_dict(state["average"])
    return for_answers(net)


def for_answers(net: CellNet) -> CellNet:
    """The net, that learns nothing any more."""
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def load_teacher(
    file: Path, examples: Mapping[str, list[crops.Example]], side_px: int, wording: crops.Wording
) -> CellNet:
    """The averaged net of a run, or the net of a shipped file, whichever of ours that is."""
    if file.suffix != ".tflite":
        return load_net(file, wording)
    pictures = some_pictures(examples, side_px)
    for name in BACKBONES:
        net = CellNet(name, len(wording.classes), wording.sizes)
        try:
            load_shipped(net, file, pictures)
        except FileDoesNotFit:
            continue
        return for_answers(net)
    raise SystemExit(f"teacher: {file} is no classifier of ours: none of {', '.join(BACKBONES)}")


def train_loader(
    settings: RunFile, examples: Mapping[str, list[crops.Example]], wording: crops.Wording
) -> DataLoader[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """An epoch: kinds by their shares, inside a kind classes by `balance`."""
    weights, all_examples = [], []
    for kind, share in settings.shares.items():
        labels = np.array([e.label for e in examples[kind]])
        counts = np.bincount(labels - crops.UNKNOWN, minlength=len(wording.classes) + 1).astype(float)
        each = counts[labels - crops.UNKNOWN] ** -BALANCES[settings.balance]
        weights.append(share * each / each.sum())
        all_examples += examples[kind]
    sampler = WeightedRandomSampler(np.concatenate(weights).tolist(), settings.epoch_crops)
    dataset = crops.TrainingCrops(
        all_examples,
        settings.side_px,
        plain_share=settings.plain_share,
        normalised_share=settings.normalised_share,
        cut_share=settings.cut_share,
        soft_share=settings.soft_share,
    )
    return DataLoader(
        dataset,
        settings.batch,
        sampler=sampler,
        num_workers=1,
        drop_last=True,
        persistent_workers=True,
        prefetch_factor=6,
    )


def loss_parts(
    answers: Answers, labels: Tensor, attributes: Tensor, are_cells: Tensor, wording: crops.Wording, smoothing: float
) -> dict[str, Tensor]:
    """Cross entropies, each a mean over the crops that have that label."""
    is_named = labels != crops.UNKNOWN
    classes = functional.cross_entropy(answers.classes[is_named], labels[is_named], label_smoothing=smoothing)
    groups = answers.morphology.split(wording.sizes, 1)
    described = [
        functional.cross_entropy(group, attributes[:, k], ignore_index=crops.UNKNOWN, reduction="sum")
        for k, group in enumerate(groups)
    ]
    morphology = sum(described) / (attributes != crops.UNKNOWN).sum().clamp(min=1)
    is_cell = functional.binary_cross_entropy_with_logits(answers.is_cell[:, 0], are_cells)
    return {"classes": classes, "morphology": morphology, "is_cell": is_cell}


def teacher_losses(
    answers: Answers, told: Answers, labels: Tensor, are_cells: Tensor, wording: crops.Wording
) -> dict[str, Tensor]:
    """How far the answers are from a teacher's to the same crops, softened; a mean over the crops that show a cell.

    Where the teacher names a cell wrongly nobody listens. Attributes: a mean over them. Source: Hinton et al.,
    "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.
    """
    is_wrong = (labels != crops.UNKNOWN) & (told.classes.argmax(1) != labels)
    are_cells = are_cells * ~is_wrong
    own, other = answers.morphology.split(wording.sizes, 1), told.morphology.split(wording.sizes, 1)
    described = torch.stack([divergence(*pair) for pair in zip(own, other, strict=True)]).mean(0)
    count = are_cells.sum().clamp(min=1)
    return {
        "teacher": (divergence(answers.classes, told.classes) * are_cells).sum() / count,
        "teacher_morphology": (described * are_cells).sum() / count,
    }


def divergence(logits: Tensor, told: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each row, (batch,), both softened; times the squared temperature (the paper)."""
    t = TEACHER_TEMPERATURE
    return functional.kl_div((logits / t).log_softmax(1), (told / t).softmax(1), reduction="none").sum(1) * t * t


def val_views(data: Path, settings: RunFile, boxes: Mapping[str, Any], wording: crops.Wording) -> dict[str, crops.View]:
    """PBC `val`, and of each source what we named by eye: its `val` where it is learnt from, all of it where it is not;
    and the platelets of its `val` fields. What there is none of has no view.
    """
    cells = read_cells(data, "val", settings.random_split)
    found = {"pbc": crops.pbc_examples(data, cells, boxes, wording)}
    for source in FOREIGN_SOURCES:
        splits = ("val",) if source in settings.foreign else ("train", "val", "test")
        found[source] = [e for e in crops.foreign_examples(data, (source,), splits, wording) if e.is_cell]
        found[platelets_of(source)] = crops.field_platelets(data, (source,), ("val",), wording)
    look = TAUGHT_LOOK if settings.normalised_share > 0 else None
    return {name: crops.make_view(each, settings.side_px, look) for name, each in found.items() if each}


FOREIGN_SOURCES = ("bccd", "raabin")


def platelets_of(source: str) -> str:
    """The view of a source's platelets."""
    return f"{source}_platelets"


def taught_views(settings: RunFile) -> set[str]:
    """The views of microscopes that the run learns from: those that the best epoch is chosen by."""
    return {"pbc", *settings.foreign, *(platelets_of(source) for source in settings.foreign)}


def pooled_accuracy(
    figures: Mapping[str, float], views: Mapping[str, crops.View], chosen: Collection[str]
) -> tuple[float, float]:
    """Share of the cells of some views that are named right, each cell counted once, and its standard error.

    figures: of `judge`.
    """
    sizes = {name: len(view.labels) for name, view in views.items() if name in chosen}
    # Whole cells: two epochs that name as many right must not differ by how a share was rounded.
    right = sum(round(figures[f"{name}_accuracy"] * size) for name, size in sizes.items())
    count = sum(sizes.values())
    share = right / count
    return share, (share * (1 - share) / count) ** 0.5


@torch.inference_mode()
def judge(net: nn.Module, views: Mapping[str, crops.View], wording: crops.Wording) -> dict[str, float]:
    """Accuracy of the class in each view, the share taken for cells, and the attributes where there are any."""
    figures = {}
    device = device_of(net)
    for name, view in views.items():
        told = (net(part.to(device).float() / 255) for part in view.crops.split(128))
        parts = [Answers(*(part.cpu() for part in answers)) for answers in told]
        classes = torch.cat([answers.classes for answers in parts]).argmax(1)
        figures[f"{name}_accuracy"] = float((classes == view.labels).float().mean())
        figures[f"{name}_is_cell"] = float((torch.cat([answers.is_cell for answers in parts]) > 0).float().mean())
        known = view.attributes != crops.UNKNOWN
        if known.any():
            groups = torch.cat([answers.morphology for answers in parts]).split(wording.sizes, 1)
            values = torch.stack([group.argmax(1) for group in groups], 1)
            figures[f"{name}_morphology"] = float((values == view.attributes)[known].float().mean())
    return figures


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the run's YAML; see models/classifier/recipes")
    add_places(parser)
    return parser.parse_args()


def add_places(parser: argparse.ArgumentParser) -> None:
    """Where on this machine lies what a run needs and leaves."""
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder with pbc.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs and caches lie")
    parser.add_argument("--boxes", type=Path, default=Path("runs/boxes.json"), help="from models.classifier.locate")


if __name__ == "__main__":
    run_program(main)
