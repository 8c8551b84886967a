"""The whole chain under faults: no committed result may be missing at the end.

    python -m tests.proofs.fault_schedule --minutes 30 [--database postgresql] [--seed 1]

A real agent (simulated slide, `delivery.confirm: receiver`), a real mosquitto without a file of its own, so that a kill
empties it, and a real collector; between them two wires that can be cut. Until the time is over, at random moments and
overlapping: broker, collector and agent are killed (SIGKILL), broker and collector are frozen (SIGSTOP), each wire is
cut, stays down for seconds, or stalls; with PostgreSQL the server is killed too. Then everything is let run until the
outbox is empty, and the ledgers of both ends are compared: each number that the outbox ever gave must be in the
database once, and what the outbox still has of its history must say the same there. Ends with 1 when it does not.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, func, select

from agent.central import tables
from agent.central.database import open_database
from tests.brokers import Broker, make_mosquitto
from tests.central.collecting import CollectorProcess, wait_until
from tests.central.postgresql import PostgreSql, find_programs
from tests.end_to_end.agent_process import Agent, Bench
from tests.relay import Relay
from tests.slides import small_slide

LEAST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 5.0
"""Between two faults."""

LONGEST_FREEZE_S = 12.0
"""Longer than the keep-alives of agent and collector, so that each of them gives a frozen broker up now and then."""

SETTLE_S = 180.0
"""At the end, for everything to arrive."""

Key = tuple[str, int, int]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The figures. committed: numbers that the outbox gave; lost: not in the database at the end."""

    minutes: float
    faults: dict[str, int]
    committed: dict[str, int]
    lost: int
    different: int
    twice: int
    dead_letters: int
    gone: int

    @property
    def is_kept(self) -> bool:
        return not (self.lost or self.different or self.twice or self.dead_letters or self.gone)

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        committed = ", ".join(f"{count} {stream}" for stream, count in sorted(self.committed.items()))
        return (
            f"{'kept' if self.is_kept else 'BROKEN'}: {self.minutes:g} minutes, {sum(self.faults.values())} faults "
            f"({faults}); committed: {committed}; lost: {self.lost}, different: {self.different}, "
            f"stored twice: {self.twice}, dead letters: {self.dead_letters}, given up: {self.gone}"
        )


# ----------------------------------------------------------------------------------------------------------- faults


@dataclass(slots=True)
class Part:
    """Something that can be disturbed. faults: by name, what does it, what undoes it. back_at_s: None = undisturbed.

    weight: how often it is chosen, beside the others.
    """

    name: str
    faults: dict[str, tuple[Callable[[], None], Callable[[], None]]]
    weight: float = 1.0
    back_at_s: float | None = None
    undo: Callable[[], None] = field(default=lambda: None)


class Stall:
    """A relay's traffic stands still while it is set; nothing is closed."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def begin(self) -> None:
        self._relay._lock.acquire()

    def end(self) -> None:
        self._relay._lock.release()


class WireDown:
    """No connection comes through."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    def begin(self) -> None:
        self._relay.refuses = lambda _first: True
        self._relay.cut()

    def end(self) -> None:
        self._relay.refuses = lambda _first: False


class AgentKeeper:
    """The agent, which is killed and started again with the same outbox."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._agent: Agent | None = None

    def start(self) -> None:
        self._agent = self._bench.start()

    def kill(self) -> None:
        if self._agent is not None:
            self._agent.kill()

    def stop(self) -> None:
        assert self._agent is not None
        code = self._agent.terminate()
        assert code == 0, self._agent.log_text[-3000:]

    @property
    def log_text(self) -> str:
        return "" if self._agent is None else self._agent.log_text


def disturb(parts: Sequence[Part], minutes: float, chance: random.Random) -> Counter[str]:
    """Faults at random until the time is over; at the end everything is undone."""
    faults: Counter[str] = Counter()
    end_s = time.monotonic() + minutes * 60
    next_s = time.monotonic() + 2
    while (now_s := time.monotonic()) < end_s:
        for part in parts:
            if part.back_at_s is not None and now_s >= part.back_at_s:
                part.undo()
                part.back_at_s = None
        whole = [part for part in parts if part.back_at_s is None]
        if now_s >= next_s and whole:
            (part,) = chance.choices(whole, [part.weight for part in whole])
            name = chance.choice(sorted(part.faults))
            do, part.undo = part.faults[name]
            do()
            faults[f"{part.name} {name}"] += 1
            part.back_at_s = time.monotonic() + chance.uniform(0.1, LONGEST_FREEZE_S if "frozen" in name else 4.0)
            next_s = time.monotonic() + chance.uniform(LEAST_PAUSE_S, LONGEST_PAUSE_S)
        time.sleep(0.02)
    for part in parts:
        if part.back_at_s is not None:
            part.undo()
            part.back_at_s = None
    return faults


def nothing() -> None:
    """What undoes a fault that is over at once."""


def make_parts(
    broker: Broker, collector: CollectorProcess, agent: AgentKeeper, wires: dict[str, Relay], server: PostgreSql | None
) -> list[Part]:
    """All that can be disturbed, and how."""

    def start_broker() -> None:
        broker.start()

    parts = [
        Part("broker", {"killed": (broker.kill, start_broker), "frozen": (broker.freeze, broker.thaw)}),
        Part("collector", {"killed": (collector.kill, collector.start), "frozen": (collector.freeze, collector.thaw)}),
        # It takes seconds to load its models; killed as often as the others it would count little.
        Part("agent", {"killed": (agent.kill, agent.start)}, weight=0.3),
    ]
    for name, relay in wires.items():
        down, stall = WireDown(relay), Stall(relay)
        ways = {"cut": (relay.cut, nothing), "down": (down.begin, down.end), "frozen": (stall.begin, stall.end)}
        parts.append(Part(f"{name} wire", ways))
    if server is not None:
        parts.append(Part("database", {"killed": (server.kill, server.start)}))
    return parts


# ---------------------------------------------------------------------------------------------------------- ledgers


@dataclass(frozen=True, slots=True)
class OutboxLedger:
    """given: the last number of each stream. waiting: rows that nobody confirmed. kept: what its history still says."""

    given: dict[str, int]
    waiting: int
    dead: int
    kept: dict[Key, bytes]


def read_outbox(folder: Path) -> OutboxLedger:
    """The agent's end."""
    connection = sqlite3.connect(f"file:{folder / 'outbox.db'}?mode=ro", uri=True, timeout=10)
    try:
        return OutboxLedger(
            given=dict(connection.execute("SELECT stream, last_seq FROM streams")),
            waiting=connection.execute("SELECT COUNT(*) FROM rows WHERE state = 0").fetchone()[0],
            dead=connection.execute("SELECT COUNT(*) FROM dead_letters").fetchone()[0],
            kept={
                (stream, boot, seq): payload
                for stream, boot, seq, payload in connection.execute("SELECT stream, boot, seq, payload FROM rows")
            },
        )
    finally:
        connection.close()


def compare(outbox: OutboxLedger, engine: Engine, minutes: float, faults: Counter[str]) -> Verdict:
    """Both ends beside each other."""
    bodies = {
        "field": tables.fields,
        "event": tables.events,
        "audit": tables.audit,
        "differential": tables.differentials,
    }
    with engine.connect() as connection:
        numbers: Counter[tuple[str, int]] = Counter()
        for row in connection.execute(select(tables.received)):
            numbers.update((row.stream, seq) for seq in range(row.first_seq, row.last_seq + 1))
        stored = {
            (stream, row.boot, row.seq): row.body
            for stream, table in bodies.items()
            for row in connection.execute(select(table).where(table.c.seq.is_not(None)))
        }
        dead = connection.execute(select(func.count()).select_from(tables.dead_letters)).scalar_one()
        gone = connection.execute(
            select(func.count()).select_from(tables.gaps).where(tables.gaps.c.status == "gone")
        ).scalar_one()
        cells = set(connection.execute(select(tables.cells.c.cell_id)).scalars())
    lost = [
        (stream, seq)
        for stream, last in outbox.given.items()
        for seq in range(1, last + 1)
        if (stream, seq) not in numbers
    ]
    # The ledger of numbers says that they came; the tables must hold them.
    there = {(stream, seq) for stream, _, seq in stored}
    lost += [("field", seq) for seq in range(1, outbox.given.get("field", 0) + 1) if ("field", seq) not in there]
    different = 0
    for key, payload in outbox.kept.items():
        sent = json.loads(payload)
        if key[0] == "cell":
            different += sent["cell_id"] not in cells
        elif key[0] in bodies:
            different += without_mark(stored.get(key, {})) != without_mark(sent)
    return Verdict(
        minutes=minutes,
        faults=dict(faults),
        committed=outbox.given,
        lost=len(lost),
        different=different,
        twice=sum(count - 1 for count in numbers.values()),
        dead_letters=dead + outbox.dead,
        gone=gone,
    )


def without_mark(body: dict[str, Any]) -> dict[str, Any]:
    """A message without the key that says when it was sent."""
    return {key: value for key, value in body.items() if key != "historical"}


# ------------------------------------------------------------------------------------------------------------- run


def run(minutes: float, seed: int, folder: Path, database: str = "sqlite") -> Verdict:
    """The proof."""
    chance = random.Random(seed)
    server = open_server() if database == "postgresql" else None
    url = f"sqlite:///{folder}/central.db" if server is None else server.new_database()
    broker = make_mosquitto(folder / "broker", "max_queued_messages 0").start()
    wires = {"agent": Relay(broker.port), "collector": Relay(broker.port)}
    collector = CollectorProcess(folder, url, wires["collector"].port)
    bench = Bench(folder)
    bench.use_broker(wires["agent"].port, keepalive_s=3)
    bench.config["delivery"] = {"confirm": "receiver", "receiver": "central", "resend_s": 3}
    bench.config["camera"] = small_slide(interval_s=0.2)
    agent = AgentKeeper(bench)
    engine = open_database(url)
    try:
        collector.start()
        agent.start()
        try:
            wait_until(lambda: read_safely(bench).given.get("field", 0) > 3, "the agent counts", timeout_s=180)
        except AssertionError:
            print(agent.log_text[-3000:], file=sys.stderr)
            raise
        faults = disturb(make_parts(broker, collector, agent, wires, server), minutes, chance)
        # No new fields: what is committed is to arrive.
        agent.stop()
        empty = folder / "no-pictures"
        empty.mkdir()
        bench.use_folder(empty, watch=True)
        agent.start()
        try:
            wait_until(lambda: is_settled(bench), "everything is confirmed", timeout_s=SETTLE_S)
        except AssertionError as error:
            print(f"{error}\n{collector.log_text[-2000:]}\n{agent.log_text[-2000:]}", file=sys.stderr)
        agent.kill()
        assert collector.terminate() == 0, collector.log_text[-3000:]
        return compare(read_outbox(bench.outbox_folder), engine, minutes, faults)
    finally:
        engine.dispose()
        agent.kill()
        collector.kill()
        for relay in wires.values():
            relay.close()
        broker.close()
        if server is not None:
            server.close()


def read_safely(bench: Bench) -> OutboxLedger:
    """An outbox that is just being made has nothing yet."""
    try:
        return read_outbox(bench.outbox_folder)
    except sqlite3.Error:
        return OutboxLedger({}, 0, 0, {})


def is_settled(bench: Bench) -> bool:
    """Whether the outbox is empty, and has something to be empty of."""
    outbox = read_safely(bench)
    return bool(outbox.given) and outbox.waiting == 0


def open_server() -> PostgreSql:
    """A PostgreSQL of our own."""
    programs = find_programs()
    if programs is None:
        raise SystemExit("PostgreSQL is not installed (apt install postgresql)")
    server = PostgreSql(programs)
    server.start()
    return server


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.fault_schedule", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, metavar="M")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hv-faults-") as name:
        verdict = run(parsed.minutes, parsed.seed, Path(name), parsed.database)
    print(f"fault_schedule ({parsed.database}): {verdict}")
    return 0 if verdict.is_kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
