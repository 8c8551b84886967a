"""Kills the collector at random moments and compares what it had acknowledged with what it has on disk.

    python -m tests.proofs.collector_kill --kills 100 [--database postgresql] [--seed 1]

A device without a camera (real messages, an outbox in memory) sends fields, cells and events through a real mosquitto
and forgets a message only when the collector has acknowledged it. The collector is killed with SIGKILL again and again.
After each kill everything that was acknowledged must be in the database; at the end everything that was sent, once.
Ends with 1 when a bound is broken. The broker lives through all of it: see `fault_schedule` for the whole chain.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import func, select

from agent.central import tables
from agent.central.database import open_database
from agent.config import BrokerSection
from agent.delivery.link import open_link
from tests.brokers import make_mosquitto
from tests.central.collecting import CollectorProcess, wait_until
from tests.central.fake_device import FakeDevice, Sent
from tests.central.postgresql import PostgreSql, find_programs

RESEND_AFTER_S, MOST_RESEND_AFTER_S = 4.0, 64.0
"""An acknowledgement that was lost with the killed collector is asked for by sending again; each time later, as the
agent does it. Else a collector that starts slowly finds more repeats than it can store before they are repeated."""

Key = tuple[str, int, int]
"""Stream, boot, seq."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """missing: acknowledged and not in the database; never: sent and never stored; twice: rows too many."""

    kills: int
    sent: int
    acknowledged: int
    sent_again: int
    missing: int
    never: int
    twice: int
    seconds: float

    @property
    def is_kept(self) -> bool:
        return not (self.missing or self.never or self.twice)

    def __str__(self) -> str:
        verdict = "kept" if self.is_kept else "BROKEN"
        return (
            f"{verdict}: {self.kills} kills in {self.seconds:.0f} s, {self.sent} messages, "
            f"{self.sent_again} sent again, {self.acknowledged} acknowledged; "
            f"acknowledged and missing: {self.missing}, never stored: {self.never}, stored twice: {self.twice}"
        )


class StubbornDevice(threading.Thread):
    """Sends at a steady rate, keeps what is not acknowledged, restarts now and then and loses its outbox once."""

    def __init__(self, port: int, per_s: float, seed: int) -> None:
        super().__init__(name="device", daemon=True)
        self.sent: dict[Key, bytes] = {}
        self.acknowledged: set[Key] = set()
        self.sent_again = 0
        self.failure: BaseException | None = None
        self._port = port
        self._per_s = per_s
        self._chance = random.Random(seed)
        self._device = FakeDevice()
        self._waiting: dict[Key, tuple[Sent, float, float]] = {}  # sent again then; the pause before that
        self._lock = threading.Lock()
        self._is_producing = True
        self._is_stopping = False

    def finish(self) -> None:
        """Nothing new; what waits is sent until it is acknowledged."""
        self._is_producing = False

    def stop(self) -> None:
        self._is_stopping = True
        self.join(10)

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    def await_acknowledgement(self) -> None:
        """Until one more message is acknowledged than now."""
        before = len(self.so_far())
        wait_until(
            lambda: len(self.so_far()) > before or self.failure is not None,
            f"something is acknowledged ({self.waiting} messages wait, {self.sent_again} were sent again)",
            timeout_s=120,
        )
        if self.failure is not None:
            raise self.failure

    def so_far(self) -> set[Key]:
        """What has been acknowledged up to now."""
        with self._lock:
            return set(self.acknowledged)

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.failure = error

    def _run(self) -> None:
        link = open_link(BrokerSection(port=self._port), client_id="hv-lab-scope", protocol="5", will=None)
        link.subscribe([f"{self._device.topics.base}/ack/+"])
        next_s = time.monotonic()
        while not self._is_stopping:
            assert not link.is_closed, link.closed_reason
            link.turn(0.005)
            for received in link.take_received():
                self._take_ack(json.loads(received.payload))
            now_s = time.monotonic()
            while self._is_producing and now_s >= next_s and len(self._waiting) < 1000:
                next_s = max(next_s + 1 / self._per_s, now_s - 1)
                for one in self._make():
                    link.publish(one.topic, one.payload)
                    self._put(one, now_s)
            self._send_again(link, now_s)
        link.disconnect()

    def _make(self) -> list[Sent]:
        what = self._chance.random()
        if what < 0.01:
            self._device.restart()
            return [self._device.event()]
        if what < 0.012:
            self._forget()
            self._device.lose_outbox()
            return [self._device.event("outbox-set-aside")]
        return self._device.field_with_cells(self._chance.randint(0, 4))

    def _forget(self) -> None:
        """The outbox is lost: what had not been acknowledged is nobody's any more."""
        with self._lock:
            for key in self._waiting:
                del self.sent[key]
            self._waiting.clear()

    def _put(self, one: Sent, now_s: float) -> None:
        with self._lock:
            self.sent[one.stream, one.boot, one.seq] = one.payload
            self._waiting[one.stream, one.boot, one.seq] = one, now_s + RESEND_AFTER_S, RESEND_AFTER_S

    def _take_ack(self, ack: dict[str, int | str]) -> None:
        with self._lock:
            confirmed = [
                key
                for key in self._waiting
                if key[0] == ack["stream"] and key[1] <= int(ack["boot"]) and key[2] <= int(ack["seq"])
            ]
            for key in confirmed:
                del self._waiting[key]
                self.acknowledged.add(key)

    def _send_again(self, link: object, now_s: float) -> None:
        with self._lock:
            for key, (one, due_s, pause_s) in list(self._waiting.items()):
                if now_s >= due_s:
                    link.publish(one.topic, one.payload)  # type: ignore[attr-defined]
                    longer_s = min(2 * pause_s, MOST_RESEND_AFTER_S)
                    self._waiting[key] = one, now_s + longer_s, longer_s
                    self.sent_again += 1


def stored(url: str) -> tuple[set[Key], int]:
    """What is in the database, and how many rows are there more than once."""
    engine = open_database(url)
    try:
        with engine.connect() as connection:
            found = {
                (row.stream, row.boot, seq)
                for row in connection.execute(select(tables.received))
                for seq in range(row.first_seq, row.last_seq + 1)
            }
            numbers = select(tables.received.c.last_seq - tables.received.c.first_seq + 1)
            total = sum(connection.execute(numbers).scalars())
            rows = {
                stream: {(stream, row.boot, row.seq) for row in connection.execute(select(table.c.boot, table.c.seq))}
                for stream, table in (("field", tables.fields), ("event", tables.events))
            }
            cells = connection.execute(select(func.count()).select_from(tables.cells)).scalar_one()
            in_fields = connection.execute(select(func.sum(tables.fields.c.cell_count))).scalar_one() or 0
    finally:
        engine.dispose()
    # The ledger of numbers must say of fields and events what their tables say, and every cell is there once.
    for stream, there in rows.items():
        assert there == {key for key in found if key[0] == stream}, f"{stream}: ledger and table differ"
    assert cells >= in_fields, f"{cells} cells, {in_fields} in the fields"
    return found, total - len(found)


def run(kills: int, seed: int, url: str, folder: Path, per_s: float = 50.0) -> Verdict:
    """The proof, with an empty database at `url`."""
    chance = random.Random(seed)
    begun_s = time.monotonic()
    broker = make_mosquitto(folder / "broker", "max_queued_messages 0").start()
    collector = CollectorProcess(folder, url, broker.port, log_level="warning")
    device = StubbornDevice(broker.port, per_s, seed)
    missing: set[Key] = set()
    twice = 0
    try:
        device.start()
        for number in range(1, kills + 1):
            collector.start()
            device.await_acknowledgement()
            time.sleep(chance.uniform(0, 0.4))
            collector.kill()
            acknowledged = device.so_far()
            found, more = stored(url)
            missing |= acknowledged - found
            twice = max(twice, more)
            if number % 10 == 0:
                print(f"{number} kills, {len(found)} stored, {len(missing)} missing", file=sys.stderr, flush=True)
        device.finish()
        collector.start()
        wait_until(lambda: device.waiting == 0 or device.failure is not None, "all is acknowledged", timeout_s=120)
        assert collector.terminate() == 0, collector.log_text
        device.stop()
        if device.failure is not None:
            raise device.failure
        found, more = stored(url)
    except AssertionError as error:
        raise AssertionError(f"{error}; the collector said last:\n{collector.log_text[-4000:]}") from error
    finally:
        collector.kill()
        device.stop()
        broker.close()
    return Verdict(
        kills=kills,
        sent=len(device.sent),
        acknowledged=len(device.acknowledged),
        sent_again=device.sent_again,
        missing=len(missing | (device.acknowledged - found)),
        never=len(set(device.sent) - found),
        twice=max(twice, more),
        seconds=time.monotonic() - begun_s,
    )


@contextmanager
def empty_database(kind: str, folder: Path) -> Iterator[str]:
    """The address of an empty database of one kind."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/central.db"
        return
    programs = find_programs()
    if programs is None:
        raise SystemExit("PostgreSQL is not installed (apt install postgresql)")
    server = PostgreSql(programs)
    try:
        server.start()
        yield server.new_database()
    finally:
        server.close()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.collector_kill", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hv-kill-") as name, empty_database(parsed.database, Path(name)) as url:
        verdict = run(parsed.kills, parsed.seed, url, Path(name))
    print(f"collector_kill ({parsed.database}): {verdict}")
    return 0 if verdict.is_kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
