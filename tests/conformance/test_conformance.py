"""The kit against the real agent over a real broker, against a faulty device, and against its own clauses."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest

from agent.config import Config, models_folder
from agent.delivery.audit import ChainHead, Entry, chain
from agent.delivery.topics import Topics
from tests.slides import small_slide

from .asking import said_first, standing_cell
from .clauses import Findings, read_clauses
from .ears import Access, Ears, Heard
from .listening import judge_all
from .receiving import judge_fleet, judge_receiver

ROOT = Path(__file__).resolve().parents[2]
BASE = "hv/1/lab/scope"

needs_models = pytest.mark.skipif(
    not (models_folder(Config().models) / "manifest.json").exists(), reason="the shipped models are not in models/"
)


def run_kit(port: int, *arguments: str, device: str = "lab/scope") -> tuple[int, str]:
    command = [sys.executable, "-m", "tests.conformance", "--broker", f"127.0.0.1:{port}", "--device", device]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


class AgentService:
    """The agent as a service: a command of the shell kills it and starts it again, as `--restart` wants it."""

    def __init__(self, folder: Path, port: int) -> None:
        config = {
            "site": "lab",
            "device": "scope",
            "camera": small_slide(interval_s=0.2, nucleated_cells_per_field=4),
            "outbox": {"folder": str(folder / "outbox"), "min_free_mb": 0},
            "broker": {"port": port, "max_backoff_s": 0.5},
            "delivery": {"confirm": "receiver", "receiver": "kit", "resend_s": 3},
            "publish": {"health_interval_s": 1, "images": True},
            "differential": {"update_s": 0},
            "models": {"threads": 1},
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        self.port = port
        self.log_file = folder / "agent.log"
        self._pid_file = folder / "agent.pid"
        self._start_file = folder / "start.sh"
        self._start_file.write_text(
            f"cd '{ROOT}'\n"
            f"'{sys.executable}' -m agent run --config '{folder}/config.yaml' >> '{self.log_file}' 2>&1 &\n"
            f"echo $! > '{self._pid_file}'\n"
        )

    @property
    def restart_command(self) -> str:
        return f"kill -9 $(cat '{self._pid_file}') && sh '{self._start_file}'"

    def start(self) -> None:
        subprocess.run(["sh", str(self._start_file)], check=True)

    def stop(self) -> None:
        pid = int(self._pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline_s = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline_s:
            if "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[-1][:3]:
                return  # it has ended, and is nobody's child that would be waited for
            time.sleep(0.05)


BROKERS = ["mosquitto", *(pytest.param(name, marks=pytest.mark.brokers) for name in ("nats", "rabbitmq"))]


@pytest.fixture(params=BROKERS)
def agent(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AgentService]:
    """A running agent on a lively simulated slide, at each of the brokers."""
    broker = request.getfixturevalue(request.param)()
    service = AgentService(tmp_path, broker.port)
    service.start()
    try:
        yield service
    finally:
        service.stop()
    assert "Traceback" not in service.log_file.read_text(errors="replace")


@needs_models
@pytest.mark.timeout(400)
def test_the_agent_keeps_the_contract_at_every_broker(agent: AgentService, request: pytest.FixtureRequest) -> None:
    asked = ("--samples", "--disturb", "--restart", agent.restart_command, "--acknowledge-as", "kit")
    code, text = run_kit(agent.port, *asked, "--seconds", "30")
    assert code == 0, text
    passed = {line.split()[1] for line in text.splitlines() if line.startswith("pass ")}
    left = {
        number for number, clause in read_clauses().items() if clause.is_for_the_kit and not clause.is_for_receivers
    }
    may_be_left = {"7.4"}  # a clock without reference
    if "mosquitto" not in request.node.name:
        may_be_left |= {"1.5", "7.9"}  # MQTT 3.1.1 has neither content types nor response topics
    if "rabbitmq" in request.node.name:
        may_be_left |= {"7.3"}  # what is retained does not come to `cmd/+`
    assert left - passed <= may_be_left, text


@pytest.mark.parametrize("name", BROKERS)
def test_the_collector_keeps_the_clauses_for_receivers_at_every_broker(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("sqlalchemy")
    broker = request.getfixturevalue(name)()
    command = ["collect", "--database", f"sqlite:///{tmp_path / 'central.db'}", "--broker", f"127.0.0.1:{broker.port}"]
    log_file = tmp_path / "collector.log"
    with log_file.open("wb") as log:
        collector = subprocess.Popen([sys.executable, "-m", "agent", *command], cwd=ROOT, stdout=log, stderr=log)
    try:
        deadline_s = time.monotonic() + 60
        while "collector: collecting\n" not in log_file.read_text() and time.monotonic() < deadline_s:
            time.sleep(0.1)
        code, text = run_kit(broker.port, "--receiver", "central", device="lab/kit")
    finally:
        collector.terminate()
        collector.wait(30)
    assert (code, "3 pass, 0 FAIL" in text) == (0, True), text


def test_what_a_receiver_says_meanwhile_is_not_taken_for_the_devices_first_word() -> None:
    kinds = ("field", "state", "ack", "info", "cmd", "health", "fleet", "event")
    heard = [Heard("", kind, b"", 1, False, None, None, float(at_s), None) for at_s, kind in enumerate(kinds)]
    assert said_first(heard, since_s=1.0) == ["state", "info", "health"]


def test_a_cell_is_amended_that_still_stands_wherever_in_its_field_it_is() -> None:
    named = {"probabilities": {"lymphocyte": 1.0}, "status": "accepted", "class": "lymphocyte"}
    cells = [{**named, "cell_id": f"s1-{number}"} for number in range(1, 5)]
    cells[1]["counted"] = False
    cells[2]["status"] = "unidentified"
    better = [{**named, "cell_id": "s1-5", "supersedes": ["s1-1"], "counted": False}]
    heard = [make_one("field/s1", {"sample": "s1", "cells": found}) for found in (cells, better)]
    standing = standing_cell(heard, "s1")
    assert standing is not None
    assert standing["cell_id"] == "s1-4"
    assert standing_cell(heard, "s2") is None


def test_a_receiver_that_acknowledges_nothing_fails(mosquitto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conformance.receiving.RECEIVER_S", 0.5)
    broker = mosquitto()
    findings = Findings()
    ears = Ears(Access("127.0.0.1", broker.port), ("hv/1/lab/kit/#",), "hv/1/lab/kit")
    try:
        judge_receiver(ears, "hv/1/lab/kit", "nobody", findings)
    finally:
        ears.close()
    assert [findings.result(number) for number in ("9.1", "9.2", "9.3")] == ["FAIL", "not tested", "not tested"]


def test_a_user_without_rights_is_told_so(mosquitto: Any, tmp_path: Path) -> None:
    (tmp_path / "acl").write_text("topic read hv/#\n")
    code, text = run_kit(mosquitto(f"acl_file {tmp_path / 'acl'}").port, "--receiver", "central", device="lab/kit")
    assert (code, "has this user the right to write there?" in text) == (2, True), text


def fleet_heard(**changes: Any) -> Heard:
    figure = {"name": "ground-red", "unit": "ratio", "here": 2.0, "others": 1.1, "low": 0.9, "high": 1.3, "devices": 4}
    body = {
        "schema": "hv/1/fleet",
        "receiver": "central",
        "site": "lab",
        "device": "kit",
        "severity": "warning",
        "at": "2026-11-27T08:00:00.000Z",
        "since": "2026-11-27T08:00:00.000Z",
        "message": "words",
        "ruo": True,
        "figures": [figure],
        **changes,
    }
    payload = json.dumps(body).encode()
    return Heard("hv/1/lab/kit/fleet/central", "fleet", payload, 1, True, None, None, 0.0, body)


@pytest.mark.parametrize(
    ("changes", "result"),
    [({}, "pass"), ({"figures": []}, "FAIL"), ({"device": "other"}, "FAIL"), ({"receiver": "other"}, "FAIL")],
)
def test_a_receivers_word_about_the_fleet_is_held_to_its_clause(changes: dict[str, Any], result: str) -> None:
    findings = Findings()
    judge_fleet([fleet_heard(**changes)], "hv/1/lab/kit", "central", findings)
    assert findings.result("9.5") == result


def test_a_device_that_is_not_there_is_told(mosquitto: Any) -> None:
    code, text = run_kit(mosquitto().port, "--seconds", "1", device="lab/nobody")
    assert code == 2
    assert "nothing is heard of hv/1/lab/nobody" in text
    code, text = run_kit(1, device="lab/nobody")
    assert code == 2
    assert "127.0.0.1:1" in text


class FaultyDevice:
    """Says what a device says, wrongly, and answers no command."""

    def __init__(self, port: int) -> None:
        self._client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for heard in make_heard():
            self._client.publish(heard.topic, heard.payload, qos=1, retain=heard.kind in ("state", "event"))
        seq = 10
        while not self._is_over.wait(0.2):
            seq += 2  # each second number is missing
            event = next(heard for heard in make_heard() if heard.kind == "event")
            body = {**(event.body or {}), "seq": seq, "id": f"scope:3:{seq}", "at": "yesterday"}
            del body["ruo"]
            self._client.publish(event.topic, json.dumps(body), qos=0)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()


def test_the_kit_finds_the_faults_of_a_faulty_device(mosquitto: Any) -> None:
    broker = mosquitto()
    device = FaultyDevice(broker.port)
    try:
        code, text = run_kit(broker.port, "--seconds", "2")
    finally:
        device.close()
    assert code == 1
    failed = {line.split()[1] for line in text.splitlines() if line.startswith("FAIL ")}
    assert {"1.2", "1.3", "1.4", "1.5", "1.6", "2.1", "3.1", "5.1", "7.1"} <= failed, text
    assert "the device answers no command" in text


# ------------------------------------------------------------------------------- each clause that listening can judge


def make_heard() -> list[Heard]:
    """A short, sound life of a device."""
    model = {"name": "m", "version": "1", "sha256": "a" * 64}
    who = {"device": "scope", "site": "lab", "boot": 3}
    at = "2026-11-25T08:00:00.000Z"
    cell = {
        "cell_id": "s1-1",
        "box": [1.0, 2.0, 30.0, 40.0],
        "detector": {"class": "x", "score": 0.9},
        "class": "x",
        "probability": 0.9,
        "probabilities": {"x": 0.9, "y": 0.1},
        "margin": 0.8,
        "status": "accepted",
    }
    provenance = {
        "agent": "0.1.0",
        "detector": model,
        "classifier": model,
        "runtime": "r",
        "delegate": "none",
        "config_sha256": "b" * 64,
    }
    field = {
        "schema": "hv/1/field",
        "id": "scope:3:1",
        "seq": 1,
        "device": "scope",
        "site": "lab",
        "sample": "s1",
        "captured_at": at,
        "captured_monotonic_ns": 1,
        "clock": {"synchronised": True, "offset_ms": None},
        "frame": {"n": 1, "sha256_16": "0" * 16, "width_px": 64, "height_px": 48, "focus": 1.0, "clipped_pct": 0.0},
        "quality": {"accepted": True, "reasons": []},
        "timing_ms": {"total": 1.0},
        "counts": {"x": 1},
        "unique_counts": {},
        "duplicates": 0,
        "cells": [cell],
        "provenance": provenance,
        "historical": False,
        "ruo": True,
    }
    second = {
        **copy.deepcopy(field),
        "id": "scope:3:2",
        "seq": 2,
        "captured_monotonic_ns": 2,
        "cells": [{**cell, "cell_id": "s1-2"}],
    }
    single = {
        "schema": "hv/1/cell",
        "id": "scope:3:1",
        "seq": 1,
        "device": "scope",
        "site": "lab",
        "sample": "s1",
        "field_id": "scope:3:1",
        "captured_at": at,
        "frame": {"n": 1},
        **cell,
        "historical": False,
        "ruo": True,
    }
    info = {
        "schema": "hv/1/info",
        "schema_version": 1,
        **who,
        "started_at": at,
        "agent": "0.1.0",
        "models": [{"role": "detector", **model, "classes": ["x"]}, {"role": "classifier", **model, "classes": ["y"]}],
        "config_sha256": "b" * 64,
        "runtime": "r",
        "delegate": "none",
        "python": "3.11",
        "platform": "p",
        "capabilities": ["field"],
        "ruo": True,
    }
    state = {"schema": "hv/1/state", "state": "ready", **who, "at": at, "ruo": True}
    event = {
        "schema": "hv/1/event",
        "id": "scope:3:1",
        "seq": 1,
        **who,
        "at": at,
        "kind": "x",
        "severity": "info",
        "message": "x",
        "detail": {},
        "historical": False,
        "ruo": True,
    }
    alert = {
        "schema": "hv/1/alert",
        **who,
        "alert": "disk-low",
        "severity": "warning",
        "message": "x",
        "since": at,
        "ruo": True,
    }
    share = {"class": "x", "count": 2, "pct": 100.0, "low_pct": 15.81, "high_pct": 100.0}
    report = {
        "schema": "hv/1/differential",
        "id": "scope:3:1",
        "seq": 1,
        **who,
        "at": at,
        "sample": "s1",
        "accession": None,
        "age_band": None,
        "status": "final",
        "report": "s1-r1",
        "supersedes": None,
        "amendments": 0,
        "fields": 2,
        "basis": "all",
        "counts": {"x": 2},
        "leukocytes": 2,
        "nucleated": 2,
        "interval": {"method": "clopper-pearson", "level_pct": 95},
        "shares": [{**share, "corrected": None, "flag": None, "reference": None}],
        "per_100_leukocytes": [],
        "per_field": [],
        "red_cells_per_leukocyte": None,
        "per_ul": [],
        "unidentified": 0,
        "not_classed": 0,
        "still_needed": None,
        "provenance": provenance,
        "historical": False,
        "ruo": True,
    }
    drafts, _ = chain(
        [Entry("cmd.start", "done", "a"), Entry("cmd.stop", "done", "b")],
        ChainHead(),
        Topics("lab", "scope"),
        boot=3,
        at=datetime(2026, 11, 25, tzinfo=timezone.utc),
    )
    audits = [
        {**draft.body, "id": f"scope:3:{n}", "seq": n, "historical": False} for n, draft in enumerate(drafts, start=1)
    ]
    heard = [
        *(("state", state), ("info", info), ("field/s1", field), ("field/s1", second), ("cell/s1", single)),
        *(("event", event), ("alert/disk-low", alert), ("differential/s1", report)),
        *(("audit", audit) for audit in audits),
    ]
    return [make_one(topic, body) for topic, body in heard]


def make_one(topic: str, body: Any, **changes: Any) -> Heard:
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()
    named: dict[str, Any] = {
        "topic": f"{BASE}/{topic}",
        "kind": topic.split("/")[0],
        "payload": payload,
        "qos": 1,
        "is_retained": False,
        "content_type": "application/json",
        "correlation": None,
        "at_s": time.monotonic(),
        "body": body if isinstance(body, dict) else None,
    }
    return Heard(**{**named, **changes})


def failed_clauses(heard: list[Heard]) -> set[str]:
    findings = Findings()
    judge_all(heard, findings, BASE, is_v5=True)
    return set(findings.faults)


def test_a_sound_life_fails_no_clause() -> None:
    findings = Findings()
    judge_all(make_heard(), findings, BASE, is_v5=True)
    assert findings.faults == {}


def change(kind: str, **keys: Any) -> Callable[[list[Heard]], list[Heard]]:
    """The first message of a kind with other keys."""

    def changed(heard: list[Heard]) -> list[Heard]:
        number = next(n for n, one in enumerate(heard) if one.kind == kind)
        body = {key: value for key, value in {**(heard[number].body or {}), **keys}.items() if value != "gone"}
        again = make_one(heard[number].topic.removeprefix(f"{BASE}/"), body)
        return [*heard[:number], again, *heard[number + 1 :]]

    return changed


def change_cell(**keys: Any) -> Callable[[list[Heard]], list[Heard]]:
    cell = {**(make_heard()[2].body or {})["cells"][0], **keys}
    return change("field", cells=[cell])


def add(topic: str, body: Any, **options: Any) -> Callable[[list[Heard]], list[Heard]]:
    return lambda heard: [*heard, make_one(topic, body, **options)]


FIELD: dict[str, Any] = make_heard()[2].body or {}
REPORT: dict[str, Any] = make_heard()[7].body or {}


@pytest.mark.parametrize(
    ("clause", "spoil"),
    [
        ("1.1", add("field/S.1", FIELD)),
        ("1.2", change("event", severity="dreadful")),
        ("1.2", add("state", b"\xff")),
        ("1.3", change("state", ruo=False)),
        ("1.4", add("state", make_heard()[0].body, qos=0)),
        ("1.5", add("state", make_heard()[0].body, content_type=None)),
        ("1.5", add("image/s1/s1-1", b"\xff\xd8", content_type="application/json")),
        ("1.6", add("field/s1", FIELD, is_retained=True)),
        ("2.4", change("info", models=[{"sha256": "9" * 64, "classes": ["x"]}])),
        ("2.5", add("health", {"schema": "hv/1/health"})),
        ("2.6", add("alert/x", b"x")),
        ("3.1", change("event", seq=1, id="scope:3:1")),
        ("3.2", change("event", id="scope:3:77")),
        ("3.2", add("field/s1", {**FIELD, "duplicates": 5})),
        ("3.3", add("field/s1", {**FIELD, "id": "scope:3:0", "seq": 0})),
        ("3.4", change("state", boot=4)),
        ("3.5", change_cell(cell_id="s1-2")),
        ("3.5", change_cell(cell_id="other-1")),
        ("4.1", change("field", counts={"x": 2})),
        ("4.6", change("field", unique_counts={"x": 7})),
        ("4.2", change_cell(box=[1.0, 2.0, 300.0, 40.0])),
        ("4.3", change_cell(probabilities={"x": 0.9, "y": 0.2})),
        ("4.3", change_cell(margin=0.5)),
        ("4.4", change("cell", probability=0.3)),
        ("4.5", change_cell(**{"class": "unicorn"})),
        ("5.1", change("event", at="2026-11-25 08:00")),
        ("5.2", change("field", captured_monotonic_ns=9)),
        ("5.3", change("field", clock={"synchronised": None})),
        ("5.4", change("event", historical="no")),
        ("6.3", add("differential/s1", {**REPORT, "id": "scope:3:2", "seq": 2, "report": "s1-r2"})),
        ("6.4", change("differential", leukocytes=3)),
        ("8.2", change("audit", message="something else")),
    ],
)
def test_each_clause_that_is_broken_is_found(
    clause: str, spoil: Callable[[list[Heard]], list[Heard]], request: pytest.FixtureRequest
) -> None:
    heard = make_heard()
    if clause == "3.1":
        heard = [*heard, make_one("event", {**(heard[5].body or {}), "id": "scope:3:3", "seq": 3})]
    assert clause in failed_clauses(spoil(heard)), request.node.name


def test_every_clause_of_the_contract_is_looked_at_or_says_why_not() -> None:
    clauses = read_clauses()
    source = "".join(
        path.read_text() for path in Path(__file__).parent.glob("*.py") if path.name != Path(__file__).name
    )
    for number, clause in clauses.items():
        assert (f'"{number}"' in source) == clause.is_for_the_kit, f"{number}: {clause.text}"
    assert len(clauses) > 45
    assert all(clause.text.endswith((".", ")")) for clause in clauses.values())
