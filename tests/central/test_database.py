"""How the database is named, opened and brought up to date."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine, text

from agent.central.database import check_schema, migrate, open_database
from agent.central.tables import metadata
from agent.errors import ConfigError, StoreUnavailable
from tests.central.postgresql import PostgreSql


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hematovision.db", "this is no address of a database"),
        ("mysql://host/base", "mysql is not supported"),
        ("sqlite://", "names no file"),
        ("postgresql://user:secret@host/base", "holds a password"),
        ("postgresql://host/base?password=secret", "holds a password"),
    ],
)
def test_an_address_that_cannot_be_used_is_refused_in_words(url: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        open_database(url)
    assert "secret@" not in str(caught.value)


def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.central.database.network_file_system", lambda folder: {tmp_path: "nfs4"}.get(folder))
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\)"):
        open_database(f"sqlite:///{tmp_path}/central.db")
    open_database(f"sqlite:///{tmp_path}/here/central.db").dispose()


def test_the_migrations_make_what_the_tables_say(engine: Engine) -> None:
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(engine: Engine) -> None:
    migrate(engine)
    check_schema(engine)


def test_a_reader_is_told_of_an_empty_database(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "central.db").touch()
    engine = open_database(database_url, read_only=True)
    with pytest.raises(ConfigError, match="there is no collection in this database"):
        check_schema(engine)
    engine.dispose()


def test_a_schema_of_a_newer_version_is_left_alone(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigError, match="newer"):
        migrate(engine)
    with pytest.raises(ConfigError, match="newer"):
        check_schema(engine)


def test_what_is_committed_is_on_disk(engine: Engine, database_url: str) -> None:
    with engine.connect() as connection:
        if database_url.startswith("sqlite"):
            assert connection.execute(text("PRAGMA synchronous")).scalar_one() == 2
            assert connection.execute(text("PRAGMA journal_mode")).scalar_one() == "wal"
        else:
            assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "on"


def test_a_server_that_commits_without_disk_is_told_not_to(postgresql: PostgreSql) -> None:
    url = postgresql.new_database()
    engine = open_database(url)
    with engine.begin() as connection:
        name = connection.execute(text("SELECT current_database()")).scalar_one()
        connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    engine.dispose()
    engine = open_database(url)
    with engine.connect() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar_one() == "on"
    engine.dispose()


@pytest.mark.usefixtures("engine")
def test_an_export_can_write_nothing(database_url: str) -> None:
    reader = open_database(database_url, read_only=True)
    with pytest.raises(Exception, match=r"read-?only"), reader.begin() as connection:
        connection.execute(text("DELETE FROM devices"))
    reader.dispose()


def test_a_database_that_is_not_there_is_unavailable_not_a_traceback(tmp_path: Path) -> None:
    for url in (f"postgresql://hv@/x?host={tmp_path}", f"sqlite:///{tmp_path}/no/such/folder/x.db"):
        engine = open_database(url)
        with pytest.raises(StoreUnavailable, match="database "):
            migrate(engine)
        engine.dispose()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_that_may_not_be_written_is_unavailable(tmp_path: Path) -> None:
    path = tmp_path / "central.db"
    path.touch()
    path.chmod(stat.S_IRUSR)
    with pytest.raises(StoreUnavailable, match="readonly"):
        migrate(open_database(f"sqlite:///{path}"))


def test_an_export_does_not_make_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no such file"):
        open_database(f"sqlite:///{tmp_path}/none.db", read_only=True)
    assert list(tmp_path.iterdir()) == []
