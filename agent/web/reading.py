"""What the page looks at, made ready on a thread of its own, once for all who look.

    browsers --> Reader --one thread--> snapshots, outbox --> bytes

However many ask, and however often: the state is made at most every FRESH_S, a picture is drawn once, and what takes
time never holds the page's loop.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from typing import Generic, TypeVar

from agent.analysis.crops import encode_jpeg
from agent.delivery.messages import Body
from agent.delivery.outbox import Outbox
from agent.errors import OutboxError
from agent.health import MachineReading
from agent.latest import SeenFrame
from agent.review import CROPS_FOLDER, CropStore
from agent.web.mapping import SampleMap
from agent.web.views import Sights, class_bodies, review_body, shown_frame, state_body

FRESH_S = 0.5
"""s; what was made since then is given again."""

REVIEW_FRESH_S = 1.0
"""s; the same for the review list, which is read from the disk."""

MAP_FRESH_S = 2.0
"""s; the same for the map of the slide."""

MACHINE_FRESH_S = 5.0
"""s; the same for disk, memory and temperature."""

KEPT_PICTURES = 4
"""Pictures of fields that are kept: a browser asks for the one that the state which it has just read speaks of."""

Answer = TypeVar("Answer")


class _Fresh(Generic[Answer]):
    """What is given again for a while instead of being made anew. for_s: for how long."""

    def __init__(self, for_s: float) -> None:
        self._for_s = for_s
        self._made: tuple[float, Answer] | None = None

    def get(self, make: Callable[[], Answer]) -> Answer:
        now_s = time.monotonic()
        if self._made is None or now_s - self._made[0] >= self._for_s:
            self._made = (now_s, make())
        return self._made[1]

    def forget(self) -> None:
        self._made = None


class Reader:
    """Reads for the page; its methods are called on the page's loop, the work is done on the reader's thread."""

    def __init__(self, sights: Sights) -> None:
        self._sights = sights
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="page-reader")
        self._outbox: Outbox | None = None
        self._crops = CropStore(sights.folder / CROPS_FOLDER)
        self._pictures: OrderedDict[int, bytes] = OrderedDict()
        self._state = _Fresh[bytes](FRESH_S)
        self._review = _Fresh[bytes](REVIEW_FRESH_S)
        self._map = _Fresh[bytes](MAP_FRESH_S)
        self._machine = _Fresh[MachineReading](MACHINE_FRESH_S)
        self._sample_map: SampleMap | None = None
        self._beats: tuple[int | None, float] = (None, time.monotonic())

    async def state(self) -> bytes:
        """All that is watched, as JSON."""
        return await self._on_thread(lambda: self._state.get(self._read_state))

    async def picture(self, number: int) -> bytes | None:
        """The JPEG of the frame of this number; None where it is not kept any more."""
        return await self._on_thread(lambda: self._pictures.get(number))

    async def review(self) -> bytes:
        """The review list, as JSON. Raises OutboxError."""
        return await self._on_thread(lambda: self._review.get(self._read_review))

    async def crop(self, sid: str, cell_id: str) -> bytes:
        """The JPEG of a cell of the review list; empty where there is none."""
        return await self._on_thread(lambda: self._crops.read(sid, cell_id))

    async def slide_map(self) -> bytes:
        """The map of the sample's slide, as JSON. Raises OutboxError."""
        return await self._on_thread(lambda: self._map.get(self._read_map))

    def forget(self) -> None:
        """A command has changed something: what was made before is not given again."""
        self._state.forget()
        self._review.forget()

    def close(self) -> None:
        """No more reading; what is being read is finished on its own."""
        self._thread.submit(self._close_outbox)
        self._thread.shutdown(wait=False)

    # ---- on the reader's thread

    async def _on_thread(self, work: Callable[[], Answer]) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _read_state(self) -> bytes:
        now_s = time.monotonic()
        seen = self._sights.latest.read()
        self._draw(shown_frame(seen))
        body = state_body(
            self._sights,
            seen,
            at=datetime.now(timezone.utc),
            now_s=now_s,
            still_s=self._stands_still_s(now_s),
            machine=self._machine.get(self._sights.machine),
        )
        return _as_json(body)

    def _draw(self, seen: SeenFrame | None) -> None:
        if seen is None or seen.number in self._pictures:
            return
        self._pictures[seen.number] = encode_jpeg(seen.pixels_bgr)
        while len(self._pictures) > KEPT_PICTURES:
            self._pictures.popitem(last=False)

    def _stands_still_s(self, now_s: float) -> float:
        """For how long the pipeline's thread has not moved."""
        beats = self._sights.health().beats.get("pipeline")
        if beats != self._beats[0]:
            self._beats = (beats, now_s)
        return now_s - self._beats[1]

    def _read_map(self) -> bytes:
        sid = self._sights.sample().sid
        if self._sample_map is None or self._sample_map.sid != sid:
            self._sample_map = SampleMap(self._sights.topics, sid)
        draw = self._sample_map.read
        colours = {one["class"]: one["colour"] for one in class_bodies(self._sights.bench())}
        return self._read_outbox(lambda outbox: draw(outbox, colours))

    def _read_review(self) -> bytes:
        return self._read_outbox(lambda outbox: review_body(outbox, self._crops))

    def _read_outbox(self, read: Callable[[Outbox], Body]) -> bytes:
        """What is read of the outbox, as JSON; a connection that has failed is opened anew the next time."""
        try:
            self._outbox = self._outbox or self._sights.open_outbox()
            return _as_json(read(self._outbox))
        except OutboxError:
            self._close_outbox()
            raise

    def _close_outbox(self) -> None:
        outbox, self._outbox = self._outbox, None
        if outbox is not None:
            outbox.close()


def _as_json(body: Body) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()
