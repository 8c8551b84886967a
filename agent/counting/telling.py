"""What waits to be told: events and notes of the agent's parts, until the outbox takes them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from agent.camera.camera import UnreadableFrame
from agent.delivery.messages import Draft, Severity, event_draft
from agent.delivery.outbox import NO_NOTES, Outbox
from agent.delivery.topics import Topics
from agent.errors import OutboxDamaged, OutboxError
from agent.health import SelfTest

logger = logging.getLogger(__name__)

MOST_EVENTS_WAITING = 256
"""The newest events are kept while the outbox takes nothing; a camera that comes and goes each minute needs hours."""

TELL_AGAIN_S = 60.0
"""s; a live camera on a bad cable gives 25 unreadable pictures a second: each is counted, one a minute is told."""


class Teller:
    """Keeps events and notes in their order until the outbox takes them. Any thread may `tell` and `remember`.

    on_stored: called when there is one event more to publish.
    """

    def __init__(self, topics: Topics, on_stored: Callable[[], None]) -> None:
        self._topics = topics
        self._on_stored = on_stored
        self._events: deque[Draft] = deque(maxlen=MOST_EVENTS_WAITING)
        self._notes: deque[tuple[str, str]] = deque(maxlen=MOST_EVENTS_WAITING)
        self._told_self_test = ""
        self._told_unreadable: tuple[str, float] = ("", 0.0)

    def tell(
        self, kind: str, message: str, severity: Severity = "info", detail: Mapping[str, object] | None = None
    ) -> None:
        """Have an event stored: something has happened now."""
        self._events.append(self.event(kind, message, severity, detail))

    def remember(self, key: str, value: str) -> None:
        """Have a note stored."""
        self._notes.append((key, value))

    def tell_self_test(self, test: SelfTest) -> None:
        """An event for the outcome; a failure that goes on in the same words is told once."""
        kind: tuple[str, Severity] = ("self-test", "info") if test.is_passed else ("self-test-failed", "error")
        if test.is_passed or test.detail != self._told_self_test:
            self.tell(kind[0], test.detail, kind[1])
        self._told_self_test = "" if test.is_passed else test.detail

    def event_of_unreadable(self, frame: UnreadableFrame) -> tuple[Draft, ...]:
        """The event of a frame that could not be read, to be stored with it; none where it was told just now."""
        told_origin, told_at_s = self._told_unreadable
        if frame.origin == told_origin and time.monotonic() - told_at_s < TELL_AGAIN_S:
            return ()
        self._told_unreadable = (frame.origin, time.monotonic())
        logger.warning("frame unreadable: %s: %s", frame.origin, frame.reason)
        detail = {"origin": frame.origin, "reason": frame.reason}
        return (self.event("frame-unreadable", f"{frame.origin}: {frame.reason}", "warning", detail),)

    def event(self, kind: str, message: str, severity: Severity, detail: Mapping[str, object] | None = None) -> Draft:
        """An event of this moment, for who stores it with what it is about."""
        at = datetime.now(timezone.utc)
        return event_draft(kind, message, self._topics, at=at, severity=severity, detail=detail)

    def store_in(self, outbox: Outbox) -> None:
        """Store what waits, the notes first; what the outbox does not take now waits on. Raises OutboxDamaged."""
        while self._notes and _is_taken(outbox, notes=dict([self._notes[0]])):
            self._notes.popleft()
        while self._events and _is_taken(outbox, (event := self._events[0],)):
            self._on_stored()
            if self._events[0] is event:  # else a newer one has pushed it out meanwhile
                self._events.popleft()


def _is_taken(outbox: Outbox, drafts: tuple[Draft, ...] = (), notes: Mapping[str, str | None] = NO_NOTES) -> bool:
    """Store this if the outbox takes it now. Raises OutboxDamaged."""
    try:
        outbox.append(drafts, notes=notes)
    except OutboxDamaged:
        raise
    except OutboxError as error:
        logger.debug("an event or a note waits: %s", error)
        return False
    return True
