"""The review list: cells that a person should look at, what persons answered, and the pictures of both.

field --review_notes--> notes review/{sample}/{cell}    stored in the frame's transaction
cmd/amend --answer_note--> notes answers/{sample}/{cell}  every answer, the newest last; none is overwritten
CropStore    {folder}/{sample}/{cell}.jpg                 after the transaction: a power cut can cost the picture of
the last field, never an entry or an answer
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from agent.analysis.agreement import Answer
from agent.analysis.cells import cell_number
from agent.config import ReviewSection
from agent.domain import Cell, CellStatus, FieldResult, SampleState
from agent.reporting import ANSWERS, REVIEW, cell_key, place_in_order, read_kept

logger = logging.getLogger(__name__)

Reason = Literal["unidentified", "low-margin", "gallery"]

CROPS_FOLDER = "crops"
"""Beside the outbox."""

LET_GO = 64
"""Pictures of cells that go at once when the disk is short: about as much as a field of the outbox needs."""

ROOM_SHARE = 0.9
"""When the pictures outgrow their limit they are brought down to this share of it, so that not each one makes room."""


@dataclass(frozen=True, slots=True)
class KeptCell:
    """A cell of the review list, or of the gallery. probability, margin: of the model, 0 to 1.

    class_name: the model's name, `unidentified` where it had none to trust; guess: its best one then.
    answers: of persons, oldest first. jpeg: empty where the picture is not here.
    """

    sid: str
    cell_id: str
    class_name: str
    guess: str
    probability: float
    margin: float | None
    reason: str
    answers: tuple[Answer, ...] = ()
    jpeg: bytes = b""

    @property
    def is_open(self) -> bool:
        """Whether it waits for a person."""
        return self.reason != "gallery" and not self.answers


def review_notes(
    field: FieldResult, sample: SampleState, section: ReviewSection, can_be_amended: Collection[str]
) -> dict[str, str | None]:
    """What the list gets of a field. sample: before this field. can_be_amended: keys of `reporting.note_cells`."""
    notes: dict[str, str | None] = {
        review_key(sample.sid, old): None for cell in field.cells for old in cell.supersedes
    }
    if not section.enabled:
        return notes
    seen = dict(sample.counts)
    for cell in field.cells:
        if cell.classification is None or cell.is_counted is False:
            continue
        reason = _reason(cell, section, seen, is_amendable=cell_key(sample.sid, cell.cell_id) in can_be_amended)
        seen[cell.class_name] = seen.get(cell.class_name, 0) + 1
        if reason is not None:
            is_named = cell.status is not CellStatus.UNIDENTIFIED
            kept = {
                "class": cell.class_name if is_named else CellStatus.UNIDENTIFIED.value,
                "guess": cell.class_name,
                "probability": round(cell.probability, 4),
                "margin": round(cell.classification.margin, 4),
                "reason": reason,
            }
            notes[review_key(sample.sid, cell.cell_id)] = json.dumps(kept)
    return notes


def _reason(cell: Cell, section: ReviewSection, seen: Mapping[str, int], *, is_amendable: bool) -> Reason | None:
    if is_amendable and cell.status is CellStatus.UNIDENTIFIED:
        return "unidentified"
    if cell.status not in (CellStatus.ACCEPTED, CellStatus.EDGE):
        return None
    if is_amendable and cell.classification is not None and cell.classification.margin < section.max_margin:
        return "low-margin"
    return "gallery" if seen.get(cell.class_name, 0) < section.gallery else None


def is_of_gallery(text: str) -> bool:
    """Whether a note of `review_notes` is of a cell that is only shown."""
    return bool(json.loads(text)["reason"] == "gallery")


def review_key(sid: str, cell_id: str) -> str:
    return f"{REVIEW}{sid}/{cell_id}"


def answers_key(sid: str, cell_id: str) -> str:
    return f"{ANSWERS}{sid}/{cell_id}"


def answer_note(before: str | None, answer: Answer) -> str:
    """The note of a cell with one answer more; the model's name stays that of the first one."""
    answers = [] if before is None else list(read_answers(before))
    first = answers[0].model if answers else answer.model
    return json.dumps([asdict(one) for one in (*answers, replace(answer, model=first))])


def read_answers(text: str) -> tuple[Answer, ...]:
    """From the note that `answer_note` wrote, oldest first."""
    return tuple(Answer(**one) for one in json.loads(text))


def read_kept_cells(notes: Mapping[str, str], answers: Mapping[str, str], crops: CropStore | None) -> list[KeptCell]:
    """The list. notes, answers: by key, of one sample or of all. A cell that was answered unasked is in it too."""
    found: list[KeptCell] = []
    given = {key.removeprefix(ANSWERS): read_answers(text) for key, text in answers.items()}
    for key, text in notes.items():
        place = key.removeprefix(REVIEW)
        found.append(_kept_cell(place, json.loads(text), given.pop(place, ()), crops))
    for place, theirs in given.items():
        told = {"class": theirs[0].model, "guess": theirs[0].model, "probability": 0.0, "margin": None}
        found.append(_kept_cell(place, {**told, "reason": "answered"}, theirs, crops))
    return sorted(found, key=lambda kept: (kept.sid, cell_number(kept.cell_id)))


def as_begun(cells: Iterable[KeptCell], ended: Mapping[str, str]) -> list[KeptCell]:
    """The cells of the sample that was begun first before those of the next; the one that has not ended is the last.

    ended: the notes of all samples that can be amended, by key. A sample's name says nothing of its time.
    """
    in_order = sorted((read_kept(text).sample for text in ended.values()), key=place_in_order)
    places = {sample.sid: place for place, sample in enumerate(in_order)}
    return sorted(cells, key=lambda cell: places.get(cell.sid, len(places)))


def _kept_cell(place: str, told: Mapping[str, Any], answers: Sequence[Answer], crops: CropStore | None) -> KeptCell:
    sid, _, cell_id = place.partition("/")
    jpeg = b"" if crops is None else crops.read(sid, cell_id)
    return KeptCell(
        sid,
        cell_id,
        str(told["class"]),
        str(told["guess"]),
        float(told["probability"]),
        told["margin"],
        str(told["reason"]),
        tuple(answers),
        jpeg,
    )


class CropStore:
    """The pictures on this device; written by one thread, read by any."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes: int | None = None

    def path(self, sid: str, cell_id: str) -> Path:
        return self.folder / sid / f"{cell_id}.jpg"

    def read(self, sid: str, cell_id: str) -> bytes:
        """The picture; empty where it is not here, or a power cut has torn it."""
        try:
            jpeg = self.path(sid, cell_id).read_bytes()
        except OSError:
            return b""
        return jpeg if jpeg.startswith(b"\xff\xd8") and jpeg.endswith(b"\xff\xd9") else b""

    def put(self, sid: str, cell_id: str, jpeg: bytes) -> None:
        """Keep a picture. One that the disk does not take is not kept, and the log says so: counting goes on."""
        path = self.path(sid, cell_id)
        unfinished = path.with_suffix(".new")  # who looks on sees whole pictures only
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(jpeg)
            unfinished.replace(path)
        except OSError as error:
            logger.warning("a picture for the review is not kept: %s: %s", path, error.strerror)
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
            return
        self._bytes = None if self._bytes is None else self._bytes + len(jpeg)

    def size_bytes(self) -> int:
        """Of all pictures together; counted once, then kept up."""
        if self._bytes is None:
            self._bytes = sum(size for _, size, _ in self._files())
        return self._bytes

    def count(self) -> int:
        """How many pictures are here."""
        return sum(1 for _ in self._files())

    def make_room(self, max_bytes: int, is_done: Mapping[str, bool]) -> int:
        """Let pictures go until they fit; returns how many went.

        is_done: by cell_id whether nobody waits for it. Those go first, the oldest before the newer, then, oldest
        first, those that nobody has answered; of these the entries stay in the list.
        """
        if self.size_bytes() <= max_bytes:
            return 0
        gone, left = 0, sum(size for _, size, _ in self._files())
        for path, size, _ in sorted(self._files(), key=lambda one: (not is_done.get(one[0].stem, True), one[2])):
            if left <= ROOM_SHARE * max_bytes:
                break
            path.unlink(missing_ok=True)
            left -= size
            gone += 1
        self._bytes = left
        return gone

    def let_go(self) -> bool:
        """Throw the oldest pictures away, to leave the disk to the results; False = there are none."""
        oldest = sorted(self._files(), key=lambda one: one[2])[:LET_GO]
        for path, _, _ in oldest:
            path.unlink(missing_ok=True)
        self._bytes = None
        return bool(oldest)

    def keep_only(self, sids: Collection[str]) -> None:
        """Throw away the pictures of samples that can no longer be amended."""
        if not self.folder.is_dir():
            return
        for place in self.folder.iterdir():
            if place.is_dir() and place.name not in sids:
                shutil.rmtree(place, ignore_errors=True)
        self._bytes = None

    def _files(self) -> Iterator[tuple[Path, int, float]]:
        """Path, bytes and time of each picture."""
        for path in self.folder.glob("*/*.jpg"):
            try:
                facts = path.stat()
            except OSError:
                continue  # another thread was quicker
            yield path, facts.st_size, facts.st_mtime
