"""The supervisor: real models, real outbox, real signals; a broker only where the test is about one."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_pipeline import make_bench

from agent import supervisor
from agent.analysis.differential import Rules
from agent.camera.camera import NOTHING_YET
from agent.camera.grabber import FrameQueue
from agent.config import CameraSection, Config, SampleSection, models_folder
from agent.delivery.certificates import Expiry
from agent.delivery.outbox import START_ROOM_BYTES, Outbox, begin_boot, open_outbox, read_boot
from agent.delivery.topics import Topics
from agent.domain import AgentState, ClockReading, ModelIdentity, Provenance, SampleState
from agent.errors import ConfigError, ModelError, OutboxError
from agent.health import Health, MachineReading, SelfTest, Throttling
from agent.pipeline import Pipeline
from agent.reporting import Reporter
from agent.signals import StopSignal, stop_on_signals
from agent.supervisor import (
    THREAD_DIED,
    Watch,
    begin_sample,
    close_sample,
    derive_state,
    make_room_to_start,
    open_unfinished,
    run_agent,
)
from tests.brokers import free_port
from tests.model_folders import put_models
from tests.slides import small_slide

TODAY = datetime(2026, 11, 23, 8, tzinfo=timezone.utc)
REPORTER = Reporter(
    Topics("lab", "dev"),
    Rules({}),
    Provenance("0", ModelIdentity("d", "1", "a" * 64), ModelIdentity("c", "1", "b" * 64), "r", "none", "c" * 64),
)

needs_models = pytest.mark.skipif(
    not (models_folder(Config().models) / "manifest.json").exists(), reason="the shipped models are not in models/"
)


def make_config(folder: Path, **sections: Any) -> Config:
    """An agent on a short simulated slide whose broker is away."""
    defaults = {
        "device": "dev",
        "camera": small_slide(fields=3, interval_s=0),
        "outbox": {"folder": folder, "min_free_mb": 0},
        "broker": {"port": free_port(), "max_backoff_s": 0.2},
        "models": {"threads": 1},
    }
    return Config.model_validate({**defaults, **sections})


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as opened:
        yield opened


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that gives a broker up which is away after 0.3 s."""
    monkeypatch.setattr(supervisor, "DRAIN_PATIENCE_S", 0.3)


# ------------------------------------------------------------------------------------------------------ a full disk


class FullDisk:
    """A disk on which files are deleted and the room that they leave is counted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        monkeypatch.setattr(supervisor, "read_disk_free", lambda _folder: self.all_bytes - self.used_bytes())
        self.all_bytes = 0

    def put(self, name: str, size_mb: float, age_s: float) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(int(size_mb * 2**20)))
        os.utime(path, (TODAY.timestamp() - age_s,) * 2)
        self.all_bytes = self.used_bytes()
        return path

    def used_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def test_on_a_full_disk_a_start_lets_whole_fields_go_first_and_no_more_than_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    pictures = [disk.put(f"pictures/{n}.png", 2, age_s=100 - n) for n in range(5)]
    crop = disk.put("crops/s-1/s-1-7.jpg", 0.1, age_s=500)
    make_room_to_start(tmp_path)
    assert [path.exists() for path in pictures] == [False, False, False, True, True]
    assert crop.exists()


def test_the_cells_of_the_review_go_when_no_field_is_left_and_results_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    field, crop = disk.put("pictures/1.png", 2, age_s=0), disk.put("crops/s-1/s-1-7.jpg", 0.1, age_s=500)
    others = [disk.put("outbox.db", 2, age_s=900), disk.put("of-somebody-else.png", 2, age_s=900)]
    make_room_to_start(tmp_path)
    assert not field.exists()
    assert not crop.exists()
    assert all(path.exists() for path in others)


def test_a_start_with_room_lets_nothing_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    picture = disk.put("pictures/1.png", 2, age_s=0)
    disk.all_bytes += START_ROOM_BYTES
    make_room_to_start(tmp_path)
    assert picture.exists()


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_the_agent_makes_room_before_it_counts_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = FullDisk(tmp_path, monkeypatch)
    picture = disk.put("pictures/1.png", 7, age_s=0)
    begun = supervisor.begin_boot

    def begin_on_a_full_disk(folder: Path) -> int:
        assert not picture.exists()
        return begun(folder)

    monkeypatch.setattr(supervisor, "begin_boot", begin_on_a_full_disk)
    assert run_agent(make_config(tmp_path)) == 0


# ----------------------------------------------------------------------------------------------------- the state


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


# ---------------------------------------------------------------------------------------------------- the sample


def begin(
    outbox: Outbox, sid: str | None = None, *, takes_all_anew: bool = True, **section: Any
) -> tuple[SampleState, bool]:
    return begin_sample(outbox, SampleSection(id=sid, **section), TODAY, REPORTER, takes_all_anew=takes_all_anew)


def test_a_new_sample_is_named_by_date_and_boot_and_runs(outbox: Outbox) -> None:
    sample, is_new = begin(outbox, stop_at_cells=200, age_band="child", accession="A-1")
    assert is_new
    assert (sample.sid, sample.phase, sample.target_cells) == (f"s-20261123-b{outbox.boot}", "running", 200)
    assert (sample.age_band, sample.accession, sample.opened_at) == ("child", "A-1", "2026-11-23T08:00:00.000Z")
    assert outbox.sample_state() == sample


def test_a_sample_that_was_not_closed_goes_on_after_a_restart(outbox: Outbox) -> None:
    stored = SampleState("s-20261122-b1", next_cell_number=40, fields=3, counts={"rbc": 39}, last_sha256_16="ab")
    outbox.append((), sample=stored, finished_keys=("one",))
    assert begin(outbox) == (stored, False)
    assert begin(outbox, "s-20261122-b1") == (stored, False)
    assert outbox.finished_keys() == {"one"}


def test_another_id_in_the_configuration_ends_the_sample_with_its_report_and_begins_another(outbox: Outbox) -> None:
    outbox.append((), sample=SampleState("first", next_cell_number=40), finished_keys=("one",))
    second, is_new = begin(outbox, "second")
    assert (second.sid, second.next_cell_number, is_new) == ("second", 1, True)
    assert outbox.finished_keys() == frozenset(), "the second sample takes the folder from its beginning"
    (report, event) = [json.loads(row.payload) for row in outbox.pending(0, 9)]
    assert (report["status"], report["report"]) == ("final", "first-r1")
    assert event["detail"]["reason"] == "replaced"


def test_another_id_does_not_count_the_earlier_slides_of_a_watched_folder(outbox: Outbox) -> None:
    outbox.append((), sample=SampleState("first"), finished_keys=("one",))
    assert begin(outbox, "second", takes_all_anew=False)[0].sid == "second"
    assert outbox.finished_keys() == {"one"}
    assert begin(outbox, "third", takes_all_anew=False, start="command")[0].phase == "idle"
    assert (outbox.sample_state(), outbox.finished_keys()) == (None, {"one"})


@pytest.mark.parametrize(
    ("camera", "is_taken_anew"),
    [
        ({"kind": "folder"}, True),
        ({"kind": "video"}, True),
        ({"kind": "simulated"}, True),
        ({"kind": "folder", "folder": {"watch": True}}, False),
        ({"kind": "usb"}, False),
    ],
)
def test_only_what_was_made_for_one_slide_is_taken_anew_by_another_sample(camera: Any, is_taken_anew: bool) -> None:
    assert CameraSection.model_validate(camera).can_begin_anew is is_taken_anew


@needs_models
@pytest.mark.usefixtures("no_thread_left")
def test_the_agent_leaves_a_watched_folders_earlier_pictures_to_the_sample_before(tmp_path: Path) -> None:
    watched = tmp_path / "watched"
    watched.mkdir()
    begin_boot(tmp_path / "o")
    with open_outbox(tmp_path / "o", min_free_mb=0, device="dev") as outbox:
        outbox.append((), sample=SampleState("first"), finished_keys=("one",))
    camera = {"kind": "folder", "folder": {"path": watched, "watch": True}}
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    assert run_agent(make_config(tmp_path / "o", camera=camera, sample={"id": "second"})) == 0
    with open_outbox(tmp_path / "o", min_free_mb=0, device="dev") as outbox:
        assert (outbox.sample_state() or SampleState("none")).sid == "second"
        assert outbox.finished_keys() == {"one"}


def test_deleted_pictures_of_a_watched_folder_leave_the_outbox_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.camera.deletions.FORGET_AFTER_S", 0)
    monkeypatch.setattr("agent.camera.deletions.FORGET_EVERY_S", 0)
    open_here = partial(open_outbox, tmp_path / "o", min_free_mb=0, device="dev")
    begin_boot(tmp_path / "o")
    watched = tmp_path / "watched"
    watched.mkdir()
    picture = watched / "a.png"
    picture.write_bytes(b"x")
    key = f"a.png|1|{picture.stat().st_mtime_ns}"
    with open_here() as outbox:
        outbox.append((), finished_keys=(key, "b.png|1|1"))
    section = CameraSection.model_validate({"kind": "folder", "folder": {"path": watched, "watch": True}})
    with closing(open_unfinished(section, open_here)) as camera:
        assert camera.read() is NOTHING_YET
        picture.unlink()
        for _ in range(3):
            camera.read()
    with open_here() as outbox:
        assert outbox.finished_keys() == {"b.png|1|1"}


def test_a_closed_sample_is_followed_by_a_new_one_with_another_id(outbox: Outbox) -> None:
    first, _ = begin(outbox)
    close_sample(outbox, first, None)
    assert outbox.finished_keys() == frozenset()
    assert begin(outbox)[0].sid == f"s-20261123-b{outbox.boot}-2"


def test_no_cell_id_and_no_report_is_given_twice_when_a_named_sample_runs_again(outbox: Outbox) -> None:
    close_sample(outbox, SampleState("named", next_cell_number=40, fields=3, counts={"rbc": 39}, reports=1), "named")
    again, is_new = begin(outbox, "named")
    assert is_new
    assert (again.sid, again.next_cell_number, again.fields, again.counts) == ("named", 40, 0, {})
    assert (again.reports, again.phase) == (1, "running")


def end(outbox: Outbox, sample: SampleState) -> SampleState:
    """As the pipeline does at the end of a source."""
    ending = REPORTER.finish(sample, TODAY, "source-ended")
    cells = {f"{kind}/{sample.sid}/{sample.sid}-1": "round" for kind in ("cells", "review")}
    documents = REPORTER.documents(ending.sample, boot=outbox.boot, at=TODAY)
    outbox.append(ending.drafts, sample=ending.sample, documents=documents, notes={**ending.notes, **cells})
    return ending.sample


def told(outbox: Outbox, kind: str) -> set[str]:
    return {topic.rpartition("/")[2] for topic in outbox.told(f"{REPORTER.topics.base}/{kind}/")}


@pytest.mark.parametrize("is_named", [False, True])
def test_samples_that_are_begun_by_a_start_archive_those_before(outbox: Outbox, *, is_named: bool) -> None:
    """A folder that a timer has read, or another `sample.id` for each slide: nothing is kept for ever."""
    sids = []
    for number in range(20):
        sample, is_new = begin(outbox, f"slide-{number}" if is_named else None)
        assert is_new
        assert (sample.number, told(outbox, "sample")) == (number + 1, set()), "cleared when the next begins"
        sids.append(sample.sid)
        ended = end(outbox, sample)
        if not is_named:
            close_sample(outbox, ended, None)
    newest = set(sids[-16:])
    assert told(outbox, "sample") == {sids[-1]}
    assert told(outbox, "differential") == newest, "cleared with the sixteenth after it"
    for kind in ("samples/", "cells/", "review/"):
        assert {key.split("/")[1] for key in outbox.notes(kind)} == newest


def test_a_sample_that_was_thrown_over_and_closed_leaves_nothing_to_the_next(outbox: Outbox) -> None:
    thrown = SampleState("s-1", phase="aborted")
    documents = REPORTER.documents(thrown, boot=outbox.boot, at=TODAY)
    outbox.append((), sample=thrown, documents=documents, notes={"cells/s-1/s-1-1": "round"})
    close_sample(outbox, thrown, None)
    begin(outbox)
    assert (told(outbox, "sample"), outbox.notes("cells/")) == (set(), {})


def test_a_named_sample_that_runs_again_keeps_what_can_be_amended(outbox: Outbox) -> None:
    ended = end(outbox, begin(outbox, "named")[0])
    close_sample(outbox, ended, "named")
    begin(outbox, "named")
    assert told(outbox, "sample") == told(outbox, "differential") == {"named"}
    assert list(outbox.notes("cells/")) == ["cells/named/named-1"]


def test_where_commands_begin_samples_none_begins_by_itself(outbox: Outbox) -> None:
    assert begin(outbox, start="command")[0].phase == "idle"
    assert outbox.sample_state() is None


def test_a_sample_that_has_ended_is_not_begun_again_by_a_restart(outbox: Outbox) -> None:
    ended = SampleState("s-1", phase="finished", fields=9)
    outbox.append((), sample=ended)
    assert begin(outbox) == (ended, False)


# --------------------------------------------------------------------------------------------------- the signals


def test_a_signal_ends_the_wait_at_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        begun_s = time.monotonic()
        assert stop.wait(30)
        assert time.monotonic() - begun_s < 5
        assert stop.wait(30), "it stays asked for"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_the_wait_ends_it() -> None:
    with stop_on_signals() as stop:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        begun_s = time.monotonic()
        assert stop.wait(30)
        assert time.monotonic() - begun_s < 5
        timer.join()


def test_a_second_ctrl_c_ends_the_program_at_once() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_signals_wake_the_wait_once_and_ask_for_nothing() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.wait(5)
            begun_s = time.monotonic()
            assert not stop.wait(0.2)
            assert time.monotonic() - begun_s >= 0.15, "a stray signal must not make the wait spin"
    finally:
        signal.signal(signal.SIGUSR1, before)


# ----------------------------------------------------------------------------------------- which models are in use


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_a_start_with_activated_models_says_that_the_configured_ones_are_not_in_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    configured = put_models(tmp_path / "mine", "8.8")
    put_models(tmp_path / "models" / "a", "9.9")
    (tmp_path / "models" / "active.json").write_text('{"slot": "a", "before": "base", "trial_starts": null}')
    with caplog.at_level(logging.WARNING, "agent.supervisor"):
        assert run_agent(make_config(tmp_path, models={"folder": configured, "threads": 1})) == 0
    assert f"slot a is in use ({tmp_path / 'models' / 'a'}), {configured} is not; to use it" in caplog.text


# ------------------------------------------------------------------------------------------------- the self-test


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


# -------------------------------------------------------------------------------------------------- the watchdog


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
    return Watch(Config(), tmp_path, 1, health, publisher, part, part, open_outbox, **more)  # type: ignore[arg-type]


def test_the_alert_of_models_that_fell_back_stands_until_others_were_activated(tmp_path: Path) -> None:
    fell_back: list[str | None] = ["the models in slot a cannot be used"]
    shown: list[set[str]] = []
    board = SimpleNamespace(show=lambda problems, _now: shown.append(set(problems)), raised=())
    watch = make_watch(tmp_path, Health(), alerts=board, fell_back=lambda: fell_back[0])
    watch.look()
    fell_back[0] = None
    watch.look()
    assert ["models-fell-back" in ids for ids in shown] == [True, False]


def test_a_clock_that_is_set_is_told_once(tmp_path: Path) -> None:
    ahead_s = [100.0]
    told: list[tuple[Any, ...]] = []
    watch = make_watch(tmp_path, Health(), told, wall_ahead_s=lambda: ahead_s[0])
    watch.look()
    ahead_s[0] += 1.0  # slewed
    watch.look()
    assert told == []
    ahead_s[0] -= 86_400.0
    watch.look()
    watch.look()
    assert told == [("clock-step", "the system clock was set back by 86400 s", "warning", {"step_s": -86400.0})]


def test_a_disk_that_runs_low_is_told_before_intake_stops_and_again_only_after_it_was_mended(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    watch = make_watch(tmp_path, Health(), told)
    for free_mb in (10_000, 255, 250, 300, 400, 200):  # outbox.min_free_mb is 64
        watch._tell_disk(free_mb * 2**20)
    assert [(kind, words.split(";")[0]) for kind, words, *_ in told] == [
        ("disk-low", "255 MB left"),
        ("disk-low", "200 MB left"),
    ]


def test_a_board_that_is_short_of_power_raises_an_alert_at_the_next_health_and_clears_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[list[str]] = []
    board = SimpleNamespace(show=lambda problems, _now: shown.append(sorted(problems)))
    health = Health()
    health.camera_state("open")
    watch = make_watch(tmp_path, health, alerts=board)
    monkeypatch.setattr(watch, "_look_into_outbox", lambda: None)
    for bits in (None, 0x1, 0x50000):
        throttling = None if bits is None else Throttling(bits)
        reading = MachineReading(None, throttling, None, None, ClockReading(is_synchronised=True))
        monkeypatch.setattr(supervisor, "read_machine", lambda _folder, reading=reading: reading)
        watch._told_at_s = -math.inf
        watch.look()
    assert shown == [[], ["under-voltage"], []]


def test_a_certificate_that_ends_soon_is_told_once_for_each_file(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    watch = make_watch(tmp_path, Health(), told)
    near, far = (Expiry("broker.tls.certificate_file", tmp_path / "scope.pem", days) for days in (29.96, 31.0))
    authority = Expiry("broker.tls.ca_file", tmp_path / "ca.pem", 3000)
    for expiries in ((far, authority), (near, authority), (near, authority), (), (far, authority), (near, authority)):
        watch._tell_expiries(expiries)
    assert [(kind, severity, detail) for kind, _, severity, detail in told] == 2 * [
        ("certificate-expiring", "warning", {"key": "broker.tls.certificate_file", "days_left": 30.0})
    ]


def test_the_watchdog_is_fed_only_when_every_stage_has_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    fed: list[int] = []
    monkeypatch.setattr("agent.systemd.feed_watchdog", lambda: fed.append(1))
    health = Health()
    watch = make_watch(tmp_path, health)
    health.beat("camera")
    health.beat("publisher")
    time.sleep(0.02)
    watch.feed_watchdog()
    watch.feed_watchdog()
    assert fed == []
    assert [record.message for record in caplog.records] == ["pipeline stands still; the watchdog is not fed"]
    health.beat("pipeline")
    watch.feed_watchdog()
    assert fed == [1]
    time.sleep(0.02)
    watch.feed_watchdog()
    assert fed == [1], "nothing has moved since"


def test_the_watchdog_is_fed_while_a_source_that_was_read_drains_for_long(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    fed: list[int] = []
    monkeypatch.setattr("agent.systemd.feed_watchdog", lambda: fed.append(1))
    health, frames = Health(), FrameQueue(1)
    pipeline = Pipeline(frames=frames, outbox=outbox, bench=make_bench(), sample=SampleState("s-1"), health=health)
    frames.end()
    health.retire("camera")  # as the grabber does at the end
    pipeline.start()
    pipeline.join(10)
    assert pipeline.is_source_finished
    watch = make_watch(outbox.path.parent, health)
    for left in range(3):
        time.sleep(0.02)
        health.beat("publisher")
        watch.feed_watchdog()
        assert len(fed) == left + 1


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_a_running_agent_tells_systemd_ready_watchdog_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(1)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "1200000")
        simulated = {"fields": 8, "interval_s": 0.25, "frame_width_px": 160, "frame_height_px": 120}
        assert run_agent(make_config(tmp_path / "o", camera={"simulated": simulated})) == 0
        told = []
        manager.setblocking(False)
        while True:
            try:
                told.append(manager.recv(4096).decode())
            except BlockingIOError:
                break
    assert told[0].startswith("READY=1\nSTATUS=ready: camera open")
    assert told.count("WATCHDOG=1") >= 2
    assert told[-1] == "STOPPING=1\nSTATUS=stopping"


# ------------------------------------------------------------------------------------------------ the whole agent


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_a_finite_source_is_counted_the_sample_closed_and_what_waits_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert run_agent(make_config(tmp_path)) == 0
    with open_outbox(tmp_path, device="dev", verify=False) as outbox:
        fields = [row for row in outbox.pending(0, 10_000) if row.stream == "field"]
        assert [row.seq for row in fields] == [1, 2, 3]
        assert outbox.sample_state() is None
        assert outbox.finished_keys() == frozenset()
        waiting = outbox.depth()
    assert f"3 fields; {waiting} messages wait on disk for the broker" in caplog.text
    assert "the source is read to its end" in caplog.text


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_each_start_has_its_own_boot_and_the_numbers_go_on(tmp_path: Path) -> None:
    for _ in range(2):
        assert run_agent(make_config(tmp_path)) == 0
    assert read_boot(tmp_path) == 2
    with open_outbox(tmp_path, device="dev", verify=False) as outbox:
        fields = [row for row in outbox.pending(0, 10_000) if row.stream == "field"]
    assert [(row.boot, row.seq) for row in fields] == [(1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_a_damaged_outbox_is_set_aside_and_told(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").write_bytes(b"\0" * 8192)
    assert run_agent(make_config(tmp_path)) == 0
    with open_outbox(tmp_path, device="dev", verify=False) as outbox:
        rows = outbox.pending(0, 10_000)
    assert sum(row.stream == "field" for row in rows) == 3
    assert any(b'"kind":"outbox-set-aside"' in row.payload for row in rows)


@needs_models
@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("camera", "agent.supervisor.open_unfinished"),
        ("pipeline", "agent.pipeline.process_frame"),
        ("publisher", "agent.delivery.publisher.Publisher._run"),
        ("page", "agent.web.page.Page._make_server"),
    ],
)
def test_the_death_of_a_thread_ends_the_process_with_its_own_code(
    name: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(place, fail)
    web = {"enabled": name == "page", "port": free_port()}
    assert run_agent(make_config(tmp_path, web=web)) == THREAD_DIED
    assert f"the {name} thread has died: a fault of ours" in caplog.text
    with open_outbox(tmp_path, device="dev", verify=False) as outbox:
        sample = outbox.sample_state()
        assert sample is None or sample.fields == 0 or name in ("publisher", "page")


@needs_models
@pytest.mark.usefixtures("no_thread_left", "impatient")
def test_a_page_whose_extra_is_missing_is_told_with_its_name_and_an_agent_without_a_page_needs_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tornado" or name.startswith("agent.web.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tornado", None)
    with pytest.raises(ConfigError, match=r"web\.enabled.*\n.*hematovision-agent\[web\]"):
        run_agent(make_config(tmp_path / "one", web={"enabled": True, "port": free_port()}))
    assert run_agent(make_config(tmp_path / "two")) == 0


@needs_models
@pytest.mark.usefixtures("no_thread_left")
def test_a_page_for_other_computers_without_a_password_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HEMATOVISION_WEB_PASSWORD", raising=False)
    with pytest.raises(ConfigError, match="needs a password"):
        run_agent(make_config(tmp_path, web={"enabled": True, "host": "0.0.0.0", "port": free_port()}))


@pytest.mark.usefixtures("no_thread_left")
def test_without_models_the_agent_does_not_start_and_leaves_nothing_running(tmp_path: Path) -> None:
    config = make_config(tmp_path / "outbox", models={"folder": tmp_path / "none"})
    with pytest.raises(ModelError, match=r"manifest\.json"):
        run_agent(config)


@pytest.mark.usefixtures("no_thread_left")
def test_a_second_agent_on_the_same_outbox_does_not_start(tmp_path: Path) -> None:
    with supervisor.lock_folder(tmp_path), pytest.raises(OutboxError, match="another agent"):
        run_agent(make_config(tmp_path))


@needs_models
@pytest.mark.usefixtures("no_thread_left")
def test_a_camera_that_is_not_there_is_retried_in_the_state_degraded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[AgentState] = []
    publish = supervisor.Publisher.publish_state
    monkeypatch.setattr(
        supervisor.Publisher,
        "publish_state",
        lambda self, state: (states.append(state), publish(self, state))[1],
    )
    wait = StopSignal.wait
    monkeypatch.setattr(StopSignal, "wait", lambda self, s: AgentState.DEGRADED in states or wait(self, s))
    camera = {"kind": "folder", "folder": {"path": tmp_path / "no-such-folder"}}
    assert run_agent(make_config(tmp_path / "outbox", camera=camera)) == 0
    assert [state for state in dict.fromkeys(states) if state is not AgentState.INIT][:2] == [
        AgentState.DEGRADED,
        AgentState.STOPPING,
    ]
    with open_outbox(tmp_path / "outbox", device="dev", verify=False) as outbox:
        events = [json.loads(row.payload) for row in outbox.pending(0, 10) if row.stream == "event"]
    assert [event["kind"] for event in events] == [
        *("agent-started", "sample-opened", "self-test"),
        *("camera-lost", "agent-stopping"),
    ]
    assert "no-such-folder" in events[3]["message"]
