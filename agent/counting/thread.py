"""The thread that counts: it takes frames from the queue and stores what each one gave, and between two does commands.

    FrameQueue --Frame--> Count.work --Outcome--> Intake --> outbox
    commands ------------> Clerk -------Deed----> Intake     `-- takes nothing: the frame in hand waits here, the queue
    other threads --tell--> Teller ----events---> Intake         behind it fills, and the camera waits

`Count.work` is the main path (`agent.pipeline`). What a frame gave is stored in one transaction, so it is either done
with or has not been begun, and nothing that was counted is lost. What each part owns:

    Pipeline  the loop, and when it ends     Count   the sample, its slide, what was learnt, the bench
    Intake    writing to the outbox          Clerk   where commands come from and answers go
    Teller    what waits to be told          Album   pictures on this device
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from agent.bench import Bench
from agent.camera.camera import NOTHING_YET, UnreadableFrame
from agent.camera.grabber import END_OF_FRAMES, UNREADABLE, FrameQueue
from agent.counting.album import Album
from agent.counting.clerk import Clerk, Service
from agent.counting.count import Count
from agent.counting.intake import Intake
from agent.counting.slide_in_view import SEEN_NOTE
from agent.counting.telling import Teller
from agent.delivery.audit import Entry
from agent.delivery.messages import Severity
from agent.delivery.outbox import NO_NOTES, Outbox
from agent.domain import Frame, SampleState
from agent.health import Health, SelfTest
from agent.latest import Latest
from agent.pictures import PictureStore
from agent.pipeline import Outcome, refuse_frame
from agent.review import CropStore

logger = logging.getLogger(__name__)

NOT_STORED = "not-stored"
"""Why a live frame is dropped that the outbox could not take before the agent was stopped."""

TURN_S = 0.5
"""s; longest wait for a frame: a stop and an event are noticed within it."""

RETRY_S = 1.0
"""s; a disk that was full is tried again this often: soon enough for a person who has just made room."""


class Pipeline(threading.Thread):
    """The thread that owns the models, the sample and its own connection to the outbox.

    Make it, `start` it, `stop` it. failure: what ended it if that was neither `stop` nor the end of the source.
    is_source_finished: all frames of a finite source are done with. on_stored: called when there is more to publish.
    on_counted: called after each stored field. service: None = no commands are heard. crops: where pictures for the
    review are kept, pictures: where whole fields are; None = they are not. latest: where frames are shown to who looks
    on; None = nobody does. due_self_test: runs a self-test that is due and returns its outcome. While the newest one
    has failed, no frame is taken: a folder waits, of a live camera the newest frame stays.
    """

    def __init__(
        self,
        *,
        frames: FrameQueue,
        outbox: Outbox,
        bench: Bench,
        sample: SampleState,
        health: Health,
        on_stored: Callable[[], None] = lambda: None,
        on_counted: Callable[[], None] = lambda: None,
        service: Service | None = None,
        due_self_test: Callable[[], SelfTest | None] = lambda: None,
        documents_every_s: float = 5.0,
        retry_s: float = RETRY_S,
        crops: CropStore | None = None,
        pictures: PictureStore | None = None,
        latest: Latest | None = None,
    ) -> None:
        super().__init__(name="pipeline", daemon=True)
        self.failure: Exception | None = None
        self.is_source_finished = False
        self._frames = frames
        self._health = health
        self._due_self_test = due_self_test
        self._retry_s = retry_s
        self._latest = latest
        self._stopping = threading.Event()
        self._teller = Teller(bench.topics, on_stored)
        self._count = Count(outbox, bench, sample, health)
        self._intake = Intake(
            outbox,
            self._count,
            self._teller,
            health,
            documents_every_s=documents_every_s,
            on_stored=on_stored,
            on_counted=on_counted,
        )
        self._clerk = Clerk(
            service, self._count, self._intake, health, boot=outbox.boot, stopping=self._stopping, retry_s=retry_s
        )
        self._album = Album(outbox, crops, pictures)
        outbox.spare(self._album.let_go)

    # ---- for other threads

    @property
    def sample(self) -> SampleState:
        """As it is stored."""
        return self._count.sample

    def tell(
        self, kind: str, message: str, severity: Severity = "info", detail: Mapping[str, object] | None = None
    ) -> None:
        """Have an event stored: something has happened now. It is, before the next frame."""
        self._teller.tell(kind, message, severity, detail)

    def tell_self_test(self, test: SelfTest) -> None:
        """Have the outcome of a self-test stored as an event."""
        self._teller.tell_self_test(test)

    def remember(self, key: str, value: str) -> None:
        """Have a note stored, before the next frame."""
        self._teller.remember(key, value)

    def use_service(self, service: Service) -> None:
        """Hear commands; before the thread is started."""
        self._clerk.service = service

    def record(self, entry: Entry, notes: Mapping[str, str | None] = NO_NOTES) -> None:
        """Write an audit entry; before the thread is started. Raises OutboxError."""
        self._intake.record(entry, notes)

    def use_bench(self, bench: Bench) -> None:
        """Work with other models or thresholds from the next frame on; on this thread, or before it is started."""
        self._count.use_bench(bench)

    def stop(self, timeout_s: float) -> bool:
        """Finish the frame in hand and end; the frames behind it are left. Returns whether it has ended in time."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout_s)
        return not self.is_alive()

    # ---- the thread

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # the top of the thread: the supervisor finds it dead and ends the process
            self.failure = error
            logger.exception("the pipeline has ended")

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._health.beat("pipeline")
            self._intake.store_waiting()
            self._clerk.serve()
            self._test_when_due()
            if self._health.is_self_test_failed:
                self._tell_sample()
                self._stopping.wait(TURN_S)
                continue
            taken = self._frames.take(TURN_S)
            self._finish_when_drained(taken)
            if taken is END_OF_FRAMES:
                self._end_of_source()
                break
            if taken is NOTHING_YET:
                self._tell_sample()
            elif isinstance(taken, UnreadableFrame):
                self._store_unreadable(taken)
            elif isinstance(taken, Frame):
                self._clerk.show_frame(taken)
                outcome = self._store_frame(taken)
                if self._latest is not None:
                    self._latest.show(taken, outcome.sample.sid, outcome.field, outcome.dropped)
        seen_note = self._count.slide.seen_note
        if seen_note is not None and self._health.snapshot().outbox == "ok":  # else a frame was given up
            self.remember(SEEN_NOTE, seen_note)
        self._intake.store_waiting()

    def _test_when_due(self) -> None:
        test = self._due_self_test()
        if test is not None:
            (logger.info if test.is_passed else logger.error)("%s", test.detail)
            self.tell_self_test(test)
            self._intake.store_waiting()  # before a frame that is counted because of it

    def _finish_when_drained(self, taken: object) -> None:
        """A sample that was told to stop is finished when no frame from before that is left."""
        if self._count.is_drained(taken):
            self._store(self._count.finish("command"))

    def _tell_sample(self) -> None:
        """While no frame comes: the documents that were not due with the last one."""
        if self._intake.has_due_documents():
            self._store(Outcome(self.sample, None))

    def _end_of_source(self) -> None:
        if self.sample.phase in ("running", "paused"):
            self._store(self._count.finish("source-ended"))
        words = f"sample {self.sample.sid}: {self.sample.fields} fields"
        self.tell("source-ended", words, detail={"sample": self.sample.sid, "fields": self.sample.fields})
        self._intake.store_waiting()
        self._health.retire("pipeline")
        self.is_source_finished = True

    # ---- storing, for as long as it takes

    def _store_frame(self, frame: Frame) -> Outcome:
        """Analyse a frame and store what it gave; a sample that is stopped while it waits makes it anew."""
        outcome = self._count.work(frame, self._clerk.desk)
        while not self._has_stored(outcome):
            before = self.sample
            if not self._has_waited():
                return outcome
            if self.sample is not before:
                outcome = self._count.work(frame, self._clerk.desk)
        return outcome

    def _store_unreadable(self, frame: UnreadableFrame) -> None:
        events = self._teller.event_of_unreadable(frame)
        self._store(Outcome(refuse_frame(self.sample, UNREADABLE), frame.key, events, dropped=UNREADABLE))

    def _store(self, outcome: Outcome) -> None:
        """A stop while the outbox takes nothing gives the outcome up."""
        while not self._has_stored(outcome):
            if not self._has_waited():
                return

    def _has_stored(self, outcome: Outcome) -> bool:
        stored = self._intake.store(outcome)
        if stored is None:
            return False
        if stored.field is not None:
            self._clerk.show_cells(stored.field, stored.sample.sid)
            self._album.keep(stored.field, stored, self._count.bench)
        self._intake.say_going_on()
        return True

    def _has_waited(self) -> bool:
        """Wait a little for an outbox that takes nothing, and answer commands; False = the thread is to end."""
        self._health.beat("pipeline")
        self._clerk.serve(can_store=False)
        if self._stopping.wait(self._retry_s):
            logger.warning("stopped while the outbox takes nothing: the frame in hand is not stored")
            self._health.count_dropped(NOT_STORED)
            return False
        return True
