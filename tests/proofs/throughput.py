"""How many fields go in and out of an outbox, and whether that stays so.

    python -m tests.proofs.throughput [--backlog 100000] [--rows 1000000] [--seconds 20]

A field here is what the pipeline stores of one frame in one transaction with `synchronous=FULL`: the message on
`field/{sample}` with its thirty cells inside (two of them classified, with probabilities and morphology), the sample's
state, the frame's key and the note for the slide's map. Where it says "with cells", the thirty messages on
`cell/{sample}` too, as `publish.cells` asks for.

  intake    fields a second, one transaction each, into a new outbox; the same with cells; and in memory (/dev/shm),
            where a sync takes no time. A disk that needs 6 ms for each takes 160 transactions a second from anybody:
            so in turns with it, what a bare SQLite loop reaches on the same disk, with the same bytes in one table
            without an index, WAL, `synchronous=FULL` and one transaction each.
  append    what one costs in an outbox that grows to so many rows, beside a new one, in turns: fields with cells.
  drain     a backlog of so many fields, by the agent's own publisher, beside a bare paho loop (`loop_start`, QoS 1,
            the same payloads out of memory, the same window) that sends as many to the same mosquitto in turns.

Exits with 1 where intake is below 1,000 fields a second, an append costs half as much again as in a new outbox, a round
of draining reaches less than 80 % of the paho loop beside it (median of the rounds), or memory grows.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

import numpy as np
import paho.mqtt.client as mqtt
import psutil
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.config import BrokerSection, DeliverySection
from agent.delivery.messages import Draft, field_drafts
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.outbox.file import WAL_LIMIT_BYTES
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.domain import (
    Attribute,
    Box,
    Cell,
    CellStatus,
    Classification,
    ClockReading,
    Detection,
    FieldResult,
    Frame,
    FrameQuality,
    ModelIdentity,
    Provenance,
    SampleState,
)
from agent.health import Health
from tests.brokers import Broker, find_program, make_mosquitto
from tests.proofs.proving import MEMORY, faults_in_words, prove

LEAST_FIELDS_PER_S = 1000.0
LEAST_SHARE_OF_PAHO = 0.8
MOST_COST_OF_A_FULL_OUTBOX = 1.5
MOST_GROWTH_MB = 16.0
"""Between the first and the last quarter of a measurement: SQLite's cache is 2 MB, the window's rows under one."""

FIELDS = "fields"
CELLS_A_FIELD = 30
CLASSIFIED_A_FIELD = 2

FIELDS_A_SAMPLE = 200
"""So many are seen for some 200 nucleated cells."""

ROUNDS = 10
"""Of intake, each a tenth of the time; of draining, each a tenth of the backlog; of appending, each of the rows."""

TIMED_APPENDS = 150
"""In each outbox, in turns, at each tenth of the way to the full one."""

TOPICS = Topics("lab", "scope")
SAMPLE = "s1"
TRACE = "x" * 5000
"""As long as the note of a field for the slide's map."""

MEBIBYTE = 2**20
AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)

DELIVERY = DeliverySection()
"""The defaults of config.yaml: the broker's word counts, and what was delivered is kept for a while."""


@dataclass(frozen=True, slots=True)
class Intake:
    """Fields a second into the outbox, and transactions a second of the bare SQLite loop in turns with it.

    cpu_ms, bare_cpu_ms: processor time for each of them; beyond that they wait for the disk, or for other processes.
    """

    per_s: float
    bare_per_s: float
    cpu_ms: float
    bare_cpu_ms: float

    def __str__(self) -> str:
        return (
            f"{self.per_s:.0f}/s, {self.cpu_ms:.2f} ms of a core each; "
            f"a bare SQLite loop {self.bare_per_s:.0f}/s, {self.bare_cpu_ms:.2f} ms"
        )


@dataclass(slots=True)
class Verdict:
    """The figures. Fields a second, milliseconds, megabytes; empty where a part was not asked for.

    sync_ms: what the disk needed to sync 12 kB, median.
    costs: at each tenth of the rows what an append costs, as a multiple of that in a new outbox. shares: in each round
    of draining, of what the paho loop reached; drain_cpu_ms and paho_cpu_ms: processor time for each message.
    """

    field_bytes: int = 0
    intake: dict[str, Intake] = field(default_factory=dict)
    sync_ms: float = 0.0
    rows: int = 0
    cost_ms: float = 0.0
    costs: list[float] = field(default_factory=list)
    backlog: int = 0
    drained_per_s: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    drain_cpu_ms: list[float] = field(default_factory=list)
    paho_cpu_ms: list[float] = field(default_factory=list)
    growth_mb: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def judge(self) -> None:
        """Note what is below its bound."""
        intake = self.intake.get(FIELDS)
        if intake is not None and intake.per_s < LEAST_FIELDS_PER_S:
            self.faults.append(f"intake: {intake}; at least {LEAST_FIELDS_PER_S:.0f} are asked for")
        if self.costs and max(self.costs) > MOST_COST_OF_A_FULL_OUTBOX:
            self.faults.append(f"append: {max(self.costs):.2f} times the cost in a new outbox")
        if self.shares and statistics.median(self.shares) < LEAST_SHARE_OF_PAHO:
            self.faults.append(f"drain: {statistics.median(self.shares):.0%} of a bare paho loop")
        for name, grown_mb in self.growth_mb.items():
            if grown_mb > MOST_GROWTH_MB:
                self.faults.append(f"memory: {grown_mb:+.1f} MB in {name}")

    def __str__(self) -> str:
        lines = [f"a field: {self.field_bytes} bytes; a sync of the disk: {self.sync_ms:.2f} ms"]
        lines += [f"intake, a transaction each: {name}: {intake}" for name, intake in self.intake.items()]
        if self.costs:
            along = " ".join(f"{cost:.2f}" for cost in self.costs)
            lines.append(f"append: {self.cost_ms:.2f} ms; up to {self.rows} rows it costs {along} of that, by tenths")
        if self.shares:
            lines.append(
                f"drain: {self.backlog} fields, median {statistics.median(self.drained_per_s or [0]):.0f} fields/s, "
                f"{statistics.median(self.shares):.0%} of a bare paho loop "
                f"({min(self.shares):.0%} to {max(self.shares):.0%} in {len(self.shares)} rounds); "
                f"{statistics.median(self.drain_cpu_ms or [0]):.2f} ms of a core each, the paho loop "
                f"{statistics.median(self.paho_cpu_ms or [0]):.2f} ms"
            )
        lines.append("memory: " + ", ".join(f"{grown:+.1f} MB in {name}" for name, grown in self.growth_mb.items()))
        return "\n".join((*lines, faults_in_words(self.faults)))


# ------------------------------------------------------------------------------------------------------- the fields


def make_field(number: int) -> FieldResult:
    """One of a smear: thirty cells, the first two of them classified."""
    names = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
    attributes = ("cell_size", "cell_shape", "nucleus_shape", "nuclear_cytoplasmic_ratio", "chromatin_density")
    attributes += ("cytoplasm_vacuole", "cytoplasm_texture", "cytoplasm_colour", "granule_type", "granule_colour")
    classification = Classification(
        "neutrophil",
        0.9375,
        MappingProxyType({name: 0.9375 if name == "neutrophil" else 0.0089 for name in names}),
        0.998,
        MappingProxyType({name: Attribute("segmented-multilobed", 0.8123) for name in (*attributes, "granularity")}),
    )
    cells = []
    for index in range(CELLS_A_FIELD):
        is_classified = index < CLASSIFIED_A_FIELD
        box = Box(20.0 * index, 7.25 * index, 20.0 * index + 41.5, 7.25 * index + 40.25)
        cells.append(
            Cell(
                cell_id=f"{SAMPLE}-{number * CELLS_A_FIELD + index + 1}",
                detection=Detection(box, "WBC" if is_classified else "RBC", 0.8765),
                class_name="neutrophil" if is_classified else "RBC",
                probability=0.9375,
                classification=classification if is_classified else None,
                status=CellStatus.ACCEPTED,
                is_counted=True,
            )
        )
    counts = {"neutrophil": CLASSIFIED_A_FIELD, "RBC": CELLS_A_FIELD - CLASSIFIED_A_FIELD}
    model = ModelIdentity("yolov10n", "0.1.0", "a" * 64)
    return FieldResult(
        frame=Frame(number, np.zeros((480, 640, 3), np.uint8), AT, time.monotonic_ns(), "0123456789abcdef", "proof"),
        quality=FrameQuality(is_accepted=True, reasons=(), focus=123.45, clipped_pct=0.125),
        cells=tuple(cells),
        counts=counts,
        unique_counts=counts,
        duplicates=0,
        timing_ms=dict.fromkeys(("capture", "quality", "detect", "crop", "classify", "place", "total"), 12.34),
        provenance=Provenance("0.1.0", model, model, "ai-edge-litert 2.3.0", "xnnpack", "c" * 64),
        clock=ClockReading(is_synchronised=True, offset_ms=0.25),
    )


def fields_to_store(*, with_cells: bool) -> Iterator[Callable[[Outbox], None]]:
    """One after the other what stores a field, as the pipeline does. Made of one: only the storing is measured.

    Every FIELDS_A_SAMPLE fields a new sample begins, and lets go what the slide's map of the last one had noted.
    """
    (template, *cells) = field_drafts(make_field(1), TOPICS, SAMPLE, with_cells=with_cells)
    for number in itertools.count(1):
        body = {**template.body, "frame": {**template.body["frame"], "n": number}}
        drafts = (Draft("field", template.topic, body, captured_monotonic_ns=time.monotonic_ns()), *cells)
        sample = SampleState(SAMPLE, fields=number, next_cell_number=1 + number * CELLS_A_FIELD)
        notes: dict[str, str | None] = {"slide/": None} if number % FIELDS_A_SAMPLE == 0 else {}
        notes[f"slide/{SAMPLE}/{number:07}"] = TRACE

        def store(
            outbox: Outbox,
            drafts: Sequence[Draft] = drafts,
            sample: SampleState = sample,
            notes: dict[str, str | None] = notes,
        ) -> None:
            outbox.append(drafts, sample=sample, finished_keys=[f"frame-{sample.fields}"], notes=notes)

        yield store


@contextmanager
def new_outbox(folder: Path) -> Iterator[Outbox]:
    """As an agent opens it with the defaults of the configuration, but for its size."""
    begin_boot(folder)
    with open_outbox(
        folder,
        1_000_000,
        device=TOPICS.device,
        min_free_mb=64,
        keep_mb=DELIVERY.keep_mb,
        keep_hours=DELIVERY.keep_hours,
    ) as outbox:
        yield outbox


class Memory:
    """The resident memory of this process along a measurement."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._readings_mb: list[float] = []

    def read(self) -> None:
        self._readings_mb.append(self._process.memory_info().rss / MEBIBYTE)

    @property
    def growth_mb(self) -> float:
        """From the median of the second quarter, when all is warm, to that of the last."""
        readings_mb = self._readings_mb
        if len(readings_mb) < 8:
            return 0.0
        quarter = len(readings_mb) // 4
        return statistics.median(readings_mb[-quarter:]) - statistics.median(readings_mb[quarter : 2 * quarter])


# ------------------------------------------------------------------------------------------------- the measurements


def measure_intake(folder: Path, seconds: float, verdict: Verdict) -> None:
    """Fields a second into a new outbox, and beside it into a bare table."""
    folder.mkdir()
    verdict.sync_ms = sync_ms(folder)
    with tempfile.TemporaryDirectory(prefix="throughput-", dir=MEMORY if MEMORY.is_dir() else None) as in_memory:
        for name, with_cells, place in (
            (FIELDS, False, folder / "fields"),
            (f"fields with {CELLS_A_FIELD} cells", True, folder / "cells"),
            ("fields in memory", False, Path(in_memory)),
        ):
            _measure_intake_at(place, name, seconds, verdict, with_cells=with_cells)


def sync_ms(folder: Path) -> float:
    """Median; what one append must wait for at least."""
    times_ms = []
    with (folder / "probe").open("wb", buffering=0) as file:
        file.write(bytes(2**20))
        os.fsync(file.fileno())
        for number in range(100):
            file.seek(number * 8192)
            file.write(bytes(12_288))
            begun_s = time.perf_counter()
            os.fdatasync(file.fileno())
            times_ms.append(1e3 * (time.perf_counter() - begun_s))
    return statistics.median(times_ms)


def _measure_intake_at(place: Path, name: str, seconds: float, verdict: Verdict, *, with_cells: bool) -> None:
    memory, ours, bare = Memory(), Pace(), Pace()
    fields = fields_to_store(with_cells=with_cells)
    with new_outbox(place) as outbox:
        next(fields)(outbox)
        blobs = [row.payload for row in outbox.pending(0, 1 + CELLS_A_FIELD)]
        with bare_database(place / "bare.db") as database:
            for _ in range(ROUNDS):
                ours.take_turn(lambda: next(fields)(outbox), seconds / ROUNDS)
                bare.take_turn(lambda: store_bare(database, [*blobs, TRACE.encode()]), seconds / ROUNDS)
                memory.read()
    verdict.intake[name] = Intake(ours.per_s, bare.per_s, ours.cpu_ms, bare.cpu_ms)
    verdict.growth_mb[f"intake of {name}"] = memory.growth_mb
    verdict.field_bytes = verdict.field_bytes or len(blobs[0])


class Pace:
    """How often something is done in a second, over several turns."""

    def __init__(self) -> None:
        self._times, self._seconds, self._cpu_s = 0, 0.0, 0.0

    def take_turn(self, do: Callable[[], None], seconds: float) -> None:
        begun_s, begun_cpu_s, took_s = time.perf_counter(), time.process_time(), 0.0
        while took_s < seconds:
            do()
            self._times += 1
            took_s = time.perf_counter() - begun_s
        self._seconds += took_s
        self._cpu_s += time.process_time() - begun_cpu_s

    @property
    def per_s(self) -> float:
        return self._times / self._seconds

    @property
    def cpu_ms(self) -> float:
        """Processor time for each time."""
        return 1e3 * self._cpu_s / self._times


@contextmanager
def bare_database(path: Path) -> Iterator[sqlite3.Connection]:
    """One table without an index, and nothing else of what makes an outbox."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(f"PRAGMA journal_size_limit={WAL_LIMIT_BYTES}")
        database.execute("CREATE TABLE blobs (blob_id INTEGER PRIMARY KEY, blob BLOB)")
        yield database


def store_bare(database: sqlite3.Connection, blobs: Sequence[bytes]) -> None:
    """All of them in one transaction."""
    database.execute("BEGIN IMMEDIATE")
    database.executemany("INSERT INTO blobs (blob) VALUES (?)", ((blob,) for blob in blobs))
    database.execute("COMMIT")


def measure_cost(folder: Path, rows: int, verdict: Verdict) -> None:
    """What an append costs in an outbox that grows, and beside it in a new one."""
    memory = Memory()
    fields, rest = fields_to_store(with_cells=True), fields_to_store(with_cells=True)
    costs_ms = []
    with new_outbox(folder / "growing") as growing:
        for tenth in range(ROUNDS + 1):
            while growing.depth() < rows * tenth // ROUNDS:
                for _ in range(20):
                    next(fields)(growing)
                memory.read()
            with new_outbox(folder / f"new-{tenth}") as fresh:
                next(rest)(fresh)
                times: dict[str, list[float]] = {"growing": [], "fresh": []}
                for _ in range(TIMED_APPENDS):
                    times["growing"].append(_seconds(next(fields), growing))
                    times["fresh"].append(_seconds(next(rest), fresh))
            costs_ms.append(1e3 * statistics.median(times["fresh"]))
            verdict.costs.append(statistics.median(times["growing"]) / statistics.median(times["fresh"]))
        verdict.rows = growing.depth()
    verdict.cost_ms = statistics.median(costs_ms)
    verdict.growth_mb["appending"] = memory.growth_mb


def _seconds(store: Callable[[Outbox], None], outbox: Outbox) -> float:
    begun_s = time.perf_counter()
    store(outbox)
    return time.perf_counter() - begun_s


def measure_drain(folder: Path, backlog: int, verdict: Verdict) -> None:
    """The agent's publisher and a bare paho loop in turns, a tenth of the backlog each; somebody subscribes."""
    with ExitStack() as cleanup:
        folder.mkdir()
        broker = make_mosquitto(folder / "broker")
        cleanup.callback(broker.close)
        broker.start()
        cleanup.enter_context(subscriber(broker))
        place = folder / "backlog"
        outbox = cleanup.enter_context(new_outbox(place))
        fields = fields_to_store(with_cells=False)
        for _ in range(backlog):
            next(fields)(outbox)
        verdict.backlog = backlog
        payloads = [row.payload for row in outbox.pending(0, 64)]
        memory = Memory()
        count = backlog // ROUNDS
        while outbox.depth() >= count:  # a publisher that is told to end has sent some more by then
            ours = drain(broker, place, outbox, count, memory)
            theirs = send_with_paho(broker, payloads, count)
            verdict.drained_per_s.append(ours.per_s)
            verdict.shares.append(ours.per_s / theirs.per_s)
            verdict.drain_cpu_ms.append(ours.cpu_ms)
            verdict.paho_cpu_ms.append(theirs.cpu_ms)
        verdict.growth_mb["draining"] = memory.growth_mb


@dataclass(frozen=True, slots=True)
class Sent:
    """Messages a second, and processor time of this process for each of them."""

    per_s: float
    cpu_ms: float


def drain(broker: Broker, folder: Path, outbox: Outbox, count: int, memory: Memory) -> Sent:
    """What left from the start of a publisher until so many have, its connecting included."""
    before = outbox.depth()
    publisher = Publisher(
        topics=TOPICS,
        broker=BrokerSection(host=broker.host, port=broker.port),
        boot=outbox.boot,
        open_outbox=lambda: open_outbox(
            folder,
            1_000_000,
            device=TOPICS.device,
            keep_mb=DELIVERY.keep_mb,
            keep_hours=DELIVERY.keep_hours,
            verify=False,
        ),
        health=Health(),
        delivery=DELIVERY,
    )
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    publisher.start()
    try:
        while (left := before - outbox.depth()) < count:
            assert publisher.is_alive(), publisher.failure
            time.sleep(0.02)
            memory.read()
        took_s, took_cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    finally:
        publisher.stop(0)
    return Sent(left / took_s, 1e3 * took_cpu_s / left)


def send_with_paho(broker: Broker, payloads: Sequence[bytes], count: int) -> Sent:
    """What the client library reaches by itself, with as many under way as the publisher has."""
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="bare", protocol=MQTTProtocolVersion.MQTTv5)
    window = BrokerSection().window
    client.max_inflight_messages_set(window)
    room = threading.Semaphore(window)
    client.on_publish = lambda *_: room.release()
    properties = Properties(PacketTypes.PUBLISH)
    properties.PayloadFormatIndicator = 1
    properties.ContentType = "application/json"
    topic = TOPICS.field(SAMPLE)
    begun_s, begun_cpu_s = time.monotonic(), time.process_time()
    client.connect(broker.host, broker.port)
    client.loop_start()
    for payload in itertools.islice(itertools.cycle(payloads), count):
        room.acquire()
        client.publish(topic, payload, qos=1, properties=properties)
    for _ in range(window):
        room.acquire()
    took_s, took_cpu_s = time.monotonic() - begun_s, time.process_time() - begun_cpu_s
    client.disconnect()
    client.loop_stop()
    return Sent(count / took_s, 1e3 * took_cpu_s / count)


@contextmanager
def subscriber(broker: Broker) -> Iterator[None]:
    """Somebody who listens, so that the broker takes what comes; a program of its own."""
    with subprocess.Popen(
        [
            find_program("mosquitto_sub", "apt install mosquitto-clients"),
            "-h",
            broker.host,
            "-p",
            str(broker.port),
            "-t",
            "hv/#",
            "-q",
            "0",
            "-F",
            "",
        ],
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            time.sleep(0.5)
            yield
        finally:
            process.kill()


def run(folder: Path, *, backlog: int, rows: int, seconds: float) -> Verdict:
    """All three; 0 leaves one out. Raises NotInstalled without mosquitto."""
    verdict = Verdict()
    if seconds:
        measure_intake(folder / "intake", seconds, verdict)
    if rows:
        measure_cost(folder / "cost", rows, verdict)
    if backlog:
        measure_drain(folder / "drain", backlog, verdict)
    verdict.judge()
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.throughput", description=__doc__.split("\n")[0])
    parser.add_argument("--backlog", type=int, default=100_000, help="fields; 0 = not measured (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="0 = not measured (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="of intake; 0 = not measured (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    return prove(
        lambda folder: run(folder, backlog=options.backlog, rows=options.rows, seconds=options.seconds),
        name="throughput",
        is_in_memory=False,
    )


if __name__ == "__main__":
    sys.exit(main())
