"""The window: messages on their way to the broker, sent and not yet acknowledged.

It takes rows from the outbox in order, keeps at most a handful under way, and settles each with the broker's answer:
acknowledged, set aside, or sent again. It lives as long as its publisher and is begun anew on each connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from agent.config import DeliverySection
from agent.delivery.acks import Ack
from agent.delivery.link import Acknowledged, BrokerLink, Passing, Waker
from agent.delivery.messages import Body, as_historical, message_id, serialise, set_aside_draft
from agent.delivery.outbox import Outbox, Row, StoredDocument, Untold
from agent.delivery.topics import Topics
from agent.errors import OutboxDamaged, OutboxError

logger = logging.getLogger(__name__)

HISTORICAL_AFTER_S = 60.0
"""From the contract: what is sent later than this after its capture says so."""

IDLE_TURN_S = 1.0
"""Longest wait while nothing happens; also how often the outbox is looked at without a call."""

FETCH_ROWS = 64
"""Rows read ahead: three windows, some hundred kilobytes."""

STORE_TOGETHER = 50
"""Acknowledged rows that leave the outbox in one transaction while others are under way. It takes a fifth of the
processor time off each message, and a page of the file is written once for many rows. After a kill so many more may
come twice."""

ACKNOWLEDGE_TIMEOUT_S = 30.0
"""A broker that answers pings and acknowledges nothing for this long is left and tried anew."""

MOST_PASSINGS = 256
MOST_PASSING_BYTES = 8 * 1024 * 1024
"""Replies and pictures that may wait: the answers to all commands in the queue, and some pictures."""

PAUSE_S = 1.0
"""Before a message is sent again that the broker refused for now (quota), or after the outbox failed."""

SUSPECT_AFTER = 2
POISON_AFTER = 5
POISON_WITHIN_S = 5.0
"""Lost connections with the same first unacknowledged row: after the second, rows go one by one; after the fifth that
came within five seconds of sending this row alone, it is set aside. A network that fails by chance does not hit the
same row five times so closely, after having taken the three documents before it."""

LONGEST_RESEND_S = 3600.0

FIRST_HOLD_S = 1.0
LONGEST_HOLD_S = 30.0
"""While nobody subscribes to a stream, one of its messages is tried after these pauses, doubled each time."""

_NOBODY_SUBSCRIBED = 0x10
"""MQTT 5: taken, and thrown away by the broker, for it had nobody to give it to."""

_REFUSED_FOR_GOOD = frozenset({0x87, 0x90, 0x95, 0x99})
"""PUBACK codes that repeating does not cure: not authorised, topic invalid, packet too large, payload format invalid.
The others (unspecified, implementation specific, quota exceeded, ...) are tried again."""


@dataclass(frozen=True, slots=True)
class Document:
    """A retained document: state, info or health. version: which writing of it, to know the newest."""

    topic: str
    payload: bytes
    version: int
    expiry_s: int | None = None


class Documents:
    """The newest state, info, health and alerts; written by any thread, sent by the publisher."""

    _FIRST = ("state", "info", "health")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._newest: dict[str, Document] = {}
        self._versions = 0

    def put(self, name: str, topic: str, body: Body | None, expiry_s: int | None = None) -> None:
        """Replace the one of this name. body: None = the topic is to be cleared."""
        payload = b"" if body is None else serialise(body, topic)
        with self._lock:
            self._versions += 1
            self._newest[name] = Document(topic, payload, self._versions, expiry_s)

    def settle(self, document: Document) -> None:
        """The broker has taken it; one that clears its topic need not be said on the next connection."""
        with self._lock:
            for name, newest in self._newest.items():
                if newest is document and not document.payload:
                    del self._newest[name]
                    return

    def newest(self) -> tuple[Document, ...]:
        """All that are known: the state first, so that a subscriber hears of the agent before it hears of anything."""
        with self._lock:
            names = (*self._FIRST, *sorted(self._newest.keys() - set(self._FIRST)))
            return tuple(self._newest[name] for name in names if name in self._newest)


class Passings:
    """Replies and pictures on their way to the publisher: a few, the oldest go first when nobody takes them.

    What is under way when the connection breaks is not sent again: who asked has given up, or asks again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[Passing] = deque()
        self._bytes = 0

    def put(self, passing: Passing) -> None:
        with self._lock:
            self._waiting.append(passing)
            self._bytes += len(passing.payload)
            while len(self._waiting) > MOST_PASSINGS or self._bytes > MOST_PASSING_BYTES:
                self._bytes -= len(self._waiting.popleft().payload)

    def take(self) -> Passing | None:
        with self._lock:
            if not self._waiting:
                return None
            passing = self._waiting.popleft()
            self._bytes -= len(passing.payload)
            return passing

    @property
    def is_empty(self) -> bool:
        with self._lock:
            return not self._waiting


@dataclass(slots=True)
class Strikes:
    """How often the connection was lost with this row as the first under way; alone: with nothing but this row."""

    row_id: int = 0
    lost: int = 0
    alone: int = 0


class Awaiting:
    """Rows that the broker has taken and a receiver has not confirmed, in the order of sending; outlives connections.

    first_s: after this long they are due again; doubled up to LONGEST_RESEND_S while nothing is confirmed.
    """

    def __init__(self, first_s: float) -> None:
        self._first_s = first_s
        self._resend_s = first_s
        self._sent: OrderedDict[int, tuple[float, str, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sent)

    def __contains__(self, row_id: int) -> bool:
        return row_id in self._sent

    def note(self, row: Row, now_s: float) -> None:
        self._sent[row.row_id] = (now_s, row.stream, row.seq)
        self._sent.move_to_end(row.row_id)

    def forget(self, row_ids: Iterable[int]) -> None:
        """These were confirmed: somebody is there."""
        for row_id in row_ids:
            self._sent.pop(row_id, None)
            self._resend_s = self._first_s

    def hurry(self, stream: str, first: int, last: int) -> bool:
        """These numbers are missed: they are due now. Whether any of them waited."""
        missed = [row_id for row_id, (_, name, seq) in self._sent.items() if name == stream and first <= seq <= last]
        for row_id in missed:
            del self._sent[row_id]
        return bool(missed)

    def take_due(self, now_s: float) -> bool:
        """Forget those that are due, so that they are sent again; whether there are any."""
        due = []
        for row_id, (sent_s, _, _) in self._sent.items():
            if now_s - sent_s < self._resend_s:
                break
            due.append(row_id)
        for row_id in due:
            del self._sent[row_id]
        if due:
            self._resend_s = min(2 * self._resend_s, max(LONGEST_RESEND_S, self._first_s))
        return bool(due)


@dataclass(slots=True)
class Hold:
    """A stream to which nobody subscribes: it waits until `until_s`, is due, and then one of its rows is tried."""

    until_s: float
    pause_s: float
    stage: Literal["waiting", "due", "trying"] = "waiting"


class Window:
    """What is under way; belongs to the publisher's thread. limit: most messages at a time (the broker may want less).

    has_progressed: a row was taken on this connection.
    """

    def __init__(
        self,
        outbox: Outbox,
        documents: Documents,
        topics: Topics,
        *,
        delivery: DeliverySection,
        passings: Passings | None = None,
        limit: int,
        monotonic_ns: Callable[[], int],
        now: Callable[[], datetime],
    ) -> None:
        self._outbox = outbox
        self._documents = documents
        self._passings = passings or Passings()
        self._topics = topics
        self._own_limit = limit
        self._receivers = delivery.receivers if delivery.confirm == "receiver" else ()
        self._most_awaiting = delivery.unconfirmed
        self._monotonic_ns = monotonic_ns
        self._now = now
        # Outlives a connection:
        self._acknowledged: set[int] = set()  # not yet stored as such; a full disk may keep them here for a while
        self._is_storing_due = False
        self._awaiting = Awaiting(delivery.resend_s)
        self._sent_up_to: dict[str, int] = {}  # by stream: the last row that a receiver's word may speak of
        self._holds: dict[str, Hold] = {}
        self._strikes = Strikes()
        self._is_outbox_failing = False
        self._untold = Untold()
        self._pause_until_s = 0.0
        # Of one connection:
        self.has_progressed = False
        self._limit = limit
        self._under_way: dict[int, Row | Document | StoredDocument | Passing] = {}
        self._rows_under_way: set[int] = set()
        self._stored_after = 0  # version of the last stored document that was sent
        self._may_have_stored = True
        self._sent_versions: dict[str, int] = {}
        self._again_at_s: dict[str, float] = {}  # retained topics that were refused for now
        self._stored_again_at_s = 0.0
        self._heard_at_s = 0.0
        self._sent_row_at_s = 0.0
        # Where we are in the outbox:
        self._ready: deque[Row] = deque()
        self._after_row = 0
        self._may_have_more = True
        self._asked: deque[Row] = deque()
        self._asked_after = 0
        self._may_have_asked = True
        self._is_far_ahead = False
        self._looked_at_s = 0.0

    def begin(self, link: BrokerLink) -> None:
        """A new connection: the documents again, then everything from the first row that is left."""
        self.has_progressed = False
        self._limit = min(self._own_limit, link.window)
        self._under_way.clear()
        self._rows_under_way.clear()
        self._sent_versions.clear()
        self._again_at_s.clear()
        self._stored_again_at_s = 0.0
        self._stored_after = 0
        self._heard_at_s = time.monotonic()
        self._holds.clear()  # whoever subscribes may be there now
        self._from_the_first_row()

    def look(self) -> None:
        """There may be new rows and documents."""
        self._may_have_more = True
        self._may_have_stored = True
        self._may_have_asked = True
        if not self._asked:
            self._asked_after = 0
        self._looked_at_s = time.monotonic()

    @property
    def is_empty(self) -> bool:
        """Whether all documents and rows known now were sent and answered; not what nobody subscribes to."""
        return self.are_documents_taken and not (
            self._under_way
            or self._ready
            or self._asked
            or self._may_have_more
            or self._may_have_asked
            or self._may_have_stored
            or self._acknowledged
            or self._awaiting
        )

    @property
    def unheard(self) -> tuple[str, ...]:
        """Streams to which nobody subscribes: their rows wait."""
        return tuple(sorted(self._holds))

    def take_ack(self, ack: Ack) -> bool:
        """A receiver has all of a stream up to a message. False: that cannot be true, such a number was never given."""
        try:
            up_to_row = self._sent_up_to.get(ack.stream, 0)
            left = self._outbox.confirm(
                ack.receiver, ack.stream, ack.boot, ack.seq, self._receivers, up_to_row=up_to_row
            )
        except OutboxError as error:
            self._outbox_failed(error)  # they are sent again, and acknowledged again
            return True
        self._awaiting.forget(left or ())
        if left:
            self._is_far_ahead = False
        return left is not None

    def send_again(self, stream: str, first: int, last: int) -> None:
        """A receiver misses these numbers; those that wait for its word are sent again now."""
        if self._awaiting.hurry(stream, first, last):
            self._is_far_ahead = False
            self._from_the_first_row()
        self.look()

    @property
    def are_documents_taken(self) -> bool:
        """Whether the newest documents and all replies were sent and answered."""
        is_under_way = any(isinstance(sent, (Document, Passing)) for sent in self._under_way.values())
        return (
            not is_under_way
            and self._passings.is_empty
            and all(
                self._sent_versions.get(document.topic) == document.version for document in self._documents.newest()
            )
        )

    def fill(self, link: BrokerLink) -> None:
        """Send documents and replies, then rows, until the window is full or nothing is left.

        What was acknowledged is stored as such afterwards, while the broker is busy with these.
        """
        self._send(link)
        if self._is_storing_due and not self._is_pausing:
            self.store_acknowledgements()

    def _send(self, link: BrokerLink) -> None:
        if not (self.send_documents(link) and self._send_passings(link)) or self._is_pausing:
            return
        try:
            if not self._send_stored_documents(link):
                return
        except OutboxError as error:
            self._outbox_failed(error)
            return
        limit = 1 if self._is_careful else self._limit
        try:
            for _ in range(FETCH_ROWS):  # bounded: setting thousands of rows aside must not starve the connection
                if link.is_closed or len(self._under_way) >= limit:
                    return
                row = self._next_row()
                if row is None:
                    return
                self._send_row(link, row)
        except OutboxError as error:
            self._outbox_failed(error)

    def send_documents(self, link: BrokerLink) -> bool:
        """Send the ones that are new. Returns whether all of them are on their way, so that rows may follow."""
        for document in self._documents.newest():
            if self._sent_versions.get(document.topic) == document.version:
                continue
            if time.monotonic() < self._again_at_s.get(document.topic, 0.0):
                continue
            if link.is_closed or len(self._under_way) >= self._limit:
                return False
            self._sent_versions[document.topic] = document.version
            length = link.packet_bytes(document.topic, document.payload, expiry_s=document.expiry_s)
            if link.max_packet_bytes is not None and length > link.max_packet_bytes:
                logger.warning("%s: %d bytes, the broker takes %d", document.topic, length, link.max_packet_bytes)
                continue
            mid = link.publish(document.topic, document.payload, retain=True, expiry_s=document.expiry_s)
            self._note_sent(mid, document)
        return True

    def _send_passings(self, link: BrokerLink) -> bool:
        """Send the replies and pictures that wait. Returns whether none is left, so that rows may follow."""
        while not self._passings.is_empty:
            if link.is_closed or len(self._under_way) >= self._limit:
                return False
            passing = self._passings.take()
            if passing is None:
                break
            length = link.passing_bytes(passing)
            if link.max_packet_bytes is not None and length > link.max_packet_bytes:
                logger.warning("%s: %d bytes, the broker takes %d", passing.topic, length, link.max_packet_bytes)
                continue
            self._note_sent(link.publish_passing(passing), passing)
        return True

    def _send_stored_documents(self, link: BrokerLink) -> bool:
        """Send the documents of the outbox that are new. Returns whether all are on their way; raises OutboxError."""
        while self._may_have_stored and time.monotonic() >= self._stored_again_at_s:
            stored = self._outbox.documents(self._stored_after, FETCH_ROWS)
            self._may_have_stored = len(stored) == FETCH_ROWS
            for document in stored:
                if link.is_closed or len(self._under_way) >= self._limit:
                    self._may_have_stored = True
                    return False
                self._stored_after = document.version
                if self._sent_versions.get(document.topic) == document.version:
                    continue
                self._sent_versions[document.topic] = document.version
                payload = document.payload or b""
                length = link.packet_bytes(document.topic, payload)
                if link.max_packet_bytes is not None and length > link.max_packet_bytes:
                    logger.warning("%s: %d bytes, the broker takes %d", document.topic, length, link.max_packet_bytes)
                    continue
                self._note_sent(link.publish(document.topic, payload, retain=True), document)
        return True

    def turn(self, link: BrokerLink, waker: Waker) -> None:
        """Wait for answers, for a call or for the next look into the outbox, and settle what was answered."""
        self._settle(link.turn(self._longest_wait_s(), waker.fileno()))
        if waker.was_woken() or time.monotonic() - self._looked_at_s >= IDLE_TURN_S:
            self.look()
        if self._awaiting.take_due(time.monotonic()):
            self._is_far_ahead = False
            self._from_the_first_row()
        self._look_at_holds()
        if self._under_way and time.monotonic() - self._heard_at_s > ACKNOWLEDGE_TIMEOUT_S:
            link.abandon(f"it has acknowledged nothing for {ACKNOWLEDGE_TIMEOUT_S:g} s")

    def end(self, link: BrokerLink) -> None:
        """The connection is gone: store what was acknowledged, note over which row it was lost."""
        self.store_acknowledgements()
        rows = [sent for sent in self._under_way.values() if isinstance(sent, Row)]
        if not rows:
            return
        for row in rows:
            self._note_not_taken(row)
        first = min(rows, key=lambda row: row.row_id)
        was_careful = self._is_careful
        if first.row_id != self._strikes.row_id:
            self._strikes = Strikes(first.row_id)
            was_careful = False
        self._strikes.lost += 1
        is_prompt = time.monotonic() - self._sent_row_at_s < POISON_WITHIN_S
        if was_careful and is_prompt and link.was_hung_up:
            self._strikes.alone += 1

    def store_acknowledgements(self) -> None:
        """Let the acknowledged rows leave the outbox; where that fails they are kept in mind and not sent again."""
        if not self._acknowledged:
            return
        try:
            self._outbox.acknowledge(sorted(self._acknowledged))
        except OutboxDamaged:
            raise
        except OutboxError as error:
            self._outbox_failed(error)
        else:
            self._acknowledged.clear()
            self._is_outbox_failing = False

    # ---- sending

    def _send_row(self, link: BrokerLink, row: Row) -> None:
        if not row.is_intact:
            self._set_aside(row, "it is not what was stored: the disk has changed it", kind="row-damaged")
            return
        length = link.packet_bytes(row.topic, row.payload)
        if link.max_packet_bytes is not None and length > link.max_packet_bytes:
            self._set_aside(row, f"too large: {length} bytes, the broker takes {link.max_packet_bytes}")
        elif row.row_id == self._strikes.row_id and self._strikes.alone >= POISON_AFTER:
            self._set_aside(row, f"the connection breaks each time this message is sent ({length} bytes)")
        else:
            payload = as_historical(row.payload) if self._is_historical(row) else row.payload
            self._note_sent(link.publish(row.topic, payload), row)
            self._sent_row_at_s = time.monotonic()

    def _note_sent(self, mid: int, sent: Row | Document | StoredDocument | Passing) -> None:
        if not self._under_way:
            self._heard_at_s = time.monotonic()  # the time to answer begins now
        self._under_way[mid] = sent
        if isinstance(sent, Row):
            self._rows_under_way.add(sent.row_id)
            if not sent.is_replay:
                self._sent_up_to[sent.stream] = max(sent.row_id, self._sent_up_to.get(sent.stream, 0))

    def _note_not_taken(self, row: Row) -> None:
        """It was sent in vain: no receiver can have it."""
        if not row.is_replay:
            self._sent_up_to[row.stream] = min(row.row_id - 1, self._sent_up_to.get(row.stream, 0))

    def _is_historical(self, row: Row) -> bool:
        """What is sent at a request, and older boots, always: their monotonic times cannot be compared with ours."""
        if row.boot != self._outbox.boot or row.is_replay:
            return True
        return self._monotonic_ns() - row.captured_monotonic_ns > HISTORICAL_AFTER_S * 1e9

    def _next_row(self) -> Row | None:
        """The next to send: what was never confirmed first, then what is asked for again."""
        while (self._ready or self._may_have_more) and not self._is_far_ahead:
            if not self._ready:
                rows = self._outbox.pending(self._after_row, FETCH_ROWS, self._waiting_streams())
                self._may_have_more = len(rows) == FETCH_ROWS
                if not rows:
                    break
                self._after_row = rows[-1].row_id
                self._ready.extend(rows)
            row = self._ready.popleft()
            if self._is_passed_over(row) or row.row_id in self._awaiting or not self._may_try(row):
                continue
            if self._receivers and len(self._awaiting) + len(self._under_way) >= self._most_awaiting:
                self._ready.appendleft(row)
                self._is_far_ahead = True
                break
            return row
        while self._asked or self._may_have_asked:
            if not self._asked:
                rows = self._outbox.asked_again(self._asked_after, FETCH_ROWS)
                self._may_have_asked = len(rows) == FETCH_ROWS
                if not rows:
                    break
                self._asked_after = rows[-1].row_id
                self._asked.extend(rows)
            row = self._asked.popleft()
            if not self._is_passed_over(row) and row.stream not in self._holds:
                return row
        return None

    def _is_passed_over(self, row: Row) -> bool:
        return row.row_id in self._rows_under_way or row.row_id in self._acknowledged

    def _from_the_first_row(self) -> None:
        self._ready.clear()
        self._asked.clear()
        self._after_row = self._asked_after = 0
        self.look()

    # ---- streams to which nobody subscribes

    def _waiting_streams(self) -> tuple[str, ...]:
        """Of a stream that is being tried no more rows are read either: there may be gigabytes of them."""
        return tuple(stream for stream, hold in self._holds.items() if hold.stage != "due")

    def _may_try(self, row: Row) -> bool:
        """Of a stream that nobody heard, one row at a time, when its time has come."""
        hold = self._holds.get(row.stream)
        if hold is None:
            return True
        if hold.stage != "due":
            return False
        hold.stage = "trying"
        return True

    def _hold(self, stream: str) -> None:
        """Nobody subscribes to this stream: the others go on, this one is tried again later."""
        before, now_s = self._holds.get(stream), time.monotonic()
        if before is not None and before.stage != "trying":
            return  # another of the same window
        pause_s = FIRST_HOLD_S if before is None else min(2 * before.pause_s, LONGEST_HOLD_S)
        self._holds[stream] = Hold(now_s + pause_s, pause_s)

    def _look_at_holds(self) -> None:
        """When the pause of a stream is over, look for its first row."""
        now_s = time.monotonic()
        for hold in self._holds.values():
            if hold.stage == "waiting" and now_s >= hold.until_s:
                hold.stage = "due"
                self._from_the_first_row()

    def _heard(self, stream: str) -> None:
        """Somebody subscribes, or the row that was tried is gone: what was passed over is next."""
        if self._holds.pop(stream, None) is not None:
            self._from_the_first_row()

    @property
    def _is_careful(self) -> bool:
        """Whether rows go one by one, to find out which of them the broker hangs up on."""
        return self._strikes.lost >= SUSPECT_AFTER

    # ---- settling

    def _settle(self, answers: list[Acknowledged]) -> None:
        if not answers and not self._acknowledged:
            return
        for answer in answers:
            self._heard_at_s = time.monotonic()
            sent = self._under_way.pop(answer.mid, None)
            if isinstance(sent, Row):
                self._rows_under_way.discard(sent.row_id)
                self._settle_row(sent, answer)
            elif sent is not None and not answer.is_taken:
                self._settle_refused(sent, answer)
            elif isinstance(sent, Document):
                self._documents.settle(sent)
            elif isinstance(sent, StoredDocument) and sent.payload is None:
                self._settle_cleared(sent)
        enough = len(self._acknowledged) >= STORE_TOGETHER
        self._is_storing_due = enough or not answers or not self._under_way

    def _settle_row(self, row: Row, answer: Acknowledged) -> None:
        if answer.code == _NOBODY_SUBSCRIBED:
            self._clear_strikes(row)
            self._note_not_taken(row)
            self._hold(row.stream)
        elif answer.is_taken:
            if self._receivers and not row.is_replay:
                self._awaiting.note(row, time.monotonic())
            else:
                self._acknowledged.add(row.row_id)
            self.has_progressed = True
            self._clear_strikes(row)
            self._heard(row.stream)
        elif answer.code in _REFUSED_FOR_GOOD:
            try:
                self._set_aside(row, f"the broker refuses it: {answer.reason} (code {answer.code})")
            except OutboxError as error:
                self._outbox_failed(error)
        else:
            logger.debug("%s: refused for now (%s)", row.topic, answer.reason)
            self._note_not_taken(row)
            self._holds.pop(row.stream, None)
            self._pause()

    def _settle_refused(self, sent: Document | StoredDocument | Passing, answer: Acknowledged) -> None:
        """A retained word that is refused for now is said again: the one before it stands there as long."""
        level = logging.DEBUG if sent.topic in self._again_at_s else logging.WARNING
        logger.log(level, "%s: the broker refuses it (%s)", sent.topic, answer.reason)
        if answer.code in _REFUSED_FOR_GOOD or isinstance(sent, Passing):
            return
        self._again_at_s[sent.topic] = time.monotonic() + PAUSE_S
        if self._sent_versions.get(sent.topic) == sent.version:
            del self._sent_versions[sent.topic]
        if isinstance(sent, StoredDocument):
            self._stored_after = min(self._stored_after, sent.version - 1)
            self._stored_again_at_s = self._again_at_s[sent.topic]
            self._may_have_stored = True

    def _settle_cleared(self, document: StoredDocument) -> None:
        try:
            self._outbox.settle_document(document)
        except OutboxDamaged:
            raise
        except OutboxError as error:  # it is cleared again on the next connection
            logger.debug("%s", error)

    def _set_aside(self, row: Row, reason: str, *, kind: str = "broker-rejected") -> None:
        """Move a row to the dead letters and tell; raises OutboxError when that cannot be stored now."""
        name = message_id(self._topics.device, row.boot, row.seq)
        # An event about a refused event would be refused too, for ever.
        told, untold = self._untold.with_another(time.monotonic(), may_tell=row.stream != "event")
        events = []
        if told:
            event = set_aside_draft(
                self._topics,
                at=self._now(),
                reason=reason,
                stream=row.stream,
                name=name,
                topic=row.topic,
                size_bytes=len(row.payload),
                set_aside=told,
                kind=kind,
            )
            events = [event]
        self._outbox.reject(row.row_id, reason, events)
        level = logging.WARNING if told else logging.DEBUG
        logger.log(level, "%s %s is set aside, %d since the last word of it: %s", row.stream, name, told, reason)
        self._clear_strikes(row)
        self._heard(row.stream)
        self._untold = untold
        if told:
            self.look()

    def _clear_strikes(self, row: Row) -> None:
        if row.row_id == self._strikes.row_id:
            self._strikes = Strikes()

    # ---- pausing

    @property
    def _is_pausing(self) -> bool:
        return time.monotonic() < self._pause_until_s

    def _pause(self) -> None:
        """Send nothing for a moment, then begin with the first row that is left and not under way."""
        self._pause_until_s = time.monotonic() + PAUSE_S
        self._from_the_first_row()

    def _longest_wait_s(self) -> float:
        if self._is_pausing:
            return min(IDLE_TURN_S, self._pause_until_s - time.monotonic())
        # A fill that was cut short by its bound has more to do at once.
        is_room = len(self._under_way) < (1 if self._is_careful else self._limit)
        has_more = (self._ready and not self._is_far_ahead) or self._asked
        return 0.0 if is_room and has_more else IDLE_TURN_S

    def _outbox_failed(self, error: OutboxError) -> None:
        if isinstance(error, OutboxDamaged):
            raise error
        if not self._is_outbox_failing:
            self._is_outbox_failing = True
            logger.error("%s", error)
        self._pause()
