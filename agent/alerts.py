"""Which problems are open: from what is seen now to alerts, without memory of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from agent.analysis.drift import drift_words
from agent.delivery.messages import Severity
from agent.health import CameraState, HealthSnapshot, Throttling

CAMERA_TROUBLE: tuple[CameraState, ...] = ("lost", "frozen")

ALERT_IDS = (
    *("camera-lost", "camera-frozen", "outbox-stopped", "dead-letters", "disk-low", "self-test-failed"),
    *("certificate-expiring", "models-fell-back", "clock-not-synchronised", "outbox-set-aside", "outbox-dropping"),
    *("drift", "under-voltage", "throttled"),
)
"""Every alert of this version. That the broker refuses us cannot be told through the broker."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An open problem in words."""

    severity: Severity
    message: str


def open_problems(
    seen: HealthSnapshot,
    *,
    is_disk_low: bool = False,
    dead_letters: int | None = None,
    near_expiries: Iterable[str] = (),
    fell_back: str | None = None,
    is_clock_true: bool = True,
    salvage: str | None = None,
    dropped: Mapping[str, int] | None = None,
    throttling: Throttling | None = None,
) -> Mapping[str, Problem]:
    """The problems of this moment by alert id.

    near_expiries: in words, of each certificate that ends soon. fell_back: why other models are in use than activated.
    salvage: what came of a damaged outbox at this start. dropped: messages of each stream that went unconfirmed, for
    room, since this start. throttling: what the firmware says now; None = this machine does not tell.
    """
    found: dict[str, Problem] = {}
    if seen.camera in CAMERA_TROUBLE:
        found[f"camera-{seen.camera}"] = Problem("error", seen.camera_detail)
    if seen.outbox == "stopped":
        found["outbox-stopped"] = Problem("error", seen.outbox_detail)
    if dead_letters:
        words = f"{dead_letters} messages were refused and set aside; `hematovision outbox list --dead` shows them"
        found["dead-letters"] = Problem("warning", words)
    if salvage is not None:
        found["outbox-set-aside"] = Problem("error", salvage)
    if dropped:
        words = ", ".join(f"{count} {stream}" for stream, count in sorted(dropped.items()))
        found["outbox-dropping"] = Problem("warning", f"the outbox is full: dropped unconfirmed {words}; results stay")
    if is_disk_low:
        found["disk-low"] = Problem("warning", "the disk is nearly full; soon intake stops. Free space")
    if seen.last_self_test is not None and not seen.last_self_test.is_passed:
        found["self-test-failed"] = Problem("error", seen.last_self_test.detail)
    moved = None if seen.drift is None else drift_words(seen.drift)
    if moved is not None:
        found["drift"] = Problem("warning", moved)
    found |= _power_problems(throttling)
    expiring = "; ".join(near_expiries)
    if expiring:
        found["certificate-expiring"] = Problem("warning", expiring)
    if fell_back is not None:
        found["models-fell-back"] = Problem("error", fell_back)
    if not is_clock_true:
        words = "the clock follows no reference: times in messages may be wrong, their order (seq) is not"
        found["clock-not-synchronised"] = Problem("info", words)
    return found


def _power_problems(throttling: Throttling | None) -> Mapping[str, Problem]:
    """What is so now; that it was so since power-on stands in the health message."""
    found: dict[str, Problem] = {}
    if throttling is not None and throttling.is_under_voltage:
        words = (
            "the board gets too little voltage: it slows down, and cameras, disks and the card may fail. Use the power "
            "supply that is made for this board, with its own cable, and give cameras and disks a powered hub"
        )
        found["under-voltage"] = Problem("warning", words)
    if throttling is not None and throttling.is_throttled:
        words = (
            "the processor is slowed down, fields take longer. Cool the board: free its vents, fit a heat sink or a fan"
        )
        if throttling.is_under_voltage:
            words += "; mend its power first"
        found["throttled"] = Problem("warning", words)
    return found
