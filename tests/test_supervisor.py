"""The supervisor: real models, real outbox, real signals; a broker only where the test is about one."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent import supervisor
from agent.camera.camera import NOTHING_YET
from agent.config import CameraSection, Config, models_folder
from agent.delivery.messages import Draft
from agent.delivery.outbox import START_ROOM_BYTES, begin_boot, open_outbox, read_boot
from agent.domain import AgentState, Frame, SampleState
from agent.errors import ConfigError, ModelError, OutboxError
from agent.signals import StopSignal
from agent.supervisor import START_FILES, THREAD_DIED, make_room_to_start, open_unfinished, run_agent
from tests.brokers import free_port
from tests.disks import mounted, use_up_files
from tests.model_folders import put_models
from tests.slides import small_slide

TODAY = datetime(2026, 11, 23, 8, tzinfo=timezone.utc)

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


@pytest.fixture
def few_files(tmp_path: Path) -> Iterator[Path]:
    """A disk with much space and room for 60 files."""
    with mounted(tmp_path / "few-files", "size=64m,nr_inodes=60") as folder:
        yield folder


def test_on_a_disk_without_files_left_a_start_lets_so_many_pictures_go_as_it_needs_files(few_files: Path) -> None:
    state = few_files / "state"
    pictures = [state / "pictures" / f"{number}.png" for number in range(10)]
    pictures[0].parent.mkdir(parents=True)
    for age_s, path in enumerate(reversed(pictures)):
        path.touch()
        os.utime(path, (TODAY.timestamp() - age_s,) * 2)
    begin_boot(state)
    use_up_files(few_files / "others")
    with pytest.raises(OutboxError, match="the disk is full; free space there, or files or quota"):
        begin_boot(state)
    make_room_to_start(state)
    assert [path.exists() for path in pictures] == [False] * START_FILES + [True] * (10 - START_FILES)
    assert begin_boot(state) == 2
    with open_outbox(state, min_free_mb=0) as outbox:
        outbox.append([Draft("event", "check", {"schema": "check"})])
    assert sorted(path.name for path in state.glob(".*")) == []


def test_on_a_disk_without_files_left_the_cells_of_the_review_go_too_and_what_is_not_ours_stays(
    few_files: Path,
) -> None:
    state = few_files / "state"
    crop = state / "crops" / "s-1" / "s-1-7.jpg"
    crop.parent.mkdir(parents=True)
    crop.touch()
    use_up_files(few_files / "others")
    others = len(list((few_files / "others").iterdir()))
    make_room_to_start(state)
    assert not crop.exists()
    assert len(list((few_files / "others").iterdir())) == others


def test_a_quota_that_is_used_up_is_room_wanting_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "pictures" / "1.png"
    picture.parent.mkdir()
    picture.touch()

    def refuse(_handle: int, _offset: int, _size: int) -> None:
        if picture.exists():
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    make_room_to_start(tmp_path)
    assert not picture.exists()


def test_a_disk_that_is_read_only_costs_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture = tmp_path / "pictures" / "1.png"
    picture.parent.mkdir()
    picture.touch()

    def refuse(_handle: int, _offset: int, _size: int) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
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


# ------------------------------------------------------------------------------------------- pictures that were deleted


def test_pictures_that_were_deleted_between_two_runs_leave_the_outbox_at_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.camera.replay.directory_identity", lambda folder: f"test {folder.stat().st_ino}")
    watched = tmp_path / "watched"
    watched.mkdir()
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(watched / name), np.full((48, 64, 3), 120, np.uint8))
    section = CameraSection.model_validate(
        {"kind": "folder", "folder": {"path": watched, "watch": True, "settle_s": 0}}
    )
    begin_boot(tmp_path)
    open_here = partial(open_outbox, tmp_path, min_free_mb=0, verify=False)
    for _ in range(2):
        with closing(supervisor.open_unfinished(section, open_here)) as camera, open_here() as outbox:
            for _ in range(4):
                if isinstance(frame := camera.read(), Frame):
                    outbox.append((), finished_keys=[frame.origin_key or ""])
            left = outbox.finished_keys()
        (watched / "a.png").unlink(missing_ok=True)
    assert [key.partition("|")[0] for key in left] == ["b.png"]


# ---------------------------------------------------------------------- whose pictures a sample takes


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


# ---------------------------------------------------------------------------------------------- systemd


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
        ("pipeline", "agent.counting.count.process_frame"),
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
