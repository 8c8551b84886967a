"""The mean of the net that a run began with and of the one that it came to, which forgets less than the run did.

    python -m models.classifier.blend models/classifier/recipes/varied.yaml [--share 0.5]

The run has ended (`models.classifier.train`). Writes `best.pt` into the folder `NAME-blended` beside its own, and
prints the figures on `val` of both ends and of the mean. Source: Wortsman et al., "Robust fine-tuning of zero-shot
models", arXiv 2109.01903; the statistics of the norms are taken anew from training crops (Izmailov et al., arXiv
1803.05407).
"""

from __future__ import annotations

from models.common import needs_torch  # isort: skip  # noqa: F401

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from models.classifier import crops
from models.classifier.locate import read_boxes
from models.classifier.train import (
    FACTS,
    add_places,
    begin_with,
    for_answers,
    judge,
    read_run,
    train_loader,
    training_examples,
    val_views,
)
from models.common.checkpoints import read_run_checkpoint, require_files
from models.common.labels import attribute_values, cell_classes, read_attributes
from models.common.programs import run_program
from models.common.training import COMMAND, save_checkpoint
from models.nets.cellnet import CellNet

BATCHES = 64
"""Of training crops, for the statistics of the norms."""


def main() -> None:
    args = parse()
    settings = read_run(args.file)
    if settings.init is None:
        raise SystemExit(f"{args.file}: begins with nothing (no `init`), so there is nothing to blend with")
    checkpoint = args.runs / args.file.stem / "best.pt"
    require_files(settings.init, checkpoint)
    torch.manual_seed(settings.seed)
    torch.set_num_threads(settings.threads)
    boxes = read_boxes(args.boxes)
    wording = crops.Wording(cell_classes(args.data), attribute_values(read_attributes(args.data)))
    examples = training_examples(settings, args, boxes, wording)
    state = read_run_checkpoint(checkpoint, FACTS)
    begun, ended, blended = (CellNet(settings.backbone, len(wording.classes), wording.sizes) for _ in range(3))
    begin_with(begun, settings, examples)
    ended.load_state_dict(state["average"])
    blended.load_state_dict(mean_of(begun.state_dict(), ended.state_dict(), args.share))
    update_bn(real_values(train_loader(settings, examples, wording)), blended.to(memory_format=torch.channels_last))
    views = val_views(args.data, settings, boxes, wording)
    for name, net in (("begun", begun), ("ended", ended), ("blended", blended)):
        print(json.dumps({"net": name, **judge(for_answers(net), views, wording)}))
    facts = {key: state[key] for key in FACTS}
    folder = args.runs / f"{args.file.stem}-blended"
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder / "best.pt", average=blended.state_dict(), epoch=state["epoch"], command=COMMAND, **facts)


def mean_of(begun: Mapping[str, Tensor], ended: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The weights of a net between two of the same run. share: of the second, 0 to 1; counts are the second's."""
    return {
        name: torch.lerp(begun[name], value, share) if value.is_floating_point() else value
        for name, value in ended.items()
    }


def real_values(batches: Iterable[tuple[Tensor, ...]]) -> Iterator[Tensor]:
    """Of BATCHES batches the pictures, as the net takes them."""
    for pixels, *_ in islice(batches, BATCHES):
        yield pixels.float() / 255


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the YAML of a run that has ended")
    parser.add_argument("--share", type=float, default=0.5, help="of the run's end in the mean, 0 to 1")
    add_places(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
