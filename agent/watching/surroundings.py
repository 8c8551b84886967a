"""What the agent works in: the machine's clock, disk and power, its certificates, and what its outbox had to let go.

The clock is looked at each time, for it may be set at any moment; the rest is read with each health message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from agent.config import Config
from agent.delivery.certificates import Expiry, read_expiries
from agent.delivery.messages import Severity
from agent.delivery.outbox import Outbox
from agent.errors import OutboxError
from agent.health import HealthSnapshot, MachineReading, Throttling
from agent.machine import read_machine

CLOCK_STEP_S = 2.0
"""s; time servers slew smaller differences; a larger one between two looks was set."""

DISK_LOW_FACTOR, DISK_FINE_FACTOR = 4, 5
"""Multiples of outbox.min_free_mb: a warning comes while there is time to act, and again only after it was mended."""

Tell = Callable[[str, str, Severity, Mapping[str, object]], None]
"""Has an event stored: kind, words, severity, detail."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found at the last reading; before the first one nothing is amiss.

    near_expiries: in words, of each certificate that ends soon. dead_letters: None = the outbox cannot be read.
    dropped: messages of each stream that went for room since this start. throttling: None = this machine does not tell.
    """

    is_disk_low: bool = False
    near_expiries: tuple[str, ...] = ()
    certificate_days_left: float | None = None
    dead_letters: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)
    is_clock_true: bool = True
    throttling: Throttling | None = None


class Surroundings:
    """Reads what is around the agent, and tells once what somebody should do something about.

    folder: of the outbox. wall_ahead_s: by how much the wall clock is ahead of the monotonic one.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        tell: Tell,
        open_outbox_here: Callable[[], Outbox],
        wall_ahead_s: Callable[[], float] = lambda: time.time() - time.monotonic(),
    ) -> None:
        self.found = Found()
        self._floor_bytes = config.outbox.min_free_mb * 1024 * 1024
        self._tls = config.broker.tls
        self._folder = folder
        self._tell = tell
        self._open_outbox = open_outbox_here
        self._read_wall_ahead_s = wall_ahead_s
        self._wall_ahead_s = wall_ahead_s()
        self._is_disk_low = False
        self._told_expiries: set[str] = set()
        self._dropped_before: Mapping[str, int] | None = None

    def tell_clock_step(self) -> None:
        """Tell when the system's clock was set since the last look."""
        before, self._wall_ahead_s = self._wall_ahead_s, self._read_wall_ahead_s()
        step_s = self._wall_ahead_s - before
        if abs(step_s) >= CLOCK_STEP_S:
            words = f"the system clock was set {'forward' if step_s > 0 else 'back'} by {abs(step_s):.0f} s"
            self._tell("clock-step", words, "warning", {"step_s": round(step_s, 1)})

    def read(self, seen: HealthSnapshot) -> MachineReading:
        """Read everything anew, into `found`. Returns what the machine says, for the health message."""
        machine = read_machine(self._folder)
        self._tell_disk(machine.disk_free_bytes)
        expiries = read_expiries(self._tls, datetime.now(timezone.utc), seen.broker_certificate_ends_at)
        self._tell_expiries(expiries)
        dead_letters, dropped = self._look_into_outbox()
        self.found = Found(
            is_disk_low=self._is_disk_low,
            near_expiries=tuple(expiry.words for expiry in expiries if expiry.is_near),
            certificate_days_left=expiries[0].days_left if expiries else None,
            dead_letters=dead_letters,
            dropped=dropped,
            is_clock_true=machine.clock.is_synchronised,
            throttling=machine.throttling,
        )
        return machine

    def _tell_disk(self, free_bytes: int | None) -> None:
        if free_bytes is None or self._floor_bytes == 0:
            return
        if not self._is_disk_low and free_bytes < DISK_LOW_FACTOR * self._floor_bytes:
            self._is_disk_low = True
            floor_mb = self._floor_bytes / 2**20
            words = f"{free_bytes / 2**20:.0f} MB left; at outbox.min_free_mb = {floor_mb:g} intake stops"
            self._tell("disk-low", words, "warning", {"free_bytes": free_bytes})
        elif self._is_disk_low and free_bytes > DISK_FINE_FACTOR * self._floor_bytes:
            self._is_disk_low = False

    def _tell_expiries(self, expiries: Sequence[Expiry]) -> None:
        """Once for each file in a run; a renewed one may be told of again when its own time comes."""
        for expiry in expiries:
            if expiry.is_near and expiry.key not in self._told_expiries:
                detail = {"key": expiry.key, "days_left": round(expiry.days_left, 1)}
                self._tell("certificate-expiring", expiry.words, "warning", detail)
        self._told_expiries = {expiry.key for expiry in expiries if expiry.is_near}

    def _look_into_outbox(self) -> tuple[int | None, Mapping[str, int]]:
        """How many messages were set aside, and how many of each stream went for room since this start."""
        try:
            with self._open_outbox() as outbox:
                dead_letters, dropped = outbox.dead_letter_count(), outbox.dropped()
        except OutboxError:
            return None, self.found.dropped
        if self._dropped_before is None:
            self._dropped_before = dropped
        since = {name: count - self._dropped_before.get(name, 0) for name, count in dropped.items()}
        return dead_letters, {name: count for name, count in since.items() if count > 0}
