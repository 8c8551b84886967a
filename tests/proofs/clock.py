"""The system clock is set back and forth by a year under a running agent: order kept, nothing lost, told.

    python -m tests.proofs.clock [--fields 5]

A real agent and a real mosquitto; the agent's process sees a clock of its own (libfaketime, `apt install faketime`),
which is set a year back, two years forward, two days back, and right again. The second and the third time the broker is
away; once the agent is killed and started again while the clock is a year ahead. Exits with 1 when a field is missing,
doubled, out of order or called historical without reason, or when a step of the clock was not told.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import yaml

from agent.delivery.outbox import open_outbox
from agent.errors import OutboxError
from tests.brokers import Broker, NotInstalled, make_mosquitto
from tests.slides import small_slide

ROOT = Path(__file__).resolve().parents[2]

DAY_S = 86_400
OFFSETS_S = (-365 * DAY_S, 365 * DAY_S, 363 * DAY_S, 0)
"""How far the clock is off after each step."""

FIELDS_COMMITTED = "SELECT last_seq FROM streams WHERE stream = 'field'"

HISTORICAL_AFTER_S = 60.0
"""From the contract."""

PATIENCE_S = 300.0
"""For anything that the agent does on a slow machine with other work."""

KEEPS_SESSIONS = "max_queued_messages 0\npersistence true\npersistence_location {folder}/\nautosave_interval 1\n"


@dataclass(frozen=True)
class Verdict:
    """What the subscriber heard, and all that was wrong with it."""

    fields: int
    boots: int
    steps_told: tuple[float, ...]
    faults: tuple[str, ...]

    def __str__(self) -> str:
        steps = ", ".join(f"{step / DAY_S:+.0f}" for step in self.steps_told)
        lines = [f"{self.fields} fields of {self.boots} boots; steps told, in days: {steps}", *self.faults]
        return "\n".join(lines)


def find_library() -> Path:
    for file in Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"):
        return file
    raise NotInstalled("libfaketime is not installed (apt install faketime)")


class Ears:
    """A subscriber with a session; keeps fields and events in the order of arrival."""

    def __init__(self, broker: Broker) -> None:
        self.messages: list[dict[str, Any]] = []
        self._is_subscribed = threading.Event()
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, "clock-ears", clean_session=False, protocol=mqtt.MQTTv311
        )
        self._client.reconnect_delay_set(0.1, 0.3)  # type: ignore[arg-type]  # not a whole second
        topics = [("hv/1/lab/scope/field/+", 1), ("hv/1/lab/scope/event", 1)]
        self._client.on_connect = lambda client, *_: client.subscribe(topics)
        self._client.on_subscribe = lambda *_: self._is_subscribed.set()
        self._client.on_message = self._on_message
        self._client.connect(broker.host, broker.port, keepalive=5)
        self._client.loop_start()
        assert self._is_subscribed.wait(10)

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [body for body in self.messages if body["schema"] == f"hv/1/{kind}"]

    def _on_message(self, _client: mqtt.Client, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        self.messages.append({**json.loads(message.payload), "arrived_monotonic_s": time.monotonic()})

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def run(folder: Path, fields: int, tell: Callable[[str], None] = print) -> Verdict:
    """The whole story; raises NotInstalled without libfaketime or mosquitto."""
    library = find_library()
    clock_file = folder / "clock"
    set_clock(clock_file, 0)
    with ExitStack() as cleanup:
        broker = make_mosquitto(folder / "broker", KEEPS_SESSIONS)
        cleanup.callback(broker.close)
        broker.start()
        ears = Ears(broker)
        cleanup.callback(ears.close)
        agent = start_agent(folder, broker.port, library, clock_file)
        cleanup.callback(lambda: agent.kill())
        wait_for_fields(folder, fields)
        for number, offset_s in enumerate(OFFSETS_S):
            is_away = number in (1, 2)
            if is_away and broker.is_running:
                wait_until(lambda: count(folder, "SELECT depth FROM tally") == 0, "an empty outbox")
                broker.stop()
            set_clock(clock_file, offset_s)
            tell(f"the clock is {offset_s / DAY_S:+.0f} days off, the broker is {'away' if is_away else 'there'}")
            wait_for_fields(folder, fields)
            if number == 1:
                # What is not committed when it is killed was never promised.
                wait_until(lambda: waits_in_outbox(folder, b"clock-step"), "the step is told")
                agent.kill()
                agent.wait()
                agent = start_agent(folder, broker.port, library, clock_file)
                tell("the agent was killed and started again")
                wait_for_fields(folder, fields)
            if not is_away and not broker.is_running:
                broker.start()
        wait_until(lambda: len(steps_told(ears)) == len(OFFSETS_S), "all steps are told", is_needed=False)
        agent.terminate()
        agent.wait(60)
        wait_until(lambda: ears.of_kind("event")[-1]["kind"] == "agent-stopping", "the last event")
        return judge(ears)


def wait_for_fields(folder: Path, more: int) -> None:
    """Until so many more fields are committed."""
    before = count(folder, FIELDS_COMMITTED)
    wait_until(lambda: count(folder, FIELDS_COMMITTED) >= before + more, f"{more} more fields are committed")


def count(folder: Path, query: str) -> int:
    """A number from the agent's outbox; 0 while it is not there yet."""
    try:
        with open_outbox(folder / "outbox", verify=False, create=False) as outbox, outbox.file.reading() as connection:
            return int((connection.execute(query).fetchone() or (0,))[0] or 0)
    except OutboxError:
        return 0


def waits_in_outbox(folder: Path, word: bytes) -> bool:
    with open_outbox(folder / "outbox", verify=False, create=False) as outbox:
        return any(word in row.payload for row in outbox.pending(0, 10_000))


def steps_told(ears: Ears) -> list[float]:
    told = {body["seq"]: body["detail"]["step_s"] for body in ears.of_kind("event") if body["kind"] == "clock-step"}
    return list(told.values())


def judge(ears: Ears) -> Verdict:
    """Every field once and in order, no doubt about its order, each step told."""
    fields, events = ears.of_kind("field"), ears.of_kind("event")
    faults = []
    for name, bodies in (("field", fields), ("event", events)):
        seqs = list(dict.fromkeys(body["seq"] for body in bodies))
        if seqs != list(range(1, len(seqs) + 1)):
            faults.append(f"{name}: not 1 to {len(seqs)} in order: {seqs}")
    by_boot: dict[str, list[dict[str, Any]]] = {}
    for body in {body["seq"]: body for body in fields}.values():
        by_boot.setdefault(body["id"].split(":")[1], []).append(body)
    for boot, bodies in by_boot.items():
        if any(b["captured_monotonic_ns"] <= a["captured_monotonic_ns"] for a, b in pairwise(bodies)):
            faults.append(f"boot {boot}: the monotonic time goes back")
    backwards = sum(time_of(b) < time_of(a) for a, b in pairwise(fields))
    if backwards < 2:
        faults.append(f"the wall clock went back {backwards} times in the fields; this run has shown nothing")
    # What waited for the broker over the restart is rightly historical, and what waited for more than a minute.
    last_boot = fields[-1]["id"].split(":")[1]
    if any(body["historical"] and age_s(body) < HISTORICAL_AFTER_S for body in by_boot[last_boot]):
        faults.append("a field is called historical although it was sent within a minute")
    steps = steps_told(ears)
    expected = [after - before for before, after in pairwise((0, *OFFSETS_S))]
    if len(steps) != len(expected) or any(abs(a - b) > 5 for a, b in zip(steps, expected, strict=True)):
        faults.append(f"steps of {expected} s were made and {steps} told")
    return Verdict(len({body["seq"] for body in fields}), len(by_boot), tuple(steps), tuple(faults))


def age_s(body: dict[str, Any]) -> float:
    """From capture to arrival; the monotonic clock is the computer's, the same for both ends and not touched."""
    return float(body["arrived_monotonic_s"]) - body["captured_monotonic_ns"] / 1e9


def time_of(body: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(body["captured_at"].replace("Z", "+00:00"))


def set_clock(file: Path, offset_s: int) -> None:
    """At once for the whole process: libfaketime reads the file with each question for the time."""
    fresh = file.with_suffix(".new")
    fresh.write_text(f"{offset_s:+d}s\n")
    fresh.replace(file)


def start_agent(folder: Path, port: int, library: Path, clock_file: Path) -> subprocess.Popen[bytes]:
    config = {
        "site": "lab",
        "device": "scope",
        "camera": small_slide(interval_s=0.3),
        "outbox": {"folder": str(folder / "outbox"), "min_free_mb": 0},
        "broker": {"port": port, "max_backoff_s": 0.5},
        "models": {"threads": 1},
        "publish": {"cells": False, "health_interval_s": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    faked = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock_file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with (folder / "agent.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "agent", "run", "--config", str(file)],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, **faked},
        )


def wait_until(is_so: Callable[[], bool], what: str, *, is_needed: bool = True) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > deadline_s:
            assert not is_needed, f"not within {PATIENCE_S:g} s: {what}"
            return
        time.sleep(0.05)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.clock", description=__doc__.split("\n")[0])
    parser.add_argument("--fields", type=int, default=5, help="between two steps (default: %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="clock-proof-") as folder:
        try:
            verdict = run(Path(folder), options.fields)
        except NotInstalled as error:
            print(error, file=sys.stderr)
            return 2
    print(verdict)
    print("FAULTS" if verdict.faults else "order kept, nothing lost, every step told")
    return 1 if verdict.faults else 0


if __name__ == "__main__":
    sys.exit(main())
