"""Whatever arrives is refused in words: `python -m tests.proofs.fuzz [--inputs N] [--seed S]`.

Commands, acknowledgements, configurations, model manifests, audit files and messages at the receiver, made in two ways:
mutations of valid ones (most get past the first check), and what Hypothesis thinks of (bytes, texts, JSON of any
shape). Each input must end in a value or in one of the foreseen errors, within HANG_S, and memory must not grow.

Fails (exit 1) at the first input that does not, and prints it: the same seed makes the same inputs.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from agent.central.intake import MessageUnusable, read_message
from agent.config import Config, load_reference_intervals, loads, packaged_folder, template
from agent.delivery.acks import read_ack
from agent.delivery.audit import ChainHead, Entry, chain, verify
from agent.delivery.commands import COMMANDS, Gatekeeper, InboundCommand, Refusal, read_command, sign
from agent.delivery.messages import serialise, stamp
from agent.delivery.topics import Topics
from agent.errors import ConfigError, ModelError
from agent.inference.manifest import MANIFEST_NAME, load_manifest

HANG_S = 5.0
"""Of CPU time: a loaded machine is no finding. An honest input takes a millisecond, the largest some hundred."""

BATCH = 2000
"""Inputs between two looks at memory. Hypothesis remembers what it tried within a batch and forgets it after."""

MOST_GROWTH_BYTES = 24 * 2**20
"""From the fifth of the run at which all is warm to its end; the allocator's own swing is a third of it."""

BASE = "hv/1/lab/scope"
KEY = b"k" * 32
NOW = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)

Target = Callable[[bytes], str]
"""Takes an input, returns in a word what became of it; raises only what is a finding."""


class Hang(Exception):
    """An input took longer than HANG_S."""


class Finding(Exception):
    """An input that was not refused in words."""

    def __init__(self, target: str, given_bytes: bytes, words: str) -> None:
        super().__init__(f"{target}: {words}\n  input: {given_bytes[:2000]!r}")


# ------------------------------------------------------------------------------------------------------ the targets


def judge_command(content: bytes) -> str:
    """A command of any name: its first bytes choose name and circumstances."""
    head, _, payload = content.partition(b"\n")
    name = head.decode("utf-8", errors="surrogateescape")
    pick = len(payload) % 5
    inbound = InboundCommand(
        name,
        payload,
        is_retained=pick == 4,
        received_monotonic_s=0.0,
        expires_in_s=(None, 0.0, 30.0, 1e300, None)[pick],
        response_topic=name,
    )
    for gatekeeper in (Gatekeeper(BASE), Gatekeeper(BASE, "broker"), Gatekeeper(BASE, "key", KEY)):
        judged = read_command(inbound, gatekeeper, monotonic_s=1.0, now=NOW if pick else None)
        if isinstance(judged, Refusal):
            serialise({"message": judged.message, "transaction": judged.transaction, "name": judged.name})
    return judged.code if isinstance(judged, Refusal) else "done"


def judge_config(content: bytes) -> str:
    text = content.decode("utf-8", errors="replace")
    try:
        config = loads(text, "fuzz", folder=Path("/nowhere"), environment={})
    except ConfigError as error:
        return "refused" if error.faults else "refused without a word"
    return "taken" if isinstance(config, Config) else "neither"


class ManifestTarget:
    """Reads manifests from a file, as the agent does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, content: bytes) -> str:
        (self._folder / MANIFEST_NAME).write_bytes(content)
        try:
            load_manifest(self._folder)
        except ModelError:
            return "refused"
        return "taken"


class ReferenceTarget:
    """The laboratory's own table of reference intervals."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "reference.yaml"

    def __call__(self, content: bytes) -> str:
        self._path.write_bytes(content)
        try:
            load_reference_intervals(self._path)
        except ConfigError:
            return "refused"
        return "taken"


def judge_audit(content: bytes) -> str:
    verdict = verify(content.decode("utf-8", errors="replace").splitlines())
    return "sound" if verdict.is_sound else "faults"


def judge_ack(content: bytes) -> str:
    judged = read_ack(content, receiver="central", device="scope", is_retained=len(content) % 7 == 0)
    return "refused" if isinstance(judged, str) else "taken"


def judge_message(content: bytes) -> str:
    topic, _, payload = content.partition(b"\n")
    try:
        read_message(topic.decode("utf-8", errors="replace"), payload, is_retained=len(payload) % 2 == 0)
    except MessageUnusable:
        return "refused"
    return "taken"


# ----------------------------------------------------------------------------------------------------- the examples


def valid_commands() -> list[bytes]:
    more: dict[str, dict[str, Any]] = {
        "start": {"sample": "s-1", "accession": "A-1", "age_band": "child", "stop_at_cells": 200, "by": "t"},
        "stop": {"sample": "s-1", "abort": True},
        "replay": {"stream": "field", "from_seq": 1, "to_seq": 900},
        "model.stage": {"folder": "next"},
        "amend": {"sample": "s-1", "cell_id": "s-1-7", "class": "monocyte", "by": "dr-1", "reason": "band"},
    }
    examples = []
    for name in COMMANDS:
        body = {"transaction": "t-1", "at": NOW.isoformat(), **more.get(name, {})}
        body["auth"] = sign(name, body, BASE, KEY)
        examples.append(name.encode() + b"\n" + json.dumps(body).encode())
    return examples


def valid_ack() -> bytes:
    ack = {
        "schema": "hv/1/ack",
        "receiver": "central",
        "device": "scope",
        "stream": "field",
        "boot": 12,
        "seq": 345,
        "at": "2026-11-25T08:00:00.000Z",
        "ruo": True,
    }
    return json.dumps(ack).encode()


def valid_audit() -> list[bytes]:
    drafts, _ = chain(
        [Entry("cmd.start", "done", f"n {n}", detail={"n": n}) for n in range(4)],
        ChainHead(),
        Topics("lab", "scope"),
        boot=2,
        at=NOW,
    )
    lines = [serialise(stamp(draft.body, "scope", 2, n)) for n, draft in enumerate(drafts, start=1)]
    return [b"\n".join(lines)]


def valid_messages() -> list[bytes]:
    event = {
        "schema": "hv/1/event",
        "id": "scope:1:1",
        "seq": 1,
        "device": "scope",
        "site": "lab",
        "boot": 1,
        "at": "2026-11-25T08:00:00.000Z",
        "kind": "x",
        "severity": "info",
        "message": "m",
        "detail": {},
        "historical": False,
        "ruo": True,
    }
    return [
        f"{BASE}/event".encode() + b"\n" + json.dumps(event).encode(),
        *(f"{BASE}/audit".encode() + b"\n" + line for line in valid_audit()[0].splitlines()),
    ]


@dataclass(frozen=True)
class Subject:
    """A target with its valid examples; share: of all inputs."""

    name: str
    target: Target
    examples: Sequence[bytes]
    share: float


def subjects(folder: Path) -> list[Subject]:
    models = packaged_folder() / "models" / MANIFEST_NAME
    reference = Path(__file__).resolve().parents[2] / "agent" / "analysis" / "reference_intervals.yaml"
    small = "\n".join(line for line in template().splitlines() if not line.lstrip().startswith("#")).encode()
    return [
        Subject("commands", judge_command, valid_commands(), 0.66),
        Subject("configuration", judge_config, [small, b"site: lab\nbroker: {host: h, port: 1883}\n"], 0.04),
        Subject("reference table", ReferenceTarget(folder), [reference.read_bytes()[-1500:]], 0.02),
        Subject("manifest", ManifestTarget(folder), [models.read_bytes()] if models.exists() else [b"{}"], 0.08),
        Subject("acknowledgements", judge_ack, [valid_ack()], 0.06),
        Subject("audit file", judge_audit, valid_audit(), 0.04),
        Subject("messages at the receiver", judge_message, valid_messages(), 0.10),
    ]


# ---------------------------------------------------------------------------------------------------- the mutations

SPITEFUL = (
    *(
        b"null",
        b"NaN",
        b"-Infinity",
        b"1e999",
        b"-0.0",
        b'""',
        b"[]",
        b"{}",
        b"true",
        b"'",
        b'"',
        b"\n",
        b"\r\n",
        b"\t",
    ),
    *(b"\x00", b"\xff\xfe", b"\xed\xa0\x80", b"\\ud800", b"9" * 400, b"1" + b"0" * 5000, b"a" * 70),
    *(b"[" * 2000, b'{"a":' * 500, b"- " * 2000, b"&a [*a]", b"*x", b"<<: ", b"? ", b"!!python/object:os.system"),
    *(b"2026-13-45T99:99:99Z", b"../../etc/passwd"),
)


def mutate(example: bytes, dice: random.Random) -> bytes:
    """Some small changes: of bytes, of lines, of JSON values."""
    mutated = example
    for _ in range(dice.choice((1, 1, 1, 2, 3, 8))):
        way = dice.randrange(7)
        place = dice.randrange(len(mutated) + 1)
        if way == 0 and mutated:
            place = min(place, len(mutated) - 1)
            mutated = mutated[:place] + bytes((dice.randrange(256),)) + mutated[place + 1 :]
        elif way == 1:
            mutated = mutated[:place] + dice.choice(SPITEFUL) + mutated[place:]
        elif way == 2:
            mutated = mutated[:place] + mutated[place + dice.randrange(1, 30) :]
        elif way == 3:
            end = place + dice.randrange(1, 60)
            mutated = mutated[:place] + mutated[place:end] * dice.choice((2, 2, 3, 50)) + mutated[end:]
        elif way == 4:
            lines = mutated.split(b"\n")
            one, other = dice.randrange(len(lines)), dice.randrange(len(lines))
            lines[one], lines[other] = lines[other], lines[one]
            mutated = b"\n".join(lines)
        else:
            mutated = mutate_json(mutated, dice)
    return mutated


def mutate_json(content: bytes, dice: random.Random) -> bytes:
    """Another value, or none, at some place of the JSON behind the first line break (or of all of it)."""
    head, mark, text = content.rpartition(b"\n") if content.count(b"\n") == 1 else (b"", b"", content)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return content
    places = list(_places(value))
    if not places:
        return content
    holder, key = dice.choice(places)
    spite: Any = dice.choice(
        (None, True, -1, 0, 2**70, 1e308, 0.1, "", "x" * 5000, "\ud800", [], {}, [[[]]], {"": None}, "a\x00b")
    )
    way = dice.randrange(3)
    if way == 0:
        holder[key] = spite
    elif way == 1 and isinstance(holder, dict):
        holder[dice.choice(("", "x", "class", "at", "auth", "sha256", "shape", "0"))] = spite
    else:
        del holder[key]
    return head + mark + json.dumps(value).encode("utf-8", errors="replace")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield value, key
            yield from _places(inner)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield value, number
            yield from _places(inner)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)


def invented(subject: Subject) -> st.SearchStrategy[bytes]:
    """What Hypothesis thinks of: bytes, and JSON behind the first line of a valid example."""
    heads = st.sampled_from([example.partition(b"\n")[0] for example in subject.examples])
    as_json = ANY_JSON.map(lambda value: json.dumps(value).encode("utf-8", errors="replace"))
    behind = st.tuples(heads, as_json).map(lambda pair: pair[0] + b"\n" + pair[1])
    return (
        st.binary(max_size=300)
        | as_json
        | behind
        | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
    )


# ---------------------------------------------------------------------------------------------------------- the run


@contextmanager
def hang_alarm() -> Iterator[Callable[[], None]]:
    """Inside, `rearm()` gives the next input its time; who takes longer gets `Hang` raised in his way."""

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hang(f"it takes more than {HANG_S:g} s")

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_PROF, HANG_S) and None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass
class Tally:
    """What became of the inputs, by subject and word; rss_bytes after each batch."""

    outcomes: Counter[tuple[str, str]]
    rss_bytes: list[int]
    slowest_s: float = 0.0

    @property
    def growth_bytes(self) -> int:
        """From when all was warm to the end; of medians, so that one swing of the allocator does not decide."""
        if len(self.rss_bytes) < 5:
            return 0
        fifth = len(self.rss_bytes) // 5
        warm = sorted(self.rss_bytes[fifth : 2 * fifth + 1])
        late = sorted(self.rss_bytes[-fifth - 1 :])
        return late[len(late) // 2] - warm[len(warm) // 2]


def run(chosen: Sequence[Subject], inputs: int, first_seed: int) -> Tally:
    """Give so many inputs to the subjects. Raises Finding."""
    tally = Tally(Counter(), [])
    process = psutil.Process()
    total_share = sum(subject.share for subject in chosen)
    with hang_alarm() as rearm:
        for number in range(max(1, -(-inputs // BATCH))):
            size = min(BATCH, inputs - number * BATCH)
            dice = random.Random(f"{first_seed}/{number}")
            for subject in chosen:
                count = max(2, round(size * subject.share / total_share))
                for _ in range(count - count // 4):
                    _give(subject, mutate(dice.choice(subject.examples), dice), tally, rearm)
                _invent(subject, count // 4, dice.randrange(2**32), tally, rearm)
            tally.rss_bytes.append(process.memory_info().rss)
    return tally


def _invent(subject: Subject, count: int, seed_: int, tally: Tally, rearm: Callable[[], None]) -> None:
    if count == 0:
        return

    @seed(seed_)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(invented(subject))
    def feed(content: bytes) -> None:
        _give(subject, content, tally, rearm)

    feed()


def _give(subject: Subject, content: bytes, tally: Tally, rearm: Callable[[], None]) -> None:
    rearm()
    begun_s = time.perf_counter()
    try:
        word = subject.target(content)
    except Exception as error:
        raise Finding(subject.name, content, f"{type(error).__name__}: {error}") from error
    tally.slowest_s = max(tally.slowest_s, time.perf_counter() - begun_s)
    tally.outcomes[subject.name, word] += 1


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            tally = run(subjects(Path(folder)), options.inputs, options.seed)
        except Finding as finding:
            print(f"FAIL  {finding}\n  seed {options.seed}")
            return 1
    took_s = time.monotonic() - begun_s
    given_inputs = sum(tally.outcomes.values())
    for (name, word), count in sorted(tally.outcomes.items()):
        print(f"{name:<26} {word:<22} {count:>9}")
    growth_mb = tally.growth_bytes / 2**20
    is_flat = tally.growth_bytes <= MOST_GROWTH_BYTES
    print(
        f"{'pass' if is_flat else 'FAIL'}  {given_inputs} inputs, no crash, no hang (slowest {tally.slowest_s:.2f} s), "
        f"memory {growth_mb:+.1f} MB (bound {MOST_GROWTH_BYTES / 2**20:g}), {took_s:.0f} s"
    )
    return 0 if is_flat else 1


if __name__ == "__main__":
    sys.exit(main())
