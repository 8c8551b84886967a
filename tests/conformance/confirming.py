"""The kit as a receiver: withholds its acknowledgement from a device that waits for it, lies, and gives it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from typing import Any

from .asking import ANSWER_S, Desk
from .ears import Ears, Heard

RESENT_S = 90.0
"""`delivery.resend_s` is 60 s by default."""

HEALTH_S = 65.0
"""Two messages of `health`, 30 s apart by default."""

STREAMS = ("field", "cell", "event", "differential", "audit")


class Receiver:
    """Acknowledges what is heard of the device, and again what comes again, until it is told to be silent.

    A thread of its own: the device waits for our word during all that the kit asks.
    """

    def __init__(self, ears: Ears, base: str, name: str) -> None:
        self.name = name
        self._ears = ears
        self._base = base
        self._is_over = threading.Event()
        self._is_silent = threading.Event()
        self._looked = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="receiver", daemon=True)
        self._thread.start()

    def be_silent(self) -> None:
        """Nothing is acknowledged from now on."""
        self._is_silent.set()
        with self._lock:  # nothing is under way any more
            pass

    def speak_again(self) -> None:
        self._is_silent.clear()
        with self._lock:
            self._looked = 0
        self._acknowledge()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def say(self, stream: str, number: tuple[int, int], *, device: str = "", name: str = "") -> None:
        """One acknowledgement, up to this boot and seq. device, name: instead of the right ones."""
        body = {
            "schema": "hv/1/ack",
            "receiver": name or self.name,
            "device": device or self._base.split("/")[3],
            "stream": stream,
            "boot": number[0],
            "seq": number[1],
            "at": "2026-01-01T00:00:00.000Z",
            "ruo": True,
        }
        self._ears.send(f"{self._base}/ack/{self.name}", json.dumps(body).encode())

    def _run(self) -> None:
        while not self._is_over.wait(0.5):
            self._acknowledge()

    def _acknowledge(self) -> None:
        with self._lock:
            if self._is_silent.is_set():
                return
            heard = self._ears.heard
            came = {one.kind for one in heard[self._looked :] if _is_numbered(one)}
            self._looked = len(heard)
            for stream, number in newest_numbers(heard).items():
                if stream in came:
                    self.say(stream, number)


def ask_confirmation(desk: Desk, receiver: Receiver) -> None:
    """Clauses 3.6, 9.4: nothing leaves the device but by an acknowledgement that names it, us and a given number."""
    look = desk.findings.look
    # What was acknowledged so far makes the device send again soon: while nobody confirms it waits longer and longer.
    time.sleep(2)
    receiver.be_silent()
    since = len(desk.ears.heard)
    desk.ask("selftest")  # makes an event and an audit entry
    first = desk.ears.wait_for(lambda heard: _is_numbered(heard) and not _is_historical(heard), ANSWER_S, since)
    if first is None or first.body is None:
        desk.findings.leave(("3.6", "9.4"), "no numbered message was heard")
        return
    after = since + 1 + desk.ears.heard[since:].index(first)
    again = _hear_again(desk, (first.kind, first.body["id"]), after)
    words = f"not sent again within {RESENT_S:g} s; does it wait for {receiver.name}, delivery.confirm: receiver?"
    if not look("9.4", again is not None, f"{first.kind} {first.body['id']}: {words}"):
        receiver.speak_again()
        return

    # Lies: another device's, another receiver's, a number not given yet, no JSON.
    depth = _depth(desk)
    for stream, (boot, seq) in newest_numbers(desk.ears.heard).items():
        receiver.say(stream, (boot, seq), device="another")
        receiver.say(stream, (boot, seq), name="another")
        receiver.say(stream, (boot, seq + 1_000_000))
    desk.ears.send(f"{desk.base}/ack/{receiver.name}", b"\xff{")
    lied_to = _depth(desk)
    is_kept = depth is not None and lied_to is not None and lied_to >= depth > 0
    look("9.4", is_kept, f"{depth} waited, after false acknowledgements {lied_to}")

    # The truth.
    told = newest_numbers(desk.ears.heard)
    receiver.speak_again()
    receiver.be_silent()
    left = _depth(desk)
    newer = sum(seq - told.get(stream, (0, 0))[1] for stream, (_, seq) in newest_numbers(desk.ears.heard).items())
    is_gone = left is not None and left <= newer and (lied_to or 0) > 0
    look("3.6", is_gone, f"{lied_to} waited; after our acknowledgement {left}, of which {newer} are newer")
    receiver.speak_again()


def newest_numbers(heard: Sequence[Heard]) -> dict[str, tuple[int, int]]:
    """The last number of each stream that was heard: boot and seq."""
    found: dict[str, tuple[int, int]] = {}
    for one in heard:
        if _is_numbered(one) and one.body is not None:
            number = int(one.body["id"].split(":")[1]), int(one.body["seq"])
            found[one.kind] = max(found.get(one.kind, (0, 0)), number, key=lambda pair: pair[1])
    return found


def _hear_again(desk: Desk, number: tuple[str, str], since: int) -> Heard | None:
    return desk.ears.wait_for(
        lambda heard: _is_numbered(heard) and (heard.kind, (heard.body or {})["id"]) == number, RESENT_S, since
    )


def _depth(desk: Desk) -> int | None:
    """How many messages wait on the device, from the second `health` from now on: the first may be older."""
    since = len(desk.ears.heard)
    deadline_s = time.monotonic() + HEALTH_S
    depth = None
    for _ in range(2):
        heard = desk.ears.wait_for(lambda heard: heard.kind == "health", deadline_s - time.monotonic(), since)
        if heard is None or heard.body is None:
            return depth
        since = desk.ears.heard.index(heard, since) + 1
        depth = int(heard.body["outbox"]["depth"])
    return depth


def _is_numbered(heard: Heard) -> bool:
    body: dict[str, Any] = heard.body or {}
    return heard.kind in STREAMS and "seq" in body and "id" in body


def _is_historical(heard: Heard) -> bool:
    return (heard.body or {}).get("historical") is True
