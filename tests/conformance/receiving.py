"""The kit as a device: sends rows to a receiver and sees what it acknowledges."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import jsonschema

from agent.delivery.messages import load_schema

from .clauses import Findings
from .ears import Ears, Heard

RECEIVER_S = 30.0
"""From the contract."""

QUIET_S = 5.0

ACK = jsonschema.Draft202012Validator(load_schema("ack"))
FLEET = jsonschema.Draft202012Validator(load_schema("fleet"))


def judge_receiver(ears: Ears, base: str, receiver: str, findings: Findings) -> None:
    """Clauses 9.*: acknowledges in time, waits for a gap to be filled, takes a repeat once."""
    topic = f"{base}/ack/{receiver}"
    boot = int(time.time())  # above all that were used in an earlier run
    # A stream begins anew at 1 under a new boot: what a receiver must take from a device that lost its outbox.
    _send_event(ears, base, boot, 1)
    _send_event(ears, base, boot, 2)
    heard = _wait(ears, topic, boot, 2, RECEIVER_S)
    is_sound = heard is not None and heard.qos == 1 and not heard.is_retained
    findings.look("9.1", is_sound, f"no acknowledgement of event {boot}:2 on {topic} within {RECEIVER_S:g} s")
    if heard is not None:
        faults = [error.message for error in ACK.iter_errors(heard.body)]
        findings.look("9.1", not faults, f"the acknowledgement does not fit its schema: {'; '.join(faults)}")
    if heard is None:
        findings.leave(("9.2", "9.3"), "the receiver does not acknowledge")
        return

    since = len(ears.heard)
    _send_event(ears, base, boot, 2)  # once more
    _send_event(ears, base, boot, 3)
    findings.look("9.3", _wait(ears, topic, boot, 3, RECEIVER_S) is not None, "nothing is acknowledged after a repeat")

    since = len(ears.heard)
    _send_event(ears, base, boot, 5)  # 4 is missing
    asked = ears.wait_for(lambda one: one.topic == f"{base}/cmd/replay" and _asks_for(one, 4), RECEIVER_S, since)
    time.sleep(QUIET_S)
    too_early = _wait(ears, topic, boot, 5, 0, since)
    findings.look("9.2", asked is not None, "4 is missing and nobody asked for it with cmd/replay")
    findings.look("9.2", too_early is None, "5 was acknowledged although 4 is missing")
    _send_event(ears, base, boot, 4, historical=True)
    findings.look(
        "9.2", _wait(ears, topic, boot, 5, RECEIVER_S, since) is not None, "the gap is filled, 5 is not acknowledged"
    )


def judge_fleet(heard: Sequence[Heard], base: str, receiver: str, findings: Findings) -> None:
    """Clause 9.5: each word about the device. Whether it is retained shows in what lay there before we came."""
    for one in heard:
        if one.topic != f"{base}/fleet/{receiver}" or one.payload == b"":
            continue
        body = one.body or {}
        faults = [error.message for error in FLEET.iter_errors(body)]
        findings.look("9.5", not faults, f"{one.topic}: {'; '.join(faults)}")
        is_own = (f"hv/1/{body.get('site')}/{body.get('device')}", body.get("receiver")) == (base, receiver)
        findings.look("9.5", is_own, f"{one.topic}: speaks for {body.get('receiver')} of {body.get('device')}")


def _send_event(ears: Ears, base: str, boot: int, seq: int, *, historical: bool = False) -> None:
    site, device = base.split("/")[2:4]
    body = {
        "schema": "hv/1/event",
        "id": f"{device}:{boot}:{seq}",
        "seq": seq,
        "device": device,
        "site": site,
        "boot": boot,
        "at": "2026-01-01T00:00:00.000Z",
        "kind": "conformance-kit",
        "severity": "info",
        "message": "from the conformance kit",
        "detail": {},
        "historical": historical,
        "ruo": True,
    }
    ears.send(f"{base}/event", json.dumps(body, separators=(",", ":")).encode())


def _wait(ears: Ears, topic: str, boot: int, seq: int, timeout_s: float, since: int = 0) -> Heard | None:
    def covers(one: Heard) -> bool:
        body: dict[str, Any] = one.body or {}
        is_same = one.topic == topic and body.get("stream") == "event" and body.get("boot") == boot
        return is_same and isinstance(body.get("seq"), int) and body["seq"] >= seq

    return ears.wait_for(covers, timeout_s, since)


def _asks_for(one: Heard, seq: int) -> bool:
    body = one.body or {}
    return body.get("stream") == "event" and body.get("from_seq", 0) <= seq <= body.get("to_seq", 0)
