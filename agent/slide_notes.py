"""The map of a sample's slide as notes of the outbox: one for each field, of as many as the map remembers.

    field --note_trace--> slide/{sample}/{number of the field}    in the frame's transaction
    start --slide_from_notes--> SlideMap                          as it was after the last stored field

So a restart in the middle of a slide neither loses a cell nor counts one twice.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from agent import systemd
from agent.analysis import placing
from agent.analysis.duplicates import SlideMap
from agent.analysis.traces import Trace, trace_from_text, trace_to_text
from agent.delivery.outbox import Outbox
from agent.domain import SampleState
from agent.errors import OutboxDamaged, OutboxError

logger = logging.getLogger(__name__)

SLIDE_NOTES = "slide/"
"""The outbox's notes of the current sample's newest fields, `slide/{sample}/{number of the field}`, from which the map
of its slide is made again after a restart; of as many as the map remembers (`placing.FIELDS_REMEMBERED`)."""

NOTES_AT_ONCE = 1024
"""Notes that are rewritten or go in one transaction: some 6 MB in the write-ahead log."""

START_PUT_OFF_S = 60
"""s; told with each NOTES_AT_ONCE of an older version, of which there may be 200,000, at 0.5 ms each."""


def note_trace(sample: SampleState, slide: SlideMap, trace: Trace) -> dict[str, str | None]:
    """The trace of a field that follows those of `sample`; the field that the map forgets for it is forgotten too."""
    notes: dict[str, str | None] = {}
    if slide.places.count == 0:
        notes[SLIDE_NOTES] = None  # what an earlier sample left, or could not be read
    number = sample.fields + 1
    notes[_slide_key(sample.sid, number)] = trace_to_text(trace)
    if number > placing.FIELDS_REMEMBERED:
        notes[_slide_key(sample.sid, number - placing.FIELDS_REMEMBERED)] = None
    return notes


def slide_from_notes(outbox: Outbox, sample: SampleState) -> SlideMap:
    """The map of the sample's slide as it was after the last stored field.

    A version before this one has kept a note of every field, and no trace of it says what the map knew before: its
    notes are read once, and written again as this one keeps them.
    """
    slide = SlideMap(sample.sid)
    if not sample.fields:
        return slide
    first = _slide_key(sample.sid, max(1, sample.fields + 1 - placing.FIELDS_REMEMBERED))
    completed: list[tuple[str, str | None]] = []
    forgotten: list[tuple[str, str | None]] = []
    try:
        for key, text in outbox.each_note(f"{SLIDE_NOTES}{sample.sid}/"):
            trace = trace_from_text(text)
            if len(forgotten) % NOTES_AT_ONCE == 1:
                systemd.extend_start(START_PUT_OFF_S)
            if key < first:
                forgotten.append((key, None))
            elif trace.before is None:
                completed.append((key, trace_to_text(replace(trace, before=slide.before(trace)))))
            slide.add(trace, is_seen=False)
        slide.places.see()
    except ValueError as error:
        logger.error("the map of sample %s cannot be read, it begins anew: %s", sample.sid, error)  # noqa: TRY400
        return SlideMap(sample.sid)
    changed = [*completed, *forgotten]  # in this order: until all are complete none is missing
    try:
        for begin in range(0, len(changed), NOTES_AT_ONCE):
            systemd.extend_start(START_PUT_OFF_S)
            outbox.append((), notes=dict(changed[begin : begin + NOTES_AT_ONCE]))
    except OutboxDamaged:
        raise
    except OutboxError as error:
        logger.warning("the notes of sample %s stay as an older version wrote them: %s", sample.sid, error)
    return slide


def _slide_key(sid: str, number: int) -> str:
    """number: of the field in its sample, from 1."""
    return f"{SLIDE_NOTES}{sid}/{number:07}"
