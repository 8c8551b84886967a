"""What fine-tuning and adaptation share: from the shipped classifier to a net, and from a net to new models."""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from agent.config import ModelsSection
from agent.errors import ModelError
from agent.inference.manifest import ClassifierEntry, load_manifest
from agent.inference.models import Models, open_models
from agent.inference.selftest import make_answers
from models.classifier import crops
from models.classifier.export import ChannelsLast, within_reach
from models.common.labels import CellImage, Rgb, read_cells
from models.common.manifests import OTHERS, find_entry, read_manifest, write_manifest
from models.common.programs import Unfit, require_place
from models.common.quantize import export_float, quantize_file, renew_entry
from models.common.warm_start import load_shipped, save_norms
from models.evaluation.asking import add_classifier
from models.evaluation.names import require_named
from models.nets.cellnet import CellNet

BATCH = 32
KEEP_MORPHOLOGY = 0.05
"""Weight of staying with what the net said of the cells' looks, for which a laboratory gives no labels."""

NEXT = (
    "Read its signoff.json, then copy the folder to the device, set models.folder to it there and restart the agent"
    " (models/README.md, your own microscope, step 6). A device on which models were activated (model.activate) goes on"
    " with those: there put it into the staging folder for model.stage and model.activate."
)
"""What a person does with new models."""


def add_options(parser: argparse.ArgumentParser, minutes: float, rate: float) -> None:
    """What fine-tuning and adaptation are both asked with. minutes, rate: the defaults."""
    parser.add_argument("--output", type=Path, required=True, help="new folder of models, which is not there yet")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of models to begin with")
    add_classifier(parser)
    parser.add_argument("--data", type=Path, help="folder of the PBC pictures with their pbc.csv, to forget less")
    parser.add_argument("--boxes", type=Path, help="with --data: runs/boxes.json of models.classifier.locate")
    parser.add_argument("--minutes", type=above_zero, default=minutes, help="of learning; a few more come on top")
    parser.add_argument("--rate", type=above_zero, default=rate, help="peak learning rate of the heads")


def above_zero(text: str) -> float:
    """A number given to a program; `ArgumentTypeError` for one with which learning would never begin or end."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above zero")
    return value


def require_new(output: Path) -> None:
    """`Unfit` where the folder to be written is there already, or cannot be made: told before minutes of learning."""
    if output.exists():
        raise Unfit(f"{output}: exists already; give another --output, or move it away first")
    require_place(output)


def known_cells(data: Path, split: str, classes: Sequence[str]) -> Sequence[CellImage]:
    """The PBC pictures to learn along, `train`, or to judge by, `val`.

    `Unfit` where there are none, or of other classes: told before minutes of learning.
    """
    cells = read_cells(data, split)
    if not cells:
        raise Unfit(
            f"{data / 'pbc.csv'}: has no picture of split {split}; --data is the folder of the PBC pictures: of train"
            " some are learnt along, by val it is judged what is forgotten. Leave --data out if you do not have them"
        )
    return require_named(cells, classes, data, split)


@dataclass(frozen=True, slots=True, eq=False)
class Base:
    """The classifier of a folder of models as a net that can learn."""

    folder: Path
    entry: ClassifierEntry
    wording: crops.Wording
    net: CellNet

    @property
    def side_px(self) -> int:
        return self.entry.input.shape[1]


def open_base(folder: Path, pictures: Sequence[crops.Example], name: str | None = None) -> Base:
    """The net of a folder's classifier.

    pictures: where no statistics of the norms lie beside the file they give them. name: of one of several classifiers;
    None = the first. Errors: `ModelError` where the folder is none; `FileDoesNotFit` where its file is of another make.
    """
    entry = load_manifest(folder).choosing(name).classifier
    wording = wording_of(entry)
    net = CellNet(entry.name, len(entry.classes), wording.sizes)
    squares = [crops.picture_tensor(square) for square in agent_squares(entry, pictures[:256])]
    load_shipped(net, folder / entry.file, (torch.stack(squares).float() / 255).split(64))
    return Base(folder, entry, wording, net)


def with_own_stain(base: Base) -> Base:
    """The same for cells that are only lit, for a laboratory that has taught it its own stain."""
    look = base.entry.crop.look
    if look is None:
        return base
    crop = base.entry.crop.model_copy(update={"look": look.model_copy(update={"lab": None})})
    return replace(base, entry=base.entry.model_copy(update={"crop": crop}))


def agent_squares(entry: ClassifierEntry, examples: Iterable[crops.Example]) -> Iterator[Rgb]:
    """Crops as the agent cuts and lights them for a classifier, of its input's size."""
    relooks = crops.Relooks(entry.crop.as_look())
    for example in examples:
        yield relooks.cell(crops.square(example.pixels, example.box, entry.input.shape[1]), example)


def wording_of(entry: ClassifierEntry) -> crops.Wording:
    """Classes and attributes of a classifier that describes cells; `ModelError` for one that does not."""
    if entry.morphology is None:
        raise ModelError(f"{entry.file}: version {entry.version} has no attributes; take models of 0.2.0 or newer")
    return crops.Wording(entry.classes, entry.morphology.attributes)


def tune(
    base: Base,
    examples: Sequence[crops.Example],
    minutes: float,
    rate: float,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Teach the net, in place, with its norms' statistics held: a few hundred cells are too few to learn those from.

    The rate falls to zero over `minutes`; early layers learn a third as fast.
    """
    net = base.net
    old = copy.deepcopy(net).eval().requires_grad_(False)
    look = base.entry.crop.as_look()
    dataset = crops.TrainingCrops(examples, base.side_px, normalised_share=1.0, look=look)
    loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=len(examples) > BATCH)
    early, late = list(net.backbone.parameters()), [p for m in (net.classes, net.is_cell) for p in m.parameters()]
    optimiser = torch.optim.AdamW([{"params": early, "lr": rate / 3}, {"params": late, "lr": rate}], weight_decay=0.02)
    peaks = [group["lr"] for group in optimiser.param_groups]
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    begun_s, spent = clock(), 0.0
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("learning", total=1.0)
        while spent < 1:
            for pixels, labels, _, are_cells in loader:
                spent = (clock() - begun_s) / (60 * minutes)
                bar.update(task, completed=spent)
                if spent >= 1:
                    break
                for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                    group["lr"] = peak * 0.5 * (1 + np.cos(np.pi * spent))
                optimiser.zero_grad(set_to_none=True)
                tuning_loss(net, old, pixels.float() / 255, labels, are_cells).backward()
                nn.utils.clip_grad_norm_(net.parameters(), 10)
                optimiser.step()
    net.eval()


def tuning_loss(net: CellNet, old: CellNet, x: Tensor, labels: Tensor, are_cells: Tensor) -> Tensor:
    """Names and is-a-cell from the labels; the looks as they were told before."""
    answers = net(x)
    with torch.inference_mode():
        told = old(x)
    loss = functional.binary_cross_entropy_with_logits(answers.is_cell[:, 0], are_cells) * 0.3
    is_named = labels != crops.UNKNOWN
    if is_named.any():
        loss = loss + functional.cross_entropy(answers.classes[is_named], labels[is_named], label_smoothing=0.05)
    return loss + KEEP_MORPHOLOGY * functional.mse_loss(answers.morphology, told.morphology.clone())


def write_models(
    base: Base, calibration: Sequence[crops.Example], output: Path, how: str, facts: dict[str, object]
) -> Models:
    """A folder of models with the tuned classifier, quantised, beside the old detector; opened as the agent opens it.

    calibration: crops that the int8 ranges are taken from, some of which may show no cell. how: goes into the version,
    as `0.2.0+tuned-20261125`. facts: figures before and after, written to `signoff.json` for the person who signs the
    change off.
    """
    output.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(base.folder)
    manifest["classifier"] = find_entry(manifest, "classifier", base.entry.name)
    manifest.pop(OTHERS, None)  # they know nothing of this laboratory
    manifest["classifier"].pop("confusion", None)  # measured on another file
    for role in ("detector", "classifier"):
        source, target = base.folder / manifest[role]["file"], output / manifest[role]["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    write_manifest(output, manifest)
    file = output / base.entry.file
    float_file = file.with_suffix(".float.tflite")
    export_float(ChannelsLast(base.net), base.side_px, float_file)
    pictures = [square[None].astype(np.float32) / 255 for square in agent_squares(base.entry, calibration)]
    pairs = list(zip(calibration, pictures, strict=True))
    shown, not_shown = ([p for e, p in pairs if e.is_cell == is_cell] for is_cell in (True, False))
    quantize_file(float_file, file, within_reach(base.net, shown, not_shown))
    float_file.unlink()
    save_norms(base.net, file)
    entry = manifest["classifier"]
    kinds = {told["shape"][-1]: told for told in entry["outputs"]}
    day = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d")
    renew_entry(
        output,
        "classifier",
        lambda told: kinds[told["shape"][-1]],
        version=f"{entry['version'].split('+')[0]}+{how}-{day}",
        data=f"{entry['data']}; {how} on this laboratory's own cells",
        crop=base.entry.crop.model_dump(mode="json"),
    )
    (output / "signoff.json").write_text(json.dumps(facts, indent=2) + "\n")
    models = open_models(ModelsSection(folder=output))
    make_answers(models, output)
    return models


def share_of_right(models: Models, examples: Sequence[crops.Example]) -> float:
    """Accuracy of a folder's int8 classifier on labelled examples."""
    return float(np.mean(named_right(models, examples)))


def named_right(models: Models, examples: Sequence[crops.Example]) -> list[bool]:
    """Of each labelled example whether a folder's int8 classifier names it right."""
    answers = answers_to(models, examples)
    return [index == e.label for (index, _, _), e in zip(answers, examples, strict=True)]


def answers_to(models: Models, examples: Sequence[crops.Example]) -> list[tuple[int, float, float]]:
    """Of each example class index, probability and cell probability that the agent would give."""
    entry = models.manifest.classifier
    squares = agent_squares(entry, examples)
    answers = (models.classifier.classify(np.ascontiguousarray(square[..., ::-1])) for square in squares)
    return [(entry.classes.index(a.class_name), a.probability, a.cell_probability) for a in answers]
