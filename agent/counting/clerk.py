"""Commands on the pipeline's thread, between frames: taken to the desk, stored, answered.

    queue --> Desk.judge --> do ----> Deed --> Intake.store_deed --> reply
                        `--> refuse -'             `-- the outbox takes nothing: the reply says what is so

While a frame waits for room in the outbox, commands are still answered; what would have to be stored is not done then.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from agent.analysis.crops import encode_jpeg
from agent.counting.count import Count
from agent.counting.intake import Intake
from agent.delivery.commands import Command, InboundCommand, Refusal, reply_topic
from agent.delivery.messages import Body
from agent.delivery.reports import Reply, reply_body
from agent.desk import Deed, Desk
from agent.domain import FieldResult, Frame
from agent.errors import OutboxDamaged, OutboxError
from agent.health import Health

SERVED_THOUGH_FULL = frozenset({"stop"})
"""Commands that are done while a frame waits for room in the outbox, which keeps some for them."""


@dataclass(frozen=True, slots=True, eq=False)
class Service:
    """Where commands come from and answers go. reply: topic, body, correlation; show: topic, JPEG bytes."""

    commands: queue.Queue[InboundCommand]
    desk: Desk
    reply: Callable[[str, Body, bytes | None], None]
    show: Callable[[str, bytes], None]


class Clerk:
    """Does the commands that have come. service: None = no commands are heard, and no pictures shown.

    boot: goes into replies. stopping: ends the waiting for an outbox that takes nothing, which is tried every retry_s.
    """

    def __init__(
        self,
        service: Service | None,
        count: Count,
        intake: Intake,
        health: Health,
        *,
        boot: int,
        stopping: threading.Event,
        retry_s: float,
    ) -> None:
        self.service = service
        self._count = count
        self._intake = intake
        self._health = health
        self._boot = boot
        self._stopping = stopping
        self._retry_s = retry_s
        self._wants_snapshot = False

    @property
    def desk(self) -> Desk | None:
        return None if self.service is None else self.service.desk

    def serve(self, *, can_store: bool = True) -> None:
        """Do the commands that have come, in their order. can_store: False while a frame waits for the outbox."""
        if self.service is None:
            return
        while True:
            try:
                inbound = self.service.commands.get_nowait()
            except queue.Empty:
                return
            self._serve(inbound, self.service, can_store=can_store)

    def _serve(self, inbound: InboundCommand, service: Service, *, can_store: bool) -> None:
        judged = service.desk.judge(inbound)
        deed: Deed | None = None
        try:
            if isinstance(judged, Refusal):
                deed = service.desk.refuse(judged, self._count.bench.reporter)
            elif can_store or not judged.kind.is_audited or judged.name in SERVED_THOUGH_FULL:
                deed = service.desk.do(judged, self._count.sample, self._count.bench.reporter)
            else:
                deed = _not_stored(judged, "the outbox takes nothing now")
            if deed.must_be_stored and not can_store and judged.name in SERVED_THOUGH_FULL:
                self._intake.store_deed(deed)
            elif deed.must_be_stored and can_store:
                # What has changed models or configuration is done; that it was must be stored, however long it takes.
                self._store(deed, keeps_trying=deed.is_done_outside)
                self._intake.say_going_on()
        except OutboxDamaged:
            raise
        except OutboxError as error:
            self._intake.say_stopped(error)
            # What reaches beyond the outbox was done before it could be recorded; the next start audits what it finds.
            is_done = deed is not None and deed.is_done_outside
            deed = _not_recorded(judged, str(error)) if is_done else _not_stored(judged, str(error))
        self._wants_snapshot |= deed.wants_snapshot
        self._answer(inbound, deed, service)

    def _store(self, deed: Deed, *, keeps_trying: bool) -> None:
        """Raises OutboxError, unless it keeps trying."""
        while True:
            try:
                self._intake.store_deed(deed)
            except OutboxDamaged:
                raise
            except OutboxError as error:
                if not keeps_trying or self._stopping.wait(self._retry_s):
                    raise
                self._intake.say_stopped(error)
                self._health.beat("pipeline")
            else:
                return

    def _answer(self, inbound: InboundCommand, deed: Deed, service: Service) -> None:
        topics, at = self._count.bench.topics, datetime.now(timezone.utc)
        body = reply_body(deed.reply, topics, boot=self._boot, at=at, is_repeated=deed.is_repeated)
        if inbound.hear_reply is None:
            service.reply(reply_topic(inbound, topics), body, inbound.correlation)
        else:
            inbound.hear_reply(body)

    # ---- pictures that were asked for

    def show_frame(self, frame: Frame) -> None:
        """Publish the frame as a picture where a command has asked for the next one."""
        if self._wants_snapshot and self.service is not None:
            self._wants_snapshot = False
            topic = self._count.bench.topics.image(self._count.sample.sid, f"frame-{frame.number}")
            self.service.show(topic, encode_jpeg(frame.pixels_bgr))

    def show_cells(self, field: FieldResult, sid: str) -> None:
        """Publish the cells of a field that went to the classifier where the configuration asks for pictures."""
        bench = self._count.bench
        if self.service is None or not bench.with_images:
            return
        for cell in field.cells:
            if cell.classification is not None:
                self.service.show(bench.topics.image(sid, cell.cell_id), bench.picture_of(cell, field.frame))


def _not_stored(judged: Command | Refusal, reason: str) -> Deed:
    message = f"nothing was done: {reason}; send it again, as another transaction, when the alert is gone"
    return Deed(Reply(judged.name, judged.transaction, "failed", "outbox-stopped", message, {}))


def _not_recorded(judged: Command | Refusal, reason: str) -> Deed:
    message = f"it was done, and could not be recorded: {reason}"
    return Deed(Reply(judged.name, judged.transaction, "failed", "not-recorded", message, {}))
