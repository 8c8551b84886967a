"""The agent at full rate, with faults, for an hour after ten minutes of warm-up: does its memory grow?

    python -m tests.proofs.memory [--minutes 70] [--seed 1]

A real agent on the simulated slide, as fast as it can, with frames that are missing and frames that stand still; a real
mosquitto that is killed, frozen and cut off again and again. As in a laboratory a sample ends and the next one begins,
every 200 fields or, where the command was lost in a fault, some more: what is known of a slide, 12 to 17 kB a field,
goes with it. The resident memory is read every second. So that a longer sample is not taken for a leak, of each two
minutes, in which a sample ends and another begins, the lowest value counts; the slope is that from the median of the
first quarter of them to that of the last, after a warm-up in which caches and pools fill: at most ten minutes. Exits
with 1 when it is 1 MB/h or more, or for runs of less than half an hour, where a slope says little, when more than 8 MB
were added.

At the machine's usual priority: one that keeps the kernel's own threads from a core makes each sync of the disk wait.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml
from paho.mqtt import publish

from agent.delivery.outbox import open_outbox
from agent.delivery.outbox.queue import last_number
from agent.delivery.topics import Topics
from agent.errors import OutboxError
from tests.brokers import Broker, NotInstalled, make_mosquitto
from tests.proofs.throughput import FIELDS_A_SAMPLE, subscriber
from tests.relay import Relay
from tests.slides import small_slide

ROOT = Path(__file__).resolve().parents[2]

MOST_MB_PER_HOUR = 1.0
MOST_MB_IN_SHORT_RUN = 8.0
SHORT_RUN_S = 1800.0

LONGEST_WARM_UP_S = 600.0
"""Of a shorter run a quarter. Models, arenas, the page cache of SQLite and the window of timings are full by then."""

LOW_EVERY_S = 120
"""A sample of FIELDS_A_SAMPLE takes less, with the commands that are lost. In a short run there are eight lows."""

FAULT_EVERY_S = (5.0, 25.0)
"""Between two faults, drawn evenly."""

ASK_AGAIN_AFTER_S = 10.0
"""A command that has shown no effect by then was lost: the broker was killed, or the agent had no connection."""

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Figures:
    """What a run has shown. rss_mb: one value a second, from the end of the warm-up on."""

    minutes: float
    rss_mb: tuple[float, ...]
    fields: int
    samples: int
    faults: Counter[str]
    waiting: int

    @property
    def lows_mb(self) -> tuple[float, ...]:
        """The lowest of each LOW_EVERY_S; what is left over at the end does not count."""
        every_s = max(1, min(LOW_EVERY_S, len(self.rss_mb) // 8))
        starts = range(0, len(self.rss_mb) - every_s + 1, every_s)
        return tuple(min(self.rss_mb[start : start + every_s]) for start in starts)

    @property
    def medians_mb(self) -> tuple[float, ...]:
        """Of all readings in each quarter of the time; what the lows leave out."""
        ends = [len(self.rss_mb) * quarter // 4 for quarter in range(5)]
        return tuple(statistics.median(self.rss_mb[start:end]) for start, end in itertools.pairwise(ends))

    @property
    def added_mb(self) -> float:
        lows = self.lows_mb
        quarter = max(1, len(lows) // 4)
        return statistics.median(lows[-quarter:]) - statistics.median(lows[:quarter])

    @property
    def mb_per_hour(self) -> float:
        """Between the middles of the two quarters lie three quarters of the time."""
        return self.added_mb / (0.75 * len(self.rss_mb) / 3600)

    @property
    def is_flat(self) -> bool:
        if self.minutes * 60 < SHORT_RUN_S:
            return self.added_mb < MOST_MB_IN_SHORT_RUN
        return self.mb_per_hour < MOST_MB_PER_HOUR

    def __str__(self) -> str:
        faults = ", ".join(f"{count} x {name}" for name, count in sorted(self.faults.items()))
        return (
            f"{self.minutes:g} minutes, {self.fields} fields, {self.samples} samples ended, faults: {faults}\n"
            f"resident memory: {min(self.rss_mb):.1f} to {max(self.rss_mb):.1f} MB, its lows "
            f"{_listed(self.lows_mb)}, medians of the quarters {_listed(self.medians_mb)}; "
            f"added {self.added_mb:+.2f} MB, slope {self.mb_per_hour:+.2f} MB/h; "
            f"{self.waiting} messages wait at the end"
        )


def _listed(values_mb: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values_mb)


def run(folder: Path, minutes: float, seed: int, tell: Callable[[str], None] = print) -> Figures:
    """Run for so long; raises NotInstalled without mosquitto."""
    chance = random.Random(seed)
    with ExitStack() as cleanup:
        broker = make_mosquitto(folder / "broker")
        cleanup.callback(broker.close)
        broker.start()
        cleanup.enter_context(subscriber(broker))  # else the broker takes nothing with MQTT 5, and everything waits
        relay = Relay(broker.port)
        cleanup.callback(relay.close)
        agent = start_agent(folder, relay.port, seed)
        cleanup.callback(agent.kill)
        watched = psutil.Process(agent.pid)
        begun_s = time.monotonic()
        warm_up_s = min(LONGEST_WARM_UP_S, minutes * 60 / 4)
        rss_mb: list[float] = []
        faults: Counter[str] = Counter()
        operator = Operator(broker.port, folder / "outbox")
        fault_at_s = chance.uniform(*FAULT_EVERY_S)
        told_at_s = 0.0
        while (now_s := time.monotonic() - begun_s) < minutes * 60:
            assert agent.poll() is None, f"the agent has ended:\n{(folder / 'agent.log').read_text()[-3000:]}"
            if now_s >= warm_up_s:
                rss_mb.append(watched.memory_info().rss / MEBIBYTE)
            if now_s >= fault_at_s:
                faults[cause_fault(chance, broker, relay)] += 1
                fault_at_s = time.monotonic() - begun_s + chance.uniform(*FAULT_EVERY_S)
            operator.turn(now_s)
            if rss_mb and now_s - told_at_s >= 60:
                told_at_s = now_s
                tell(f"{now_s / 60:5.1f} min  {rss_mb[-1]:.1f} MB, {sum(faults.values())} faults")
            time.sleep(1.0)
        agent.terminate()
        agent.wait(60)
        fields, samples, waiting = count(folder / "outbox")
        return Figures(minutes, tuple(rss_mb), fields, samples, faults, waiting)


class Operator:
    """Ends each sample after FIELDS_A_SAMPLE and begins the next, by commands, which are repeated until they are done.

    folder: of the outbox, in which the effect shows.
    """

    def __init__(self, port: int, folder: Path) -> None:
        self._port = port
        self._folder = folder
        self._commands = 0
        self._ask_at_s = 0.0
        self._fields = self._samples = 0
        self._is_between = False

    def turn(self, now_s: float) -> None:
        """What is due; called once a second."""
        if now_s < self._ask_at_s:
            return
        with suppress(OutboxError):  # being made, or put in order
            fields, samples, _ = count(self._folder)
            if samples > self._samples:
                self._fields, self._samples, self._is_between = fields, samples, True
            if self._is_between and fields > self._fields:
                self._is_between = False
            if self._is_between:
                self._send("start", now_s)
            elif fields >= self._fields + FIELDS_A_SAMPLE:
                self._send("stop", now_s)

    def _send(self, name: str, now_s: float) -> None:
        self._commands += 1
        body = {"transaction": f"{name}-{self._commands}"}
        topic = f"{Topics('lab', 'scope').base}/cmd/{name}"
        with suppress(OSError, ValueError):  # the broker is away; in a second it is tried again
            publish.single(topic, json.dumps(body), qos=1, port=self._port, hostname="127.0.0.1")
            self._ask_at_s = now_s + ASK_AGAIN_AFTER_S


def start_agent(folder: Path, port: int, seed: int) -> subprocess.Popen[bytes]:
    config = {
        "site": "lab",
        "device": "scope",
        "camera": small_slide(seed=seed, interval_s=0, missing_share=0.02, frozen_share=0.02),
        "outbox": {"folder": str(folder / "outbox"), "min_free_mb": 0, "max_mb": 256},
        "broker": {"port": port, "max_backoff_s": 1, "keepalive_s": 2},
        "models": {"threads": 1},
        "publish": {"health_interval_s": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with (folder / "agent.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "agent", "run", "--config", str(file)], cwd=ROOT, stdout=log, stderr=log
        )


def cause_fault(chance: random.Random, broker: Broker, relay: Relay) -> str:
    """One fault and its end."""
    fault = chance.choice(("cut", "cut in a message", "broker killed", "broker frozen"))
    pause_s = chance.uniform(0.5, 8.0)
    if fault == "cut":
        relay.cut()
    elif fault == "cut in a message":
        relay.cut_after_bytes = chance.randrange(1, 5000)
        time.sleep(pause_s)
        relay.cut_after_bytes = None
        relay.cut()
    elif fault == "broker killed":
        broker.kill()
        time.sleep(pause_s)
        broker.start()
    else:
        broker.freeze()
        time.sleep(pause_s)
        broker.thaw()
    return fault


def count(folder: Path) -> tuple[int, int, int]:
    """Fields numbered so far, samples that were reported, and messages that wait. Raises OutboxError."""
    with open_outbox(folder, verify=False, create=False) as outbox:
        with outbox.file.reading() as connection:
            fields, samples = (last_number(connection, stream) or 0 for stream in ("field", "differential"))
        return fields, samples, outbox.depth()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="memory-proof-") as folder:
        try:
            figures = run(Path(folder), options.minutes, options.seed)
        except NotInstalled as error:
            print(error, file=sys.stderr)
            return 2
    print(figures)
    print("the memory is flat" if figures.is_flat else "THE MEMORY GROWS")
    return 0 if figures.is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
