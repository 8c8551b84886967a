"""A field that was counted, analysed again from its picture, and held against what was said of it then.

    message + picture --analyse_again--> message of now --compare--> Verdict: identical, or what differs

The same path as in `agent.pipeline`. A single field is compared as the models see it: what its cells are to the slide
(duplicates, dirt, places) follows from the fields before it. All fields of a sample, from the first on, are compared
with that too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.analysis.cells import UNIDENTIFIED, cell_number
from agent.analysis.duplicates import SlideMap
from agent.analysis.quality import assess_quality
from agent.bench import Bench
from agent.camera.camera import SYSTEM_CLOCKS, make_frame
from agent.camera.decoding import decode_file
from agent.camera.replay import list_pictures
from agent.delivery.messages import Body, field_body
from agent.domain import CellStatus, Frame, Pixels, SampleState
from agent.errors import CameraError, FrameUnreadable, HematoVisionError
from agent.machine import read_clock
from agent.pictures import PictureStore
from agent.pipeline import Stopwatch, analyse_frame, on_its_slide

OF_THE_SLIDE = ("duplicate_of", "counted", "supersedes")
"""Keys of a cell that tell what it is to the slide."""

DUPLICATE, ARTEFACT = CellStatus.DUPLICATE.value, CellStatus.ARTEFACT.value


class PictureMissing(HematoVisionError):
    """The picture that was counted is not where it was looked for."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What is no longer as it was. where: a cell's id, `counts`, or a part of the provenance; key: which word of it."""

    where: str
    key: str
    then: Any
    now: Any


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out. picture: where it was found. differences: of cells and counts, empty = identical.

    provenance: what else counts now. with_slide: whether duplicates, dirt and places were compared too.
    """

    field_id: str
    sample: str
    cells: int
    picture: str
    differences: tuple[Difference, ...]
    provenance: tuple[Difference, ...]
    with_slide: bool

    @property
    def is_identical(self) -> bool:
        return not self.differences


class Pictures:
    """Where the pictures of fields are looked for: one file; or those that were kept, then folders, by their digest.

    A folder's pictures are decoded one by one until the right one comes; which they are is remembered.
    """

    def __init__(
        self, file: Path | None, kept: PictureStore | None, folders: Iterable[Path], max_megapixels: float
    ) -> None:
        self._file = file
        self._kept = kept
        self._folders = list(folders)
        self._max_megapixels = max_megapixels
        self._known: dict[str, Path] = {}
        self._not_looked_at = self._files()

    def find(self, message: Mapping[str, Any]) -> tuple[Path, Frame]:
        """The picture of a field, by its digest. Raises PictureMissing; FrameUnreadable: the file is no picture."""
        told = message["frame"]
        digest = str(told.get("sha256") or told["sha256_16"])  # an older agent told sixteen digits
        if self._file is not None:
            frame = self._frame(decode_file(self._file, self._max_megapixels), self._file, told)
            if not frame.sha256.startswith(digest):
                raise PictureMissing(
                    f"{self._file}: this is another picture than the one that was counted: its pixels have the SHA-256"
                    f" {frame.sha256[:16]}..., the field's have {digest[:16]}..."
                )
            return self._file, frame
        for path, frame in self._candidates(digest, told):
            if frame.sha256.startswith(digest):
                return path, frame
        raise PictureMissing(f"no picture with the SHA-256 {digest[:16]}... {self._where()}")

    def _candidates(self, digest: str, told: Mapping[str, Any]) -> Iterator[tuple[Path, Frame]]:
        """First those whose name or earlier look promises it, then what was not looked at yet."""
        promising = [path for known, path in self._known.items() if known.startswith(digest)]
        if self._kept is not None:
            promising += sorted(self._kept.folder.glob(f"{digest}*.png"))
        for path in promising:
            if (frame := self._read(path, told)) is not None:
                yield path, frame
        for path in self._not_looked_at:
            if (frame := self._read(path, told)) is not None:
                self._known[frame.sha256] = path
                yield path, frame

    def _files(self) -> Iterator[Path]:
        for folder in self._folders:
            try:
                yield from list_pictures(folder)
            except CameraError:
                continue  # `_where` names it

    def _read(self, path: Path, told: Mapping[str, Any]) -> Frame | None:
        try:
            return self._frame(decode_file(path, self._max_megapixels), path, told)
        except FrameUnreadable:
            return None

    @staticmethod
    def _frame(pixels_bgr: Pixels, path: Path, told: Mapping[str, Any]) -> Frame:
        stage = told.get("stage_um")
        return make_frame(
            int(told["n"]),
            pixels_bgr,
            source=str(path),
            clocks=SYSTEM_CLOCKS,
            um_per_px=told.get("um_per_px"),
            stage_um=None if stage is None else (float(stage[0]), float(stage[1])),
        )

    def _where(self) -> str:
        places = [str(folder) for folder in self._folders]
        if self._kept is not None:
            places.append(f"{self._kept.folder} (pictures.keep_mb)")
        if not places:
            return "can be looked for: give --image FILE or --images DIR; with pictures.keep_mb a device keeps its own"
        return f"in {', '.join(places)}; give --image FILE or --images DIR"


def replay(
    messages: Iterable[Mapping[str, Any]], find: Callable[[Mapping[str, Any]], tuple[Path, Frame]], bench: Bench
) -> Iterator[Verdict | PictureMissing]:
    """Each field again. With all fields of a sample, in order, what its cells are to the slide is compared too; from a
    field on whose picture is missing no longer.
    """
    slide: SlideMap | None = None
    for number, message in enumerate(messages):
        if number == 0 and is_first(message):
            slide = SlideMap(message["sample"])
        try:
            path, frame = find(message)
        except (PictureMissing, FrameUnreadable) as missing:
            slide = None
            yield PictureMissing(f"{message['id']}: {missing}")
            continue
        now = analyse_again(message, frame, bench, slide)
        yield Verdict(
            field_id=message["id"],
            sample=message["sample"],
            cells=len(message["cells"]),
            picture=str(path),
            differences=tuple(compare(message, now, with_slide=slide is not None)),
            provenance=tuple(compare_provenance(message["provenance"], now["provenance"])),
            with_slide=slide is not None,
        )


def is_first(message: Mapping[str, Any]) -> bool:
    """Whether this is the first field of its sample: its cells begin at 1, and it lies where the slide begins."""
    place = message.get("place")
    return place is not None and place["part"] in (0, 1) and _first_number(message) == 1


def _first_number(message: Mapping[str, Any]) -> int | None:
    """The least number of its cells; None for a field without any."""
    return min((cell_number(cell["cell_id"]) for cell in message["cells"]), default=None)


def analyse_again(message: Mapping[str, Any], frame: Frame, bench: Bench, slide: SlideMap | None) -> Body:
    """The field's message as it would be said now. slide: of the fields before; gets this one too."""
    sample = SampleState(message["sample"], next_cell_number=_first_number(message) or 1)
    watch = Stopwatch()
    quality = assess_quality(frame.pixels_bgr, bench.quality)
    field = analyse_frame(frame, quality, bench, sample, read_clock(), watch)
    if slide is not None:
        field, observed = on_its_slide(field, slide, watch)
        slide.add(observed.trace)
    topics = bench.topics
    return field_body(field, topics.device, topics.site, sample.sid, message.get("accession"))


def compare(then: Mapping[str, Any], now: Mapping[str, Any], *, with_slide: bool) -> Iterator[Difference]:
    """What is not the same to the last digit, of cells and counts. with_slide: what they are to the slide too."""
    for key in ("focus", "clipped_pct"):
        if then["frame"][key] != now["frame"][key]:
            yield Difference("frame", key, then["frame"][key], now["frame"][key])
    before = {cell["cell_id"]: cell for cell in then["cells"]}
    after = {cell["cell_id"]: cell for cell in now["cells"]}
    for cell_id in sorted({*before, *after}, key=cell_number):
        if cell_id not in after or cell_id not in before:
            found = before.get(cell_id) or after[cell_id]
            words = f"{found['class']} at {found['box']}"
            yield Difference(cell_id, "cell", *((words, None) if cell_id in before else (None, words)))
        else:
            yield from _compare_cell(before[cell_id], after[cell_id], with_slide=with_slide)
    if with_slide:
        for key in ("counts", "unique_counts", "duplicates", "place"):
            if then.get(key) != now.get(key):
                yield Difference(key, "", then.get(key), now.get(key))
        return
    is_dirt = {cell_id for cell_id, cell in before.items() if cell["status"] == ARTEFACT}
    counts = _count(cell for cell in now["cells"] if cell["cell_id"] not in is_dirt)
    if then["counts"] != counts:
        yield Difference("counts", "", then["counts"], counts)


def _compare_cell(then: Mapping[str, Any], now: Mapping[str, Any], *, with_slide: bool) -> Iterator[Difference]:
    ignored = set() if with_slide else set(OF_THE_SLIDE)
    if not with_slide and then["status"] in (DUPLICATE, ARTEFACT):
        ignored.add("status")
    for key in {**then, **now}:
        if key not in ignored and then.get(key) != now.get(key):
            yield Difference(then["cell_id"], key, then.get(key), now.get(key))


def _count(cells: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(UNIDENTIFIED if cell["status"] == UNIDENTIFIED else cell["class"] for cell in cells)
    return dict(sorted(counts.items()))


def compare_provenance(then: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[Difference]:
    """What else counts now, word for word; what an older agent did not tell is not compared."""
    for key, value in then.items():
        other = now.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from compare_provenance(value, other, f"{above}{key}.")
        elif value != other:
            yield Difference("provenance", f"{above}{key}", value, other)
