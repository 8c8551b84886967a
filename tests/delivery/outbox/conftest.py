"""An outbox that keeps no history, and a disk that is soon full."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.delivery.outbox import Outbox
from tests.delivery.outbox.making import make_outbox
from tests.disks import mounted


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    with make_outbox(tmp_path) as opened:
        yield opened


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB of its own."""
    with mounted(tmp_path / "small-disk", "size=8m") as folder:
        yield folder
