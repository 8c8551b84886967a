"""The power is cut under an outbox at any moment: it opens again, and nothing that `append` had stored is missing.

    python -m tests.proofs.power_cuts [--cuts 15000] [--seed 1] [--minutes 40]

An outbox is filled and emptied for real, behind a shim that records every write, truncation and sync (`disk_shim.c`). A
cut is then a moment in that record: what was synced before it is there; of what was not, any part may have reached the
disk, in any order, sector by sector (512 bytes). The files that a disk would hold then are made, and opened by the
agent's own code. Exits with 1 when one does not open whole, a stored message is missing or altered, or half a frame is
there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from agent.delivery.messages import Draft
from agent.delivery.outbox import DATABASE_NAME, Outbox, begin_boot, open_outbox
from agent.errors import OutboxError
from tests.proofs import disk_shim
from tests.proofs.proving import add_minutes, faults_in_words, prove

MODULE = "tests.proofs.power_cuts"

SECTOR_BYTES = 512
FRAMES_A_RECORDING = 300
CELLS_A_FRAME = 2
MOST_WAITING = 60


@dataclass(slots=True)
class Verdict:
    """cuts: of them unsynced ones cut into writes that were not synced. lost, half: what must be 0."""

    cuts: int = 0
    unsynced: int = 0
    checked: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = f"{self.cuts} power cuts, {self.unsynced} of them into unsynced writes; {self.checked} stored messages"
        return f"{words} looked for; {faults_in_words(self.faults)}"


class Disk:
    """One file as it would be after a cut: what is durable, and what was written since."""

    def __init__(self, content: bytes = b"") -> None:
        self.durable = bytearray(content)
        self.unsynced: list[disk_shim.Operation] = []

    def sync(self) -> None:
        for operation in self.unsynced:
            _apply(self.durable, operation)
        self.unsynced.clear()

    def cut(self, rng: random.Random) -> bytes:
        """What is there after the cut: any part of the unsynced writes."""
        content = bytearray(self.durable)
        share = rng.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for operation in self.unsynced:
            if operation.kind == "T":
                if rng.random() < share:
                    _apply(content, operation)
                continue
            at, end = operation.offset, operation.offset + len(operation.payload)
            while at < end:
                stop = min(end, (at // SECTOR_BYTES + 1) * SECTOR_BYTES)
                if rng.random() < share:
                    part = operation.payload[at - operation.offset : stop - operation.offset]
                    _apply(content, disk_shim.Operation("W", "", at, part))
                at = stop
        return bytes(content)


def _apply(content: bytearray, operation: disk_shim.Operation) -> None:
    if operation.kind == "T":
        del content[operation.offset :]
        content.extend(bytes(operation.offset - len(content)))
        return
    if len(content) < operation.offset:
        content.extend(bytes(operation.offset - len(content)))
    content[operation.offset : operation.offset + len(operation.payload)] = operation.payload


def frame(number: int, rng: random.Random) -> list[Draft]:
    """A field and its cells, each carrying the frame's number."""
    size = rng.choice((100, 2_000, 9_000))
    body = {"n": number, "text": "x" * size}
    field_draft = Draft("field", "hv/1/lab/scope/field/s1", {"schema": "hv/1/field", **body})
    cell = Draft("cell", "hv/1/lab/scope/cell/s1", {"schema": "hv/1/cell", "n": number})
    return [field_draft, *[cell] * CELLS_A_FRAME]


def open_here(folder: Path) -> Outbox:
    return open_outbox(folder, device="scope", min_free_mb=0, keep_mb=0.2, keep_hours=1)


def fill(folder: Path, seed: int) -> None:
    """What is recorded, behind the shim. Mark n: frame n is stored. Mark -n: up to frame n all may leave."""
    rng = random.Random(seed)
    shim = disk_shim.shim()
    outbox = open_here(folder)
    for number in range(1, FRAMES_A_RECORDING + 1):
        outbox.append(frame(number, rng))
        shim.shim_mark(number)
        if outbox.depth() > MOST_WAITING or rng.random() < 0.05:
            rows = outbox.pending(0, rng.randrange(1, MOST_WAITING))
            shim.shim_mark(-max(json.loads(row.payload)["n"] for row in rows))
            outbox.acknowledge([row.row_id for row in rows])
    os._exit(0)  # as killed: no closing, no last checkpoint


def run(folder: Path, cuts: int, seed: int = 1, *, lies: bool = False, minutes: float = math.inf) -> Verdict:
    """lies: the disk says that it has synced and has not. Raises NotInstalled without a C compiler."""
    until_s = time.monotonic() + 60 * minutes
    library = disk_shim.build(folder)
    verdict = Verdict()
    rng = random.Random(seed)
    a_recording = 1500
    while verdict.cuts < cuts and time.monotonic() < until_s:
        place = folder / f"recorded-{verdict.cuts}"
        place.mkdir()
        begin_boot(place)
        open_here(place).close()
        before = (place / DATABASE_NAME).read_bytes()
        log = folder / "record"
        log.unlink(missing_ok=True)
        child = disk_shim.start(
            library, place, MODULE, "--fill", str(place), "--seed", str(rng.randrange(2**31)), log=log
        )
        assert child.wait(600) == 0, "the recorded program failed"
        _cut_often(place, before, log, min(a_recording, cuts - verdict.cuts), rng, verdict, lies=lies, until_s=until_s)
        shutil.rmtree(place)
    return verdict


def _cut_often(
    place: Path,
    before: bytes,
    log: Path,
    cuts: int,
    rng: random.Random,
    verdict: Verdict,
    *,
    lies: bool,
    until_s: float,
) -> None:
    operations = list(disk_shim.read_log(log))
    moments = sorted(rng.randrange(1, len(operations)) for _ in range(cuts))
    disks = {str(place.resolve() / DATABASE_NAME): Disk(before)}
    stored = left = 0
    done = 0
    for moment in moments:
        if time.monotonic() > until_s:
            return
        for operation in operations[done:moment]:
            if operation.kind == "M":
                number = operation.offset if operation.offset < 2**63 else operation.offset - 2**64
                stored, left = (number, left) if number > 0 else (stored, max(left, -number))
                continue
            disk = disks.setdefault(operation.path, Disk())
            if operation.kind != "S":
                disk.unsynced.append(operation)
            elif not lies:
                disk.sync()
        done = moment
        after = place / "after"
        after.mkdir()
        for path, disk in disks.items():
            if Path(path).name.startswith(DATABASE_NAME):
                (after / Path(path).name).write_bytes(disk.cut(rng))
        begin_boot(after)
        verdict.cuts += 1
        verdict.unsynced += any(disk.unsynced for disk in disks.values())
        _look(after, stored, left, f"cut {verdict.cuts} at operation {moment}", verdict)
        shutil.rmtree(after)


def _look(after: Path, stored: int, left: int, where: str, verdict: Verdict) -> None:
    try:
        with open_here(after) as outbox:
            if outbox.salvage is not None:
                verdict.faults.append(f"{where}: does not open whole: {outbox.salvage.reason}")
                return
            parts: dict[int, list[str]] = {}
            for row in outbox.pending(0, 100_000):
                if not row.is_intact:
                    verdict.faults.append(f"{where}: {row.stream} {row.seq} is altered")
                parts.setdefault(json.loads(row.payload)["n"], []).append(row.stream)
            outbox.append(frame(10**6, random.Random(0)))
    except OutboxError as error:
        verdict.faults.append(f"{where}: {error}")
        return
    whole = ["field", *["cell"] * CELLS_A_FRAME]
    for number in range(left + 1, stored + 1):
        verdict.checked += len(whole)
        if parts.get(number) != whole:
            verdict.faults.append(f"{where}: frame {number} was stored and is {parts.get(number)}")
    # The one in hand: all or nothing. Up to `left`: rows may leave one by one.
    for number in set(parts) - set(range(1, stored + 1)):
        if number != stored + 1 or parts[number] != whole:
            verdict.faults.append(f"{where}: half of frame {number}: {parts[number]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.power_cuts", description=__doc__.split("\n")[0])
    parser.add_argument("--cuts", type=int, default=15_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    add_minutes(parser)
    parser.add_argument("--fill", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    logging.getLogger("agent").setLevel(logging.CRITICAL)  # what a cut outbox says of itself is expected here
    if options.fill is not None:
        fill(options.fill, options.seed)
    return prove(
        lambda folder: run(folder, options.cuts, options.seed, minutes=options.minutes),
        name="power-cuts",
        is_in_memory=True,
    )


if __name__ == "__main__":
    sys.exit(main())
