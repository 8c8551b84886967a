"""A wire between client and broker that can be cut."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable


class Relay:
    """A wire between client and broker that can be cut: `cut()` now, or by itself after `cut_after_bytes` upstream.

    refuses: is given the first bytes of a connection; when it says True the connection is closed without a word.
    """

    def __init__(self, target_port: int) -> None:
        self.cut_after_bytes: int | None = None
        self.refuses: Callable[[bytes], bool] = lambda _first: False
        self.connections = 0
        self.cuts = 0
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = self._listener.getsockname()
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._upstream: dict[socket.socket, int] = {}
        self._lock = threading.Lock()
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()

    def cut(self) -> None:
        with self._lock:
            for one in list(self._pairs):
                self._drop(one)

    def close(self) -> None:
        self._is_closing = True
        self._thread.join(timeout=5)
        self.cut()
        self._listener.close()

    def _run(self) -> None:
        while not self._is_closing:
            with self._lock:
                watched = [self._listener, *self._pairs]
            try:
                ready, _, _ = select.select(watched, [], [], 0.02)
            except (OSError, ValueError):  # cut meanwhile
                continue
            for one in ready:
                if one is self._listener:
                    self._accept()
                else:
                    self._pass_on(one)

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self.connections += 1
        try:
            broker = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
        except OSError:
            client.close()
            return
        with self._lock:
            self._pairs[client], self._pairs[broker] = broker, client
            self._upstream[client] = 0

    def _pass_on(self, one: socket.socket) -> None:
        with self._lock:
            other = self._pairs.get(one)
            if other is None:
                return
            try:
                passed = one.recv(65536)
                is_first = self._upstream.get(one) == 0
                if not passed or (is_first and self.refuses(passed)):
                    self._drop(one)
                    return
                limit = self.cut_after_bytes  # once: the test changes it, and what was cut short must be cut off
                if one in self._upstream and limit is not None:
                    left = max(0, limit - self._upstream[one])
                    other.sendall(passed[:left])
                    self._upstream[one] += len(passed)
                    if self._upstream[one] >= limit:
                        self.cuts += 1
                        self._drop(one)
                    return
                if one in self._upstream:
                    self._upstream[one] += len(passed)
                other.sendall(passed)
            except OSError:
                self._drop(one)

    def _drop(self, one: socket.socket) -> None:
        other = self._pairs.pop(one, None)
        if other is None:
            return
        self._pairs.pop(other, None)
        for end in (one, other):
            self._upstream.pop(end, None)
            end.close()
