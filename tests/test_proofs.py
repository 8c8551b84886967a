"""The short versions of the proofs that run for long; the long ones are programs: `python -m tests.proofs.NAME`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.brokers import NotInstalled
from tests.proofs import clock, memory


@pytest.mark.timeout(300)
def test_at_full_rate_with_faults_the_agent_keeps_no_frames(tmp_path: Path) -> None:
    """Half a minute shows gross leaks only: frames that are kept would be some 50 MB."""
    try:
        figures = memory.run(tmp_path, minutes=0.6, seed=1)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert figures.fields > 0
    assert sum(figures.faults.values()) > 0
    assert figures.added_mb < 25, str(figures)


@pytest.mark.timeout(900)
def test_a_clock_that_is_set_back_and_forth_by_a_year_costs_no_result_and_no_order(tmp_path: Path) -> None:
    try:
        verdict = clock.run(tmp_path, fields=3)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert verdict.faults == (), str(verdict)
    assert verdict.boots == 2
