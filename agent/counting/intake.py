"""What frames and commands give goes into the outbox here, each as a whole: one transaction, or nothing of it.

    Outcome --store------> outbox    None while it takes nothing: intake has stopped, and says so until it goes on
    Deed ----store_deed--> outbox    with its link in the audit chain; OutboxError while it takes nothing

Only what is stored is accepted by the count, so memory and disk never tell two stories.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from agent.counting.audit_chain import AuditChain
from agent.counting.count import Count
from agent.counting.documents import SampleDocuments
from agent.counting.slide_in_view import SEEN_NOTE
from agent.counting.telling import Teller
from agent.delivery.audit import Entry
from agent.delivery.outbox import Outbox
from agent.desk import Deed
from agent.domain import SampleState
from agent.errors import MessageRejected, OutboxDamaged, OutboxError
from agent.health import Health
from agent.pipeline import Outcome
from agent.reporting import cell_key
from agent.review import is_of_gallery, review_key

logger = logging.getLogger(__name__)

UNSAYABLE = "unsayable"
"""Why a frame is dropped whose results JSON cannot say (a model that answers with no number)."""

CELLS_NAMEABLE = 500_000
"""Of a sample's cells, red ones counted along, the newest so many can be named anew and stand in its review list: all
of ten thousand fields. Their notes stay below 200 MB even where the models know no cell."""


class Intake:
    """Writes to the outbox of the pipeline's thread. documents_every_s: while frames come.

    on_stored: called when there is more to publish. on_counted: called after each stored field.
    """

    def __init__(
        self,
        outbox: Outbox,
        count: Count,
        teller: Teller,
        health: Health,
        *,
        documents_every_s: float,
        on_stored: Callable[[], None],
        on_counted: Callable[[], None],
    ) -> None:
        self._outbox = outbox
        self._count = count
        self._teller = teller
        self._health = health
        self._documents = SampleDocuments(documents_every_s, outbox.boot)
        self._chain = AuditChain(outbox, count.bench.topics)
        self._on_stored = on_stored
        self._on_counted = on_counted

    # ---- what frames give

    def store(self, outcome: Outcome) -> Outcome | None:
        """Store all that a frame gave. Returns what was stored; None = the outbox takes nothing now.

        A field that JSON cannot say is not stored; its frame is dropped instead, with an event. Raises OutboxDamaged.
        """
        try:
            self._append(outcome)
        except MessageRejected as error:
            return self.store(self._report_unsayable(outcome, error))
        except OutboxDamaged:
            raise
        except OutboxError as error:
            self.say_stopped(error)
            return None
        self._count.accept(outcome)
        if outcome.field is not None:
            self._health.count_field(outcome.field.timing_ms)
            self._on_counted()
        if outcome.dropped is not None:
            self._health.count_dropped(outcome.dropped)
        if outcome.drafts:
            self._on_stored()
        return outcome

    def _append(self, outcome: Outcome) -> None:
        documents = (*outcome.documents, *self._documents.due(outcome.sample, self._count.bench.reporter))
        if not outcome.drafts and outcome.finished_key is None and not documents:
            return  # a live frame that gave nothing need not wear the disk
        keys = () if outcome.finished_key is None else (outcome.finished_key,)
        more = 0 if outcome.field is None else len(outcome.field.cells)
        seen_note = self._count.slide.seen_note
        seen = {} if seen_note is None else {SEEN_NOTE: seen_note}
        self._outbox.append(
            outcome.drafts,
            sample=outcome.sample,
            finished_keys=keys,
            documents=documents,
            notes={**_notes_of_old_cells(self._outbox, outcome.sample, more), **outcome.notes, **seen},
        )
        if documents:
            self._documents.note_told(outcome.sample)
            if not outcome.drafts:
                self._on_stored()

    def _report_unsayable(self, outcome: Outcome, error: MessageRejected) -> Outcome:
        logger.error("a field cannot be stored: %s", error)
        event = self._teller.event("field-rejected", str(error), "error", {"frame": outcome.finished_key})
        return Outcome(self._count.sample, outcome.finished_key, (event,), dropped=UNSAYABLE)

    # ---- what commands and parts give

    def store_deed(self, deed: Deed) -> None:
        """Store all that a command gives. Raises OutboxError."""
        outcome, link = self._count.outcome_of(deed), self._chain.link(deed.entry)
        is_told = deed.sample is not None
        documents = self._documents.due(outcome.sample, self._count.bench.reporter) if is_told else ()
        self._outbox.append(
            (*outcome.drafts, *link.drafts),
            sample=deed.sample,
            documents=(*outcome.documents, *documents),
            notes={**outcome.notes, **link.notes},
            answer=None if deed.answer_to is None else (deed.answer_to, deed.answer),
        )
        self._chain.take(link)
        self._count.accept(outcome)
        if documents:
            self._documents.note_told(outcome.sample)
        self._on_stored()

    def record(self, entry: Entry, notes: Mapping[str, str | None]) -> None:
        """Write an audit entry. Raises OutboxError."""
        link = self._chain.link(entry)
        self._outbox.append(link.drafts, notes={**notes, **link.notes})
        self._chain.take(link)

    def store_waiting(self) -> None:
        """Store the notes and events that wait, as far as the outbox takes them."""
        self._teller.store_in(self._outbox)

    def has_due_documents(self) -> bool:
        """Whether the sample has documents that were not due with its last frame."""
        return bool(self._documents.due(self._count.sample, self._count.bench.reporter))

    # ---- while the outbox takes nothing

    def say_stopped(self, error: OutboxError) -> None:
        """The outbox takes nothing; said once."""
        if self._health.snapshot().outbox == "stopped":
            return
        logger.error("outbox stopped, intake waits: %s", error)
        self._health.outbox_state("stopped", str(error))
        self._teller.tell("outbox-stopped", str(error), "error")
        self.store_waiting()  # a full outbox keeps a little room for saying so

    def say_going_on(self) -> None:
        """The outbox has stored; said once after it took nothing."""
        if self._health.snapshot().outbox == "ok":
            return
        logger.info("outbox stores again, intake goes on")
        self._health.outbox_state("ok")
        self._teller.tell("outbox-recovered", "results are stored again; none was lost")


def _notes_of_old_cells(outbox: Outbox, sample: SampleState, more: int) -> dict[str, str | None]:
    """What goes of the oldest cells when so many more have come; the gallery stays, and what persons have said.

    sample: with the new cells.
    """
    end = sample.next_cell_number - CELLS_NAMEABLE
    notes: dict[str, str | None] = {}
    for number in range(max(1, end - more), end):
        cell_id = f"{sample.sid}-{number}"
        notes[cell_key(sample.sid, cell_id)] = None
        listed = outbox.note(key := review_key(sample.sid, cell_id))
        if listed is not None and not is_of_gallery(listed):
            notes[key] = None
    return notes
