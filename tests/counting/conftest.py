"""An outbox for the thread that counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.delivery.outbox import Outbox, begin_boot, open_outbox


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as opened:
        yield opened
