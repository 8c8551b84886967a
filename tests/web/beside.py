"""A page beside a pipeline that counts: real server, real desk, real outbox; the models are doubles."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from agent.analysis.differential import Rules
from agent.config import Config, ReviewSection, WebSection
from agent.delivery.commands import InboundCommand
from agent.delivery.outbox import begin_boot, open_outbox
from agent.delivery.reports import Alert
from agent.delivery.topics import Topics
from agent.domain import AgentState, SampleState
from agent.latest import Latest
from agent.machine import read_machine
from agent.web.page import Page
from agent.web.views import Sights
from tests.brokers import free_port
from tests.counting.running import KINDS, Place
from tests.frames import make_bench

PATIENCE_S = 20.0


@dataclass(frozen=True)
class Answer:
    """What the page said. cookie: of the session, where one was set."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    @property
    def words(self) -> str:
        return str(self.body["message"])

    @property
    def cookie(self) -> str:
        return str(self.headers["Set-Cookie"]).split(";")[0]


class Beside:
    """A page and the agent's parts that it looks at."""

    def __init__(self, folder: Path, password: str | None, sample: SampleState, **web: Any) -> None:
        begin_boot(folder)
        self.folder = folder
        self.outbox = open_outbox(folder, min_free_mb=0, device="dev")
        self.latest = Latest()
        self.alerts: tuple[Alert, ...] = ()
        self.is_taking = True
        review = ReviewSection(max_margin=1.0)
        bench = replace(make_bench(), counting=Rules(KINDS), review=review)
        self.place = Place(self.outbox, sample, bench, latest=self.latest)
        self.section = WebSection(enabled=True, **{"port": free_port(), **web})
        self.config = Config(web=self.section)
        self.page = Page(
            self.section,
            password,
            Sights(
                topics=Topics("site", "dev"),
                boot=self.outbox.boot,
                folder=folder,
                latest=self.latest,
                health=self.place.health.snapshot,
                machine=partial(read_machine, folder),
                state=lambda: AgentState.READY,
                sample=lambda: self.place.pipeline.sample,
                bench=lambda: bench,
                alerts=lambda: self.alerts,
                open_outbox=partial(open_outbox, folder, device="dev", verify=False),
                send=self._send,
                examined_with=lambda: self.config,
            ),
        )

    def _send(self, command: InboundCommand) -> bool:
        if self.is_taking:
            self.place.commands.put(command)
        return self.is_taking

    def start(self, *, with_pipeline: bool = True) -> Beside:
        if with_pipeline:
            self.place.pipeline.start()
        self.page.start()
        self.wait_until(self.is_listening)
        return self

    def is_listening(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.section.port)) == 0

    def close(self) -> None:
        assert self.page.stop(5)
        assert self.page.failure is None
        assert self.place.pipeline.stop(5)
        self.outbox.close()

    def ask(self, method: str, path: str, content: bytes | None = None, **headers: str | None) -> Answer:
        """One request as a browser on the page's own address sends it; headers: by name, None = without."""
        own = f"127.0.0.1:{self.section.port}"
        sent = {"Host": own, **({"Origin": f"http://{own}"} if method == "POST" else {}), **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.section.port, timeout=PATIENCE_S)
        try:
            kept = {name.replace("_", "-"): value for name, value in sent.items() if value is not None}
            connection.request(method, path, content, kept)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()

    def announce(self, path: str, size_bytes: int) -> str:
        """What is answered to a POST of so many bytes before any of them is sent.

        Who sends them all the same may find the connection reset in place of an answer.
        """
        own = f"127.0.0.1:{self.section.port}"
        head = f"POST {path} HTTP/1.1\r\nHost: {own}\r\nOrigin: http://{own}\r\nContent-Length: {size_bytes}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.section.port), 10) as client:
            client.sendall(head.encode())
            return client.recv(4096).decode()

    def get(self, path: str, **headers: str | None) -> Answer:
        return self.ask("GET", path, **headers)

    def command(self, name: str, transaction: str = "t-1", **words: Any) -> Answer:
        return self.ask("POST", f"/api/command/{name}", json.dumps({"transaction": transaction, **words}).encode())

    def state(self) -> dict[str, Any]:
        return dict(self.get("/api/state").body)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while not is_so():
            assert time.monotonic() < deadline_s, "it did not come to it"
            time.sleep(0.02)


def count(beside: Beside, *seeds: int) -> None:
    """Have these frames counted, or refused."""
    taken = beside.latest.read()[0]
    wanted = (taken.number if taken else 0) + len(seeds)
    beside.place.give(*seeds)
    beside.wait_until(
        lambda: (beside.latest.read()[0] or taken) is not None and beside.latest.read()[0].number >= wanted
    )
