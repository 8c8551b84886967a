"""Flipped bits and truncation of the outbox: never a crash loop, and everything readable is delivered.

    python -m tests.proofs.damage [--seeds 1000] [--minutes 20]

Each seed makes an outbox of its own and hurts it: flipped bits, a page of zeros or of noise, a shorter file, in the
database or its write-ahead log. Then the agent's own code opens it, as the agent's starts would, and empties it. A row
counts as unhurt when no page was touched in which a part of it stands. Exits with 1 when three starts do not get over
the damage, something is delivered that was never stored, or an unhurt row is missing; but for the very last one, of
which a broken log cannot tell whether it had been stored or was cut off by the power.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.delivery.messages import Draft
from agent.delivery.outbox import DATABASE_NAME, begin_boot, open_outbox
from agent.errors import OutboxDamaged, OutboxError
from tests.proofs.proving import add_minutes, faults_in_words, prove

PAGE_BYTES = 4096
MOST_STARTS = 3
"""One that meets the damage in use and ends, one that sets the file aside, one that finds all well."""


@dataclass(slots=True)
class Verdict:
    """rows: stored in all. unhurt: those whose bytes were not touched; delivered: of these. salvaged: files."""

    seeds: int = 0
    salvaged: int = 0
    rows: int = 0
    unhurt: int = 0
    delivered: int = 0
    also: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = f"{self.seeds} damaged files, {self.salvaged} set aside; {self.rows} messages, {self.unhurt} unhurt, "
        words += (
            f"{self.delivered} of these delivered and {self.also} of the others set aside with a reason or delivered"
        )
        return f"{words}; {faults_in_words(self.faults)}"


def fill(folder: Path, rng: random.Random) -> dict[int, str]:
    """An outbox that was killed; its fields by number, with the mark that stands in each."""
    begin_boot(folder)
    outbox = open_outbox(folder, device="scope", min_free_mb=0)
    marks = {}
    for number in range(1, rng.randrange(20, 60)):
        marks[number] = f"<{rng.getrandbits(64):016x}:{number}>"
        text = marks[number] * rng.choice((1, 20, 400))
        outbox.append([Draft("field", "hv/1/lab/scope/field/s1", {"schema": "hv/1/field", "n": number, "text": text})])
    if rng.random() < 0.5:
        outbox.close()
    else:  # killed: the log is still there
        kept = folder / "kept"
        kept.mkdir()
        for part in folder.glob(f"{DATABASE_NAME}*"):
            shutil.copy(part, kept / part.name)
        outbox.close()
        for part in kept.iterdir():
            shutil.move(part, folder / part.name)
        (folder / f"{DATABASE_NAME}-shm").unlink(missing_ok=True)
    return marks


def hurt(folder: Path, rng: random.Random) -> str:
    """One damage; what it was."""
    parts = [part for part in folder.glob(f"{DATABASE_NAME}*") if part.suffix != ".db-shm" and part.stat().st_size]
    path = rng.choice(sorted(part for part in parts if not part.name.endswith("-shm")))
    content = bytearray(path.read_bytes())
    kind = rng.choice(("bit", "bits", "zeros", "noise", "shorter", "head"))
    at = rng.randrange(len(content))
    page = at // PAGE_BYTES * PAGE_BYTES
    if kind == "bit":
        content[at] ^= 1 << rng.randrange(8)
    elif kind == "bits":
        for _ in range(50):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        content[page : page + PAGE_BYTES] = bytes(len(content[page : page + PAGE_BYTES]))
    elif kind == "noise":
        content[page : page + PAGE_BYTES] = rng.randbytes(len(content[page : page + PAGE_BYTES]))
    elif kind == "shorter":
        del content[at:]
    else:
        content[:64] = rng.randbytes(64)
    path.write_bytes(content)
    return f"{kind} at {at} of {path.name}"


def unhurt_numbers(before: dict[str, bytes], folder: Path, marks: dict[int, str]) -> set[int]:
    """Fields all of whose pages, in every file where they stand, are as they were; nor is the page before them hurt.

    A mark stands in each part of a payload. A row is held by its own leaf page too, so that page must be whole.
    """
    whole: set[int] = set(marks)
    for name, content in before.items():
        now = (folder / name).read_bytes()
        for start in range(0, len(content), PAGE_BYTES):
            page = content[start : start + PAGE_BYTES]
            if now[start : start + PAGE_BYTES] != page:
                whole -= {number for number in whole if marks[number][:18].encode() in page}
    return whole


def deliver(folder: Path) -> tuple[dict[int, str], set[int], bool]:
    """Start, send and acknowledge until nothing waits: what came, what was set aside, whether a file was put away."""
    came: dict[int, str] = {}
    aside: set[int] = set()
    salvaged = False
    for _ in range(MOST_STARTS):
        begin_boot(folder)
        try:
            with open_outbox(folder, device="scope", min_free_mb=0) as outbox:
                salvaged |= outbox.salvage is not None
                outbox.sample_state(), outbox.finished_keys(), outbox.oldest_age_s(), outbox.notes("")
                outbox.append([Draft("event", "hv/1/lab/scope/event", {"schema": "hv/1/event", "n": 0})])
                while rows := outbox.pending(0, 64):
                    for row in rows:
                        if row.is_intact:
                            message = json.loads(row.payload)
                            if row.stream == "field":
                                came[message["n"]] = message["text"]
                            outbox.acknowledge([row.row_id])
                        else:
                            aside.add(row.seq)
                            outbox.reject(row.row_id, "the disk has changed it")
                return came, aside, salvaged
        except OutboxDamaged:
            continue
    raise OutboxError(f"{folder}: {MOST_STARTS} starts have met damage")


def run(folder: Path, seeds: int, first: int = 0, *, minutes: float = math.inf) -> Verdict:
    until_s = time.monotonic() + 60 * minutes
    verdict = Verdict()
    for seed in range(first, first + seeds):
        if time.monotonic() > until_s:
            break
        rng = random.Random(seed)
        place = folder / str(seed)
        place.mkdir()
        marks = fill(place, rng)
        before = {part.name: part.read_bytes() for part in place.glob(f"{DATABASE_NAME}*")}
        what = f"seed {seed}: {hurt(place, rng)}"
        verdict.seeds += 1
        verdict.rows += len(marks)
        unhurt = unhurt_numbers(before, place, marks)
        verdict.unhurt += len(unhurt)
        try:
            came, aside, salvaged = deliver(place)
        except Exception as error:  # whatever it is would end the agent, again and again
            verdict.faults.append(f"{what}: {type(error).__name__}: {error}")
            continue
        verdict.salvaged += salvaged
        verdict.delivered += len(unhurt & came.keys())
        verdict.also += len((set(marks) - unhurt) & (came.keys() | aside))
        if missing := unhurt - came.keys() - {max(marks)}:
            verdict.faults.append(f"{what}: unhurt and not delivered: {sorted(missing)[:5]} of {len(marks)}")
        for number, text in came.items():
            if number not in marks or text.replace(marks[number], ""):
                verdict.faults.append(f"{what}: {number} was never stored like this")
        shutil.rmtree(place)
    return verdict


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.damage", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    add_minutes(parser)
    options = parser.parse_args(arguments)
    logging.getLogger("agent").setLevel(logging.CRITICAL)  # what a damaged outbox says of itself is expected here
    return prove(
        lambda folder: run(folder, options.seeds, options.first, minutes=options.minutes),
        name="damage",
        is_in_memory=True,
    )


if __name__ == "__main__":
    sys.exit(main())
