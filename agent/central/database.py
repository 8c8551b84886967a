"""The central database: where it is, how it is opened so that a commit is a commit, and its schema brought up to date.

SQLite for one collector on one computer, PostgreSQL for more. Both are opened so that what was committed survives a
power cut, whatever the server's defaults are.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.pool import NullPool, StaticPool

from agent.config import read_secret
from agent.errors import ConfigError, StoreUnavailable
from agent.files import network_file_system

DATABASE_PASSWORD_VARIABLE = "HEMATOVISION_DATABASE_PASSWORD"

BUSY_TIMEOUT_S = 10
"""For another program's write to SQLite: an export reads beside us, a person may hold a transaction open."""

CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30
"""A batch takes milliseconds; what takes longer than this hangs, and hangs the collector with it."""

UNACKNOWLEDGED_TIMEOUT_S = 15
"""A server behind a broken network is given up after this; TCP by itself waits a quarter of an hour."""

MIGRATION_LOCK = 0x48764D69
"""`HvMi`; two collectors that start together migrate one after the other."""

HOW_TO_NAME = "use sqlite:///relative.db, sqlite:////absolute/path.db or postgresql://user@host/database"

_CREDENTIALS = re.compile(r"(?<=://)([^:@/\s]*):[^@\s]*@")


def open_database(
    url: str, password_file: Path | None = None, environ: Mapping[str, str] = os.environ, *, read_only: bool = False
) -> Engine:
    """The way to the database; connects only when it is used.

    read_only: for exports; takes no lock that would stop a collector.
    Raises ConfigError for an address that cannot be understood or that holds a password.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return _open_sqlite(parsed, read_only=read_only)
    return _open_postgresql(
        parsed, read_secret(password_file, DATABASE_PASSWORD_VARIABLE, environ), read_only=read_only
    )


def migrate(engine: Engine) -> None:
    """Bring the schema up to date. Raises ConfigError: a newer program made it; StoreUnavailable: it is away."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with explained(engine), engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SET LOCAL statement_timeout = 0"))  # a year of cells takes its time
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
        config.attributes["connection"] = connection
        try:
            alembic.command.upgrade(config, "head")
        except CommandError as error:
            raise _too_new(engine, error) from error


def check_schema(engine: Engine) -> None:
    """For readers: raises ConfigError when the schema is not the one that this program knows."""
    script = ScriptDirectory(str(Path(__file__).parent / "migrations"))
    with explained(engine), engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    if found == script.get_current_head():
        return
    if found is None:
        fault = "there is no collection in this database; `hematovision collect` makes one"
    elif found in {revision.revision for revision in script.walk_revisions()}:
        fault = f"its schema is older (revision {found}); start this version's `hematovision collect` once"
    else:
        fault = f"its schema is newer (revision {found}); use the version that wrote it, or a newer one"
    raise ConfigError(describe(engine), (fault,))


@contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Turns what the database says into StoreUnavailable."""
    try:
        yield
    except (SQLAlchemyError, OSError) as error:
        raise StoreUnavailable(f"database {describe(engine)}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What the driver said, in one line, without the statement and its values."""
    words = " ".join(str(getattr(error, "orig", None) or error).split())
    return _CREDENTIALS.sub(r"\1:***@", words)[:500]


def describe(engine: Engine) -> str:
    """The address, without a password."""
    return engine.url.set(drivername=engine.url.get_backend_name()).render_as_string(hide_password=True)


# ------------------------------------------------------------------------------------------------------- the parts


def _parse(url: str) -> URL:
    shown = _CREDENTIALS.sub(r"\1:***@", url)
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise ConfigError(shown, (f"this is no address of a database; {HOW_TO_NAME}",)) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigError(shown, (f"{parsed.get_backend_name()} is not supported; {HOW_TO_NAME}",))
    if parsed.password is not None or "password" in parsed.query:
        fault = (
            "holds a password, which other users of this computer could read; take it out and use a password file,"
            f" {DATABASE_PASSWORD_VARIABLE} or ~/.pgpass"
        )
        raise ConfigError(shown, (fault,))
    if parsed.get_backend_name() == "sqlite" and not parsed.database:
        raise ConfigError(shown, (f"names no file; {HOW_TO_NAME}",))
    return parsed


def _open_sqlite(parsed: URL, *, read_only: bool) -> Engine:
    file = Path(str(parsed.database))
    kind = None if read_only else network_file_system(file.absolute().parent)
    if kind is not None:
        fault = f"lies on a network file system ({kind}), where SQLite is not safe; use a local disk, or PostgreSQL"
        raise ConfigError(str(parsed), (fault,))
    if read_only and not file.is_file():
        raise ConfigError(str(parsed), ("there is no such file; `hematovision collect` makes it",))
    engine = create_engine(
        parsed.set(drivername="sqlite+pysqlite"),
        poolclass=NullPool if read_only else StaticPool,
        json_serializer=_to_json,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours: Python's own comes too late for a read that decides a write
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _open_postgresql(parsed: URL, password: str | None, *, read_only: bool) -> Engine:
    options = ["timezone=UTC"]
    # An export of a year may take its time; a batch that hangs may not.
    options.append("default_transaction_read_only=on" if read_only else f"statement_timeout={STATEMENT_TIMEOUT_S}s")
    engine = create_engine(
        parsed.set(drivername="postgresql+psycopg", password=password),
        pool_size=1,
        max_overflow=0,
        json_serializer=_to_json,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "tcp_user_timeout": UNACKNOWLEDGED_TIMEOUT_S * 1000,
            "options": " ".join(f"-c {option}" for option in options),
            "application_name": "hematovision",
        },
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: Any) -> None:
        # A server set to `off` says "committed" before it is; all other settings are at least as strong as `local`.
        with connection.cursor() as cursor:
            cursor.execute("SHOW synchronous_commit")
            if cursor.fetchone() == ("off",):
                cursor.execute("SET synchronous_commit = on")
        connection.commit()

    return engine


_to_json = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _too_new(engine: Engine, error: CommandError) -> ConfigError:
    fault = f"its schema was made by a newer version ({error}); use that version or a newer one"
    return ConfigError(describe(engine), (fault,))
