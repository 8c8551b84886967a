"""Pages beside a pipeline, agents of their own, and a real browser."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

pytest.importorskip("tornado", reason="the page needs the extra `web`")
# The pipeline's and the desk's tests have the doubles, the end-to-end tests the agent in a process of its own.
sys.path[:0] = [str(TESTS), str(TESTS / "end_to_end")]

from agent_process import Bench
from beside import Beside
from browser import Browser, find_chromium

from agent.desk import NO_SAMPLE_YET
from agent.domain import SampleState


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Beside]]:
    """Factory `beside(password=None, sample=..., start=True, **web) -> Beside`; each state is made anew."""
    monkeypatch.setattr("agent.web.reading.FRESH_S", 0)
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
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A place of work for agents, all of which are gone when the test ends."""
    made = Bench(tmp_path)
    yield made
    made.close()


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
