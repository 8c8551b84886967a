"""The `Outbox` itself: what is one transaction, and what may be asked.

Each method opens a block of the file (`reading`, `writing` or `leaving`) and calls the part that knows the statements:
`queue` (rows that wait), `leaving` (rows that are confirmed), `dead_letters`, `words` (all that is no row), `room`.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from types import TracebackType

from agent.delivery.messages import Draft, RetainedDocument, message_id, set_aside_draft
from agent.delivery.outbox import dead_letters, leaving, queue, words
from agent.delivery.outbox.dead_letters import DeadLetter, Untold
from agent.delivery.outbox.file import OutboxFile
from agent.delivery.outbox.leaving import CONFIRM_STEP_ROWS, History, ReplayAnswer
from agent.delivery.outbox.room import Room, reserve_for
from agent.delivery.outbox.rows import ASKED, WAITING, Clocks, NumberedRow, Row, export_line, publish_bytes
from agent.delivery.outbox.salvage import Salvage
from agent.delivery.outbox.words import NO_NOTES, NUMBERING_NOTE, PACKET_LIMIT_NOTE, StoredDocument
from agent.delivery.topics import Topics
from agent.domain import SampleState

logger = logging.getLogger(__name__)

PORTION_ROWS = 200
"""Read at once by what reads all: nobody waits for long meanwhile."""

MOST_DOCUMENTS = 1000


class Outbox:
    """One thread's way to the outbox; made by `open_outbox`.

    boot: the boot that new ids carry. salvage: what opening made of a damaged file; None = it was whole. file: the
    connection, for a question that no method answers.
    """

    def __init__(
        self,
        file: OutboxFile,
        *,
        device: str,
        clocks: Clocks,
        history: History,
        room: Room,
        salvage: Salvage | None = None,
    ) -> None:
        self.path = file.path
        self.device = device
        self.boot = clocks.boot
        self.salvage = salvage
        self.file = file
        self._clocks = clocks
        self._history = history
        self._room = room
        self._untold = Untold()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the last one to close also empties the write-ahead log."""
        self.file.close()

    def spare(self, let_go: Callable[[], bool]) -> None:
        """What is worth less than all that is here, and goes first when the disk is short.

        let_go: deletes some of it and says True, or False when nothing is left. Called on the thread that appends.
        """
        self._room.spare(let_go)

    # ---- storing

    def append(
        self,
        drafts: Sequence[Draft],
        *,
        sample: SampleState | None = None,
        finished_keys: Sequence[str] = (),
        closes_sample: bool = False,
        documents: Sequence[RetainedDocument] = (),
        notes: Mapping[str, str | None] = NO_NOTES,
        answer: tuple[str, str] | None = None,
    ) -> tuple[int, ...]:
        """Number and store the drafts, the sample's state and the finished frames, all in one transaction.

        sample: None = leave the stored state as it is. closes_sample: forget the state and all finished frames, so
        that the next run begins a new sample. documents: the newest words on retained topics. notes: small facts to
        remember by key; None = forget it, and with a key that ends in `/` all below it. answer: (name, text) of a
        transaction that must not be done twice; the newest `words.MOST_ANSWERS` are kept.
        Returns the row ids in the order of the drafts.
        Raises OutboxError when it cannot store now, MessageRejected for a body that JSON cannot say; then nothing of
        it is stored, no number is used up, and a later append works again.
        """
        self._room.give_back_log()
        with self._writing() as connection:
            for key, value in notes.items():
                if value is None:  # first: its room may be what the drafts need
                    words.put_note(connection, key, None)
            row_ids = self._store(connection, drafts, phase=None if sample is None else sample.phase)
            words.put_finished(connection, finished_keys)
            if sample is not None:
                words.put_sample(connection, sample)
            if closes_sample:
                words.forget_sample(connection, with_finished=True)
            words.put_documents(connection, documents)
            for key, value in notes.items():
                if value is not None:
                    words.put_note(connection, key, value)
            if answer is not None:
                words.put_answer(connection, *answer)
        return row_ids

    def _store(
        self, connection: sqlite3.Connection, drafts: Sequence[Draft], *, phase: str | None = None
    ) -> tuple[int, ...]:
        """Number the drafts, make room for them and put them in. phase: of the sample that is stored with them.

        What is too large for the broker goes into the dead letters at once, and an event tells of it.
        """
        rows = queue.number_drafts(connection, drafts, self.device, self._clocks)
        more_bytes = sum(len(row.payload) for row in rows)
        self._room.make(more_bytes, reserve_for({draft.stream for draft in drafts}, phase))
        text = words.note(connection, PACKET_LIMIT_NOTE) if rows else None
        limit = None if text is None else int(text)
        row_ids, waiting, events = [], 0, []
        for row in rows:
            length = publish_bytes(row.topic, row.payload)
            if limit is not None and length > limit:
                row_ids.append(0)
                events += self._set_aside(connection, row, f"too large: {length} bytes, the broker takes {limit}")
            else:
                row_ids.append(queue.put_row(connection, row))
                waiting += 1
        queue.count_appended(connection, waiting, self.boot)
        if events:
            self._store(connection, events)
        return tuple(row_ids)

    def _set_aside(self, connection: sqlite3.Connection, row: NumberedRow, reason: str) -> list[Draft]:
        """Into the dead letters before it ever waited; the event that tells of it, if it is time for one."""
        dead_letters.put_letter(connection, row, reason, self._clocks.now_text())
        topics = Topics.of(row.topic)
        # An event about an event that is too large would be too large itself.
        may_tell = row.stream != "event" and topics is not None
        number, self._untold = self._untold.with_another(self._clocks.monotonic_ns() / 1e9, may_tell=may_tell)
        named = (row.stream, row.boot, row.seq)
        if number == 0 or topics is None:
            logger.debug("%s %d:%d is set aside: %s", *named, reason)
            return []
        logger.warning("%s %d:%d is set aside, %d since the last word of it: %s", *named, number, reason)
        return [
            set_aside_draft(
                topics,
                at=datetime.fromtimestamp(row.appended_unix_s, timezone.utc),
                reason=reason,
                stream=row.stream,
                name=message_id(self.device, row.boot, row.seq),
                topic=row.topic,
                size_bytes=len(row.payload),
                set_aside=number,
            )
        ]

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        untold = self._untold
        try:
            with self.file.writing() as connection:
                yield connection
        except BaseException:
            self._untold = untold  # the event about it is not stored either
            raise

    # ---- rows that wait

    def pending(self, after_row: int, limit: int, without: Sequence[str] = ()) -> list[Row]:
        """The next rows to send, in order; after_row: 0, or the last row id that was taken. without: streams."""
        with self.file.reading() as connection:
            return queue.rows_in_state(connection, WAITING, after_row, limit, without)

    def depth(self) -> int:
        """How many rows wait."""
        with self.file.reading() as connection:
            return queue.depth(connection)

    def oldest_age_s(self) -> float | None:
        """s; how long the first row has waited; None when nothing waits. After a restart by the wall clock."""
        with self.file.reading() as connection:
            return queue.oldest_age_s(connection, self._clocks)

    def of_topic(self, stream: str, topic: str, after_row: int = 0) -> Iterator[Row]:
        """Every message of a topic that is here, confirmed or not, in order, for reports; read in portions.

        after_row: only those behind this one.
        """
        with self.file.reading() as connection:
            row_ids = queue.row_ids_of_stream(connection, stream, after_row)
        for begin in range(0, len(row_ids), PORTION_ROWS):
            with self.file.reading() as connection:
                rows = queue.rows_of_topic(connection, row_ids[begin : begin + PORTION_ROWS], topic)
            yield from rows

    def numbered(self, stream: str, boot: int, seq: int) -> Row | None:
        """One message, confirmed or not, where it is still here."""
        with self.file.reading() as connection:
            return queue.numbered_row(connection, stream, boot, seq)

    def export_rows(self, *, dead_letters: bool = False, only: Sequence[int] | None = None) -> Iterator[str]:
        """What waits, or what was set aside, one JSON object a line: row, topic, message (as text when damaged).

        only: of the dead letters those with these numbers.
        """
        if dead_letters:
            for letter in self.dead_letters():
                if only is None or letter.letter_id in only:
                    more = {"reason": letter.reason, "rejected_at": letter.rejected_at}
                    yield export_line(letter.letter_id, letter.topic, letter.payload, **more)
            return
        after_row = 0
        while rows := self.pending(after_row, PORTION_ROWS):
            for row in rows:
                yield export_line(row.row_id, row.topic, row.payload)
            after_row = rows[-1].row_id

    # ---- rows that leave, and what is kept of them

    def acknowledge(self, row_ids: Sequence[int]) -> None:
        """These rows are where they should be; they leave, and history that was asked for is history again.

        Unknown ids are passed over.
        """
        with self.file.leaving() as connection:
            for rows in leaving.rows_of_ids(connection, row_ids):
                self._history.let_go(rows)

    def confirm(
        self, receiver: str, stream: str, boot: int, seq: int, receivers: Sequence[str], *, up_to_row: int
    ) -> list[int] | None:
        """A receiver has all of a stream up to this number on its disk; what all the receivers have leaves.

        receivers: all that have to confirm. up_to_row: the last row of the stream that was sent; later ones stay.
        Returns the ids of the rows that left; None: this cannot be true, for such a number was never given, and nothing
        is done.
        """
        with self.file.reading() as connection:
            last_given = queue.last_number(connection, stream)
        if boot > self.boot or last_given is None or seq > last_given:
            return None
        left: list[int] = []
        is_more = True
        while is_more:
            with self.file.leaving() as connection:
                rows = leaving.rows_all_have(connection, receiver, stream, boot, seq, receivers, up_to_row)
                self._history.let_go(rows)
            left += [row.row_id for row in rows]
            is_more = len(rows) == CONFIRM_STEP_ROWS
        return left

    def request_replay(self, stream: str, first: int, last: int) -> ReplayAnswer:
        """Have what is kept of these numbers, both included, sent again."""
        with self._writing():
            return self._history.ask_for(stream, first, last)

    def asked_again(self, after_row: int, limit: int) -> list[Row]:
        """History that is to be sent again, in order."""
        with self.file.reading() as connection:
            return queue.rows_in_state(connection, ASKED, after_row, limit)

    def prune(self) -> None:
        """Let history go that is too old or too much; a little at each call."""
        with self.file.leaving():
            self._history.prune()

    def kept_bytes(self) -> int:
        """bytes; payloads of what was confirmed and is kept to be sent again."""
        with self.file.reading():
            return self._history.kept_bytes()

    def dropped(self) -> dict[str, int]:
        """How many messages of each stream went unconfirmed, for room, since this file was begun."""
        with self.file.reading():
            return self._room.dropped()

    # ---- dead letters

    def reject(self, row_id: int, reason: str, events: Sequence[Draft] = ()) -> None:
        """Set a row aside with the reason why it cannot be sent, and store the events that tell of it."""
        now = self._clocks.now_text()
        with self._writing() as connection:
            dead_letters.set_row_aside(connection, row_id, reason, now)
            self._store(connection, events)

    def requeue(self, letter_ids: Sequence[int] | None = None) -> int:
        """Put dead letters back to be sent, behind all that waits; damaged ones stay. None = all. Returns how many."""
        with self._writing() as connection:
            return dead_letters.requeue_letters(connection, letter_ids)

    def discard(self, letter_ids: Sequence[int]) -> int:
        """Throw dead letters away for good, at a person's word. Returns how many."""
        with self._writing() as connection:
            return dead_letters.discard_letters(connection, letter_ids)

    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """All that was set aside, oldest first."""
        with self.file.reading() as connection:
            return dead_letters.all_letters(connection)

    def dead_letter_count(self) -> int:
        """How many were set aside."""
        with self.file.reading() as connection:
            return dead_letters.count_letters(connection)

    # ---- the sample and its finished frames

    def sample_state(self) -> SampleState | None:
        """The state stored with the last field; None before the first and after the sample was closed."""
        with self.file.reading() as connection:
            text = words.stored_sample(connection)
        try:
            return None if text is None else words.sample_from(text)
        except (ValueError, TypeError, AttributeError):
            logger.error("%s: the disk has changed the sample's state; a new sample is begun", self.path)  # noqa: TRY400
            return None

    def finished_keys(self) -> frozenset[str]:
        """Origin keys of the frames that are done with, as they are now; may be handed to another thread."""
        with self.file.reading() as connection:
            return words.finished_keys(connection)

    def clear_sample(self, *, with_finished: bool) -> None:
        """Forget the sample's state. with_finished: and the finished frames, so that the source is taken anew."""
        with self._writing() as connection:
            words.forget_sample(connection, with_finished=with_finished)

    def forget_finished(self, keys: Sequence[str]) -> None:
        """These frames cannot come again: their pictures were deleted. A power cut may bring the keys back."""
        with self.file.leaving() as connection:
            words.forget_finished(connection, keys)

    # ---- documents, notes and answers

    def documents(self, after_version: int = 0, limit: int = MOST_DOCUMENTS) -> list[StoredDocument]:
        """The retained documents that were written after this version, in the order of writing."""
        with self.file.reading() as connection:
            return words.documents_after(connection, after_version, limit)

    def document(self, topic: str) -> bytes | None:
        """The newest word on a retained topic; None where nothing was said, or it is to be cleared."""
        with self.file.reading() as connection:
            return words.document(connection, topic)

    def told(self, prefix: str) -> tuple[str, ...]:
        """The retained topics that begin so and are not to be cleared, in the order in which they were written last."""
        with self.file.reading() as connection:
            return words.told_topics(connection, prefix)

    def settle_document(self, document: StoredDocument) -> None:
        """The broker has cleared the topic of this document: it need not be told again, unless it was written anew."""
        with self._writing() as connection:
            words.settle_document(connection, document)

    def note(self, key: str) -> str | None:
        """What was noted under this key."""
        with self.file.reading() as connection:
            return words.note(connection, key)

    def notes(self, prefix: str) -> dict[str, str]:
        """All notes whose key begins so."""
        with self.file.reading() as connection:
            return words.notes_below(connection, prefix)

    def each_note(self, prefix: str) -> Iterator[tuple[str, str]]:
        """Key and value of all notes below a prefix, in the order of their keys; read in portions."""
        after, end = words.from_to(prefix)
        while True:
            with self.file.reading() as connection:
                found = words.notes_between(connection, after, end, PORTION_ROWS)
            if not found:
                return
            yield from found
            after = found[-1][0]

    def note_packet_limit(self, max_packet_bytes: int | None) -> None:
        """The largest PUBLISH that the broker takes, as it said last; None = it set no limit. Survives a restart."""
        text = None if max_packet_bytes is None else str(max_packet_bytes)
        if self.note(PACKET_LIMIT_NOTE) != text:
            with self._writing() as connection:
                words.put_note(connection, PACKET_LIMIT_NOTE, text)

    def numbered_since_boot(self) -> int | None:
        """The boot in which the numbers of this file began at 1; None for a file of an older agent."""
        text = self.note(NUMBERING_NOTE)
        return int(text) if text is not None and text.isdecimal() else None

    def answer(self, name: str) -> str | None:
        """What was answered to this transaction, if it was done and not too long ago."""
        with self.file.reading() as connection:
            return words.answer(connection, name)
