"""The watch over the running agent: looks at its parts and tells what it sees, a few times each second.

    threads, health ---> deaths, state (systemd and broker), camera events
    surroundings ------> health message, alerts
    beats of stages ---> the watchdog's food

It runs on the main thread and acts on nothing: that a thread has died ends the process, and the supervisor does that.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from agent import systemd
from agent.alerts import CAMERA_TROUBLE, open_problems
from agent.camera.grabber import Grabber
from agent.config import Config
from agent.counting.thread import Pipeline
from agent.delivery.messages import Severity, health_body
from agent.delivery.publisher import Publisher
from agent.delivery.reports import Alert
from agent.domain import AgentState
from agent.health import CameraState, Health, HealthSnapshot
from agent.machine import give_back_free_memory
from agent.watching.alert_board import AlertBoard
from agent.watching.surroundings import Surroundings
from agent.watching.watchdog import Watchdog

if TYPE_CHECKING:  # the page's framework comes with an extra
    from agent.web.page import Page

    Watched = Grabber | Pipeline | Publisher | Page

logger = logging.getLogger(__name__)

START_PUT_OFF_S = 60
"""s; told at each look while the self-test keeps the agent from `ready`: a new start would not mend the models."""


def derive_state(health: HealthSnapshot, *, is_started: bool) -> AgentState:
    """The agent's state in one word. A broker that is merely away is no fault of this device: results wait on disk."""
    if not is_started:
        return AgentState.INIT
    is_failed = _is_test_failed(health)
    if health.camera in CAMERA_TROUBLE or health.broker == "refused" or health.outbox == "stopped" or is_failed:
        return AgentState.DEGRADED
    return AgentState.SLEEPING if health.camera == "idle" else AgentState.READY


def _is_test_failed(health: HealthSnapshot) -> bool:
    return health.last_self_test is not None and not health.last_self_test.is_passed


class Watch:
    """Looks at the running parts and tells what it sees: the state, events, the health message, the watchdog.

    page: watched too, where there is one. fell_back: of the workshop. salvage: what came of a damaged outbox.
    state, raised_alerts: may be read on any thread.
    """

    def __init__(
        self,
        config: Config,
        boot: int,
        health: Health,
        publisher: Publisher,
        pipeline: Pipeline,
        grabber: Grabber,
        surroundings: Surroundings,
        *,
        alerts: AlertBoard | None = None,
        fell_back: Callable[[], str | None] = lambda: None,
        salvage: str | None = None,
    ) -> None:
        self.boot = boot
        self.page: Page | None = None
        self._config = config
        self._health = health
        self._publisher = publisher
        self._pipeline = pipeline
        self._grabber = grabber
        self._surroundings = surroundings
        self._alerts = alerts
        self._fell_back = fell_back
        self._salvage = salvage
        self._watchdog = Watchdog(health)
        self._state = AgentState.INIT
        self._is_ready_told = False
        self._camera: CameraState = "opening"
        self._dead: set[str] = set()
        self._told_at_s = -math.inf

    @property
    def has_died(self) -> bool:
        """Whether a thread has ended that nobody had asked to."""
        return bool(self._dead)

    @property
    def state(self) -> AgentState:
        return self._state

    @property
    def raised_alerts(self) -> tuple[Alert, ...]:
        return () if self._alerts is None else self._alerts.raised

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to watch: the source is read to its end, or a thread has died."""
        return self.has_died or self._pipeline.is_source_finished

    def look(self) -> None:
        """Once around all parts."""
        # First: the last word of a thread that ends as it should is said before it ends, and so is in the snapshot.
        ended = {name: thread for name, thread in self._threads().items() if not thread.is_alive()}
        seen = self._health.snapshot()
        self._look_for_deaths(ended, seen)
        self._tell_camera(seen)
        self._surroundings.tell_clock_step()
        self._tell_state(seen)
        self._tell_health(seen)
        self._show_alerts(seen)
        self._watchdog.feed()

    def say_stopping(self) -> None:
        """The last word of the watch; the pipeline stores the event before it ends."""
        systemd.stopping()
        self._publisher.publish_state(AgentState.STOPPING)
        if self.has_died:
            reason = "a part of the agent has died"
        elif self._pipeline.is_source_finished:
            reason = "the source is read to its end"
        else:
            reason = "asked to by a signal"
        logger.info("stopping: %s", reason)
        if self._pipeline.is_alive():  # with its source it has ended already, and said so
            self._tell("agent-stopping", reason)

    def _threads(self) -> dict[str, Watched]:
        threads: dict[str, Watched] = {
            "camera": self._grabber,
            "pipeline": self._pipeline,
            "publisher": self._publisher,
        }
        return threads if self.page is None else {**threads, "page": self.page}

    def _look_for_deaths(self, ended: Mapping[str, Watched], seen: HealthSnapshot) -> None:
        """ended: threads that had ended before `seen` was taken."""
        may_end = {
            "camera": seen.camera == "ended",
            "pipeline": self._pipeline.is_source_finished and self._pipeline.failure is None,
        }
        for name, thread in ended.items():
            if may_end.get(name, False) or name in self._dead:
                continue
            self._dead.add(name)
            failure = thread.failure
            logger.error("the %s thread has died: %s", name, failure, exc_info=failure if name == "camera" else None)

    def _tell_camera(self, seen: HealthSnapshot) -> None:
        before, self._camera = self._camera, seen.camera
        if seen.camera == before:
            return
        if seen.camera in CAMERA_TROUBLE:
            self._tell(f"camera-{seen.camera}", seen.camera_detail, "warning")
        elif before in CAMERA_TROUBLE:
            self._tell("camera-regained", seen.camera_detail)

    def _tell(self, kind: str, message: str, severity: Severity = "info") -> None:
        self._pipeline.tell(kind, message, severity)

    def _tell_state(self, seen: HealthSnapshot) -> None:
        is_starting = self._state is AgentState.INIT
        state = derive_state(seen, is_started=not is_starting or seen.camera != "opening")
        is_test_failed = _is_test_failed(seen)
        is_ready_due = not self._is_ready_told and not is_test_failed and state is not AgentState.INIT
        if is_test_failed and not self._is_ready_told:
            systemd.extend_start(START_PUT_OFF_S)
        if state is self._state and not is_ready_due:
            return
        words = f"{state.value}: camera {seen.camera}, broker {seen.broker}, outbox {seen.outbox}"
        if is_test_failed:
            words += ", self-test failed: nothing is counted"
        logger.info("%s", words)
        if state is not self._state:
            self._state = state
            self._publisher.publish_state(state)
        if is_ready_due:
            self._is_ready_told = True
            systemd.ready(words)
        else:
            systemd.status(words)

    def _tell_health(self, seen: HealthSnapshot) -> None:
        interval_s = self._config.publish.health_interval_s
        if self._state is AgentState.INIT or time.monotonic() - self._told_at_s < interval_s:
            return
        self._told_at_s = time.monotonic()
        give_back_free_memory()
        machine = self._surroundings.read(seen)
        self._publisher.publish_health(
            health_body(
                seen,
                machine,
                device=self._config.device,
                site=self._config.site,
                boot=self.boot,
                at=datetime.now(timezone.utc),
                state=self._state,
                interval_s=interval_s,
                restarts=self.boot - 1,
                dead_letters=self._surroundings.found.dead_letters,
                certificate_days_left=self._surroundings.found.certificate_days_left,
            )
        )

    def _show_alerts(self, seen: HealthSnapshot) -> None:
        if self._alerts is None:
            return
        found = self._surroundings.found
        problems = open_problems(
            seen,
            is_disk_low=found.is_disk_low,
            dead_letters=found.dead_letters,
            near_expiries=found.near_expiries,
            fell_back=self._fell_back(),
            is_clock_true=found.is_clock_true,
            salvage=self._salvage,
            dropped=found.dropped,
            throttling=found.throttling,
        )
        self._alerts.show(problems, datetime.now(timezone.utc))
