"""Telling systemd how the service is: ready, stopping, alive; and whether its journal listens.

The protocol is one datagram to the socket that NOTIFY_SOCKET names (sd_notify(3)). Without that variable, as in a
terminal, every call does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

WATCHDOG_SHARE = 3
"""The watchdog is fed at most this many times in its interval: sd_watchdog_enabled(3) asks for half, a third leaves
room for one late round."""


def notify(message: str, environ: Mapping[str, str] | None = None) -> bool:
    """Send one message such as `READY=1`; True when a service manager was told.

    A lost notification is no reason to stop counting cells, so a socket that fails answers False.
    """
    address = (os.environ if environ is None else environ).get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # Linux's abstract namespace: written with @, addressed with a leading zero byte
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            channel.connect(address)
            channel.sendall(message.encode())
    except OSError:
        return False
    return True


def ready(status: str) -> bool:
    """The agent counts, or would as soon as the camera is back."""
    return notify(f"READY=1\nSTATUS={_one_line(status)}")


def extend_start(seconds: int) -> bool:
    """Not ready yet, and for a reason that a new start would not mend: TimeoutStartSec is put off by this long."""
    return notify(f"EXTEND_TIMEOUT_USEC={seconds * 1_000_000}")


def stopping() -> bool:
    """The agent has begun to end."""
    return notify("STOPPING=1\nSTATUS=stopping")


def status(text: str) -> bool:
    """One line for `systemctl status`."""
    return notify(f"STATUS={_one_line(text)}")


def feed_watchdog() -> bool:
    """Every stage has moved since the last time."""
    return notify("WATCHDOG=1")


def is_journal(environ: Mapping[str, str] | None = None) -> bool:
    """Whether standard error is the journal, which adds the time itself.

    JOURNAL_STREAM names the file that it must be (systemd.exec(5)): the programs of a desktop inherit the variable, and
    their standard error may be a terminal or a file.
    """
    told = (os.environ if environ is None else environ).get("JOURNAL_STREAM")
    try:
        place = os.fstat(2)
    except OSError:
        return False
    return told == f"{place.st_dev}:{place.st_ino}"


def watchdog_interval_s(environ: Mapping[str, str] | None = None, process_id: int | None = None) -> float | None:
    """Seconds between two feedings, None when no watchdog watches this process (sd_watchdog_enabled(3))."""
    environ = os.environ if environ is None else environ
    timeout_us = environ.get("WATCHDOG_USEC", "")
    watched_id = environ.get("WATCHDOG_PID", "")
    if not timeout_us.isdecimal() or int(timeout_us) == 0:
        return None
    if watched_id and watched_id != str(os.getpid() if process_id is None else process_id):
        return None
    return int(timeout_us) / 1e6 / WATCHDOG_SHARE


def _one_line(text: str) -> str:
    """A line end would begin another assignment."""
    return " ".join(text.split())
