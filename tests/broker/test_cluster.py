"""The short version of `python -m tests.proofs.cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.brokers import NotInstalled
from tests.proofs.cluster import run


@pytest.mark.brokers
@pytest.mark.timeout(300)
@pytest.mark.parametrize("confirm", ["receiver", "broker"])
def test_of_a_cluster_of_three_one_node_is_killed_and_comes_back_and_nothing_is_missing(
    tmp_path: Path, confirm: Any
) -> None:
    try:
        report = run(tmp_path, devices=10, fields=60, confirm=confirm)
    except NotInstalled as error:
        pytest.skip(str(error))
    assert report.is_whole, str(report)
