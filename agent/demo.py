"""The demo: a broker, the agent and a subscriber on this computer, started and ended together.

    demo (this process) --starts--> broker (child)  <--publishes-- agent (child: `run` with its own configuration)
          ^                            |
          +--------- subscribes -------+

What is shown has gone the whole way: rendered or read, detected, named, stored, published, received.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from agent.camera.replay import list_pictures
from agent.child_process import ChildProcess
from agent.config import VARIABLE_PREFIX
from agent.delivery.embedded_broker import open_embedded_broker
from agent.delivery.subscriber import Subscriber, open_subscriber
from agent.errors import ConfigError, HematoVisionError

SITE, DEVICE = "demo", "microscope-1"

QUIET_S = 1.0
"""s; when the agent has ended and nothing arrives for this long, everything has arrived."""


class AgentEnded(HematoVisionError):
    """The demo's agent ended with a fault; `exit_code` is its own."""

    def __init__(self, exit_code: int, last_lines: str) -> None:
        self.exit_code = exit_code if exit_code > 0 else 1  # negative: ended by a signal
        super().__init__(f"the agent ended with exit code {exit_code}; its last lines:\n{last_lines}")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """source: a folder of images, a video file, a stream's address or a camera /dev/...; None = the simulated slide.

    fields: end after so many; None = go on until the source ends or Ctrl-C.   port: of the broker; None = a free one.
    """

    source: str | None = None
    fields: int | None = None
    port: int | None = None


def run_demo(
    options: DemoOptions, on_start: Callable[[str, int], None], on_message: Callable[[str, Mapping[str, Any]], None]
) -> None:
    """Run until the source ends, `fields` have been seen or a signal comes; leaves no process and no file behind.

    on_start is told the broker's program and port, on_message the kind and body of all that the subscriber hears.
    """
    camera = _camera_section(options)
    with (
        _signals_end_it(),
        tempfile.TemporaryDirectory(prefix="hematovision-demo-", ignore_cleanup_errors=True) as name,
        closing(open_embedded_broker(Path(name), options.port)) as broker,
        open_subscriber(broker.host, broker.port, f"hv/1/{SITE}/{DEVICE}/#") as subscriber,
    ):
        on_start(broker.name, broker.port)
        config = {
            "site": SITE,
            "device": DEVICE,
            "camera": camera,
            "outbox": {"folder": str(Path(name) / "state")},
            "broker": {"host": broker.host, "port": broker.port},
        }
        agent = _start_agent(Path(name), config)
        try:
            _listen(agent, subscriber, options.fields, on_message)
        finally:
            agent.stop()


def _start_agent(folder: Path, config: dict[str, Any]) -> ChildProcess:
    file = folder / "config.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    # The user's own settings and systemd's socket are not meant for the demo's agent.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(VARIABLE_PREFIX) and name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    }
    command = [sys.executable, "-m", "agent", "run", "--config", str(file)]
    # `-m` looks into the working directory first: there must be this package, not a folder of the user's called agent.
    package_parent = Path(__file__).resolve().parent.parent
    return ChildProcess(command, folder / "agent.log", environment=environment, folder=package_parent)


def _listen(
    agent: ChildProcess,
    subscriber: Subscriber,
    fields: int | None,
    on_message: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Pass on what arrives until there are enough fields with all their cells, or the agent has ended and all is in."""
    cells_to_come: dict[str, set[str]] = {}  # by id of the field; the broker may give a message twice
    while True:
        heard = subscriber.receive(QUIET_S)
        if heard is None:
            if agent.is_running:
                continue
            if agent.exit_code:
                raise AgentEnded(agent.exit_code, agent.last_lines(10))
            return
        if heard.kind == "field":
            if heard.body["id"] in cells_to_come or len(cells_to_come) == fields:
                continue
            cells_to_come[heard.body["id"]] = {cell["cell_id"] for cell in heard.body["cells"]}
        elif heard.kind == "cell":
            waiting = cells_to_come.get(heard.body["field_id"], set())
            if heard.body["cell_id"] not in waiting:
                continue
            waiting.remove(heard.body["cell_id"])
        on_message(heard.kind, heard.body)
        if len(cells_to_come) == fields and not any(cells_to_come.values()):
            return


def _camera_section(options: DemoOptions) -> dict[str, Any]:
    """The camera that the source means. Raises ConfigError for a path that is neither."""
    source = options.source
    if source is None:
        return {"kind": "simulated", "simulated": {"fields": options.fields or 0}}
    if "://" in source:
        return {"kind": "network", "network": {"url": source}}
    path = Path(source).absolute()
    if path.is_dir():
        if not list_pictures(path):  # the agent itself would wait for some to come
            raise ConfigError("--source", (f"{source}: there are no pictures in this folder",))
        return {"kind": "folder", "folder": {"path": str(path)}}
    if path.is_char_device():
        return {"kind": "usb", "usb": {"device": str(path)}}
    if path.is_file():
        return {"kind": "video", "video": {"path": str(path)}}
    raise ConfigError("--source", (f"{source}: there is no such folder, video file or camera",))


@contextmanager
def _signals_end_it() -> Iterator[None]:
    """SIGTERM and SIGHUP (the terminal was closed) end the demo as Ctrl-C does: children and files go too."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
