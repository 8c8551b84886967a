"""The agent as a process of its own, folders of fields for it, and a reader that checks each message it sends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest
import yaml

from agent.camera.simulated import open_simulated
from agent.config import CameraSection, Config, models_folder
from agent.delivery.messages import load_schema
from agent.delivery.outbox import open_outbox

jsonschema = pytest.importorskip("jsonschema")

ROOT = Path(__file__).resolve().parents[2]
REAL_FIELDS = ROOT.parent / "shared" / "data" / "fields" / "images"

START_S = 60.0
"""s; for anything that the agent does on a slow machine with other work."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing here can run without the shipped models."""
    if (models_folder(Config().models) / "manifest.json").exists():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="the shipped models are not in models/"))


class Agent:
    """`hematovision run` in a child process; its log is in `log_text`."""

    def __init__(self, config_file: Path, log_file: Path, environment: dict[str, str]) -> None:
        self.log_file = log_file
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent", "run", "--config", str(config_file)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **environment},
            )

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def log_text(self) -> str:
        return self.log_file.read_text(errors="replace")

    def wait(self, timeout_s: float = START_S) -> int:
        """The exit code, when it has ended by itself."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the agent has not ended in {timeout_s} s:\n{self.log_text}") from None

    def terminate(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


class Bench:
    """One place of work: a configuration that is changed by key, an outbox, and as many agents as a test starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outbox_folder = folder / "outbox"
        self.config: dict[str, Any] = {
            "site": "lab",
            "device": "scope",
            "outbox": {"folder": str(self.outbox_folder), "min_free_mb": 0},
            "publish": {"health_interval_s": 1},
            "models": {"threads": 1},
        }
        self._agents: list[Agent] = []

    def use_broker(self, port: int, **keys: Any) -> None:
        self.config["broker"] = {"port": port, "max_backoff_s": 0.5, **keys}

    def use_folder(self, path: Path, **keys: Any) -> None:
        self.config["camera"] = {"kind": "folder", "folder": {"path": str(path), **keys}}

    def start(self, **environment: str) -> Agent:
        config_file = self.folder / "config.yaml"
        config_file.write_text(yaml.safe_dump(self.config))
        agent = Agent(config_file, self.folder / f"agent-{len(self._agents)}.log", environment)
        self._agents.append(agent)
        return agent

    def waiting(self) -> Counter[str]:
        """How many rows of each stream are in the outbox now."""
        try:
            with open_outbox(self.outbox_folder, verify=False, create=False) as outbox:
                return Counter(row.stream for row in outbox.pending(0, 1_000_000))
        except Exception:
            return Counter()

    def finished(self) -> int:
        """How many pictures of the folder are done with."""
        try:
            with open_outbox(self.outbox_folder, verify=False, create=False) as outbox:
                return len(outbox.finished_keys())
        except Exception:
            return 0

    def close(self) -> None:
        for agent in self._agents:
            if agent.is_running:
                agent.kill()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A `Bench`; every agent that it started is gone when the test ends."""
    made = Bench(tmp_path)
    yield made
    made.close()


@pytest.fixture
def make_fields(tmp_path: Path) -> Callable[..., Path]:
    """Factory `make_fields(count, seed=1) -> Path` of a folder of rendered fields, 320 x 240, as PNG files."""

    def make(count: int, seed: int = 1) -> Path:
        folder = tmp_path / f"fields-{seed}"
        folder.mkdir()
        simulated = {"fields": count, "seed": seed, "interval_s": 0, "frame_width_px": 320, "frame_height_px": 240}
        camera = open_simulated(CameraSection.model_validate({"kind": "simulated", "simulated": simulated}))
        number = 0
        while (frame := camera.read()) is not None:
            if hasattr(frame, "pixels_bgr"):
                number += 1
                cv2.imwrite(str(folder / f"field-{number}.png"), frame.pixels_bgr)
        camera.close()
        assert number == count
        return folder

    return make


def wait_until(is_so: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Look again and again until it is so."""
    deadline_s = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


class Ledger:
    """What a careful subscriber makes of the messages: each checked against its schema, repeats dropped by id."""

    def __init__(self, messages: list[Any]) -> None:
        self.states: list[str] = []
        self.infos: list[dict[str, Any]] = []
        self.healths: list[dict[str, Any]] = []
        self.fields: dict[str, dict[str, Any]] = {}
        self.cells: dict[str, dict[str, Any]] = {}
        self.events: dict[str, dict[str, Any]] = {}
        self.repeats = 0
        validators = {
            kind: jsonschema.Draft202012Validator(
                load_schema(kind), format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
            )
            for kind in ("state", "info", "health", "field", "cell", "event")
        }
        for message in messages:
            validators[message.kind].validate(message.body)
            assert message.qos == 1
            self._take(message.kind, message.body)

    def _take(self, kind: str, body: dict[str, Any]) -> None:
        if kind in ("state", "info", "health"):
            {
                "state": lambda: self.states.append(body["state"]),
                "info": lambda: self.infos.append(body),
                "health": lambda: self.healths.append(body),
            }[kind]()
            return
        known = {"field": self.fields, "cell": self.cells, "event": self.events}[kind]
        if (before := known.get(body["id"])) is not None:
            self.repeats += 1
            same = [json.dumps({**one, "historical": None}, sort_keys=True) for one in (before, body)]
            assert same[0] == same[1], "a repeat must say the same"
        known[body["id"]] = body

    def check_numbers(self) -> None:
        """Every stream counts from 1 without gaps: the subscriber can prove that nothing is missing."""
        for stream in (self.fields, self.cells, self.events):
            seqs = sorted(body["seq"] for body in stream.values())
            assert seqs == list(range(1, len(seqs) + 1))

    def check_cells(self) -> None:
        """The cells one by one are the cells of the fields, and no cell_id names two cells."""
        in_fields = [cell for field in self.fields.values() for cell in field["cells"]]
        ids = [cell["cell_id"] for cell in in_fields]
        assert len(set(ids)) == len(ids)
        one_by_one = {cell["cell_id"]: cell for cell in self.cells.values()}
        assert set(one_by_one) == set(ids)
        for cell in in_fields:
            assert {key: one_by_one[cell["cell_id"]][key] for key in cell} == cell
        for field in self.fields.values():
            assert sum(field["counts"].values()) == len(field["cells"])
            assert all(cell["field_id"] in self.fields for cell in self.cells.values())

    def check_all(self, pictures: int) -> None:
        """As many fields as pictures, each picture once, all numbers and cells in order."""
        assert len({field["frame"]["sha256_16"] for field in self.fields.values()}) == pictures
        assert len(self.fields) == pictures
        self.check_numbers()
        self.check_cells()
