"""Alerts at the broker: raised and cleared as problems come and go, also those that an earlier run left behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

from agent.alerts import Problem
from agent.counting.thread import Pipeline
from agent.delivery.outbox import Outbox
from agent.delivery.publisher import Publisher
from agent.delivery.reports import Alert

RAISED_KEY = "alerts"
"""Note: the ids of the alerts that stand at the broker."""


class AlertBoard:
    """Raises and clears alerts as problems come and go. stale: ids that an earlier run left raised at the broker.

    raised: those that stand now; may be read on any thread.
    """

    def __init__(self, publisher: Publisher, pipeline: Pipeline, stale: Iterable[str] = ()) -> None:
        self._publisher = publisher
        self._pipeline = pipeline
        self._stale = set(stale)
        self._raised: dict[str, Alert] = {}
        self.raised: tuple[Alert, ...] = ()

    def show(self, problems: Mapping[str, Problem], now: datetime) -> None:
        """These are open now, and no others."""
        before = set(self._raised) | self._stale
        for alert_id in before - set(problems):
            self._raised.pop(alert_id, None)
            self._publisher.publish_alert(alert_id, None)
        for alert_id, problem in problems.items():
            known = self._raised.get(alert_id)
            if known is None or (known.severity, known.message) != (problem.severity, problem.message):
                since = now if known is None else known.since
                self._raised[alert_id] = Alert(alert_id, problem.severity, problem.message, since)
                self._publisher.publish_alert(alert_id, self._raised[alert_id])
        self._stale.clear()
        self.raised = tuple(self._raised.values())
        if before != set(self._raised):
            self._pipeline.remember(RAISED_KEY, " ".join(sorted(self._raised)))


def read_raised(outbox: Outbox) -> tuple[str, ...]:
    """The alerts that were raised when the agent ended the last time."""
    return tuple((outbox.note(RAISED_KEY) or "").split())
