"""Asking an agent: send one command over the broker and wait for its reply. For people and scripts."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from agent.config import BrokerSection
from agent.delivery.commands import sign
from agent.delivery.link import BrokerLink, HungUp, Passing, ProtocolRefused, open_link
from agent.delivery.topics import Topics
from agent.errors import BrokerRefused, BrokerUnavailable

TURN_S = 0.2


def ask(
    broker: BrokerSection,
    topics: Topics,
    name: str,
    words: Mapping[str, Any],
    *,
    key: bytes | None = None,
    timeout_s: float = 40.0,
    environ: Mapping[str, str] = os.environ,
) -> dict[str, Any]:
    """The reply of the device to this command. words: its keys; a transaction and the time are added where missing.

    key: signs it as an operator's. Raises BrokerUnavailable: no broker, not allowed, or no reply in time.
    """
    request = {"transaction": secrets.token_hex(8), "at": datetime.now(timezone.utc).isoformat(), **words}
    if key is not None:
        request["auth"] = sign(name, request, topics.base, key)
    link = _connect(broker, environ)
    try:
        return _exchange(link, topics, name, request, timeout_s)
    finally:
        link.disconnect()


def _connect(broker: BrokerSection, environ: Mapping[str, str]) -> BrokerLink:
    client_id = f"hv-ask-{secrets.token_hex(6)}"
    protocols = ("5", "3.1.1") if broker.protocol == "auto" else (broker.protocol,)
    for protocol in protocols:
        try:
            return open_link(broker, client_id=client_id, protocol=protocol, will=None, environ=environ)
        except (ProtocolRefused, HungUp):  # some brokers hang up when they meet a version that they do not know
            if protocol == protocols[-1]:
                raise
    raise AssertionError("a protocol was tried")


def _exchange(
    link: BrokerLink, topics: Topics, name: str, request: Mapping[str, Any], timeout_s: float
) -> dict[str, Any]:
    """Subscribe, send when that is granted, wait for the reply with this transaction."""
    deadline_s = time.monotonic() + timeout_s
    link.subscribe((topics.reply(name),))
    sent_as: int | None = None
    while time.monotonic() < deadline_s:
        if link.is_closed:
            raise BrokerUnavailable(f"the connection ended: {link.closed_reason}")
        for answer in link.turn(TURN_S):
            if answer.mid == sent_as and not answer.is_taken:
                raise BrokerRefused(
                    f"the broker does not let us send {name}: {answer.reason}; who may is in its rights"
                )
        for subscribed in link.take_subscribed():
            if not subscribed.is_granted:
                raise BrokerRefused(f"the broker does not let us hear replies: {subscribed.reason}")
            payload = json.dumps(request).encode()
            sent_as = link.publish_passing(Passing(f"{topics.base}/cmd/{name}", payload))
        for received in link.take_received():
            reply = _reply(received.payload)
            if reply.get("transaction") == request["transaction"]:
                return reply
    raise BrokerUnavailable(
        f"{topics.site}/{topics.device} has not answered within {timeout_s:g} s; does it run, and is the name right?"
    )


def _reply(payload: bytes) -> dict[str, Any]:
    try:
        spoken = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return spoken if isinstance(spoken, dict) else {}
