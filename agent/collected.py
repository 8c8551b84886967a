"""The way to a collector's database for commands that mostly work without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from agent.errors import ConfigError

if TYPE_CHECKING:
    from agent.central.records import Collection


@contextmanager
def open_collected(url: str, password_file: Path | None, command: str) -> Iterator[Collection]:
    """What was collected, to be read only. Raises ConfigError: it cannot be, or the extra `central` is missing."""
    try:
        from agent.central.records import open_collection
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("sqlalchemy", "alembic"):
            raise
        fault = f"{error.name} is not installed; `pip install 'hematovision-agent[central]'` brings it"
        raise ConfigError(f"hematovision {command} --database", (fault,)) from None
    with open_collection(url, password_file) as collection:
        yield collection
