"""What a sample says of itself: its documents, its final differential, and what is kept to amend it later.

Everything here is a value; who stores it is `agent.counting.intake`, in the transaction of what caused it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone

from agent.analysis.cells import UNIDENTIFIED
from agent.analysis.differential import (
    CellKind,
    Differential,
    Rules,
    Tally,
    count_nucleated,
    make_differential,
)
from agent.analysis.sample import ENDED, change
from agent.delivery.messages import Draft, RetainedDocument, event_draft, rfc3339_ms
from agent.delivery.outbox import Outbox, sample_from, sample_text
from agent.delivery.reports import ReportStatus, differential_body, differential_draft, sample_body
from agent.delivery.topics import Topics
from agent.domain import Cell, CellStatus, ModelIdentity, Provenance, SampleState, Software, Thresholds

ARTEFACT = CellStatus.ARTEFACT.value

REVIEW, ANSWERS = "review/", "answers/"
"""Notes of the cells of each sample that a person should look at, and of what persons said; see `agent.review`."""

KEPT_SAMPLES = 16
"""Ended samples that can still be amended: more than lie on a bench in a day's review."""

KEPT_KINDS: tuple[CellKind, ...] = ("leukocyte", "erythroblast", "smudge")
"""Of these, and of cells without a trusted name, the class is kept for each cell: thousands of red cells are not."""


@dataclass(frozen=True, slots=True, eq=False)
class Reporter:
    """How samples of this device are reported. rules: of the differential; provenance: who counts now."""

    topics: Topics
    rules: Rules
    provenance: Provenance

    def differential(self, sample: SampleState) -> Differential:
        """What the counts of a sample say now."""
        half_width_pct = sample.target_half_width_pct
        rules = replace(self.rules, half_width=None if half_width_pct is None else half_width_pct / 100)
        return make_differential(tally_of(sample), rules, sample.age_band)

    def documents(self, sample: SampleState, *, boot: int, at: datetime) -> tuple[RetainedDocument, ...]:
        """The retained documents of a sample as it is; a sample that was thrown over has no differential."""
        if sample.phase == "idle":
            return ()
        nucleated = count_nucleated(tally_of(sample).counts, self.rules.kinds)
        body = sample_body(sample, self.topics, boot=boot, at=at, nucleated=nucleated)
        topic = self.topics.differential(sample.sid)
        if sample.phase == "aborted":
            report = None
        else:
            report = differential_body(
                self.differential(sample),
                sample,
                self.topics,
                self.provenance,
                boot=boot,
                at=at,
                status=status_of(sample),
                amendments=sample.amendments,
            )
        return RetainedDocument(self.topics.sample(sample.sid), body), RetainedDocument(topic, report)

    def report(self, sample: SampleState, at: datetime) -> tuple[SampleState, Draft]:
        """The next numbered differential of an ended sample, and the sample that knows of it."""
        numbered = replace(sample, reports=sample.reports + 1)
        body = differential_body(
            self.differential(numbered),
            numbered,
            self.topics,
            self.provenance,
            boot=1,  # filled in when it is numbered
            at=at,
            status=status_of(numbered),
            amendments=numbered.amendments,
        )
        return numbered, differential_draft(body, self.topics, sample.sid)

    def finish(self, sample: SampleState, at: datetime, reason: str) -> Ending:
        """The sample ended in order, with its final differential."""
        stopped = sample if sample.phase == "finishing" else change(sample, "stop", rfc3339_ms(at), reason)
        ended, report = self.report(change(stopped, "settle", rfc3339_ms(at)), at)
        words = f"sample {ended.sid}: {ended.fields} fields, {ended.end_reason}"
        detail = {"sample": ended.sid, "fields": ended.fields, "reason": ended.end_reason}
        event = event_draft("sample-finished", words, self.topics, at=at, detail=detail)
        return Ending(ended, (report, event), self.keep(ended))

    def keep(self, sample: SampleState) -> Mapping[str, str | None]:
        """What has to be remembered of an ended sample so that it can be amended."""
        kept = {"state": json.loads(sample_text(sample)), "provenance": asdict(self.provenance)}
        return {kept_key(sample.sid): json.dumps(kept)}


@dataclass(frozen=True, slots=True, eq=False)
class Ending:
    """What the end of a sample gives, to be stored as a whole."""

    sample: SampleState
    drafts: tuple[Draft, ...]
    notes: Mapping[str, str | None]


@dataclass(frozen=True, slots=True, eq=False)
class KeptSample:
    """An ended sample that can still be amended, and who counted it."""

    sample: SampleState
    provenance: Provenance


def tally_of(sample: SampleState) -> Tally:
    """What a differential is made from."""
    return Tally(
        sample.counts,
        sample.fields,
        is_unique=sample.unplaced == 0,
        area_um2=sample.area_um2,
        not_classed=sample.not_classed,
    )


def status_of(sample: SampleState) -> ReportStatus:
    if sample.phase not in ENDED:
        return "preliminary"
    return "amended" if sample.amendments else "final"


def kept_key(sid: str) -> str:
    return f"samples/{sid}"


def read_kept(text: str) -> KeptSample:
    """From the note that `Reporter.keep` wrote."""
    kept = json.loads(text)
    who = kept["provenance"]
    software, thresholds = who.get("software"), who.get("thresholds")
    provenance = Provenance(
        **{
            **who,
            "detector": ModelIdentity(**who["detector"]),
            "classifier": ModelIdentity(**who["classifier"]),
            "software": None if software is None else Software(**software),
            "thresholds": None if thresholds is None else Thresholds(**thresholds),
        }
    )
    return KeptSample(sample_from(json.dumps(kept["state"])), provenance)


def cell_key(sid: str, cell_id: str) -> str:
    return f"cells/{sid}/{cell_id}"


def note_cells(sid: str, cells: Iterable[Cell], kinds: Mapping[str, CellKind]) -> dict[str, str | None]:
    """The class of each counted cell that a person may want to name anew."""
    notes: dict[str, str | None] = {}
    for cell in cells:
        if cell.status is CellStatus.UNIDENTIFIED:
            notes[cell_key(sid, cell.cell_id)] = UNIDENTIFIED
        elif cell.status in (CellStatus.ACCEPTED, CellStatus.EDGE) and kinds.get(cell.class_name) in KEPT_KINDS:
            notes[cell_key(sid, cell.cell_id)] = cell.class_name
    return notes


def archive(
    before: SampleState | None, fresh_sid: str, outbox: Outbox, topics: Topics
) -> tuple[tuple[RetainedDocument, ...], dict[str, str | None]]:
    """What becomes of the samples before, when the next begins: documents to clear, notes to forget.

    The `sample` of every other one goes; of the ended ones, oldest first, all that goes beyond KEPT_SAMPLES with the
    new one; of those that have no report the cells; and of an earlier run of the same configured name, whose cells are
    none of the new sample's, all but what persons have said. before: the last one, ended, where it is known; its end
    may not be stored yet. outbox: only read.
    """
    kept = outbox.notes(kept_key(""))
    ended = {sample.sid: sample for sample in (read_kept(text).sample for text in kept.values())}
    told = {topic.rpartition("/")[2] for topic in outbox.told(f"{topics.base}/sample/")}
    if before is not None and before.phase == "finished":
        ended[before.sid] = before
    if before is not None and before.phase != "idle":
        told.add(before.sid)
    told.discard(fresh_sid)
    ended.pop(fresh_sid, None)
    documents: dict[str, tuple[RetainedDocument, ...]] = {
        sid: (RetainedDocument(topics.sample(sid), None),) for sid in sorted(told)
    }
    notes: dict[str, str | None] = {kept_key(fresh_sid): None, **forget_waiting(fresh_sid, outbox)}
    for sid in told - ended.keys():
        notes.update(forget_cells(sid))
    last_sid = None if before is None else before.sid
    in_order = sorted(ended.values(), key=lambda one: (one.sid == last_sid, *place_in_order(one)))
    for old in in_order[: -KEPT_SAMPLES + 1]:
        documents[old.sid], forgotten = forget_sample(old.sid, topics)
        notes.update(forgotten)
    return tuple(document for cleared in documents.values() for document in cleared), notes


def place_in_order(sample: SampleState) -> tuple[int, str]:
    """By the number of its beginning; before all that have one those of an older version, by the time of their end."""
    return (0, sample.ended_at or "") if sample.number is None else (sample.number, "")


def forget_sample(sid: str, topics: Topics) -> tuple[tuple[RetainedDocument, ...], Mapping[str, str | None]]:
    """A sample that is too old to be amended: its documents are cleared, what was kept of it is forgotten."""
    documents = (RetainedDocument(topics.sample(sid), None), RetainedDocument(topics.differential(sid), None))
    return documents, {kept_key(sid): None, **forget_cells(sid)}


def forget_cells(sid: str) -> dict[str, str | None]:
    """What is kept of the single cells of a sample, to be forgotten."""
    return {f"cells/{sid}/": None, f"{REVIEW}{sid}/": None, f"{ANSWERS}{sid}/": None}


def forget_waiting(sid: str, outbox: Outbox) -> dict[str, str | None]:
    """What is kept of the cells of a sample of which none can be named any more, to be forgotten. outbox: only read.

    What persons have said stays, each with its entry in the list: their work may not be exported yet.
    """
    answered = [key.removeprefix(ANSWERS) for key in outbox.notes(f"{ANSWERS}{sid}/")]
    entries = {f"{REVIEW}{place}": outbox.note(f"{REVIEW}{place}") for place in answered}
    return {f"cells/{sid}/": None, f"{REVIEW}{sid}/": None, **entries}


def rename_cell(sample: SampleState, before: str, after: str) -> SampleState:
    """The sample with one cell counted under another class; `artefact` is counted under none."""
    counts = dict(sample.counts)
    if before != ARTEFACT:
        counts[before] = counts.get(before, 0) - 1
    if after != ARTEFACT:
        counts[after] = counts.get(after, 0) + 1
    moved = (after == ARTEFACT) - (before == ARTEFACT)
    return replace(
        sample,
        counts={name: count for name, count in sorted(counts.items()) if count > 0},
        not_classed=max(0, sample.not_classed + moved),
        amendments=sample.amendments + 1,
    )


def utc_now() -> datetime:
    """The system's clock."""
    return datetime.now(timezone.utc)
