"""The proof that the whole chain loses nothing under faults, in short; `soak` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.central.postgresql import find_programs
from tests.proofs.fault_schedule import run


@pytest.mark.timeout(500)
def test_nothing_committed_is_lost_while_everything_fails_in_turn(tmp_path: Path) -> None:
    verdict = run(minutes=0.5, seed=3, folder=tmp_path)
    assert verdict.is_kept, str(verdict)
    assert sum(verdict.faults.values()) >= 5
    assert verdict.committed["field"] > 3


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_nothing_committed_is_lost_in_thirty_minutes_of_faults(tmp_path: Path, database: str) -> None:
    if database == "postgresql" and find_programs() is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    verdict = run(minutes=30, seed=4, folder=tmp_path, database=database)
    print(verdict)
    assert verdict.is_kept, str(verdict)
