"""A whole agent at the broker of a site that make-site.sh made: results out, commands in, nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from agent_process import START_S, Bench, wait_until

from deploy.broker.make_site import Client, make_site
from tests.broker.site_at_broker import Person, Site
from tests.central.collecting import CollectorProcess

BASE = "hv/1/lab/scope"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site: the certificate of the device `scope` ends in 20 days, those of the broker and all others in 10."""
    made = Site(tmp_path / "site", days=10)
    make_site(made.top, clients=[Client("device", "scope")], days=20)
    return made


@pytest.fixture
def meet(site: Site, mosquitto: Callable[..., Any]) -> Iterator[Callable[[str, str], Person]]:
    """Factory `meet(kind, name) -> Person` at the site's broker; `meet.port` is where that is."""
    broker = mosquitto(site.mosquitto_lines, listener=False)
    people: list[Person] = []

    def make(kind: str, name: str) -> Person:
        people.append(Person(broker.port, site.tls(kind, name), f"test-{name}"))
        return people[-1]

    make.port = broker.port  # type: ignore[attr-defined]
    yield make
    for one in people:
        one.close()


def test_results_go_out_commands_of_an_operator_come_in_and_the_end_of_the_certificate_is_told(
    bench: Bench, make_fields: Callable[..., Path], site: Site, meet: Any
) -> None:
    collector, anna = meet("receiver", "collector"), meet("operator", "anna")
    collector.subscribe(f"{BASE}/#")
    tls = {key: value if key == "enabled" else str(value) for key, value in site.tls("device", "scope").items()}
    bench.use_broker(meet.port, tls=tls)
    bench.use_folder(make_fields(2), watch=True, settle_s=0)
    written = yaml.safe_load((site.top / "devices" / "scope" / "config.yaml").read_text())
    bench.config["commands"] = written["commands"]
    agent = bench.start()

    def heard(part: str) -> list[dict[str, Any]]:
        return [json.loads(payload) for topic, payload in list(collector.hears) if topic.startswith(f"{BASE}/{part}")]

    wait_until(lambda: len(heard("field/")) == 2, "two fields", START_S)
    wait_until(lambda: any(event["kind"] == "certificate-expiring" for event in heard("event")), "the event", START_S)
    wait_until(lambda: bool(heard("alert/certificate-expiring")), "the alert", START_S)
    wait_until(lambda: bool(heard("health")), "health", START_S)
    assert 9.9 <= heard("health")[-1]["certificate_days_left"] <= 10
    told = heard("alert/certificate-expiring")[-1]["message"]
    assert "the broker's certificate: expires in 10 days; renew it at the broker before" in told
    assert "scope.pem: expires in 20 days; renew it before" in told

    assert anna.publish(f"{BASE}/cmd/ping", json.dumps({"transaction": "t-1"}).encode()) == 0
    wait_until(lambda: any(reply["transaction"] == "t-1" for reply in heard("reply/ping")), "the reply", START_S)
    assert anna.publish(f"{BASE}/cmd/reload", json.dumps({"transaction": "t-3", "by": "anna"}).encode()) == 0
    wait_until(lambda: any(reply["transaction"] == "t-3" for reply in heard("reply/reload")), "the reply", START_S)
    assert heard("reply/reload")[-1]["status"] == "ok", "the site's configuration leaves it to the broker's rights"
    assert collector.publish(f"{BASE}/cmd/reload", json.dumps({"transaction": "t-4"}).encode()) >= 0x80
    assert collector.publish(f"{BASE}/cmd/stop", json.dumps({"transaction": "t-2"}).encode()) >= 0x80
    assert agent.terminate() == 0, agent.log_text
    assert not heard("reply/stop")
    assert bench.waiting() == {}


def test_a_collector_says_in_its_log_whose_certificate_ends_soon(site: Site, meet: Any, tmp_path: Path) -> None:
    tls = {key: value if key == "enabled" else str(value) for key, value in site.tls("receiver", "collector").items()}
    url = f"sqlite:///{tmp_path / 'central.db'}"
    collector = CollectorProcess(tmp_path, url, meet.port, receiver="collector", broker={"tls": tls})
    collector.start()
    try:
        for words in ("the broker's certificate: expires in 10 days", "collector.pem: expires in 10 days"):
            wait_until(lambda words=words: words in collector.log_text, words, START_S)
        assert "refuses" not in collector.log_text
    finally:
        assert collector.terminate() == 0
