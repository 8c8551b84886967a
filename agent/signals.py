"""The request to stop, as the operating system makes it: SIGTERM and SIGINT."""

from __future__ import annotations

import select
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopSignal:
    """Whether the process was asked to stop, by SIGTERM or SIGINT."""

    def __init__(self, wakeup: socket.socket) -> None:
        self._wakeup = wakeup
        self.is_set = False

    def wait(self, timeout_s: float) -> bool:
        """Wait for the request; True as soon as it is there, False after the time."""
        if not self.is_set and select.select((self._wakeup,), (), (), timeout_s)[0]:
            self._wakeup.recv(64)  # other signals wake it too; what they wrote must not wake it again
        return self.is_set

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Note the request. A second Ctrl-C ends the program at once: what is stored is stored."""
        if self.is_set and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.is_set = True


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """SIGTERM and SIGINT ask to stop, inside the block.

    The wait is on a socket that Python writes to when a signal comes: setting a `threading.Event` in a signal handler
    can lock up with the very wait that it interrupts.
    """
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)  # Python asks for it
        stop = StopSignal(reader)
        wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, stop.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup_before)
