"""Files that are there when they are complete, and not before: half a report looks like a whole one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agent.errors import ConfigError


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file under its name only when the block has ended well. Raises ConfigError: it cannot be written there."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        sink = unfinished.open("wb")
    except OSError as error:
        raise ConfigError(f"--output {path}", (f"cannot be written: {error.strerror}",)) from error
    try:
        with sink:
            yield sink
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
