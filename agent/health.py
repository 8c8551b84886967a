"""How the agent is: the one thing that all threads write to, read only as frozen snapshots.

Camera, pipeline and publisher tell what happened; the supervisor reads a `HealthSnapshot` for the health message, the
state word and the watchdog. Nothing here touches a file or a socket; what the machine says is read in
`agent.machine` and carried in `MachineReading`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Literal

from agent.domain import ClockReading, DriftReading

Stage = Literal["camera", "pipeline", "publisher"]
"""The working threads. Each beats when it has done a piece of work or has looked in vain for one."""

STAGES: tuple[Stage, ...] = ("camera", "pipeline", "publisher")

CameraState = Literal["opening", "open", "frozen", "lost", "idle", "ended"]
"""idle: no new file in a watched folder. frozen: the same picture again and again. ended: a finite source was read."""

BrokerState = Literal["connecting", "connected", "lost", "refused"]
"""lost: not reachable, tried again. refused: it answered and said no (password, certificate, rights)."""

OutboxState = Literal["ok", "stopped"]
"""stopped: it cannot store now (disk full, limit reached); intake waits."""

TIMING_WINDOW_FIELDS = 256
"""Fields whose timings are kept for the percentiles: enough for a 95th, a few kilobytes, some minutes of work."""

RATE_WINDOW_S = 60.0
"""Fields per minute are counted over the last minute, so that a stop shows within a minute."""

RATE_WINDOW_FIELDS = 6000
"""Bound of the rate's memory: 100 fields a second, more than a microscope's stage can move."""


@dataclass(frozen=True, slots=True)
class StageTiming:
    """How long one stage takes for a frame: median and 95th percentile over the last fields."""

    p50_ms: float
    p95_ms: float


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The last time the agent tried its own models on a frame."""

    at: datetime
    is_passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class Throttling:
    """The bits of a Raspberry Pi's firmware: what is so now, and what has been since power-on."""

    bits: int

    # Bit numbers: Raspberry Pi documentation, `vcgencmd get_throttled`.
    @property
    def is_under_voltage(self) -> bool:
        return bool(self.bits & 1 << 0)

    @property
    def is_frequency_capped(self) -> bool:
        return bool(self.bits & 1 << 1)

    @property
    def is_throttled(self) -> bool:
        return bool(self.bits & 1 << 2)

    @property
    def is_soft_temperature_limit(self) -> bool:
        return bool(self.bits & 1 << 3)

    @property
    def was_under_voltage(self) -> bool:
        return bool(self.bits & 1 << 16)

    @property
    def was_throttled(self) -> bool:
        return bool(self.bits & 1 << 18)


@dataclass(frozen=True, slots=True)
class MachineReading:
    """What the machine under the agent says; None where this machine does not say it."""

    temperature_c: float | None
    throttling: Throttling | None
    rss_bytes: int | None
    disk_free_bytes: int | None
    clock: ClockReading


@dataclass(frozen=True, slots=True)
class HealthSnapshot:
    """The agent's health at one moment.

    dropped: frames that gave no field, by reason (`frozen`, `queue-full`, `dark`, `unreadable`, ...), since the start.
    timings: by stage name as in `FieldResult.timing_ms`. beats: by stage, for `Health.stalled_since`.
    outbox_oldest_age_s: None while nothing waits. drift: None where it is not watched.
    broker_certificate_ends_at: of the certificate that the broker showed last; None where it showed none.
    """

    uptime_s: float
    fields: int
    fields_per_min: float
    dropped: Mapping[str, int]
    timings: Mapping[str, StageTiming]
    camera: CameraState
    camera_detail: str
    broker: BrokerState
    broker_detail: str
    outbox: OutboxState
    outbox_detail: str
    outbox_depth: int
    outbox_oldest_age_s: float | None
    last_self_test: SelfTest | None = None
    drift: DriftReading | None = None
    broker_certificate_ends_at: datetime | None = None
    beats: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


class Health:
    """The shared health of the agent. Every method may be called from any thread and returns at once."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._started_s = clock()
        self._beats: dict[str, int] = dict.fromkeys(STAGES, 0)
        self._dropped: Counter[str] = Counter()
        self._fields = 0
        self._field_times_s: deque[float] = deque(maxlen=RATE_WINDOW_FIELDS)
        self._timings: deque[Mapping[str, float]] = deque(maxlen=TIMING_WINDOW_FIELDS)
        self._camera: tuple[CameraState, str] = ("opening", "")
        self._broker: tuple[BrokerState, str] = ("connecting", "")
        self._outbox: tuple[OutboxState, str] = ("ok", "")
        self._outbox_depth = 0
        self._outbox_oldest_age_s: float | None = None
        self._self_test: SelfTest | None = None
        self._drift: DriftReading | None = None
        self._broker_certificate_ends_at: datetime | None = None

    def beat(self, stage: Stage) -> None:
        """The stage has moved: the watchdog is fed only while all of them do."""
        with self._lock:
            if stage in self._beats:
                self._beats[stage] += 1

    def retire(self, stage: Stage) -> None:
        """The stage has ended as it should (a finite source is read); the watchdog no longer waits for it."""
        with self._lock:
            self._beats.pop(stage, None)

    def count_dropped(self, reason: str) -> None:
        """One frame that gives no field, and why."""
        with self._lock:
            self._dropped[reason] += 1

    def count_field(self, timing_ms: Mapping[str, float]) -> None:
        """One field that is stored; timing_ms as in `FieldResult`."""
        with self._lock:
            self._fields += 1
            self._field_times_s.append(self._clock())
            self._timings.append(dict(timing_ms))

    def camera_state(self, state: CameraState, detail: str = "") -> None:
        """How the camera is. detail: for people, what happened or what is tried next."""
        with self._lock:
            self._camera = (state, detail)

    def broker_state(self, state: BrokerState, detail: str = "") -> None:
        """How the connection to the broker is."""
        with self._lock:
            self._broker = (state, detail)

    def broker_certificate(self, ends_at: datetime | None) -> None:
        """Until when the certificate is good that the broker has shown."""
        with self._lock:
            self._broker_certificate_ends_at = ends_at

    def outbox_state(self, state: OutboxState, detail: str = "") -> None:
        """Whether the outbox takes in results."""
        with self._lock:
            self._outbox = (state, detail)

    def storage(self, depth: int, oldest_age_s: float | None) -> None:
        """How many rows wait for the broker, and how long the oldest has waited; None when nothing waits."""
        with self._lock:
            self._outbox_depth = depth
            self._outbox_oldest_age_s = oldest_age_s

    def self_test(self, result: SelfTest) -> None:
        """The outcome of the newest self-test."""
        with self._lock:
            self._self_test = result

    def drift(self, reading: DriftReading | None) -> None:
        """How the watched figures are to what is usual on this device; None = they are not watched."""
        with self._lock:
            self._drift = reading

    @property
    def is_self_test_failed(self) -> bool:
        """Whether the newest self-test has failed: nothing is counted until one passes."""
        with self._lock:
            return self._self_test is not None and not self._self_test.is_passed

    def snapshot(self) -> HealthSnapshot:
        """All of it at one moment, frozen."""
        with self._lock:
            now_s = self._clock()
            recent = sum(1 for at_s in self._field_times_s if now_s - at_s <= RATE_WINDOW_S)
            uptime_s = now_s - self._started_s
            return HealthSnapshot(
                uptime_s=uptime_s,
                fields=self._fields,
                fields_per_min=recent * 60.0 / RATE_WINDOW_S,
                dropped=MappingProxyType(dict(self._dropped)),
                timings=_summarise_timings(self._timings),
                camera=self._camera[0],
                camera_detail=self._camera[1],
                broker=self._broker[0],
                broker_detail=self._broker[1],
                outbox=self._outbox[0],
                outbox_detail=self._outbox[1],
                outbox_depth=self._outbox_depth,
                outbox_oldest_age_s=self._outbox_oldest_age_s,
                last_self_test=self._self_test,
                drift=self._drift,
                broker_certificate_ends_at=self._broker_certificate_ends_at,
                beats=MappingProxyType(dict(self._beats)),
            )

    def stalled_since(self, mark: HealthSnapshot) -> tuple[str, ...]:
        """The stages that have not moved since the mark was taken: only without any may the watchdog be fed."""
        with self._lock:
            return tuple(stage for stage, beats in self._beats.items() if beats == mark.beats.get(stage))


def _summarise_timings(timings: Sequence[Mapping[str, float]]) -> Mapping[str, StageTiming]:
    by_stage: dict[str, list[float]] = {}
    for timing_ms in timings:
        for stage, duration_ms in timing_ms.items():
            by_stage.setdefault(stage, []).append(duration_ms)
    return MappingProxyType(
        {
            stage: StageTiming(p50_ms=_percentile(durations, 50), p95_ms=_percentile(durations, 95))
            for stage, durations in ((stage, sorted(durations)) for stage, durations in by_stage.items())
        }
    )


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of all values do not exceed (nearest rank); ordered ascending."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
