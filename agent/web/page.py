"""The page's thread: a small web server beside the counting, which it looks at and never holds up.

    browser --Host, Origin, session, pace--> handler --> Reader (snapshots) | commands (the desk) | Examiner (uploads)

Which object lives where: the server, sessions and examiner on this thread's loop; what takes time on the reader's
thread or in the examiner's process. Counting shares nothing with it but frozen values and the queue of commands.
Bounds, so that no number of clients takes memory or time from it: connections, requests a second, bytes of a request,
one upload at a time, and a time for each wait. An address that cannot be listened on is tried again: the microscope
counts on without its page.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
import weakref
from typing import Any

import tornado.httpserver
import tornado.iostream
import tornado.netutil
import tornado.web

from agent.config import WebSection
from agent.delivery.commands import LARGEST_COMMAND_BYTES
from agent.errors import ConfigError
from agent.web.examining import Examiner
from agent.web.guard import Pace, Sessions, own_names
from agent.web.handlers import ROUTES, Parts
from agent.web.reading import Reader
from agent.web.views import Sights

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 32
"""A browser opens up to six; more than four tablets beside a microscope are a mistake."""

IDLE_CONNECTION_S = 30.0
"""s; for the head of a request to come, and between two of them; a browser that watches asks every second."""

BODY_WITHIN_S = 60.0
"""s; 20 MB over a slow wireless network."""

SILENT_PEER_S = 20
"""s; a peer that takes nothing of what was sent for so long is gone: a tablet out of reach keeps no connection."""

LARGEST_HEAD_BYTES = 16 * 1024
BUFFER_BYTES = 256 * 1024
"""Of one connection; bodies are taken in portions."""

REQUESTS_PER_S, BURST, LONGEST_WAIT_S = 30.0, 120, 2.0
"""All together. A watching browser makes two requests a second, the review some dozens at once for its pictures."""

LISTEN_AGAIN_S = 5.0

ENDS_WITHIN_S = 2.0
"""s; after that the stop of the agent goes on without the page."""


class Page(threading.Thread):
    """Make it, `start` it, `stop` it. failure: what ended it if that was not `stop`."""

    def __init__(self, section: WebSection, password: str | None, sights: Sights) -> None:
        """password: None = whoever reaches the page may use it. Raises ConfigError for a certificate that is none."""
        super().__init__(name="page", daemon=True)
        self.failure: Exception | None = None
        self._section = section
        self._password = password
        self._sights = sights
        self._tls = tls_context(section)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_to_stop = threading.Event()
        self._stopping: asyncio.Event | None = None

    def stop(self, timeout_s: float = ENDS_WITHIN_S) -> bool:
        """End, whatever browsers wait for. Returns whether it has ended in time."""
        self._asked_to_stop.set()
        if self._loop is not None and self._stopping is not None:
            with contextlib.suppress(RuntimeError):  # its loop has ended meanwhile
                self._loop.call_soon_threadsafe(self._stopping.set)
        if self.is_alive():
            self.join(timeout_s)
        return not self.is_alive()

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:  # the top of the thread: the supervisor finds it dead and ends the process
            self.failure = error
            logger.exception("the page has ended")

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        # A client that sends nonsense must not fill the log with it.
        logging.getLogger("tornado.general").setLevel(logging.ERROR)
        reader, examiner = Reader(self._sights), Examiner(self._sights.examined_with)
        server: _Server | None = None
        try:
            sockets = await self._listen()
            if sockets:
                server = self._make_server(reader, examiner)
                server.add_sockets(sockets)
                await self._until_asked()
        finally:
            if server is not None:
                server.stop()
                server.close_streams()
            await examiner.close()
            reader.close()

    def _make_server(self, reader: Reader, examiner: Examiner) -> _Server:
        parts = Parts(
            section=self._section,
            sights=self._sights,
            reader=reader,
            examiner=examiner,
            sessions=Sessions(self._password),
            pace=Pace(REQUESTS_PER_S, BURST, LONGEST_WAIT_S),
            names=own_names(self._section.names),
            uploads=asyncio.Semaphore(1),
        )
        routes = [(pattern, handler, {"parts": parts}) for pattern, handler in ROUTES]
        application = tornado.web.Application(routes, log_function=lambda _handler: None)
        return _Server(
            application,
            ssl_options=self._tls,
            max_header_size=LARGEST_HEAD_BYTES,
            max_body_size=LARGEST_COMMAND_BYTES,
            max_buffer_size=BUFFER_BYTES,
            idle_connection_timeout=IDLE_CONNECTION_S,
            body_timeout=BODY_WITHIN_S,
        )

    async def _listen(self) -> list[socket.socket]:
        """The listening sockets; none where the page was asked to stop before it had them."""
        section, told = self._section, False
        while not self._asked_to_stop.is_set():
            try:
                sockets = tornado.netutil.bind_sockets(section.port, section.host)
            except OSError as error:
                if not told:
                    words = error.strerror or error
                    logger.warning("the page cannot listen on %s port %d: %s", section.host, section.port, words)
                told = True
                await self._until_asked(LISTEN_AGAIN_S)
            else:
                protocol = "http" if self._tls is None else "https"
                logger.info("the page is at %s://%s:%d", protocol, section.host, section.port)
                return sockets
        return []

    async def _until_asked(self, timeout_s: float | None = None) -> None:
        assert self._stopping is not None
        if self._asked_to_stop.is_set():
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), timeout_s)


class _Server(tornado.httpserver.HTTPServer):
    """Takes so many connections and no more; knows them all, to end them."""

    def initialize(self, *args: Any, **kwargs: Any) -> None:
        super().initialize(*args, **kwargs)
        self._streams: weakref.WeakSet[tornado.iostream.IOStream] = weakref.WeakSet()

    def handle_stream(self, stream: tornado.iostream.IOStream, address: tuple[Any, ...]) -> None:
        if sum(not one.closed() for one in self._streams) >= MOST_CONNECTIONS:
            stream.close()
            return
        stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_PEER_S * 1000)
        self._streams.add(stream)
        super().handle_stream(stream, address)

    def close_streams(self) -> None:
        for stream in list(self._streams):
            stream.close()


def tls_context(section: WebSection) -> ssl.SSLContext | None:
    """How the page is encrypted; None = it is not. Raises ConfigError for a certificate that is none."""
    if section.certificate_file is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # An encrypted key would have OpenSSL ask for its password at a terminal that is not there.
        context.load_cert_chain(section.certificate_file, section.key_file, password=lambda: "")
    except (OSError, ValueError) as error:
        words = f"{section.certificate_file}: no certificate with its key can be read there: {error}"
        raise ConfigError("web.certificate_file", (words,)) from error
    return context
