"""An agent's delivery is killed (SIGKILL) at random moments and at each labelled point: nothing lost, nothing wrong.

    python -m tests.proofs.kills [--kills 1000] [--seed 1] [--minutes 25]

A process appends frames to an outbox and hands what waits to a receiver that keeps what it got on disk, as the
publisher does: send, then let it leave. It is killed again and again: after a random number of disk operations, after a
random time, or at a label (below), and goes on where it was. At the end the ledger of all that `append` had promised is
compared with what came. Exits with 1 when a message is missing, altered, numbered twice or half of a frame is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.delivery.messages import Draft
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.outbox import file as outbox_file
from agent.domain import SampleState
from tests.proofs import disk_shim
from tests.proofs.proving import add_minutes, faults_in_words, prove

MODULE = "tests.proofs.kills"

LABELS = (
    *("before-boot", "after-boot", "opened", "before-append", "before-commit", "after-commit", "after-append"),
    *("before-send", "after-send", "before-leave", "before-leave-commit", "after-leave"),
)
"""Where the process can be killed; `commit` is that of an append, `leave` the confirmation of rows."""

CELLS_A_FRAME = 2


@dataclass(slots=True)
class Verdict:
    """promised: messages whose append had returned. came: different ones that arrived; repeats: again."""

    kills: int = 0
    at: Counter[str] = field(default_factory=Counter)
    promised: int = 0
    came: int = 0
    repeats: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = ", ".join(f"{count} {name}" for name, count in self.at.most_common())
        words = (
            f"{self.kills} kills ({where}); {self.promised} messages promised, {self.came} came, {self.repeats} repeats"
        )
        return f"{words}; {faults_in_words(self.faults)}"


def work(folder: Path, label: str, nth: int) -> None:
    """The process that is killed: at the nth time that it comes to `label`; behind the shim at the nth operation."""
    left = [nth]

    def reach(name: str) -> None:
        if name == label:
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    if label == "operation":
        disk_shim.shim().shim_arm(nth, 0, 1)
    reach("before-boot")
    begin_boot(folder)
    reach("after-boot")
    inside = [""]
    original: Callable[..., Any] = outbox_file.transaction

    @contextmanager
    def transaction(connection: Any) -> Iterator[Any]:
        with original(connection) as opened:
            yield opened
            if inside[0]:
                reach(f"before-{inside[0]}")
        if inside[0] == "commit":
            reach("after-commit")

    outbox_file.transaction = transaction  # type: ignore[assignment]
    with open_outbox(folder, device="scope", min_free_mb=0, keep_mb=0.1, keep_hours=1) as outbox:
        reach("opened")
        rng = random.Random(outbox.boot)
        with (folder / "promised").open("a") as promised, (folder / "came").open("a") as came:
            while True:
                inside[0] = "commit"
                _append(outbox, promised, reach)
                inside[0] = "leave-commit"
                if rng.random() < 0.5:
                    _send(outbox, came, rng.randrange(1, 8), reach)


def _append(outbox: Outbox, promised: Any, reach: Callable[[str], None]) -> None:
    """The frame after the last one of the stored sample, as the pipeline does."""
    before = outbox.sample_state()
    sample = SampleState("s1", fields=(before.fields if before else 0) + 1)
    body = {"n": sample.fields, "text": "x" * (sample.fields * 37 % 3000)}
    cell = Draft("cell", "t/cell", {"schema": "hv/1/cell", "n": sample.fields})
    reach("before-append")
    drafts = [Draft("field", "t/field", {"schema": "hv/1/field", **body}), *[cell] * CELLS_A_FRAME]
    outbox.append(drafts, sample=sample)
    reach("after-append")
    promised.write(f"{sample.fields}\n")
    promised.flush()


def _send(outbox: Outbox, came: Any, count: int, reach: Callable[[str], None]) -> None:
    rows = outbox.pending(0, count)
    reach("before-send")
    for row in rows:
        message = json.loads(row.payload)
        came.write(json.dumps([row.stream, row.seq, message["id"], message["n"], len(message.get("text", ""))]) + "\n")
    came.flush()
    reach("after-send")
    reach("before-leave")
    outbox.acknowledge([row.row_id for row in rows])
    reach("after-leave")


def run(folder: Path, kills: int, seed: int = 1, *, minutes: float = math.inf) -> Verdict:
    """Raises NotInstalled without a C compiler."""
    until_s = time.monotonic() + 60 * minutes
    library = disk_shim.build(folder)
    verdict = Verdict()
    rng = random.Random(seed)
    state = folder / "state"
    state.mkdir()
    while verdict.kills < kills and time.monotonic() < until_s:
        how = (
            LABELS[verdict.kills] if verdict.kills < len(LABELS) else rng.choice((*LABELS, "operation", "time", "time"))
        )
        once = how in ("before-boot", "after-boot", "opened")
        nth = 1 if once else rng.randrange(1, 400 if how == "operation" else 30)
        child = disk_shim.start(library, state, MODULE, "--work", str(state), "--label", how, "--nth", str(nth))
        if how == "time":
            time.sleep(rng.uniform(0.3, 1.2))
            child.kill()
        code = child.wait(120)
        assert code == -signal.SIGKILL, f"{how} {nth}: ended with {code}"
        verdict.kills += 1
        verdict.at[how] += 1
    _compare(state, verdict)
    return verdict


def _compare(state: Path, verdict: Verdict) -> None:
    begin_boot(state)
    came = [json.loads(line) for line in _whole_lines(state / "came")]
    with open_outbox(state, device="scope", min_free_mb=0) as outbox:
        if outbox.salvage is not None:
            verdict.faults.append(f"the outbox was damaged: {outbox.salvage.reason}")
        for row in outbox.pending(0, 10**9):
            message = json.loads(row.payload)
            came.append([row.stream, row.seq, message["id"], message["n"], len(message.get("text", ""))])
        last = outbox.sample_state()
    unique = {tuple(one) for one in came}
    verdict.came, verdict.repeats = len(unique), len(came) - len(unique)
    frames: dict[int, list[str]] = {}
    for stream, _, _, number, size in unique:
        frames.setdefault(number, []).append(stream)
        if stream == "field" and size != number * 37 % 3000:
            verdict.faults.append(f"frame {number} is altered")
    for stream in ("field", "cell"):
        seqs = sorted(seq for name, seq, *_ in unique if name == stream)
        if seqs != list(range(1, len(seqs) + 1)):
            verdict.faults.append(f"{stream}: numbers are missing or double")
    promised = [int(line) for line in _whole_lines(state / "promised")]
    verdict.promised = (1 + CELLS_A_FRAME) * len(promised)
    whole = sorted(["field", *["cell"] * CELLS_A_FRAME])
    for number in range(1, max([*promised, last.fields if last else 0]) + 1):
        if sorted(frames.pop(number, [])) != whole:
            verdict.faults.append(f"frame {number} is not whole")
    if frames:
        verdict.faults.append(f"frames that the sample does not know: {sorted(frames)[:5]}")


def _whole_lines(path: Path) -> list[str]:
    """Without one that the kill has cut."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.proofs.kills", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    add_minutes(parser)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--label", default="", help=argparse.SUPPRESS)
    parser.add_argument("--nth", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work is not None:
        work(options.work, options.label, options.nth)
    return prove(
        lambda folder: run(folder, options.kills, options.seed, minutes=options.minutes),
        name="kills",
        is_in_memory=False,
    )


if __name__ == "__main__":
    sys.exit(main())
