"""How the proofs of the outbox run, end and tell their verdict."""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tests.brokers import NotInstalled

MOST_FAULTS_TOLD = 10
MEMORY = Path("/dev/shm")


class Verdict(Protocol):
    """What a proof has seen; its words tell the figures."""

    faults: list[str]


def add_minutes(parser: argparse.ArgumentParser) -> None:
    """The option of a proof that may end before it is through."""
    parser.add_argument("--minutes", type=float, default=math.inf, help="ends after this time with what it has")


def faults_in_words(faults: Sequence[str]) -> str:
    """How many, and the first of them, a line each."""
    return f"{len(faults)} faults" + "".join(f"\n  {fault}" for fault in faults[:MOST_FAULTS_TOLD])


def prove(run: Callable[[Path], Verdict], *, name: str, is_in_memory: bool) -> int:
    """Run in a folder that is thrown away; print the verdict and the seconds.

    is_in_memory: on a file system in memory where there is one, for a proof to which the disk itself adds nothing but
    time. Gives the exit status: 0 no fault, 1 faults, 2 something that it needs is not installed.
    """
    begun_s = time.monotonic()
    place = MEMORY if is_in_memory and os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=place) as folder:
        try:
            verdict = run(Path(folder))
        except NotInstalled as error:
            print(error, file=sys.stderr)
            return 2
    print(f"{verdict} ({time.monotonic() - begun_s:.0f} s)")
    return 1 if verdict.faults else 0
