"""When the retained documents of the sample in hand are told again."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone

from agent.delivery.messages import RetainedDocument
from agent.domain import SampleState
from agent.reporting import Reporter


class SampleDocuments:
    """Says which documents are due, and knows which were told last. every_s: while frames come."""

    def __init__(self, every_s: float, boot: int) -> None:
        self._every_s = every_s
        self._boot = boot
        self._told: tuple[object, ...] = ()
        self._told_at_s = -math.inf

    def due(self, sample: SampleState, reporter: Reporter) -> tuple[RetainedDocument, ...]:
        """The sample's documents, at once when its phase or its report is new, else only every few seconds."""
        key = _told_key(sample)
        is_new = key[:4] != self._told[:4]
        is_due = time.monotonic() - self._told_at_s >= self._every_s
        if key == self._told or not (is_new or is_due):
            return ()
        return reporter.documents(sample, boot=self._boot, at=datetime.now(timezone.utc))

    def note_told(self, sample: SampleState) -> None:
        """Its documents are stored."""
        self._told, self._told_at_s = _told_key(sample), time.monotonic()


def _told_key(sample: SampleState) -> tuple[object, ...]:
    """What its documents depend on; the first four change seldom and are told at once."""
    return sample.sid, sample.phase, sample.reports, sample.amendments, sample.fields
