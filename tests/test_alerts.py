"""Every problem that is seen is an open one, in words for people."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from agent.alerts import ALERT_IDS, open_problems
from agent.domain import DriftReading, FigureReading
from agent.health import Health, SelfTest, Throttling

AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)


def test_nothing_is_open_while_all_is_well() -> None:
    assert open_problems(Health().snapshot()) == {}


def test_figures_that_are_watched_and_have_not_moved_are_no_problem() -> None:
    health = Health()
    health.drift(DriftReading(30, 30, {"focus": FigureReading(5, 5, 4, 6, "thousandths")}))
    assert open_problems(health.snapshot()) == {}


@pytest.mark.parametrize(
    ("alert_id", "change", "more"),
    [
        ("camera-lost", lambda h: h.camera_state("lost", "no picture"), {}),
        ("camera-frozen", lambda h: h.camera_state("frozen", "the same again"), {}),
        ("outbox-stopped", lambda h: h.outbox_state("stopped", "full"), {}),
        ("self-test-failed", lambda h: h.self_test(SelfTest(AT, is_passed=False, detail="no")), {}),
        ("drift", lambda h: h.drift(DriftReading(30, 30, {"focus": FigureReading(5, 2, 4, 6, "x", "it moved")})), {}),
        ("dead-letters", None, {"dead_letters": 3}),
        ("disk-low", None, {"is_disk_low": True}),
        ("certificate-expiring", None, {"near_expiries": ["ca.pem: expires in 3 days"]}),
        ("models-fell-back", None, {"fell_back": "slot a cannot be used"}),
        ("clock-not-synchronised", None, {"is_clock_true": False}),
        ("outbox-set-aside", None, {"salvage": "damaged, 3 messages were read out of it"}),
        ("outbox-dropping", None, {"dropped": {"cell": 64}}),
        ("under-voltage", None, {"throttling": Throttling(0x50001)}),
        ("throttled", None, {"throttling": Throttling(0x40004)}),
    ],
)
def test_each_problem_has_its_alert(alert_id: str, change: Any, more: dict[str, Any]) -> None:
    health = Health()
    if change is not None:
        change(health)
    (found,) = open_problems(health.snapshot(), **more).items()
    assert found[0] == alert_id
    assert alert_id in ALERT_IDS
    assert found[1].message


def test_a_board_that_was_short_of_power_and_is_not_now_has_no_open_problem() -> None:
    assert open_problems(Health().snapshot(), throttling=Throttling(0x50000)) == {}


def test_both_at_once_are_two_alerts_and_say_what_to_mend_first() -> None:
    found = open_problems(Health().snapshot(), throttling=Throttling(0x50005))
    assert list(found) == ["under-voltage", "throttled"]
    assert "power supply" in found["under-voltage"].message
    assert found["throttled"].message.endswith("mend its power first")
