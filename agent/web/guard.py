"""Who may come in at the page, and how fast. Knows nothing of the framework; used on the page's thread alone.

Rules
  * A browser can be made to send requests here by any page that it shows. So a request counts only under a name that is
    ours (a foreign name that was made to point here is refused: DNS rebinding), and one that changes something only
    from a page that is ours (`Origin`).
  * Addresses are always ours: whoever reaches us under one has asked for us, not for a name.
  * Guessing the password is slow for all together; whoever is in stays in.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from urllib.parse import urlsplit

SESSION_S = 12 * 3600.0
"""s; a working day: then the password is asked for again."""

MOST_SESSIONS = 64
"""Browsers that are in; the one that came first goes when another comes."""

MOST_WRONG, WRONG_WITHIN_S = 10, 60.0
"""So many wrong passwords within this time, from all together; then every one is refused until it has passed."""


def own_names(configured: str | None) -> frozenset[str]:
    """The names, besides addresses, under which the page answers; lower case. configured: separated by commas."""
    host = socket.gethostname().lower()
    given = (name.strip().lower() for name in (configured or "").split(","))
    return frozenset({"localhost", host, f"{host.split('.')[0]}.local", *given} - {""})


def is_own_name(host_header: str, names: Collection[str]) -> bool:
    """Whether a request's Host is an address or one of our names."""
    try:
        name = urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return name in names
    return True


def is_own_origin(origin: str | None, protocol: str, host_header: str) -> bool:
    """Whether a request that changes something comes from a page of ours. Without an Origin it does not: every browser
    sends one with these.
    """
    return origin is not None and origin.lower() == f"{protocol}://{host_header}".lower()


class TooManyTries(Exception):
    """Passwords are not looked at now. wait_s: for how long."""

    def __init__(self, wait_s: float) -> None:
        self.wait_s = wait_s
        super().__init__(f"too many wrong passwords; wait {wait_s:.0f} s")


class Sessions:
    """Who is in. Of passwords and tokens only digests are kept."""

    def __init__(self, password: str | None, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        """password: None = everybody is in who reaches the page."""
        self._password = None if password is None else _digest(password)
        self._monotonic_s = monotonic_s
        self._ends_at_s: OrderedDict[bytes, float] = OrderedDict()
        self._wrong_at_s: deque[float] = deque(maxlen=MOST_WRONG)

    @property
    def needs_password(self) -> bool:
        return self._password is not None

    def begin(self, password: str) -> str | None:
        """The token of a new session; None for a wrong password. Raises TooManyTries."""
        now_s = self._monotonic_s()
        if len(self._wrong_at_s) == MOST_WRONG and now_s - self._wrong_at_s[0] < WRONG_WITHIN_S:
            raise TooManyTries(WRONG_WITHIN_S - (now_s - self._wrong_at_s[0]))
        if self._password is None or not hmac.compare_digest(_digest(password), self._password):
            self._wrong_at_s.append(now_s)
            return None
        while len(self._ends_at_s) >= MOST_SESSIONS:
            self._ends_at_s.popitem(last=False)
        token = secrets.token_urlsafe(32)
        self._ends_at_s[_digest(token)] = now_s + SESSION_S
        return token

    def is_in(self, token: str | None) -> bool:
        """Whether a request with this token is let in."""
        if self._password is None:
            return True
        if token is None:
            return False
        return self._ends_at_s.get(_digest(token), 0.0) > self._monotonic_s()

    def end(self, token: str | None) -> None:
        """Out again."""
        self._ends_at_s.pop(_digest(token or ""), None)


class Pace:
    """How fast requests are answered, all together: what comes faster waits, and beyond that is refused.

    The counting shares this process's interpreter lock: a thread that never waits would slow it.
    """

    def __init__(
        self, per_s: float, burst: int, longest_wait_s: float, monotonic_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._step_s = 1 / per_s
        self._burst_s = burst / per_s
        self.longest_wait_s = longest_wait_s
        self._monotonic_s = monotonic_s
        self._free_at_s = monotonic_s()

    def wait_s(self) -> float | None:
        """For how long the next request has to wait; None = it is refused."""
        now_s = self._monotonic_s()
        free_at_s = max(self._free_at_s, now_s - self._burst_s)
        wait_s = max(0.0, free_at_s - now_s)
        if wait_s > self.longest_wait_s:
            return None
        self._free_at_s = free_at_s + self._step_s
        return wait_s


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
