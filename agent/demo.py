"""The demo: a broker, the agent and a subscriber on this computer, started and ended together.

    demo (this process) --starts--> broker (child)  <--publishes-- agent (child: `run` with its own configuration)
          ^                            |                               |
          +--------- subscribes -------+                               +--> the local page, where its extra is there

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
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from agent.camera.replay import list_pictures
from agent.child_process import ChildProcess
from agent.config import VARIABLE_PREFIX, OutboxSection, WebSection
from agent.delivery.embedded_broker import LOOPBACK, free_port, open_embedded_broker
from agent.delivery.outbox import START_ROOM_BYTES, open_outbox
from agent.delivery.subscriber import Subscriber, open_subscriber
from agent.delivery.topics import Topics
from agent.errors import ConfigError, HematoVisionError, OutboxError
from agent.files import whole_file
from agent.machine import read_disk_free
from agent.report.device import read_device
from agent.report.document import compose
from agent.report.render import render
from agent.report.signature import ENDING, KEY_NAME, open_key, sign
from agent.review import CROPS_FOLDER, CropStore
from agent.supervisor import import_page, start_want

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

SITE, DEVICE, SAMPLE = "demo", "microscope-1", "demo-sample"

QUIET_S = 1.0
"""s; when the agent has ended and nothing arrives for this long, everything has arrived."""

ROOM_BYTES = int(OutboxSection().min_free_mb * 2**20) + START_ROOM_BYTES
"""Free on the disk when the demo begins: with less than `outbox.min_free_mb` its agent stores nothing, and waits."""


class AgentEnded(HematoVisionError):
    """The demo's agent ended with a fault; `exit_code` is its own."""

    def __init__(self, exit_code: int, last_lines: str) -> None:
        self.exit_code = exit_code if exit_code > 0 else 1  # negative: ended by a signal
        super().__init__(f"the agent ended with exit code {exit_code}; its last lines:\n{last_lines}")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """source: a folder of images, a video file, a stream's address or a camera /dev/...; None = the simulated slide.

    fields: end after so many; None = go on until the source ends or Ctrl-C.   port: of the broker; None = a free one.
    cells: end when the sample has so many nucleated cells, and write its signed report into `report`.
    """

    source: str | None = None
    fields: int | None = None
    port: int | None = None
    cells: int | None = None
    report: Path | None = None


@dataclass(frozen=True, slots=True)
class DemoAddresses:
    """Where the demo can be met. broker: the program's name; broker_port: on 127.0.0.1; page: None = there is none."""

    broker: str
    broker_port: int
    page: str | None


def run_demo(
    options: DemoOptions,
    on_start: Callable[[DemoAddresses], None],
    on_message: Callable[[str, Mapping[str, Any]], None],
) -> list[Path]:
    """Run until the source ends, `fields` or a sample have been seen or a signal comes; leaves no process behind.

    Leaves no file behind either, but for the reports of a sample, which are returned.

    on_message is told the kind and body of all that the subscriber hears.
    """
    camera = _camera_section(options)
    with (
        _signals_end_it(),
        _own_folder() as folder,
        closing(open_embedded_broker(folder, options.port)) as broker,
        open_subscriber(broker.host, broker.port, f"hv/1/{SITE}/{DEVICE}/#") as subscriber,
    ):
        page_port = _page_port()
        page = None if page_port is None else f"http://{LOOPBACK}:{page_port}"
        on_start(DemoAddresses(broker.name, broker.port, page))
        config = {
            "site": SITE,
            "device": DEVICE,
            "camera": camera,
            "outbox": {"folder": str(folder / "state")},
            "broker": {"host": broker.host, "port": broker.port},
        }
        if page_port is not None:
            config["web"] = {"enabled": True, "port": page_port}
        key = None
        if options.cells is not None:
            key = open_key(folder / KEY_NAME, create=True)  # that it cannot is said before the counting
            config["sample"] = {"id": SAMPLE, "age_band": "adult", "stop_at_cells": options.cells}
        agent = _start_agent(folder, config)
        try:
            _listen(agent, subscriber, options.fields, on_message, ends_with_report=key is not None)
        finally:
            agent.stop()
        return [] if key is None or options.report is None else _write_report(folder / "state", options.report, key)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A temporary folder for all that a demo keeps. Raises OutboxError: none can be made, or its disk lacks room."""
    mend = "free space there, or name a folder with room: TMPDIR=/a/folder hematovision demo"
    try:
        made = tempfile.TemporaryDirectory(prefix="hematovision-demo-", ignore_cleanup_errors=True)
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        raise OutboxError(f"the demo has no temporary folder for its files: {where}{error.strerror}; {mend}") from error
    with made as name:
        folder = Path(name)
        want = start_want(folder)
        free_bytes = read_disk_free(folder)
        if want is None and free_bytes is not None and free_bytes < ROOM_BYTES:
            want = f"the disk has {free_bytes / 2**20:.1f} MB left"
        if want is not None:
            raise OutboxError(f"{folder.parent}: {want}; a demo needs {ROOM_BYTES / 2**20:g} MB: {mend}")
        yield folder


def _page_port() -> int | None:
    """Where the page can listen: its usual port if that is free. None where its extra is not installed."""
    try:
        import_page()
    except ConfigError:
        return None
    try:
        return free_port(WebSection().port)
    except OSError:
        return free_port()


def _write_report(state: Path, folder: Path, key: Ed25519PrivateKey) -> list[Path]:
    """The report of the demo's sample, as HTML, JSON and, where one can be made, PDF, each with its signature."""
    with open_outbox(state, device=DEVICE, verify=False, create=False) as outbox:
        record = read_device(outbox, Topics(SITE, DEVICE), SAMPLE, CropStore(state / CROPS_FOLDER))
        now = datetime.now(timezone.utc)
        document = compose(record, now)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--report {folder}", (f"cannot be made: {error.strerror}",)) from error
    for wanted in ("html", "pdf", "json"):
        path = folder / f"{SAMPLE}.{wanted}"
        try:
            rendered = render(document, record.crops, wanted)
        except ConfigError:
            if wanted != "pdf":
                raise
            continue  # it needs a library that the demo does not ask for
        for place, content in ((path, rendered), (Path(f"{path}{ENDING}"), sign(rendered, SAMPLE, key, at=now))):
            with whole_file(place) as sink:
                sink.write(content)
        written.append(path)
    return written


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
    *,
    ends_with_report: bool = False,
) -> None:
    """Pass on what arrives until there are enough fields with all their cells, or the agent has ended and all is in."""
    cells_to_come: dict[str, set[str]] = {}  # by id of the field; the broker may give a message twice
    is_final = False  # the differential may come before the last of the fields that it counts
    while True:
        heard = subscriber.receive(QUIET_S)
        if heard is None:
            if agent.is_running and not is_final:
                continue
            if not agent.is_running and agent.exit_code:
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
        if ends_with_report and heard.kind == "differential" and heard.body["status"] == "final":
            is_final, fields = True, heard.body["fields"]
        if len(cells_to_come) == fields and not any(cells_to_come.values()):
            return


def _camera_section(options: DemoOptions) -> dict[str, Any]:
    """The camera that the source means. Raises ConfigError for a path that is neither."""
    source = options.source
    if source is None:
        # For a sample the slide is rich and the stage quick: people wait for its end.
        quick = {"interval_s": 0, "overlap": 0.1, "nucleated_cells_per_field": 5} if options.cells else {}
        return {"kind": "simulated", "simulated": {"fields": options.fields or 0, **quick}}
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
