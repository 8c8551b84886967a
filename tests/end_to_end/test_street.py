"""Folder camera -> models -> outbox -> mosquitto -> a subscriber that checks every message and counts."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agent_process import ROOT, START_S, Bench, wait_until
from ledger import Ledger

from tests.disks import mounted, use_up_space

REAL_FIELDS = ROOT.parent / "shared" / "data" / "fields" / "images"

KEEPS_SESSIONS = "max_queued_messages 0\npersistence true\npersistence_location {folder}/\nautosave_interval 1\n"
"""The subscriber's session lives on over a restart of the broker, so that it misses nothing while it reconnects. Left
to itself, mosquitto throws away what goes beyond 1000 messages."""


def wait_for_saved_session(broker: Any) -> None:
    """The broker has written its sessions to disk."""
    wait_until((broker.folder / "mosquitto.db").exists, "mosquitto's own database")


def has_all_of(pictures: int) -> Callable[[list[Any]], bool]:
    """Whether the fields of so many pictures have arrived with all their cells, and the three events of a start."""

    def has_all(messages: list[Any]) -> bool:
        ids = {kind: {m.body["id"] for m in messages if m.kind == kind} for kind in ("field", "cell", "event")}
        cells = {c["cell_id"] for m in messages if m.kind == "field" for c in m.body["cells"]}
        return len(ids["field"]) == pictures and len(ids["cell"]) == len(cells) and len(ids["event"]) == 3

    return has_all


def is_over(messages: list[Any]) -> bool:
    return any(message.kind == "state" and message.body["state"] == "disconnected" for message in messages)


def test_every_field_of_a_folder_arrives_and_every_message_matches_its_schema(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any
) -> None:
    folder = make_fields(5)
    shutil.copy(folder / "field-2.png", folder / "field-2b.png")  # comes right after, byte for byte the same
    (folder / "field-3b.png").write_bytes((folder / "field-3.png").read_bytes()[:2000])
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(folder)
    agent = bench.start()
    assert agent.wait() == 0, agent.log_text
    ledger = Ledger(ears.wait_for(is_over, START_S))

    ledger.check_all(pictures=5)
    assert [field["frame"]["n"] for field in ledger.fields.values()] == sorted(
        field["frame"]["n"] for field in ledger.fields.values()
    )
    told = [event["kind"] for event in ledger.events.values()]
    assert told == [
        "agent-started",
        "sample-opened",
        "self-test",
        "frame-unreadable",
        "sample-finished",
        "source-ended",
    ]
    assert "field-3b.png" in list(ledger.events.values())[3]["message"]
    assert ledger.states[0] in ("init", "ready")
    assert ledger.states[-3:] == ["ready", "stopping", "disconnected"]
    assert ledger.infos[0]["models"][0]["role"] == "detector"
    assert ledger.repeats == 0
    assert bench.waiting() == {}
    assert "Traceback" not in agent.log_text


def test_a_repeated_frame_is_counted_as_frozen_and_gives_no_cells(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any
) -> None:
    folder = make_fields(2)
    for number in range(3):
        shutil.copy(folder / "field-1.png", folder / f"field-1-{number}.png")
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(folder, watch=True, settle_s=0)
    agent = bench.start()
    ears.wait_for(
        lambda heard: any(
            m.kind == "health" and m.body["fields"] + sum(m.body["dropped"].values()) == 5 for m in heard
        ),
        START_S,
    )
    assert agent.terminate() == 0
    ledger = Ledger(ears.wait_for(is_over, START_S))
    assert ledger.healths[-1]["dropped"] == {"frozen": 3}
    ledger.check_all(pictures=2)


def test_a_watched_folder_sleeps_wakes_and_is_ended_by_sigterm(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any, tmp_path: Path
) -> None:
    fields = make_fields(2)
    watched = tmp_path / "watched"
    watched.mkdir()
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(watched, watch=True, settle_s=0)
    agent = bench.start()
    ears.wait_for(lambda heard: "sleeping" in [m.body["state"] for m in heard if m.kind == "state"], START_S)
    shutil.copy(fields / "field-1.png", watched)
    ears.wait_for(lambda heard: any(m.kind == "field" for m in heard), START_S)
    shutil.copy(fields / "field-2.png", watched)
    ears.wait_for(lambda heard: sum(m.kind == "field" for m in heard) == 2, START_S)
    assert agent.terminate() == 0
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=2)
    assert ledger.states[-2:] == ["stopping", "disconnected"]
    assert "asked to by a signal" in agent.log_text


def test_a_camera_that_is_lost_is_told_and_taken_up_again(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any, tmp_path: Path
) -> None:
    fields = make_fields(2)
    watched = tmp_path / "share"
    watched.mkdir()
    shutil.copy(fields / "field-1.png", watched)
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(watched, watch=True, settle_s=0)
    agent = bench.start()
    ears.wait_for(lambda heard: any(m.kind == "field" for m in heard), START_S)
    watched.rename(tmp_path / "unplugged")
    ears.wait_for(lambda heard: any(m.kind == "event" and m.body["kind"] == "camera-lost" for m in heard), START_S)
    (tmp_path / "unplugged").rename(watched)
    ears.wait_for(lambda heard: any(m.kind == "event" and m.body["kind"] == "camera-regained" for m in heard), START_S)
    shutil.copy(fields / "field-2.png", watched)
    ears.wait_for(lambda heard: sum(m.kind == "field" for m in heard) >= 2, START_S)
    assert agent.terminate() == 0
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=2)  # the first one, still there, is not taken twice
    assert "degraded" in ledger.states


def test_with_the_broker_down_at_the_start_everything_is_counted_and_arrives_later(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto(KEEPS_SESSIONS)
    ears = subscriber(broker, "hv/1/#")
    broker.stop()
    bench.use_broker(broker.port)
    folder = make_fields(6)
    bench.use_folder(folder, watch=True, settle_s=0)
    agent = bench.start()
    wait_until(lambda: bench.waiting()["field"] == 6, "six fields in the outbox, without a broker")
    broker.restart()
    ears.wait_for(lambda heard: len({m.body["id"] for m in heard if m.kind == "field"}) == 6, START_S)
    wait_until(lambda: bench.waiting() == {}, "an empty outbox")
    assert agent.terminate() == 0
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=6)
    assert "broker lost" in agent.log_text
    assert "broker connected" in agent.log_text


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_when_the_broker_goes_in_the_middle_and_comes_back_nothing_is_missing(
    how: str, bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any, tmp_path: Path
) -> None:
    fields = sorted(make_fields(14).iterdir())
    watched = tmp_path / "watched"
    watched.mkdir()
    broker = mosquitto(KEEPS_SESSIONS)
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(watched, watch=True, settle_s=0)
    agent = bench.start()
    for path in fields[:7]:
        shutil.copy(path, watched)
    ears.wait_for(lambda heard: sum(m.kind == "field" for m in heard) >= 4, START_S)
    wait_for_saved_session(broker)
    if how == "kill":
        # What a broker has acknowledged and not yet handed on dies with it; no sender can know. So nothing may be
        # between the two when it is killed: here it is the agent that is tested.
        wait_until(lambda: bench.finished() == 7 and bench.waiting() == {}, "the first half has left")
        ears.wait_for(has_all_of(7), START_S)
    getattr(broker, how)()
    for path in fields[7:]:
        shutil.copy(path, watched)
    wait_until(lambda: bench.finished() == 14, "counting goes on without a broker")
    assert bench.waiting()["field"] >= 7
    broker.restart()
    wait_until(lambda: bench.waiting() == {}, "an empty outbox")
    assert agent.terminate() == 0, agent.log_text
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=14)


def test_after_sigkill_in_the_middle_of_a_folder_no_field_is_lost_and_none_doubled(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(make_fields(40))
    for kills in range(1, 4):
        agent = bench.start()
        wait_until(lambda: bench.finished() >= 3 * kills, "some fields are done")  # noqa: B023
        assert agent.is_running, "the folder is too short for this machine"
        agent.kill()
    agent = bench.start()
    assert agent.wait() == 0, agent.log_text
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=40)
    assert len({field["sample"] for field in ledger.fields.values()}) == 1, "it is still the same sample"
    assert len({field["id"].split(":")[1] for field in ledger.fields.values()}) > 1, "ids carry the boot"
    assert "lost" in ledger.states, "the broker has told each kill from the Will"


def test_a_folder_that_was_read_to_its_end_is_a_new_sample_in_the_next_run(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any
) -> None:
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(make_fields(2))
    for _ in range(2):
        assert bench.start().wait() == 0
    ledger = Ledger(ears.wait_for(lambda heard: sum(m.kind == "state" and is_over([m]) for m in heard) == 2, START_S))
    assert len(ledger.fields) == 4
    assert len({field["sample"] for field in ledger.fields.values()}) == 2
    ledger.check_numbers()
    ledger.check_cells()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB in memory."""
    with mounted(tmp_path / "small-disk", "size=8m") as folder:
        yield folder


def test_a_full_disk_degrades_the_agent_and_nothing_is_lost(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any, small_disk: Path, tmp_path: Path
) -> None:
    fields = make_fields(10)
    watched = tmp_path / "watched"
    watched.mkdir()
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(watched, watch=True, settle_s=0)
    bench.outbox_folder = small_disk / "outbox"
    bench.config["outbox"] = {"folder": str(bench.outbox_folder), "min_free_mb": 0}
    agent = bench.start()
    shutil.copy(fields / "field-1.png", watched)
    ears.wait_for(lambda heard: any(m.kind == "field" for m in heard), START_S)

    filler = use_up_space(small_disk)
    for number in range(2, 11):
        shutil.copy(fields / f"field-{number}.png", watched)
    ears.wait_for(lambda heard: "degraded" in [m.body["state"] for m in heard if m.kind == "state"], START_S)
    assert agent.is_running
    filler.unlink()

    ears.wait_for(lambda heard: len({m.body["id"] for m in heard if m.kind == "field"}) == 10, START_S)
    ears.wait_for(lambda heard: any(m.kind == "event" and m.body["kind"] == "outbox-recovered" for m in heard), START_S)
    assert agent.terminate() == 0
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=10)
    assert "Traceback" not in agent.log_text
    assert any(health["outbox"]["state"] == "stopped" for health in ledger.healths)


def test_a_broker_that_refuses_the_password_degrades_the_agent_and_nothing_is_lost(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, mosquitto_password_file: Any
) -> None:
    passwords = mosquitto_password_file("scope", "right")
    broker = mosquitto(f"allow_anonymous false\npassword_file {passwords}\n")
    bench.use_broker(broker.port, username="scope")
    bench.use_folder(make_fields(2), watch=True, settle_s=0)
    agent = bench.start(HEMATOVISION_BROKER_PASSWORD="wrong-word")
    wait_until(lambda: "degraded: " in agent.log_text, "the state degraded")
    wait_until(lambda: bench.waiting()["field"] == 2, "two fields in the outbox")
    assert agent.terminate() == 0
    assert "broker refused" in agent.log_text
    assert "wrong-word" not in agent.log_text
    assert "Traceback" not in agent.log_text


def test_systemd_hears_ready_from_the_process_itself(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, tmp_path: Path
) -> None:
    broker = mosquitto()
    bench.use_broker(broker.port)
    bench.use_folder(make_fields(1), watch=True, settle_s=0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(START_S)
        agent = bench.start(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="3000000")
        assert manager.recv(4096).startswith(b"READY=1\n")
        while manager.recv(4096) != b"WATCHDOG=1":
            pass
        assert agent.terminate() == 0
        while not manager.recv(4096).startswith(b"STOPPING=1"):
            pass


def test_real_fields_of_three_microscopes_give_cells(
    bench: Bench, mosquitto: Any, subscriber: Any, tmp_path: Path
) -> None:
    if not REAL_FIELDS.is_dir():
        pytest.skip(f"no real fields at {REAL_FIELDS}")
    folder = tmp_path / "real"
    folder.mkdir()
    paths = sorted(REAL_FIELDS.iterdir())
    bccd = [path for path in paths if path.name.startswith("BloodImage")]
    raabin = [path for path in paths if path.name.startswith("raabin")]
    pbc = [path for path in paths if path not in bccd + raabin]
    pictures = [*bccd[:3], *raabin[:3], *pbc[:3]]
    for path in pictures:
        shutil.copy(path, folder)
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(folder)
    agent = bench.start()
    assert agent.wait() == 0, agent.log_text
    ledger = Ledger(ears.wait_for(is_over, START_S))
    ledger.check_all(pictures=len(pictures))
    assert all(field["cells"] for field in ledger.fields.values()), json.dumps(
        [[field["frame"]["n"], field["counts"]] for field in ledger.fields.values()]
    )
