"""A session at the broker: what was not confirmed comes again, what was confirmed does not. With a real mosquitto."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from agent.config import BrokerSection
from agent.delivery.link import BrokerLink, Received, Session, Subscribed, open_link


def connect(broker: Any, protocol: str, *, receive_maximum: int = 100, client_id: str = "receiver") -> BrokerLink:
    return open_link(
        BrokerSection(port=broker.port),
        client_id=client_id,
        protocol=protocol,
        will=None,
        session=Session(expiry_s=60, receive_maximum=receive_maximum),
    )


def turn_until(link: BrokerLink, is_so: Callable[[], bool], timeout_s: float = 10) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s
        link.turn(0.05)


def receive(link: BrokerLink, count: int) -> list[Received]:
    got: list[Received] = []

    def is_enough() -> bool:
        got.extend(link.take_received())
        return len(got) >= count

    turn_until(link, is_enough)
    return got


def subscribe(link: BrokerLink, *filters: str) -> list[bool]:
    link.subscribe(filters)
    granted: list[bool] = []

    def is_answered() -> bool:
        granted.extend(answer.is_granted for answer in link.take_subscribed())
        return len(granted) == len(filters)

    turn_until(link, is_answered)
    return granted


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_what_was_not_confirmed_comes_again_over_the_next_connection(mosquitto: Any, protocol: str) -> None:
    broker = mosquitto()
    receiver, sender = connect(broker, protocol), connect(broker, protocol, client_id="sender")
    assert not receiver.has_session
    assert subscribe(receiver, "a/+", "b") == [True, True]
    for number in range(4):
        sender.publish(f"a/{number}", b"%d" % number)
    sender.turn(0.1)
    first = receive(receiver, 4)
    assert [message.payload for message in first] == [b"0", b"1", b"2", b"3"]
    assert not any(message.is_repeat for message in first)
    for message in first[:2]:
        receiver.confirm(message)
    receiver.turn(0.1)
    receiver.abandon()

    again = connect(broker, protocol)
    assert again.has_session
    repeats = receive(again, 2)
    assert [(message.topic, message.is_repeat) for message in repeats] == [("a/2", True), ("a/3", True)]
    again.turn(0.2)
    assert again.take_received() == []
    again.disconnect()
    sender.disconnect()


def test_the_broker_sends_no_more_than_the_receive_maximum_unconfirmed(mosquitto: Any) -> None:
    broker = mosquitto("max_inflight_messages 0")
    receiver, sender = connect(broker, "5", receive_maximum=3), connect(broker, "5", client_id="sender")
    subscribe(receiver, "a")
    for _ in range(5):
        sender.publish("a", b"x")
    sender.turn(0.1)
    got = receive(receiver, 3)
    receiver.turn(0.3)
    assert receiver.take_received() == []
    receiver.confirm(got[0])
    assert len(receive(receiver, 1)) == 1
    receiver.disconnect()
    sender.disconnect()


def test_two_receivers_share_a_subscription_between_them(mosquitto: Any) -> None:
    broker = mosquitto()
    one, other = (connect(broker, "5", client_id=name) for name in ("one", "other"))
    sender = connect(broker, "5", client_id="sender")
    for receiver in (one, other):
        assert receiver.shares
        assert subscribe(receiver, "$share/group/a") == [True]
    for number in range(6):
        sender.publish("a", b"%d" % number)
    sender.turn(0.1)
    got = {message.payload for receiver in (one, other) for message in receive(receiver, 3)}
    assert got == {b"0", b"1", b"2", b"3", b"4", b"5"}
    for link in (one, other, sender):
        link.disconnect()


def test_a_subscription_that_is_refused_is_asked_for_again_until_it_is_granted(
    nats: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By nats-server, which refuses beyond a sum of 65535; in a cluster it does so while a leader is elected, too."""
    monkeypatch.setattr("agent.delivery.link.ASK_AGAIN_S", 0.2)
    broker = nats("max_ack_pending: 40000")
    link = connect(broker, "3.1.1")
    assert subscribe(link, "a", "b") == [True, False]
    config = broker.folder / "nats.conf"
    config.write_text(config.read_text().replace("max_ack_pending: 40000", "max_ack_pending: 1000"))
    os.kill(broker.pid, signal.SIGHUP)
    answers: list[Subscribed] = []

    def is_granted() -> bool:
        answers.extend(link.take_subscribed())
        return bool(answers)

    turn_until(link, is_granted)
    assert [(answer.topic_filter, answer.is_granted) for answer in answers] == [("b", True)]
    link.publish("b", b"{}")
    assert [received.topic for received in receive(link, 1)] == ["b"]
    link.disconnect()
