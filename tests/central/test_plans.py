"""How SQLite goes about the questions: never by reading a table throughout that grows with every field."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from agent.central.cohort import read_cohort
from agent.central.database import migrate, open_database
from agent.central.export import Selection
from agent.central.intake import Place
from agent.central.records import Collection
from agent.central.store import Store
from tests.central.conftest import arrival
from tests.central.fake_device import FakeDevice
from tests.central.test_collected_cohort import ended

GROWING = ("fields", "cells", "events", "audit")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_database(f"sqlite:///{tmp_path}/central.db")
    migrate(engine)
    yield engine
    engine.dispose()


@contextmanager
def plans(engine: Engine) -> Iterator[list[str]]:
    """The steps by which each SELECT of the block is answered."""
    steps: list[str] = []

    def explain(connection: Any, _cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        if statement.startswith("SELECT"):
            found = connection.connection.cursor().execute(f"EXPLAIN QUERY PLAN {statement}", parameters)
            steps.extend(step[3] for step in found)

    event.listen(engine, "before_cursor_execute", explain)
    try:
        yield steps
    finally:
        event.remove(engine, "before_cursor_execute", explain)


def repeats(engine: Engine) -> None:
    """What is sent again is compared with what is stored."""
    devices = [FakeDevice(device=f"scope-{number}") for number in range(3)]
    sent = [arrival(device.field(cells=2)) for device in devices for _ in range(3)]
    store = Store(engine)
    store.commit(sent)
    assert store.commit(sent).repeats == len(sent)


def cohort(engine: Engine) -> None:
    devices = [FakeDevice(device=f"scope-{number}") for number in range(3)]
    for device in devices:
        Store(engine).commit([arrival(device.field(cells=2)), arrival(ended(device, "adult", 60))])
    collected = read_cohort(engine, Selection())
    assert [one.confidence_pct for one in collected.samples] == [90.0] * 3


def one_field(engine: Engine) -> None:
    """By its id, which does not name the site."""
    device = FakeDevice()
    Store(engine).commit([arrival(device.field(cells=2))])
    assert len(Collection(engine).fields("scope", 1, 1)) == 1


def fields_of_a_sample(engine: Engine) -> None:
    device = FakeDevice()
    Store(engine).commit([arrival(device.field(cells=2)), arrival(ended(device, "adult", 60))])
    assert len(list(Collection(engine).read(Place("lab", "scope"), device.sample).fields)) == 1


@pytest.mark.parametrize("ask", [repeats, cohort, one_field, fields_of_a_sample])
def test_no_table_that_grows_with_the_fields_is_read_throughout(engine: Engine, ask: Callable[[Engine], None]) -> None:
    with plans(engine) as steps:
        ask(engine)
    assert steps
    assert [step for step in steps if any(step.startswith(f"SCAN {table}") for table in GROWING)] == []
    if ask is fields_of_a_sample:  # nor all fields that a device ever sent, for one sample
        assert [step for step in steps if " fields " in step and "sample=?" not in step] == []
