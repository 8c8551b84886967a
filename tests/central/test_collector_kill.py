"""The proof that nothing acknowledged is missing, in short; `soak` is the long one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proofs.collector_kill import run


@pytest.mark.timeout(300)
def test_a_killed_collector_has_all_that_it_acknowledged(database_url: str, tmp_path: Path) -> None:
    verdict = run(kills=3, seed=1, url=database_url, folder=tmp_path)
    assert verdict.is_kept, str(verdict)
    assert verdict.acknowledged > 100


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_collector_killed_five_hundred_times_has_all_that_it_acknowledged(database_url: str, tmp_path: Path) -> None:
    verdict = run(kills=500, seed=2, url=database_url, folder=tmp_path)
    print(verdict)
    assert verdict.is_kept, str(verdict)
