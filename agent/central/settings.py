"""The collector's settings: a YAML of its own, read and blamed like the agent's."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from agent.config import BrokerSection, Identifier, Section, read_text
from agent.config_reader import default_yaml, read_section
from agent.errors import ConfigError

VARIABLE_PREFIX = "HEMATOVISION_COLLECT_"

_BROKER = re.compile(r"(?:(mqtts?)://)?([^\s/:@\[\]]+|\[[0-9a-fA-F:]+\])(?::([0-9]{1,5}))?/?")
_PORTS = {"mqtt": 1883, "mqtts": 8883}


class DatabaseSection(Section):
    """Where the messages are kept."""

    url: str | None = None
    """Address of the database: sqlite:////absolute/path.db, or postgresql://user@host/database. Never a password.
    Has to be given, here or as --database."""
    password_file: Path | None = None
    """File that holds the password in one line; null = the variable HEMATOVISION_DATABASE_PASSWORD, if set, else what
    PostgreSQL's own ~/.pgpass says."""


class CollectorConfig(Section):
    """The whole of it. Every key has a default."""

    receiver: Identifier = "central"
    """Name of this receiver in topics (ack/{receiver}): the name that the agents' delivery.receiver waits for."""
    site: Identifier | None = None
    """Only the devices of this site; null = of all sites that the broker's access list lets us hear."""
    share: Identifier | None = None
    """Name of a group of collectors that divide the messages among them (MQTT 5 shared subscription) and write to one
    PostgreSQL database; each needs a client_id of its own. null = this collector hears everything."""
    client_id: (
        Annotated[
            str,
            Field(pattern=r"^[A-Za-z0-9-]{1,64}$", json_schema_extra={"x-allowed": "1 to 64 letters, digits, hyphens"}),
        ]
        | None
    ) = None
    """Name at the broker, under which it keeps what we have not acknowledged; null = hv-collect-{receiver}."""
    session_expiry_h: Annotated[float, Field(ge=1, le=8760)] = 168
    """h; how long the broker keeps our session while we are away (MQTT 5; with 3.1.1 the broker decides)."""
    window: Annotated[int, Field(ge=1, le=10000)] = 1000
    """Messages that the broker may send before we have acknowledged them, and that one commit may hold (MQTT 5)."""
    fleet_every_s: Annotated[float, Field(ge=0, le=86400)] = 300
    """s; how often the devices are compared, and what stands out is told on fleet/{receiver}; 0 = never."""
    database: DatabaseSection = DatabaseSection()
    broker: BrokerSection = BrokerSection()
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged to standard error (under systemd: the journal)."""

    @property
    def name(self) -> str:
        """The client id in force."""
        return self.client_id or f"hv-collect-{self.receiver}"


def load_settings(
    path: Path | None,
    environment: Mapping[str, str] | None = None,
    *,
    database: str | None = None,
    broker: str | None = None,
    receiver: str | None = None,
    share: str | None = None,
) -> CollectorConfig:
    """From a file (None = all defaults), the environment, and the command line's words, which go first.

    broker: `host`, `host:port`, `mqtt://host` or `mqtts://host` (with TLS).  Raises ConfigError with all faults.
    """
    settings = read_section(
        CollectorConfig,
        "" if path is None else read_text(path),
        "the defaults" if path is None else str(path),
        folder=Path.cwd() if path is None else path.absolute().parent,
        environment=os.environ if environment is None else environment,
        prefix=VARIABLE_PREFIX,
    )
    changed: dict[str, Any] = {}
    if database is not None:
        changed["database"] = settings.database.model_copy(update={"url": database})
    if broker is not None:
        changed["broker"] = _with_address(settings.broker, broker)
    if receiver is not None:
        changed["receiver"] = receiver
    if share is not None:
        changed["share"] = share
    settings = settings.model_copy(update=changed)
    if faults := tuple(_faults(settings)):
        raise ConfigError("the defaults" if path is None else str(path), faults)
    return settings


def template() -> str:
    """The default settings as a commented YAML file; committed as deploy/central/collector.yaml."""
    return default_yaml(CollectorConfig, TEMPLATE_HEAD)


TEMPLATE_HEAD = """\
Settings of the collector (`hematovision collect --config FILE`), with every key at its default. Research use only.

Keep only what you change: a missing key has its default, an unknown key is refused. Relative paths start at the folder
of this file. The variable HEMATOVISION_COLLECT_SECTION__KEY goes before this file, for example
HEMATOVISION_COLLECT_DATABASE__URL. Passwords never stand here: see the keys password_file.
"""


def _with_address(section: BrokerSection, address: str) -> BrokerSection:
    found = _BROKER.fullmatch(address)
    if found is None or not 1 <= int(found[3] or 1) <= 65535:
        raise ConfigError("--broker", (f"found {address!r}; allowed: host, host:port, mqtt://host or mqtts://host",))
    is_tls = section.tls.enabled if found[1] is None else found[1] == "mqtts"
    port = int(found[3]) if found[3] else _PORTS[found[1]] if found[1] else section.port
    tls = section.tls.model_copy(update={"enabled": is_tls})
    return section.model_copy(update={"host": found[2].strip("[]"), "port": port, "tls": tls})


def _faults(settings: CollectorConfig) -> Iterator[str]:
    """Keys that do not go together; looked for when the command line has had its say."""
    url = settings.database.url
    if url is None:
        yield "database.url: missing; name the database there, or as --database sqlite:////path/of/a/file.db"
    if settings.share and settings.client_id is None:
        yield "share: several collectors of one name knock each other off; set client_id, different for each of them"
    if settings.share and (url or "").startswith("sqlite"):
        yield "share: collectors that divide the messages need one PostgreSQL database; set database.url"
    if settings.broker.password_file and settings.broker.username is None:
        yield "broker.password_file: a password without a user; set broker.username too"
