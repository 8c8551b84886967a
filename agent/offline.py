"""Stored pictures through both models, without camera thread, outbox and broker: `hematovision infer` and `classify`.

Each input gives one outcome, in order: a result, or the reason why there is none. One bad file stops nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2

from agent.analysis.annotation import annotate
from agent.analysis.preprocessing import preprocess
from agent.analysis.quality import assess_quality
from agent.bench import Bench, make_bench
from agent.camera.camera import SYSTEM_CLOCKS, make_frame
from agent.camera.decoding import MIN_CROP_SIDE_PX, decode_file
from agent.camera.replay import PICTURE_SUFFIXES, list_pictures, printable
from agent.config import Config
from agent.delivery.messages import Body, field_body, stamp
from agent.domain import Classification, FieldResult, Pixels, SampleState
from agent.errors import CameraError, ConfigError, FrameUnreadable, HematoVisionError
from agent.inference.models import Models
from agent.machine import read_clock
from agent.pipeline import Stopwatch, add_field, analyse_frame

SAMPLE_ID = "infer"
"""The sample of cell ids where the configuration names none."""

NO_BOOT = 0
"""Ids of these results carry the boot 0, which no running agent ever has."""


class AlbumError(HematoVisionError):
    """The folder for annotated pictures does not take them."""

    exit_code = 5


@dataclass(frozen=True, slots=True)
class Picture:
    """A file to analyse. source: as it was given, or found in a given folder.   place: below that folder."""

    path: Path
    source: str
    place: Path


@dataclass(frozen=True, slots=True)
class Unread:
    """An input that gave no result, and why."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Analysed:
    """One field. message: the payload that the agent would publish for it."""

    picture: Picture
    field: FieldResult
    message: Body


@dataclass(frozen=True, slots=True)
class Classified:
    """One crop. looks: the cell described in words, empty where the model does not.

    is_trusted: whether the agent would count it under that name; else it would be `unidentified`.
    """

    source: str
    classification: Classification
    looks: str
    is_trusted: bool


def find_pictures(paths: Sequence[str]) -> list[Picture | Unread]:
    """Files as they are given; folders with all below them, in natural order."""
    found: list[Picture | Unread] = []
    for given in paths:
        path, source = Path(given), os.fsencode(given).decode("utf-8", "backslashreplace")
        if not path.is_dir():
            found.append(Picture(path, source, Path(path.name)))
            continue
        try:
            below = list_pictures(path)
        except CameraError as error:
            found.append(Unread(source, str(error)))
            continue
        found.extend(Picture(file, printable(file), file.relative_to(path)) for file in below)
        if not below:
            found.append(Unread(source, f"no pictures in this folder ({', '.join(sorted(PICTURE_SUFFIXES))})"))
    return found


def analyse_pictures(
    pictures: Iterable[Picture | Unread], config: Config, models: Models
) -> Iterator[Analysed | Unread]:
    """Every picture through both models, as the agent would; the quality gate's verdict is told, not obeyed."""
    bench = make_bench(config, models)
    sample = SampleState(config.sample.id or SAMPLE_ID)
    for picture in pictures:
        if isinstance(picture, Unread):
            yield picture
            continue
        try:
            field = _analyse(picture, config, bench, sample)
        except FrameUnreadable as error:
            yield Unread(picture.source, error.reason)
            continue
        sample = add_field(sample, field)
        body = field_body(field, config.device, config.site, sample.sid)
        yield Analysed(picture, field, stamp(body, config.device, NO_BOOT, sample.fields))


def _analyse(picture: Picture, config: Config, bench: Bench, sample: SampleState) -> FieldResult:
    pixels_bgr = decode_file(picture.path, config.camera.max_megapixels)
    return analyse_pixels(pixels_bgr, picture.source, config, bench, sample)


def analyse_pixels(pixels_bgr: Pixels, source: str, config: Config, bench: Bench, sample: SampleState) -> FieldResult:
    """The next field of a sample, from its pixels; the quality gate's verdict is told, not obeyed."""
    watch = Stopwatch()
    frame = make_frame(
        sample.fields + 1,
        pixels_bgr,
        source=source,
        clocks=SYSTEM_CLOCKS,
        um_per_px=config.camera.um_per_px,
    )
    with watch.stage("quality"):
        quality = assess_quality(frame.pixels_bgr, config.quality)
    return analyse_frame(frame, quality, bench, sample, read_clock(), watch)


def classify_pictures(
    pictures: Iterable[Picture | Unread], config: Config, models: Models
) -> Iterator[Classified | Unread]:
    """Every picture as one cell, cut tightly or with its surroundings."""
    rules = models.naming_rules(config.models.min_probability)
    for picture in pictures:
        if isinstance(picture, Unread):
            yield picture
            continue
        try:
            pixels_bgr = decode_file(picture.path, config.camera.max_megapixels, MIN_CROP_SIDE_PX)
        except FrameUnreadable as error:
            yield Unread(picture.source, error.reason)
            continue
        answer = models.name_central_cell(preprocess(pixels_bgr, config.preprocessing), config.models.min_score)
        yield Classified(picture.source, answer, models.describe(answer), rules.believes(answer))


def refuse_to_overwrite(folder: Path, pictures: Iterable[Picture | Unread]) -> None:
    """Annotated pictures must not replace those that they were made from, nor be analysed the next time.

    Raises ConfigError where one of the pictures lies in the folder for annotated ones, or below it.
    """
    place = folder.resolve()
    for picture in pictures:
        if isinstance(picture, Picture) and place in picture.path.resolve().parents:
            fault = f"{picture.source} lies in it, and could be overwritten; name a folder without pictures to analyse"
            raise ConfigError(f"--save-annotated {folder}", (fault,))


class Album:
    """A folder of annotated pictures, laid out as the pictures themselves are."""

    def __init__(self, folder: Path, class_names: Sequence[str], footer: str) -> None:
        self._folder = folder
        self._class_names = class_names
        self._footer = footer
        self._used: set[Path] = set()

    def save(self, analysed: Analysed) -> Path:
        """Write the picture with its cells marked. Raises AlbumError where the disk does not take it."""
        field = analysed.field
        picture = annotate(field.frame.pixels_bgr, field.cells, self._class_names, self._footer)
        path = self._free_path(analysed.picture.place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".png", picture)[1].tobytes())
        except OSError as error:
            raise AlbumError(f"{path}: the annotated picture cannot be written: {error.strerror}") from error
        return path

    def _free_path(self, place: Path) -> Path:
        """Two inputs of one name, from two folders or with two endings, do not overwrite each other."""
        path, number = self._folder / place.with_suffix(".png"), 1
        while path in self._used:
            number += 1
            path = self._folder / place.with_name(f"{place.stem}-{number}.png")
        self._used.add(path)
        return path
