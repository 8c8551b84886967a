"""A row leaves when it is acknowledged, for good where no history is kept."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

from agent.delivery.outbox import Outbox, begin_boot
from tests.delivery.outbox.making import make_draft, make_outbox


def test_a_row_leaves_when_it_is_acknowledged_and_only_then(outbox: Outbox) -> None:
    row_ids = outbox.append([make_draft(text=str(n)) for n in range(5)])
    assert [row.row_id for row in outbox.pending(0, 3)] == list(row_ids[:3])
    assert [row.row_id for row in outbox.pending(row_ids[2], 10)] == list(row_ids[3:])
    assert outbox.depth() == 5
    outbox.acknowledge([row_ids[0], row_ids[3], 999_999])
    outbox.acknowledge([row_ids[0]])
    assert [row.row_id for row in outbox.pending(0, 10)] == [row_ids[1], row_ids[2], row_ids[4]]
    assert outbox.depth() == 3


def test_what_leaves_is_not_written_over_with_zeros(tmp_path: Path) -> None:
    with make_outbox(tmp_path) as outbox:
        (row_id,) = outbox.append([make_draft(text="x" * 400_000)])
        with contextlib.closing(sqlite3.connect(outbox.path)) as other:
            other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        outbox.acknowledge([row_id])
        assert outbox.depth() == 0
        assert Path(f"{outbox.path}-wal").stat().st_size < 200_000


def test_the_file_becomes_small_again_after_an_outage(outbox: Outbox) -> None:
    big = [make_draft(text="x" * 30_000) for _ in range(100)]
    row_ids = [row_id for _ in range(8) for row_id in outbox.append(big)]
    for start in range(0, len(row_ids), 20):
        outbox.acknowledge(row_ids[start : start + 20])
    for _ in range(40):
        outbox.acknowledge([])
    with contextlib.closing(sqlite3.connect(outbox.path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert outbox.path.stat().st_size < 6 * 2**20


def test_the_age_of_the_oldest_row_is_monotonic_in_its_boot_and_by_the_clock_afterwards(tmp_path: Path) -> None:
    times = {"ns": 10_000_000_000, "s": 1000.0}
    clocks: dict[str, Any] = {"monotonic_ns": lambda: times["ns"], "unix_time": lambda: times["s"]}
    with make_outbox(tmp_path, **clocks) as outbox:
        assert outbox.oldest_age_s() is None
        outbox.append([make_draft(captured_monotonic_ns=8_000_000_000), make_draft()])
        times["s"] = 1_000_000.0  # the clock steps
        assert outbox.oldest_age_s() == 2.0
    begin_boot(tmp_path)
    times["ns"] = 0
    with make_outbox(tmp_path, **clocks) as outbox:
        assert outbox.oldest_age_s() == 999_000.0
        times["s"] = 0.0  # the clock is back in the past
        assert outbox.oldest_age_s() == 0.0
