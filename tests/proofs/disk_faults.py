"""The disk fails at every single operation of an outbox: intake stops and says so, goes on by itself, loses nothing.

    python -m tests.proofs.disk_faults [--every 1] [--minutes 40]

A scripted session of an agent runs behind a shim (`disk_shim.c`): its pipeline stores frames; its publisher's side lets
them leave, sets them aside and asks for them again; the agent is started three times. Each opening for writing, write,
truncation, sync, rename and unlink of that session is a moment. At each of them, in a session of its own, the disk
fails with "no space left", "read-only file system" or "input/output error": once, or from there on until it is mended.
Where it has failed, the files are looked at as a power cut would leave them.

Exits with 1 when a stored message is missing or altered, one that was refused is there, half a frame is there, intake
stopped without an alert or the alert stayed, or anything but a new start at the very beginning was needed to go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from agent.alerts import open_problems
from agent.camera.grabber import FrameQueue
from agent.counting.thread import Pipeline
from agent.delivery.messages import Draft
from agent.delivery.outbox import DATABASE_NAME, Outbox, Row, begin_boot, open_outbox
from agent.domain import SampleState
from agent.errors import OutboxError
from agent.health import Health, Stage
from agent.pipeline import Outcome
from tests.frames import make_bench
from tests.proofs import disk_shim
from tests.proofs.proving import add_minutes, faults_in_words, prove

MODULE = "tests.proofs.disk_faults"

ERRORS = {"no space": errno.ENOSPC, "read-only": errno.EROFS, "I/O error": errno.EIO}
LASTING = 10**9

REFUSALS_TO_MEND = 3
"""So often a lasting fault is met before the disk is mended."""

MOST_TRIES = 20

CELLS_A_FRAME = 2
STARTS = 3
FRAMES_A_START = 8
CHECKPOINT_PAGES = 40
"""Instead of SQLite's 1000, so that a short session moves its log into the file too."""

Key = tuple[str, int]
"""Stream and number of a message."""

T = TypeVar("T")


@dataclass(slots=True)
class Verdict:
    """sessions: one for each moment and failure. met: those in which somebody felt it. lost: what must be 0."""

    sessions: int = 0
    moments: int = 0
    met: int = 0
    stops: int = 0
    starts: int = 0
    stored: int = 0
    lost: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        words = f"{self.sessions} sessions over {self.moments} disk operations, in {self.met} the failure was felt: "
        words += (
            f"intake stopped {self.stops} times and went on by itself, {self.starts} starts were refused in words; "
        )
        words += f"{self.stored} stored messages looked for, {self.lost} missing; {faults_in_words(self.faults)}"
        return words

    def add(self, other: Verdict) -> None:
        for name in ("sessions", "met", "stops", "starts", "stored", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.moments = max(self.moments, other.moments)
        self.faults += other.faults


class NotMended(Exception):
    """The disk was mended and the agent did not go on."""


class Disk:
    """The failure in hand, and how often it was felt. on_first: called when it was felt for the first time."""

    def __init__(self, shim: Any, on_first: Callable[[], None]) -> None:
        self._shim = shim
        self._on_first = on_first
        self.refusals = 0

    def feel(self) -> None:
        self.refusals += 1
        if self.refusals == 1:
            self._on_first()
        if self.refusals == REFUSALS_TO_MEND:
            self._shim.shim_arm(-1, 0, 0)
        if self.refusals > MOST_TRIES:
            raise NotMended


class Watcher(Health):
    """The agent's health; a beat of a stopped pipeline is one refusal more, and there must be an alert."""

    def __init__(self, disk: Disk, verdict: Verdict) -> None:
        super().__init__()
        self.disk = disk
        self.verdict = verdict
        self.was_stopped = False

    def beat(self, stage: Stage) -> None:
        super().beat(stage)
        if self.snapshot().outbox == "stopped":
            self.verdict.stops += not self.was_stopped
            self.was_stopped = True
            if "outbox-stopped" not in open_problems(self.snapshot()):
                self.verdict.faults.append("intake stopped and there was no alert")
            self.disk.feel()


@dataclass(slots=True)
class Ledger:
    """What the session knows for sure. stored: frames. leaving: rows told to leave; gone: of them those that have.

    Numbers are without gaps also where the disk refused, so field n is frame n, and its cells are 2 n - 1 and 2 n.
    """

    stored: int = 0
    leaving: set[Key] = field(default_factory=set)
    gone: set[Key] = field(default_factory=set)

    @staticmethod
    def keys_of(frame: int) -> list[Key]:
        cells = range((frame - 1) * CELLS_A_FRAME + 1, frame * CELLS_A_FRAME + 1)
        return [("field", frame), *(("cell", seq) for seq in cells)]


class Session:
    """The script. Raises NotMended when it cannot go on though the disk is mended."""

    def __init__(self, folder: Path, disk: Disk, verdict: Verdict) -> None:
        self.folder = folder
        self.disk = disk
        self.verdict = verdict
        self.health = Watcher(disk, verdict)
        self.ledger = Ledger()
        self.in_hand = 0

    def run(self) -> None:
        for start in range(STARTS):
            self._run_once(start)

    def _run_once(self, start: int) -> None:
        """The agent from its start to its end."""
        outbox = self._begin(start)
        senders = self._patiently(lambda: open_here(self.folder, start, verify=False))
        pipeline = self._pipeline(outbox)
        for step in range(FRAMES_A_START):
            self.in_hand = self.ledger.stored + 1
            pipeline._store(outcome(self.in_hand))
            self.ledger.stored = self.in_hand
            pipeline._intake.store_waiting()
            self._send(senders, start, step)
        if self.health.snapshot().outbox != "ok":
            self.verdict.faults.append("the disk is mended and the alert stays")
        senders.close()
        outbox.close()

    def _begin(self, start: int) -> Outbox:
        """As the agent's process: a start that is refused ends it, and systemd starts it anew."""
        while True:
            try:
                begin_boot(self.folder)
                return open_here(self.folder, start, verify=True)
            except OutboxError:
                self.verdict.starts += 1
                self.disk.feel()

    def _pipeline(self, outbox: Outbox) -> Pipeline:
        sample = outbox.sample_state() or SampleState("s-1")
        if sample.fields != self.ledger.stored:
            self.verdict.faults.append(f"the sample has {sample.fields} fields, {self.ledger.stored} were stored")
        return Pipeline(
            frames=FrameQueue(1), outbox=outbox, bench=make_bench(), sample=sample, health=self.health, retry_s=0
        )

    def _send(self, outbox: Outbox, start: int, step: int) -> None:
        """What the publisher does to an outbox, each in its turn."""
        patiently = self._patiently
        rows = [row for row in patiently(lambda: outbox.pending(0, 1000)) if row.stream != "event"]
        first = rows[0]
        if step == 1:
            patiently(lambda: outbox.reject(first.row_id, "a test"))
        elif step == 2:
            self._leave(rows[:4], lambda: outbox.acknowledge([row.row_id for row in rows[:4]]))
        elif step == 3:
            fields = [row for row in rows if row.stream == "field"]
            boot, seq = fields[1].boot, fields[1].seq
            up_to_it = [row for row in fields if row.seq <= seq and row.boot <= boot]
            last = up_to_it[-1].row_id
            self._leave(up_to_it, lambda: outbox.confirm("desk", "field", boot, seq, ("desk",), up_to_row=last))
        elif step == 4:
            patiently(lambda: outbox.request_replay("cell", 1, 3))
            again = patiently(lambda: outbox.asked_again(0, 10))
            patiently(lambda: outbox.acknowledge([row.row_id for row in again]))
        elif step == 5:
            patiently(lambda: outbox.note_packet_limit(1_000_000 + start))
        elif step == 6:
            patiently(outbox.requeue)
        elif step == 7:
            patiently(outbox.prune)

    def _leave(self, rows: Sequence[Row], deed: Callable[[], object]) -> None:
        keys = {(row.stream, row.seq) for row in rows}
        self.ledger.leaving |= keys
        self._patiently(deed)
        self.ledger.gone |= keys

    def _patiently(self, deed: Callable[[], T]) -> T:
        """As the publisher: what cannot be done now is done again later."""
        while True:
            try:
                return deed()
            except OutboxError:
                self.disk.feel()

    def compare(self, folder: Path, where: str, *, is_cut: bool) -> None:
        """All that was stored is there, once, as it was, and nothing else.

        is_cut: the files are as they were left in the middle; the frame in hand may be there, as a whole.
        """
        ledger = self.ledger
        problems = []
        with open_here(folder, 0, verify=True) as outbox:
            if outbox.salvage is not None:
                self.verdict.faults.append(f"{where}: does not open whole: {outbox.salvage.reason}")
                return
            state = outbox.sample_state()
            outbox.requeue()
            waiting = outbox.pending(0, 100_000)
            for stream in ("field", "cell"):
                outbox.request_replay(stream, 1, 100_000)
            history = outbox.asked_again(0, 100_000)
        fields = 0 if state is None else state.fields
        if fields not in ({ledger.stored, self.in_hand} if is_cut else {ledger.stored}):
            problems.append(f"the sample knows {fields} fields, {ledger.stored} were stored")
        rows = [*waiting, *history]
        problems += [f"{row.stream} {row.seq} is altered" for row in rows if not is_as_made(row)]
        keys = [(row.stream, row.seq) for row in rows]
        if len(set(keys)) < len(keys):
            problems.append("a message is there twice")
        expected = {key for frame in range(1, fields + 1) for key in ledger.keys_of(frame)}
        if missing := expected - set(keys) - ledger.leaving:
            problems.append(f"missing: {sorted(missing)}")
        if strange := {key for key in keys if key[0] != "event"} - expected:
            problems.append(f"refused, or of half a frame, and there: {sorted(strange)}")
        if back := {(row.stream, row.seq) for row in waiting} & ledger.gone and not is_cut:
            problems.append(f"had left and waits again: {back}")
        self.verdict.stored += len(expected)
        self.verdict.lost += len(missing)
        self.verdict.faults += [f"{where}: {problem}" for problem in problems]


def open_here(folder: Path, start: int, *, verify: bool) -> Outbox:
    """The first starts keep what was confirmed, the last one lets it go."""
    keep_mb = 0.0 if start == STARTS - 1 else 1.0
    outbox = open_outbox(
        folder, device="dev", min_free_mb=0, keep_mb=keep_mb, keep_hours=1, verify=verify, mounts_file=Path("/none")
    )
    with outbox.file.reading() as connection:
        connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
    return outbox


def outcome(frame: int) -> Outcome:
    """A frame's field and cells, the sample with it counted, and a note; some are larger than a page."""
    text = f"<{frame}>" * (1500 if frame % 4 == 0 else 60)
    drafts = [Draft("field", "hv/1/site/dev/field/s-1", {"schema": "hv/1/field", "n": frame, "text": text})]
    for _ in range(CELLS_A_FRAME):
        drafts.append(Draft("cell", "hv/1/site/dev/cell/s-1", {"schema": "hv/1/cell", "n": frame}))
    sample = SampleState("s-1", fields=frame, next_cell_number=1 + frame * CELLS_A_FRAME)
    notes = MappingProxyType({f"slide/s-1/{frame}": text[:100], f"slide/s-1/{frame - 3}": None})
    return Outcome(sample, f"frame-{frame}", tuple(drafts), notes=notes)


def is_as_made(row: Row) -> bool:
    """Intact, and of the frame that its number says."""
    if not row.is_intact or row.stream == "event":
        return row.is_intact
    message = json.loads(row.payload)
    frame = row.seq if row.stream == "field" else (row.seq + CELLS_A_FRAME - 1) // CELLS_A_FRAME
    made = next(draft.body for draft in outcome(frame).drafts if draft.stream == row.stream)
    return message.items() >= made.items() and message["seq"] == row.seq


# ------------------------------------------------------------------------------------------------ behind the shim


def play(folder: Path, moment: int | None, fault: str, *, lasts: bool) -> Verdict:
    """One session; moment: the operation that fails, None = none does. `moments`: operations that there were."""
    shim = disk_shim.shim()
    verdict = Verdict(sessions=1)
    place = folder / "played"
    place.mkdir()
    where = f"{fault}{', lasting' if lasts else ''}, at operation {moment}"

    def look_as_after_a_cut() -> None:
        cut = folder.with_name("cut")
        cut.mkdir()
        for name in (DATABASE_NAME, f"{DATABASE_NAME}-wal", "boot"):
            if (place / name).exists():
                shutil.copy(place / name, cut / name)
        # Not before something was begun: an empty folder is a new outbox.
        if session.in_hand:
            session.compare(cut, f"{where}, cut there", is_cut=True)
        shutil.rmtree(cut)

    disk = Disk(shim, look_as_after_a_cut)
    session = Session(place, disk, verdict)
    before = shim.shim_operations()
    if moment is not None:
        shim.shim_arm(moment, ERRORS[fault], LASTING if lasts else 1)
    try:
        session.run()
    except NotMended:
        verdict.faults.append(f"{where}: the disk is mended and nothing goes on")
    except Exception as error:  # whatever it is would end the agent
        verdict.faults.append(f"{where}: {type(error).__name__}: {error}")
    finally:
        shim.shim_arm(-1, 0, 0)
    verdict.moments = shim.shim_operations() - before
    verdict.met = int(disk.refusals > 0)
    if not verdict.faults:
        session.compare(place, where, is_cut=False)
    shutil.rmtree(place)
    return verdict


def play_all(folder: Path, every: int, first: int, until_s: float) -> Verdict:
    """A session for each moment and failure; with every > 1 each failure takes its turn at each so manieth moment."""
    total = play(folder, None, "no space", lasts=False)
    kinds = [(fault, lasts) for fault in ERRORS for lasts in (False, True)]
    for number, moment in enumerate(range(first, total.moments, every)):
        for fault, lasts in kinds if every == 1 else [kinds[number % len(kinds)]]:
            if time.monotonic() > until_s:
                return total
            total.add(play(folder, moment, fault, lasts=lasts))
    return total


def run(folder: Path, every: int = 1, first: int = 0, minutes: float = math.inf) -> Verdict:
    """Raises NotInstalled without a C compiler."""
    library = disk_shim.build(folder)
    place, report = folder / "place", folder / "report"
    place.mkdir()
    arguments = ["--play", str(place.resolve()), "--report", str(report), "--every", str(every), "--first", str(first)]
    child = disk_shim.start(library, place, MODULE, *arguments, "--minutes", str(minutes))
    code = child.wait()
    assert code == 0, f"the program behind the shim ended with {code}"
    return Verdict(**json.loads(report.read_text()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    parser.add_argument("--every", type=int, default=1, help="only each so manieth moment, one failure at each")
    parser.add_argument("--first", type=int, default=0, help="the first moment (default: %(default)s)")
    add_minutes(parser)
    parser.add_argument("--play", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.play is not None:
        logging.getLogger("agent").setLevel(logging.CRITICAL)  # what a failing outbox says of itself is expected here
        verdict = play_all(options.play, options.every, options.first, time.monotonic() + 60 * options.minutes)
        options.report.write_text(json.dumps(dataclasses.asdict(verdict)))
        return 0
    return prove(
        lambda folder: run(folder, options.every, options.first, options.minutes), name="disk-faults", is_in_memory=True
    )


if __name__ == "__main__":
    sys.exit(main())
