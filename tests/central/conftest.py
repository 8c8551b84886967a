"""Real databases: each test that asks for `database_url` runs on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Table, select

from agent.central.database import migrate, open_database
from agent.central.store import Arrival
from tests.central.fake_device import Sent
from tests.central.postgresql import PostgreSql, find_programs

NOW = datetime(2026, 11, 25, 9, 0, tzinfo=timezone.utc)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgreSql]:
    """A running server; skips where PostgreSQL is absent."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (apt install postgresql)")
    server = PostgreSql(programs)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of an empty database, of each kind in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/central.db"
        return
    server: PostgreSql = request.getfixturevalue("postgresql")
    url = server.new_database()
    yield url
    server.drop_database(url)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """A migrated database."""
    engine = open_database(database_url)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def rows(engine: Engine) -> Callable[..., list[dict[str, Any]]]:
    """`rows(table) -> list of dicts`, in the order of the primary key."""

    def read(table: Table) -> list[dict[str, Any]]:
        with engine.connect() as connection:
            return [dict(row) for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()]

    return read


def arrival(sent: Sent | tuple[str, bytes], at: datetime = NOW, *, is_retained: bool = False) -> Arrival:
    """As the broker would hand it over."""
    topic, payload = sent if isinstance(sent, tuple) else (sent.topic, sent.payload)
    return Arrival(topic, payload, at, is_retained)
