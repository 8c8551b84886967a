"""Pages beside a pipeline, agents of their own, and a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.desk import NO_SAMPLE_YET
from agent.domain import SampleState
from tests.end_to_end.agent_process import bench as bench  # a fixture
from tests.web.beside import Beside
from tests.web.browser import Browser, find_chromium


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Beside]]:
    """Factory `beside(password=None, sample=..., start=True, **web) -> Beside`; each state is made anew."""
    monkeypatch.setattr("agent.web.reading.FRESH_S", 0)
    monkeypatch.setattr("agent.counting.thread.TURN_S", 0.02)  # commands are done between frames, and none come
    made: list[Beside] = []

    def make(
        password: str | None = None, sample: SampleState = NO_SAMPLE_YET, *, start: bool = True, **web: Any
    ) -> Beside:
        folder = tmp_path / f"outbox-{len(made)}"
        folder.mkdir()
        made.append(Beside(folder, password, sample, **web))
        return made[-1].start() if start else made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """A window of a real browser; skips where none is installed."""
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium is installed (apt install chromium)")
    folder = tmp_path / "browser"
    folder.mkdir()
    window = Browser(program, folder)
    yield window
    window.close()
