"""What waits to be told is stored before the next frame, and not over and over."""

from __future__ import annotations

import jsonschema
import pytest

from agent.camera.camera import UnreadableFrame
from agent.delivery.messages import load_schema
from agent.delivery.outbox import Outbox
from tests.counting.running import Runner
from tests.frames import make_frame


def test_an_event_from_another_thread_is_stored(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.pipeline.tell("camera-lost", "unplugged", "warning", {"attempt": 1})
    runner.run_to_end()
    (event,) = runner.told
    assert (event["kind"], event["detail"]) == ("camera-lost", {"attempt": 1})


def test_an_unreadable_frame_is_an_event_and_done_with(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.give(UnreadableFrame("a/b.png", "truncated", "key-b"), make_frame(2))
    runner.run_to_end()
    (event,) = runner.told
    jsonschema.Draft202012Validator(load_schema("event")).validate(event)
    assert (event["kind"], event["severity"]) == ("frame-unreadable", "warning")
    assert "a/b.png: truncated" in event["message"]
    assert outbox.finished_keys() == {"key-b"}
    assert runner.health.snapshot().dropped == {"unreadable": 1}
    assert len(runner.of_kind("field")) == 1


def test_a_camera_on_a_bad_cable_is_counted_each_time_and_told_once_a_minute(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(outbox)
    runner.give(*(UnreadableFrame("camera 0", "torn") for _ in range(5)))
    runner.run_to_end()
    assert len(runner.told) == 1
    assert runner.health.snapshot().dropped == {"unreadable": 5}
    monkeypatch.setattr("agent.counting.telling.TELL_AGAIN_S", 0)
    again = Runner(outbox)
    again.give(*(UnreadableFrame("camera 0", "torn") for _ in range(2)), UnreadableFrame("camera 1", "torn"))
    again.run_to_end()
    assert len(again.told) == 1 + 3
