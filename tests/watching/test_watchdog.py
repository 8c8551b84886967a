"""The watchdog is fed only while every stage moves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.camera.grabber import FrameQueue
from agent.counting.thread import Pipeline
from agent.delivery.outbox import begin_boot, open_outbox
from agent.domain import SampleState
from agent.health import Health
from agent.watching.watchdog import Watchdog
from tests.frames import make_bench


def test_the_watchdog_is_fed_only_when_every_stage_has_moved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    fed: list[int] = []
    monkeypatch.setattr("agent.systemd.feed_watchdog", lambda: fed.append(1))
    health = Health()
    watchdog = Watchdog(health)
    health.beat("camera")
    health.beat("publisher")
    time.sleep(0.02)
    watchdog.feed()
    watchdog.feed()
    assert fed == []
    assert [record.message for record in caplog.records] == ["pipeline stands still; the watchdog is not fed"]
    health.beat("pipeline")
    watchdog.feed()
    assert fed == [1]
    time.sleep(0.02)
    watchdog.feed()
    assert fed == [1], "nothing has moved since"


def test_the_watchdog_is_fed_while_a_source_that_was_read_drains_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    fed: list[int] = []
    monkeypatch.setattr("agent.systemd.feed_watchdog", lambda: fed.append(1))
    health, frames = Health(), FrameQueue(1)
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
        pipeline = Pipeline(frames=frames, outbox=outbox, bench=make_bench(), sample=SampleState("s-1"), health=health)
        frames.end()
        health.retire("camera")  # as the grabber does at the end
        pipeline.start()
        pipeline.join(10)
    assert pipeline.is_source_finished
    watchdog = Watchdog(health)
    for left in range(3):
        time.sleep(0.02)
        health.beat("publisher")
        watchdog.feed()
        assert len(fed) == left + 1
