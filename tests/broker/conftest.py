"""A site made by make-site.sh, a mosquitto that runs on its files, and people and devices with their certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as mqtt
import pytest
from site_at_broker import Person, Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with two microscopes, a collector and an operator."""
    return Site(tmp_path / "site")


@pytest.fixture
def broker(site: Site, mosquitto: Callable[..., Any]) -> Any:
    """A running mosquitto with the site's files."""
    return mosquitto(site.mosquitto_lines, listener=False)


@pytest.fixture
def person(site: Site, broker: Any) -> Iterator[Callable[..., Person]]:
    """Factory `person(kind, name, protocol=MQTTv5) -> Person`, connected with the certificate of that client."""
    people: list[Person] = []

    def make(kind: str, name: str, protocol: int = mqtt.MQTTv5, client_id: str | None = None) -> Person:
        people.append(Person(broker.port, site.tls(kind, name), client_id or f"test-{name}", protocol))
        return people[-1]

    yield make
    for one in people:
        one.close()
