"""Alerts are raised once, kept while they last, and cleared when they are solved."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from agent.alerts import Problem
from agent.watching.alert_board import AlertBoard

AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)


class Board:
    """An alert board; what it says is kept in order."""

    def __init__(self, *stale: str) -> None:
        self.said: list[tuple[str, Any]] = []
        self.noted: list[str] = []
        publisher: Any = SimpleNamespace(publish_alert=lambda name, alert: self.said.append((name, alert)))
        pipeline: Any = SimpleNamespace(remember=lambda _key, value: self.noted.append(value))
        self.board = AlertBoard(publisher, pipeline, stale)


def test_an_alert_is_raised_once_kept_while_it_lasts_and_cleared_when_it_is_solved() -> None:
    place = Board()
    problem = {"disk-low": Problem("warning", "10 MB left")}
    for minutes in range(3):
        place.board.show(problem, AT + timedelta(minutes=minutes))
    place.board.show({}, AT)
    assert [(name, alert and alert.since) for name, alert in place.said] == [("disk-low", AT), ("disk-low", None)]
    assert place.noted == ["disk-low", ""]


def test_an_alert_whose_words_change_keeps_the_time_since_which_it_is_open() -> None:
    place = Board()
    place.board.show({"dead-letters": Problem("warning", "1 message")}, AT)
    place.board.show({"dead-letters": Problem("warning", "2 messages")}, AT + timedelta(hours=1))
    assert [(alert.message, alert.since) for _, alert in place.said] == [("1 message", AT), ("2 messages", AT)]


def test_what_an_earlier_run_left_raised_is_cleared_unless_it_is_still_so() -> None:
    place = Board("camera-lost", "disk-low")
    place.board.show({"disk-low": Problem("warning", "10 MB left")}, AT)
    assert [(name, alert is None) for name, alert in place.said] == [("camera-lost", True), ("disk-low", False)]
    assert place.noted == ["disk-low"]
