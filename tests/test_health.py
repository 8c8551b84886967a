"""Health: what several threads tell, read as one frozen picture."""

from __future__ import annotations

import threading
from datetime import datetime, timezone

import pytest

from agent.health import STAGES, TIMING_WINDOW_FIELDS, Health, SelfTest, StageTiming, Throttling


class Clock:
    """Monotonic seconds that move only when told."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def test_a_new_agent_has_done_nothing_yet() -> None:
    snapshot = Health().snapshot()
    assert snapshot.fields == 0
    assert snapshot.fields_per_min == 0
    assert snapshot.dropped == {}
    assert snapshot.timings == {}
    assert (snapshot.camera, snapshot.broker, snapshot.outbox) == ("opening", "connecting", "ok")
    assert snapshot.outbox_oldest_age_s is None
    assert snapshot.last_self_test is None


def test_the_watchdog_may_be_fed_only_when_every_stage_has_moved() -> None:
    health = Health()
    mark = health.snapshot()
    for stage in STAGES[:-1]:
        health.beat(stage)
    assert health.stalled_since(mark) == (STAGES[-1],)
    health.beat(STAGES[-1])
    assert not health.stalled_since(mark)
    assert health.stalled_since(health.snapshot())


def test_a_stage_that_has_ended_as_it_should_is_no_longer_waited_for() -> None:
    health = Health()
    mark = health.snapshot()
    health.retire("camera")
    health.beat("camera")
    health.beat("pipeline")
    health.beat("publisher")
    assert not health.stalled_since(mark)
    assert "camera" not in health.snapshot().beats


def test_fields_per_minute_forgets_what_is_older_than_a_minute() -> None:
    clock = Clock()
    health = Health(clock=clock)
    for _ in range(30):
        health.count_field({})
        clock.now_s += 1
    assert health.snapshot().fields_per_min == 30
    clock.now_s += 59
    assert health.snapshot().fields_per_min < 30
    clock.now_s += 3600
    snapshot = health.snapshot()
    assert snapshot.fields_per_min == 0
    assert snapshot.fields == 30


def test_percentiles_are_values_that_were_measured() -> None:
    health = Health()
    for duration_ms in range(1, 101):
        health.count_field({"detect": float(duration_ms)})
    assert health.snapshot().timings == {"detect": StageTiming(p50_ms=50.0, p95_ms=95.0)}


def test_one_single_field_has_percentiles_too() -> None:
    health = Health()
    health.count_field({"total": 7.0})
    assert health.snapshot().timings == {"total": StageTiming(p50_ms=7.0, p95_ms=7.0)}


def test_old_timings_leave_the_window() -> None:
    health = Health()
    health.count_field({"detect": 1e9})
    for _ in range(TIMING_WINDOW_FIELDS):
        health.count_field({"detect": 5.0})
    assert health.snapshot().timings["detect"].p95_ms == 5.0


def test_dropped_frames_are_counted_by_reason() -> None:
    health = Health()
    for reason in ("dark", "frozen", "dark"):
        health.count_dropped(reason)
    assert health.snapshot().dropped == {"dark": 2, "frozen": 1}


def test_a_snapshot_does_not_change_afterwards() -> None:
    health = Health()
    before = health.snapshot()
    health.count_dropped("dark")
    health.camera_state("lost", "unplugged")
    health.broker_state("refused", "not authorised")
    health.outbox_state("stopped", "disk full")
    health.storage(12, 3.5)
    health.self_test(SelfTest(at=datetime(2026, 1, 1, tzinfo=timezone.utc), is_passed=True, detail="both answer"))
    assert before.dropped == {}
    with pytest.raises(TypeError):
        before.dropped["dark"] = 5  # type: ignore[index]
    after = health.snapshot()
    assert (after.camera, after.camera_detail) == ("lost", "unplugged")
    assert (after.broker, after.broker_detail) == ("refused", "not authorised")
    assert (after.outbox, after.outbox_detail) == ("stopped", "disk full")
    assert (after.outbox_depth, after.outbox_oldest_age_s) == (12, 3.5)
    assert after.last_self_test is not None
    assert after.last_self_test.is_passed


def test_no_count_is_lost_when_threads_write_at_once() -> None:
    health = Health()

    def work() -> None:
        for _ in range(2000):
            health.count_dropped("dark")
            health.beat("camera")
            health.count_field({"total": 1.0})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = health.snapshot()
    assert snapshot.dropped == {"dark": 8000}
    assert snapshot.beats["camera"] == 8000
    assert snapshot.fields == 8000


def test_throttling_bits_are_read_as_the_firmware_writes_them() -> None:
    throttling = Throttling(bits=0x50005)
    assert throttling.is_under_voltage
    assert not throttling.is_frequency_capped
    assert throttling.is_throttled
    assert not throttling.is_soft_temperature_limit
    assert throttling.was_under_voltage
    assert throttling.was_throttled
    assert not Throttling(bits=0x50000).is_under_voltage
