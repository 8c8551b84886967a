"""What every program that measures shipped files asks for, and how it shows that it goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from agent.config import ModelsSection

MAX_MEGAPIXELS = 80


def progress(sequence: Iterable[Any], what: str) -> Iterable[Any]:
    """A progress bar on a terminal's standard error."""
    console = Console(stderr=True)
    return track(list(sequence), what, console=console, disable=not console.is_terminal)


def add_options(parser: argparse.ArgumentParser, split: str = "test") -> None:
    """What every evaluation of shipped files is asked with. split: the default."""
    parser.add_argument("--split", choices=("train", "val", "test"), default=split)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of labelled data")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of manifest.json")
    add_threads(parser)
    parser.add_argument(
        "--most-tiles",
        type=as_setting("most_tiles"),
        default=ModelsSection().most_tiles,
        metavar="N",
        help="1 = frames as a whole only",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """On how many threads a model runs."""
    parser.add_argument("--threads", type=as_setting("threads"), default=2, metavar="N", help="CPU threads for a model")


def as_setting(name: str) -> Callable[[str], int]:
    """Reads an option that stands for a setting in `models` of the configuration, within its bounds there."""

    def read(text: str) -> int:
        try:
            value: int = getattr(ModelsSection.model_validate({name: text}), name)
        except ValidationError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error.errors()[0]['msg']}") from error
        return value

    return read


def add_classifier(parser: argparse.ArgumentParser) -> None:
    """Which of several classifiers is meant."""
    parser.add_argument("--classifier", metavar="NAME", help="of those in the manifest; default: the first")


def section_of(args: argparse.Namespace) -> ModelsSection:
    """The models that `add_options` and `add_classifier` were answered with."""
    return ModelsSection(
        folder=args.models, classifier=args.classifier, threads=args.threads, most_tiles=args.most_tiles
    )
