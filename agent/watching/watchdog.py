"""systemd's watchdog: fed only while camera, pipeline and publisher all move."""

from __future__ import annotations

import logging
import time

from agent import systemd
from agent.health import Health

logger = logging.getLogger(__name__)


class Watchdog:
    """Looks whether every stage has moved since it was fed the last time; one that stands still is logged once."""

    def __init__(self, health: Health) -> None:
        self._health = health
        self._feed_every_s = systemd.watchdog_interval_s()
        self._mark = health.snapshot()
        self._marked_at_s = time.monotonic()
        self._stalled: tuple[str, ...] = ()

    def feed(self) -> None:
        """Tell systemd that all is alive, where it wants to know and it is so."""
        if self._feed_every_s is None or time.monotonic() - self._marked_at_s < self._feed_every_s:
            return
        stalled = self._health.stalled_since(self._mark)
        if stalled:
            if stalled != self._stalled:
                logger.error("%s stands still; the watchdog is not fed", " and ".join(stalled))
            self._stalled = stalled
            return
        systemd.feed_watchdog()
        self._stalled = ()
        self._mark, self._marked_at_s = self._health.snapshot(), time.monotonic()
