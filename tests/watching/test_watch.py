"""The watch tells state, events and alerts as it sees them; the parts that it looks at are doubles."""

from __future__ import annotations

import math
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent.config import Config
from agent.delivery.outbox import open_outbox
from agent.domain import AgentState, ClockReading
from agent.health import Health, MachineReading, SelfTest, Throttling
from agent.watching import surroundings
from agent.watching.surroundings import Surroundings
from agent.watching.watch import Watch, derive_state


@pytest.mark.parametrize(
    ("camera", "broker", "outbox_state", "expected"),
    [
        ("open", "connected", "ok", AgentState.READY),
        ("open", "lost", "ok", AgentState.READY),
        ("open", "connecting", "ok", AgentState.READY),
        ("ended", "connected", "ok", AgentState.READY),
        ("idle", "connected", "ok", AgentState.SLEEPING),
        ("lost", "connected", "ok", AgentState.DEGRADED),
        ("frozen", "connected", "ok", AgentState.DEGRADED),
        ("open", "refused", "ok", AgentState.DEGRADED),
        ("open", "connected", "stopped", AgentState.DEGRADED),
        ("idle", "connected", "stopped", AgentState.DEGRADED),
    ],
)
def test_the_state_follows_from_health(camera: Any, broker: Any, outbox_state: Any, expected: AgentState) -> None:
    health = Health()
    health.camera_state(camera)
    health.broker_state(broker)
    health.outbox_state(outbox_state)
    assert derive_state(health.snapshot(), is_started=True) is expected
    assert derive_state(health.snapshot(), is_started=False) is AgentState.INIT


def test_systemd_is_told_ready_only_when_the_self_test_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("agent.systemd.ready", lambda words: told.append(f"READY {words}"))
    monkeypatch.setattr("agent.systemd.status", told.append)
    put_off: list[int] = []
    monkeypatch.setattr("agent.systemd.extend_start", put_off.append)
    health = Health()
    watch = make_watch(tmp_path, health)
    now = datetime.now(timezone.utc)
    health.self_test(SelfTest(now, is_passed=False, detail="self-test: field a"))
    health.camera_state("open", "simulated")
    watch._tell_state(health.snapshot())
    assert told == ["degraded: camera open, broker connecting, outbox ok, self-test failed: nothing is counted"]
    watch._tell_state(health.snapshot())
    assert len(put_off) == 2  # at each look: no new start of the service would mend the models
    health.broker_state("refused", "no")  # degraded for another reason too: that must not keep READY back
    health.self_test(SelfTest(now, is_passed=True, detail="as known"))
    watch._tell_state(health.snapshot())
    watch._tell_state(health.snapshot())
    assert told[1:] == ["READY degraded: camera open, broker refused, outbox ok"]
    assert len(put_off) == 2


def make_watch(
    tmp_path: Path,
    health: Health,
    told: list[tuple[Any, ...]] | None = None,
    **more: Any,
) -> Watch:
    heard = [] if told is None else told
    part = SimpleNamespace(
        is_alive=lambda: True, failure=None, is_source_finished=False, tell=lambda *words: heard.append(words)
    )
    publisher = SimpleNamespace(is_alive=lambda: True, failure=None, publish_state=print, publish_health=print)
    around = Surroundings(Config(), tmp_path, part.tell, open_outbox)
    return Watch(Config(), 1, health, publisher, part, part, around, **more)  # type: ignore[arg-type]


def test_the_alert_of_models_that_fell_back_stands_until_others_were_activated(tmp_path: Path) -> None:
    fell_back: list[str | None] = ["the models in slot a cannot be used"]
    shown: list[set[str]] = []
    board = SimpleNamespace(show=lambda problems, _now: shown.append(set(problems)), raised=())
    watch = make_watch(tmp_path, Health(), alerts=board, fell_back=lambda: fell_back[0])
    watch.look()
    fell_back[0] = None
    watch.look()
    assert ["models-fell-back" in ids for ids in shown] == [True, False]


def test_a_board_that_is_short_of_power_raises_an_alert_at_the_next_health_and_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[str]] = []
    board = SimpleNamespace(show=lambda problems, _now: shown.append(sorted(problems)))
    health = Health()
    health.camera_state("open")
    watch = make_watch(tmp_path, health, alerts=board)
    monkeypatch.setattr(watch._surroundings, "_look_into_outbox", lambda: (None, {}))
    for bits in (None, 0x1, 0x50000):
        throttling = None if bits is None else Throttling(bits)
        reading = MachineReading(None, throttling, None, None, ClockReading(is_synchronised=True))
        monkeypatch.setattr(surroundings, "read_machine", lambda _folder, reading=reading: reading)
        watch._told_at_s = -math.inf
        watch.look()
    assert shown == [[], ["under-voltage"], []]


@pytest.mark.parametrize("name", ["camera", "pipeline"])
def test_a_thread_that_ends_with_its_source_while_it_is_looked_at_has_not_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    health = Health()
    health.camera_state("open")
    watch = make_watch(tmp_path, health)
    monkeypatch.setattr(watch._surroundings, "_look_into_outbox", lambda: (None, {}))
    part = SimpleNamespace(failure=None, is_source_finished=False, tell=lambda *_words: None)

    def ends_now() -> bool:
        if name == "camera":
            health.camera_state("ended")
        part.is_source_finished = True
        return False

    part.is_alive = ends_now
    monkeypatch.setattr(watch, {"camera": "_grabber", "pipeline": "_pipeline"}[name], part)
    watch.look()
    assert not watch.has_died


def test_a_thread_that_has_ended_unasked_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health()
    health.camera_state("open")
    watch = make_watch(tmp_path, health)
    monkeypatch.setattr(watch._surroundings, "_look_into_outbox", lambda: (None, {}))
    watch.look()
    assert not watch.has_died
    monkeypatch.setattr(watch, "_grabber", SimpleNamespace(is_alive=lambda: False, failure=ValueError("no frame")))
    watch.look()
    assert watch.has_died
