"""Pipelines that run, with all around them: real queue, real outbox on a real disk; the models are doubles."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

import jsonschema
import numpy as np

from agent.analysis.differential import CellKind, Rules
from agent.bench import Bench
from agent.camera.camera import UnreadableFrame
from agent.camera.grabber import FrameQueue
from agent.config import ReviewSection, SampleSection
from agent.counting.clerk import Service
from agent.counting.thread import Pipeline
from agent.delivery.commands import Gatekeeper, InboundCommand
from agent.delivery.messages import load_schema
from agent.delivery.outbox import Outbox, open_outbox
from agent.desk import NO_SAMPLE_YET, Desk, Done, Instruments, Refused
from agent.domain import Box, Detection, Frame, SampleState
from agent.errors import OutboxError
from agent.health import Health, SelfTest
from agent.latest import Latest
from agent.pictures import PictureStore
from agent.review import CropStore
from tests.frames import make_bench, make_frame, make_models
from tests.proofs.scanning import Window, World, take

AT = datetime(2026, 11, 25, 8, 0, tzinfo=timezone.utc)
BASE = "hv/1/site/dev"
KINDS: dict[str, CellKind] = {"round": "leukocyte", "lobed": "leukocyte", "red": "red-cell"}


class Runner:
    """A pipeline that runs, with all around it."""

    def __init__(self, outbox: Outbox, bench: Bench | None = None, sample: SampleState | None = None) -> None:
        self.frames = FrameQueue(8)
        self.outbox = outbox
        self.health = Health()
        self.stored = 0
        self.pipeline = Pipeline(
            frames=self.frames,
            outbox=outbox,
            bench=bench or make_bench(),
            sample=sample or SampleState("s-1"),
            health=self.health,
            on_stored=self._count,
            retry_s=0.02,
        )

    def _count(self) -> None:
        self.stored += 1

    def give(self, *taken: Frame | UnreadableFrame) -> None:
        for one in taken:
            assert self.frames.put_waiting(one, 5)

    def run_to_end(self) -> None:
        self.frames.end()
        self.pipeline.run()

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 10) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, "it did not come to it"
            time.sleep(0.005)

    @property
    def messages(self) -> list[dict[str, Any]]:
        with open_outbox(self.outbox.path.parent, device="dev", verify=False) as mine:  # one connection a thread
            return [json.loads(row.payload) for row in mine.pending(0, 100_000)]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["schema"] == f"hv/1/{kind}"]

    @property
    def told(self) -> list[dict[str, Any]]:
        """The events, without the two that end every finite source."""
        return [event for event in self.of_kind("event") if event["kind"] not in ("sample-finished", "source-ended")]


class FullOutbox:
    """A real outbox in front of which a test can say that the disk is full."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.is_full = True
        self.refused = 0

    def append(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        if self.is_full:
            self.refused += 1
            raise OutboxError("outbox.db: the disk is full; free space there")
        return self.outbox.append(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outbox, name)


def make_instruments(**changes: Any) -> Instruments:
    def refuse(*_args: object) -> Done:
        raise Refused("no-models", "nothing is staged")

    named: dict[str, Any] = {
        "self_test": lambda: SelfTest(AT, is_passed=True, detail="both models answer"),
        "reload": lambda: Done("changed: quality", {"changed": ["quality"]}),
        "relearn": lambda: Done("what is usual is learnt anew, from 30 slides", {"slides": 30}),
        "stage": refuse,
        "activate": refuse,
        "roll_back": refuse,
        "replay": lambda stream, first, last: Done("3 rows", {"stream": stream, "from_seq": first, "to_seq": last}),
        "describe": lambda: {"agent": "0.0"},
    }
    return Instruments(**{**named, **changes})


class Place:
    """A pipeline with a desk; what it says is kept in `replies` and `pictures`."""

    def __init__(
        self,
        outbox: Outbox,
        sample: SampleState = NO_SAMPLE_YET,
        bench: Bench | None = None,
        section: SampleSection = SampleSection(),  # noqa: B008 - frozen
        latest: Latest | None = None,
        crops: CropStore | None = None,
        whole_fields: PictureStore | None = None,
        **instruments: Any,
    ) -> None:
        self.outbox = outbox
        self.frames = FrameQueue(16)
        self.replies: list[dict[str, Any]] = []
        self.pictures: list[tuple[str, bytes]] = []
        self.commands: queue.Queue[InboundCommand] = queue.Queue(16)
        self.health = Health()
        self.desk = Desk(
            outbox,
            Gatekeeper(BASE, "broker"),
            lambda: section,
            make_instruments(**instruments),
            clock=lambda: datetime.now(timezone.utc),
            is_clock_true=lambda: True,
            monotonic_s=time.monotonic,
        )
        self.pipeline = Pipeline(
            frames=self.frames,
            outbox=outbox,
            bench=bench or replace(make_bench(), counting=Rules(KINDS)),
            sample=sample,
            health=self.health,
            service=Service(
                self.commands,
                self.desk,
                lambda _topic, body, _correlation: self.replies.append(json.loads(json.dumps(body))),
                lambda topic, jpeg: self.pictures.append((topic, jpeg)),
            ),
            documents_every_s=0,
            retry_s=0.02,
            latest=latest,
            crops=crops,
            pictures=whole_fields,
        )

    @property
    def bench(self) -> Bench:
        return self.pipeline._count.bench

    def send(self, name: str, transaction: str = "t-1", **body: Any) -> None:
        payload = json.dumps({"transaction": transaction, **body}).encode()
        self.commands.put(InboundCommand(name, payload, received_monotonic_s=time.monotonic()))

    def do(self, name: str, transaction: str = "t-1", **body: Any) -> dict[str, Any]:
        """Send one command and have it served, on this thread; returns the reply."""
        self.send(name, transaction, **body)
        self.serve()
        reply = self.replies[-1]
        jsonschema.Draft202012Validator(load_schema("reply")).validate(reply)
        return reply

    def serve(self) -> None:
        """Have the commands served that have come, on this thread."""
        self.pipeline._clerk.serve()

    def give(self, *seeds: int) -> None:
        for seed in seeds:
            assert self.frames.put_waiting(make_frame(seed), 5)

    def run_a_while(self, is_so: Callable[[], bool]) -> None:
        """Run the thread until it is so."""
        self.pipeline.start()
        deadline_s = time.monotonic() + 10
        while not is_so():
            assert time.monotonic() < deadline_s, "it did not come to it"
            time.sleep(0.005)
        assert self.pipeline.stop(5)
        assert self.pipeline.failure is None

    @property
    def phase(self) -> str:
        return self.pipeline.sample.phase

    def messages(self, kind: str) -> list[dict[str, Any]]:
        with open_outbox(self.outbox.path.parent, device="dev", verify=False) as mine:
            found = [json.loads(row.payload) for row in mine.pending(0, 100_000)]
        chosen = [message for message in found if message["schema"] == f"hv/1/{kind}"]
        for message in chosen:
            jsonschema.Draft202012Validator(load_schema(kind)).validate(message)
        return chosen

    def documents(self) -> dict[str, Any]:
        """The retained documents by the end of their topic; None = to be cleared."""
        found = {}
        for document in self.outbox.documents():
            body = None if document.payload is None else json.loads(document.payload)
            if body is not None:
                jsonschema.Draft202012Validator(load_schema(document.topic.split("/")[4])).validate(body)
            found[document.topic.removeprefix(f"{BASE}/")] = body
        return found


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not is_so():
        assert time.monotonic() < deadline_s, "it did not come to it"
        time.sleep(0.005)


def make_slide_frame(world: World, number: int, x: float) -> Frame:
    frame = take(world, Window(x, 100), (640, 480), np.random.default_rng(number), number)
    return replace(frame, origin_key=f"f{number}", captured_monotonic_ns=time.monotonic_ns() + (number - 600) * 10**9)


def count_along(outbox: Outbox, world: World, numbers: Sequence[int]) -> Runner:
    """Fields of a slide, 200 px from one to the next and back again; each shows the cells that stand every 100 px."""
    models = make_models(())
    bench = replace(make_bench(models), counting=Rules({"round": "leukocyte"}), review=ReviewSection(gallery=3))
    runner = Runner(outbox, bench, sample=outbox.sample_state() or SampleState("s-1"))
    for number in numbers:
        x = 60.0 + 200 * abs((number + 4) % 10 - 5)
        edges = range(int(-x % 100) + 10, 600, 100)
        cells = tuple(Detection(Box(edge, 200, edge + 37, 240), "white", 0.9) for edge in edges)
        models.detector.detect = lambda _pixels, _min_score=None, cells=cells: cells
        runner.pipeline._store_frame(make_slide_frame(world, number, x))
    return runner
