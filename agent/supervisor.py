"""The main thread: builds the agent from its configuration, sink first, watches it, and ends it, source first.

    start   outbox -> publisher -> workshop (models) -> pipeline -> camera -> page, if there is one -> READY
    stop    page -> camera -> the frame in hand -> publisher drains -> outbox

A thread may end only when it was asked to, or with its finite source. Any other end of one ends the process with an
exit code of its own, and systemd starts it again. The watchdog is fed only when camera, pipeline and publisher have all
moved since the last time; those that ended with their source are not waited for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import agent
from agent import systemd
from agent.alerts import CAMERA_TROUBLE, Problem, open_problems
from agent.analysis.sample import begin
from agent.camera.camera import Camera, open_camera
from agent.camera.grabber import FrameQueue, Grabber
from agent.config import (
    CameraSection,
    Config,
    SampleSection,
    config_sha256,
    models_folder,
    read_operator_key,
    read_web_password,
    state_folder,
)
from agent.delivery.audit import Entry
from agent.delivery.certificates import Expiry, read_expiries
from agent.delivery.commands import Gatekeeper, InboundCommand, canonical_json
from agent.delivery.messages import Body, DescribedModel, Severity, health_body, info_body, rfc3339_ms
from agent.delivery.outbox import START_ROOM_BYTES, Outbox, Salvage, begin_boot, lock_folder, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.reports import Alert
from agent.delivery.topics import Topics
from agent.desk import NO_SAMPLE_YET, NUMBER_KEY, Desk, Done, Instruments, fresh_sample, new_sid, next_number
from agent.domain import AgentState, SampleState
from agent.errors import CameraError, ConfigError, OutboxError
from agent.health import CameraState, Health, HealthSnapshot, Throttling
from agent.inference.models import Models
from agent.inference.slots import ModelSlots
from agent.latest import Latest
from agent.machine import give_back_free_memory, keep_big_blocks_apart, read_clock, read_disk_free, read_machine
from agent.pictures import PICTURES_FOLDER, PictureStore
from agent.pipeline import Pipeline, Service
from agent.reporting import Reporter, archive
from agent.review import CROPS_FOLDER, CropStore
from agent.signals import StopSignal, stop_on_signals
from agent.workshop import Work, Workshop

if TYPE_CHECKING:  # the page's framework comes with an extra
    from agent.web.page import Page

logger = logging.getLogger(__name__)

THREAD_DIED = 70
"""Exit code when a thread has ended unasked: EX_SOFTWARE of sysexits(3). systemd starts the agent again."""

START_PUT_OFF_S = 60
"""s; told at each look while the self-test keeps the agent from `ready`: a new start would not mend the models."""

TICK_S = 0.25
"""s; how often the parts are looked at: a lost camera shows within it."""

DRAIN_S = 5.0
"""s; after SIGTERM the publisher may go on for this long. What is not sent waits on disk for the next start; at a
shutdown systemd and people lose patience."""

DRAIN_PATIENCE_S = 5.0
"""s; at the end of a finite source: when no row has left for this long, the broker counts as away."""

FRAME_IN_HAND_S = 10.0
"""s; for the frame in hand: a large one through both models on a slow board takes a few."""

CAMERA_CLOSES_S = 2.0
"""s; a camera that does not let go within this is left to the end of the process."""

CLOCK_STEP_S = 2.0
"""s; time servers slew smaller differences; a larger one between two looks was set."""

DISK_LOW_FACTOR, DISK_FINE_FACTOR = 4, 5
"""Multiples of outbox.min_free_mb: a warning comes while there is time to act, and again only after it was mended."""

MOST_COMMANDS_WAITING = 64
"""Persons send one; a program that sends more than this at once is told to wait."""

WORK_KEY = "audit/work"
"""Note: the agent, configuration and models of the last start."""

RAISED_KEY = "alerts"
"""Note: the ids of the alerts that stand at the broker."""


def run_agent(config: Config, reread: Callable[[], Config] | None = None) -> int:
    """Run until a signal, the end of a finite source, or the death of a thread; returns the exit code.

    reread: the configuration as it stands in its file at the time of the command `reload`; None = as it is.
    Raises what stands in the way of a start: ModelError, OutboxError, ConfigError.
    """
    keep_big_blocks_apart()
    with stop_on_signals() as stop, ExitStack() as cleanup:
        folder = state_folder(config.outbox)
        cleanup.enter_context(lock_folder(folder))
        make_room_to_start(folder)
        begin_boot(folder)
        open_here = partial(
            open_outbox,
            folder,
            config.outbox.max_mb,
            config.outbox.min_free_mb,
            device=config.device,
            keep_mb=config.delivery.keep_mb,
            keep_hours=config.delivery.keep_hours,
        )
        outbox = open_here()
        open_another = partial(open_here, verify=False)

        health = Health()
        commands: queue.Queue[InboundCommand] = queue.Queue(MOST_COMMANDS_WAITING)
        publisher = Publisher(
            topics=Topics(config.site, config.device),
            broker=config.broker,
            boot=outbox.boot,
            open_outbox=open_another,
            health=health,
            health_interval_s=config.publish.health_interval_s,
            delivery=config.delivery,
            take_command=partial(_put_if_room, commands) if config.commands.enabled else None,
        )
        publisher.start()
        cleanup.callback(publisher.stop, 0)  # for a start that fails below; a second stop does nothing

        slots = model_slots(config, folder)
        workshop = Workshop(config, slots, health, reread or (lambda: config))
        if (words := slots.staying_words) is not None:
            logger.log(logging.INFO if config.models.folder is None else logging.WARNING, "%s", words)
        since_boot = outbox.numbered_since_boot()
        publisher.publish_info(describe(config, workshop.work.models, outbox.boot, since_boot))

        bench = workshop.work.bench
        latest = Latest() if config.web.enabled else None
        now, is_anew = datetime.now(timezone.utc), config.camera.can_begin_anew
        sample, is_new = begin_sample(outbox, config.sample, now, bench.reporter, takes_all_anew=is_anew)
        frames = FrameQueue(config.camera.queue_frames)
        pipeline = Pipeline(
            frames=frames,
            outbox=outbox,
            bench=bench,
            sample=sample,
            health=health,
            on_stored=publisher.wake,
            on_counted=workshop.mark_proven,
            due_self_test=workshop.due_self_test,
            documents_every_s=config.differential.update_s,
            crops=CropStore(folder / CROPS_FOLDER),
            pictures=open_pictures(config, folder),
            latest=latest,
        )
        desk = make_desk(config, outbox, workshop, publisher.send_again)
        pipeline.use_service(Service(commands, desk, publisher.publish_reply, publisher.publish_picture))

        def on_change(work: Work) -> None:
            pipeline.use_bench(work.bench)
            publisher.publish_info(describe(work.config, work.models, outbox.boot, since_boot))

        workshop.on_change = on_change
        stop_camera = threading.Event()
        grabber = Grabber(
            partial(open_unfinished, config.camera, open_another),
            frames,
            health,
            stop_camera,
            last_sha256_16=sample.last_sha256_16,
        )
        watch = Watch(
            config,
            folder,
            outbox.boot,
            health,
            publisher,
            pipeline,
            grabber,
            open_another,
            alerts=AlertBoard(publisher, pipeline, stale=read_raised(outbox)),
            fell_back=lambda: workshop.fell_back,
            salvage=None if outbox.salvage is None else salvage_words(outbox.salvage),
        )
        if latest is not None:
            watch.page = make_page(config, folder, latest, health, watch, pipeline, workshop, commands, open_another)
        logger.info("sample %s, boot %d, %d messages wait", sample.sid, outbox.boot, outbox.depth())
        record_work(pipeline, outbox, workshop)
        if outbox.salvage is not None:
            pipeline.tell("outbox-set-aside", salvage_words(outbox.salvage), "error", {"rows": outbox.salvage.rows})
        if workshop.went_back is not None:
            pipeline.tell("model-rolled-back", workshop.went_back, "error")
        pipeline.tell("agent-started", f"agent {agent.__version__}, sample {sample.sid}", detail={"sample": sample.sid})
        if is_new:
            pipeline.tell("sample-opened", f"sample {sample.sid}", detail={"sample": sample.sid})
        if (tested := health.snapshot().last_self_test) is not None:
            pipeline.tell_self_test(tested)
        pipeline.start()
        grabber.start()
        if watch.page is not None:
            watch.page.start()

        while not stop.wait(TICK_S) and not watch.has_ended:
            watch.look()
        watch.look()  # a short folder is read before the first look; that it was ready is told all the same

        is_finished = pipeline.is_source_finished
        if is_finished and pipeline.stop(FRAME_IN_HAND_S):
            drain(outbox, publisher, watch, stop)
        # Not before the drain: from here on systemd counts TimeoutStopSec.
        watch.say_stopping()
        if watch.page is not None and not watch.page.stop():
            logger.warning("the page does not end; the agent ends without waiting for it")
        stop_camera.set()
        grabber.join(CAMERA_CLOSES_S)
        if not pipeline.stop(FRAME_IN_HAND_S):
            # The outbox stays open: closing a connection under another thread's hands can crash the process.
            logger.error("the frame in hand takes more than %g s; the next start begins it anew", FRAME_IN_HAND_S)
            return THREAD_DIED
        publisher.stop(DRAIN_S if health.snapshot().broker == "connected" else 0)
        if is_finished and not watch.has_died:
            close_sample(outbox, pipeline.sample, config.sample.id)
        ended = pipeline.sample
        logger.info("ended: sample %s, %d fields; %s", ended.sid, ended.fields, waiting_words(outbox))
        outbox.close()
        return THREAD_DIED if watch.has_died else 0


# ------------------------------------------------------------------------------------------------------- the parts


def model_slots(config: Config, folder: Path | None = None) -> ModelSlots:
    """The slots of this device, beside its outbox. folder: of the outbox; None = as configured."""
    place = (folder or state_folder(config.outbox)) / "models"
    return ModelSlots(place, models_folder(config.models), config.commands.staging_folder or place / "staging")


def open_pictures(config: Config, folder: Path) -> PictureStore | None:
    """Where whole fields are kept; None = they are not. folder: of the outbox, for whose results the disk has room."""
    min_free_bytes = int(DISK_LOW_FACTOR * config.outbox.min_free_mb * 2**20)
    keep_bytes = int(config.pictures.keep_mb * 2**20)
    return PictureStore(folder / PICTURES_FOLDER, keep_bytes, min_free_bytes) if keep_bytes else None


def make_room_to_start(folder: Path) -> None:
    """On a disk that somebody else has filled, let our own pictures go until the outbox can be opened.

    Whole fields before the cells that a person should look at. Where that does not suffice, the opening says so.
    """
    free_bytes = read_disk_free(folder)
    if free_bytes is None or free_bytes >= START_ROOM_BYTES:
        return  # nearly always: to know which pictures are old means to look at all of them
    with contextlib.suppress(OSError):  # a disk that lets nothing go tells more at the opening
        pictures, crops = PictureStore(folder / PICTURES_FOLDER, 0), CropStore(folder / CROPS_FOLDER)
        while free_bytes is not None and free_bytes < START_ROOM_BYTES and (pictures.let_go() or crops.let_go()):
            logger.warning("the disk has %.1f MB left: the oldest pictures are let go", free_bytes / 2**20)
            free_bytes = read_disk_free(folder)


def folder_in_use(config: Config) -> Path:
    """The folder of models that is in use: the configured one, or that of the slot that was activated."""
    return model_slots(config).path_in_use


def make_desk(config: Config, outbox: Outbox, workshop: Workshop, send_again: Callable[[str, int, int], None]) -> Desk:
    """The desk at which this agent's commands are done. send_again: of the publisher.

    Raises ConfigError for an operator key that is none.
    """
    topics = Topics(config.site, config.device)
    return Desk(
        outbox,
        Gatekeeper(topics.base, config.commands.operator, read_operator_key(config.commands)),
        lambda: workshop.sample_section,
        Instruments(
            self_test=workshop.self_test,
            reload=workshop.reload,
            relearn=workshop.relearn,
            stage=workshop.stage,
            activate=workshop.activate,
            roll_back=workshop.roll_back,
            replay=partial(_replay, outbox, send_again),
            describe=workshop.describe,
        ),
        clock=lambda: datetime.now(timezone.utc),
        is_clock_true=lambda: read_clock().is_synchronised,
        monotonic_s=time.monotonic,
    )


def make_page(
    config: Config,
    folder: Path,
    latest: Latest,
    health: Health,
    watch: Watch,
    pipeline: Pipeline,
    workshop: Workshop,
    commands: queue.Queue[InboundCommand],
    open_another: Callable[[], Outbox],
) -> Page:
    """The local page, not yet started. Raises ConfigError: its extra is not installed, no password, no certificate."""
    Page = import_page()  # noqa: N806 - a class
    from agent.web.views import Sights

    def examined_with() -> Config:
        """As the agent works now, on one thread of the processor: the counting needs the others."""
        now = workshop.work.config
        models = now.models.model_copy(update={"folder": folder_in_use(now), "threads": 1})
        return now.model_copy(update={"models": models})

    sights = Sights(
        topics=Topics(config.site, config.device),
        boot=watch.boot,
        folder=folder,
        latest=latest,
        health=health.snapshot,
        machine=partial(read_machine, folder),
        state=lambda: watch.state,
        sample=lambda: pipeline.sample,
        bench=lambda: workshop.work.bench,
        alerts=lambda: watch.raised_alerts,
        open_outbox=open_another,
        send=lambda command: pipeline.is_alive() and _put_if_room(commands, command),
        examined_with=examined_with,
    )
    return Page(config.web, read_web_password(config.web), sights)


def import_page() -> type[Page]:
    """The page's class, which needs an extra. Raises ConfigError where that is not installed."""
    try:
        from agent.web.page import Page
    except ModuleNotFoundError as error:
        fault = f"{error.name} is not installed; `pip install 'hematovision-agent[web]'` brings it, or set it to false"
        raise ConfigError("web.enabled", (fault,)) from None
    return Page


def salvage_words(salvage: Salvage) -> str:
    """What came of a damaged outbox, for the event and the alert."""
    extent = "all of it could be read" if salvage.is_whole else "not all of it could be read: results may be missing"
    return f"damaged, kept as {salvage.bad}; {salvage.rows} messages were read out of it; {extent}"


def _replay(outbox: Outbox, send_again: Callable[[str, int, int], None], stream: str, first: int, last: int) -> Done:
    """Have messages sent again, and say which are gone."""
    answer = outbox.request_replay(stream, first, last)
    send_again(stream, first, last)
    facts = {"asked": answer.asked, "waiting": answer.waiting, "gone": [list(span) for span in answer.gone]}
    words = f"{stream} {first} to {last}: {answer.asked} are sent again, {answer.waiting} were on their way"
    if answer.gone:
        words += f", {sum(end - begin + 1 for begin, end in answer.gone)} are not kept any more"
    if answer.beyond is not None:
        facts["beyond"] = answer.beyond
        words += f"; {answer.beyond} and later do not exist yet"
    return Done(words, facts)


def _put_if_room(commands: queue.Queue[InboundCommand], command: InboundCommand) -> bool:
    try:
        commands.put_nowait(command)
    except queue.Full:
        return False
    return True


def record_work(pipeline: Pipeline, outbox: Outbox, workshop: Workshop) -> None:
    """Audit that this start works with another configuration or other models than the last one did."""
    now = canonical_json(workshop.describe()).decode()
    before = outbox.note(WORK_KEY)
    if before == now:
        return
    facts = {**workshop.describe(), "before": before}
    words = "the agent works with another version, configuration or models than before" if before else "first start"
    try:
        pipeline.record(Entry("work-changed", "done", words, detail=facts), {WORK_KEY: now})
    except OutboxError as error:
        logger.error("the audit cannot be written now: %s", error)  # noqa: TRY400 - its words say all; next start again


def describe(config: Config, models: Models, boot: int, numbered_since_boot: int | None) -> Body:
    """The birth certificate of this start."""
    entries = (models.manifest.detector, models.manifest.classifier)
    return info_body(
        device=config.device,
        site=config.site,
        boot=boot,
        numbered_since_boot=numbered_since_boot,
        started_at=datetime.now(timezone.utc),
        agent_version=agent.__version__,
        models=[DescribedModel(entry.role, entry.identity, entry.classes) for entry in entries],
        config_sha256=config_sha256(config),
        runtime=models.runtime,
        delegate=models.delegate,
    )


def open_unfinished(section: CameraSection, open_outbox_here: Callable[[], Outbox]) -> Camera:
    """The camera, told which stored pictures are done with at this moment; on the camera's own thread."""
    try:
        with open_outbox_here() as outbox:
            done = outbox.finished_keys()
    except OutboxError as error:
        raise CameraError(f"which pictures are done with cannot be looked up: {error}") from error
    return open_camera(section, done=done, forget=partial(forget_finished, open_outbox_here))


def forget_finished(open_outbox_here: Callable[[], Outbox], keys: Sequence[str]) -> None:
    """These stored pictures were deleted: nobody need know any more that they are done with."""
    try:
        with open_outbox_here() as outbox:
            outbox.forget_finished(keys)
    except OutboxError as error:
        logger.debug("deleted pictures stay noted: %s", error)


def begin_sample(
    outbox: Outbox, section: SampleSection, now: datetime, reporter: Reporter, *, takes_all_anew: bool
) -> tuple[SampleState, bool]:
    """The sample that was not closed, else a new one, and whether it is new.

    Another id in the configuration ends the sample before and begins another. With `sample.start: command` none is
    begun. With a new one the samples before are archived. takes_all_anew: whether that other sample gets the source
    from its beginning; else it gets what comes now.
    """
    stored, ended = outbox.sample_state(), None
    is_asked = stored is not None and section.id in (None, stored.sid)
    if stored is not None and is_asked and stored.phase != "idle":
        return stored, False
    if stored is not None and not is_asked:
        logger.info("sample %s gives way to %s, which the configuration names", stored.sid, section.id)
        ended = stored
        if stored.phase in ("running", "paused", "finishing"):
            ending = reporter.finish(stored, now, "replaced")
            documents = reporter.documents(ending.sample, boot=outbox.boot, at=now)
            outbox.append(ending.drafts, sample=ending.sample, documents=documents, notes=ending.notes)
            ended = ending.sample
        outbox.clear_sample(with_finished=takes_all_anew)
        stored = None
    if section.start == "command":
        return stored or NO_SAMPLE_YET, False
    number = next_number(outbox)
    fresh = fresh_sample(section.id or new_sid(now, outbox.boot, number), number, section)
    if stored is not None:  # of the same name: no cell_id and no report is given twice
        fresh = replace(fresh, next_cell_number=stored.next_cell_number, reports=stored.reports)
    begun = begin(None, fresh, rfc3339_ms(now))
    cleared, archived = archive(ended, begun.sid, outbox, reporter.topics)
    outbox.append((), sample=begun, documents=cleared, notes={**archived, NUMBER_KEY: str(number)})
    return begun, True


def close_sample(outbox: Outbox, sample: SampleState, wanted_id: str | None) -> None:
    """The source has come to its end: the next run takes all of it anew, as a new sample.

    Where the configuration names the sample, that one has the same id; its cells' numbers then go on, so that no
    cell_id is given twice.
    """
    try:
        outbox.clear_sample(with_finished=True)
        if wanted_id is not None:
            closed = SampleState(
                sample.sid, next_cell_number=sample.next_cell_number, reports=sample.reports, phase="idle"
            )
            outbox.append((), sample=closed)
    except OutboxError as error:
        logger.error("sample %s cannot be closed: %s", sample.sid, error)  # noqa: TRY400 - its words say all


def drain(outbox: Outbox, publisher: Publisher, watch: Watch, stop: StopSignal) -> None:
    """Wait for the broker to take what is there, as long as it takes something."""
    left, moved_at_s = math.inf, time.monotonic()
    with contextlib.suppress(OutboxError):  # what cannot be counted cannot be waited for; it stays on disk
        while (depth := outbox.depth()) > 0 and publisher.is_alive():
            if depth < left:
                left, moved_at_s = depth, time.monotonic()
            if time.monotonic() - moved_at_s > DRAIN_PATIENCE_S or stop.wait(TICK_S):
                return
            watch.look()


def waiting_words(outbox: Outbox) -> str:
    """How many messages are left for the next start."""
    try:
        depth = outbox.depth()
    except OutboxError as error:
        return f"what waits cannot be counted: {error}"
    return f"{depth} messages wait on disk for the broker" if depth else "everything was sent"


# ---------------------------------------------------------------------------------------------------- the watching


def derive_state(health: HealthSnapshot, *, is_started: bool) -> AgentState:
    """The agent's state in one word. A broker that is merely away is no fault of this device: results wait on disk."""
    if not is_started:
        return AgentState.INIT
    is_test_failed = health.last_self_test is not None and not health.last_self_test.is_passed
    if health.camera in CAMERA_TROUBLE or health.broker == "refused" or health.outbox == "stopped" or is_test_failed:
        return AgentState.DEGRADED
    return AgentState.SLEEPING if health.camera == "idle" else AgentState.READY


class AlertBoard:
    """Raises and clears alerts as problems come and go. stale: ids that an earlier run left raised at the broker.

    raised: those that stand now; may be read on any thread.
    """

    def __init__(self, publisher: Publisher, pipeline: Pipeline, stale: Iterable[str] = ()) -> None:
        self._publisher = publisher
        self._pipeline = pipeline
        self._stale = set(stale)
        self._raised: dict[str, Alert] = {}
        self.raised: tuple[Alert, ...] = ()

    def show(self, problems: Mapping[str, Problem], now: datetime) -> None:
        """These are open now, and no others."""
        before = set(self._raised) | self._stale
        for alert_id in before - set(problems):
            self._raised.pop(alert_id, None)
            self._publisher.publish_alert(alert_id, None)
        for alert_id, problem in problems.items():
            known = self._raised.get(alert_id)
            if known is None or (known.severity, known.message) != (problem.severity, problem.message):
                since = now if known is None else known.since
                self._raised[alert_id] = Alert(alert_id, problem.severity, problem.message, since)
                self._publisher.publish_alert(alert_id, self._raised[alert_id])
        self._stale.clear()
        self.raised = tuple(self._raised.values())
        if before != set(self._raised):
            self._pipeline.remember(RAISED_KEY, " ".join(sorted(self._raised)))


def read_raised(outbox: Outbox) -> tuple[str, ...]:
    """The alerts that were raised when the agent ended the last time."""
    return tuple((outbox.note(RAISED_KEY) or "").split())


class Watch:
    """Looks at the running parts and tells what it sees: the state, events, the health message, the watchdog.

    page: watched too, where there is one. fell_back: of the workshop. state, raised_alerts: may be read on any thread.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        boot: int,
        health: Health,
        publisher: Publisher,
        pipeline: Pipeline,
        grabber: Grabber,
        open_outbox_here: Callable[[], Outbox],
        wall_ahead_s: Callable[[], float] = lambda: time.time() - time.monotonic(),
        *,
        alerts: AlertBoard | None = None,
        fell_back: Callable[[], str | None] = lambda: None,
        salvage: str | None = None,
    ) -> None:
        self.boot = boot
        self.page: Page | None = None
        self._config = config
        self._folder = folder
        self._health = health
        self._publisher = publisher
        self._pipeline = pipeline
        self._grabber = grabber
        self._open_outbox = open_outbox_here
        self._state = AgentState.INIT
        self._is_ready_told = False
        self._camera: CameraState = "opening"
        self._dead: set[str] = set()
        self._told_at_s = -math.inf
        self._feed_every_s = systemd.watchdog_interval_s()
        self._mark = health.snapshot()
        self._marked_at_s = time.monotonic()
        self._stalled: tuple[str, ...] = ()
        self._read_wall_ahead_s = wall_ahead_s
        self._wall_ahead_s = wall_ahead_s()
        self._is_disk_low = False
        self._told_expiries: set[str] = set()
        self._alerts = alerts
        self._fell_back = fell_back
        self._salvage = salvage
        self._dead_letters: int | None = None
        self._dropped_before: Mapping[str, int] | None = None
        self._dropped: Mapping[str, int] = {}
        self._near_expiries: tuple[str, ...] = ()
        self._is_clock_true = True
        self._throttling: Throttling | None = None

    @property
    def has_died(self) -> bool:
        """Whether a thread has ended that nobody had asked to."""
        return bool(self._dead)

    @property
    def state(self) -> AgentState:
        return self._state

    @property
    def raised_alerts(self) -> tuple[Alert, ...]:
        return () if self._alerts is None else self._alerts.raised

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing left to watch: the source is read to its end, or a thread has died."""
        return self.has_died or self._pipeline.is_source_finished

    def look(self) -> None:
        """Once around all parts."""
        seen = self._health.snapshot()
        self._look_for_deaths(seen)
        self._tell_camera(seen)
        self._tell_clock_step()
        self._tell_state(seen)
        self._tell_health(seen)
        self._show_alerts(seen)
        self.feed_watchdog()

    def say_stopping(self) -> None:
        """The last word of the watch; the pipeline stores the event before it ends."""
        systemd.stopping()
        self._publisher.publish_state(AgentState.STOPPING)
        if self.has_died:
            reason = "a part of the agent has died"
        elif self._pipeline.is_source_finished:
            reason = "the source is read to its end"
        else:
            reason = "asked to by a signal"
        logger.info("stopping: %s", reason)
        if self._pipeline.is_alive():  # with its source it has ended already, and said so
            self._tell("agent-stopping", reason)

    def feed_watchdog(self) -> None:
        """Tell systemd that all is alive: only when every stage has moved since the last time."""
        if self._feed_every_s is None or time.monotonic() - self._marked_at_s < self._feed_every_s:
            return
        stalled = self._health.stalled_since(self._mark)
        if stalled:
            if stalled != self._stalled:
                logger.error("%s stands still; the watchdog is not fed", " and ".join(stalled))
            self._stalled = stalled
            return
        systemd.feed_watchdog()
        self._stalled = ()
        self._mark, self._marked_at_s = self._health.snapshot(), time.monotonic()

    def _look_for_deaths(self, seen: HealthSnapshot) -> None:
        threads: dict[str, tuple[Grabber | Pipeline | Publisher | Page, bool]] = {
            "camera": (self._grabber, seen.camera == "ended"),
            "pipeline": (self._pipeline, self._pipeline.is_source_finished and self._pipeline.failure is None),
            "publisher": (self._publisher, False),
        }
        if self.page is not None:
            threads["page"] = (self.page, False)
        for name, (thread, may_end) in threads.items():
            if thread.is_alive() or may_end or name in self._dead:
                continue
            self._dead.add(name)
            failure = thread.failure
            logger.error("the %s thread has died: %s", name, failure, exc_info=failure if name == "camera" else None)

    def _tell_camera(self, seen: HealthSnapshot) -> None:
        before, self._camera = self._camera, seen.camera
        if seen.camera == before:
            return
        if seen.camera in CAMERA_TROUBLE:
            self._tell(f"camera-{seen.camera}", seen.camera_detail, "warning")
        elif before in CAMERA_TROUBLE:
            self._tell("camera-regained", seen.camera_detail)

    def _tell(self, kind: str, message: str, severity: Severity = "info") -> None:
        self._pipeline.tell(kind, message, severity)

    def _tell_state(self, seen: HealthSnapshot) -> None:
        is_starting = self._state is AgentState.INIT
        state = derive_state(seen, is_started=not is_starting or seen.camera != "opening")
        is_test_failed = seen.last_self_test is not None and not seen.last_self_test.is_passed
        is_ready_due = not self._is_ready_told and not is_test_failed and state is not AgentState.INIT
        if is_test_failed and not self._is_ready_told:
            systemd.extend_start(START_PUT_OFF_S)
        if state is self._state and not is_ready_due:
            return
        words = f"{state.value}: camera {seen.camera}, broker {seen.broker}, outbox {seen.outbox}"
        if is_test_failed:
            words += ", self-test failed: nothing is counted"
        logger.info("%s", words)
        if state is not self._state:
            self._state = state
            self._publisher.publish_state(state)
        if is_ready_due:
            self._is_ready_told = True
            systemd.ready(words)
        else:
            systemd.status(words)

    def _tell_health(self, seen: HealthSnapshot) -> None:
        interval_s = self._config.publish.health_interval_s
        if self._state is AgentState.INIT or time.monotonic() - self._told_at_s < interval_s:
            return
        self._told_at_s = time.monotonic()
        give_back_free_memory()
        machine = read_machine(self._folder)
        self._tell_disk(machine.disk_free_bytes)
        tls, now = self._config.broker.tls, datetime.now(timezone.utc)
        expiries = read_expiries(tls, now, seen.broker_certificate_ends_at)
        self._tell_expiries(expiries)
        self._near_expiries = tuple(expiry.words for expiry in expiries if expiry.is_near)
        self._look_into_outbox()
        self._is_clock_true = machine.clock.is_synchronised
        self._throttling = machine.throttling
        self._publisher.publish_health(
            health_body(
                seen,
                machine,
                device=self._config.device,
                site=self._config.site,
                boot=self.boot,
                at=datetime.now(timezone.utc),
                state=self._state,
                interval_s=interval_s,
                restarts=self.boot - 1,
                dead_letters=self._dead_letters,
                certificate_days_left=expiries[0].days_left if expiries else None,
            )
        )

    def _show_alerts(self, seen: HealthSnapshot) -> None:
        if self._alerts is None:
            return
        problems = open_problems(
            seen,
            is_disk_low=self._is_disk_low,
            dead_letters=self._dead_letters,
            near_expiries=self._near_expiries,
            fell_back=self._fell_back(),
            is_clock_true=self._is_clock_true,
            salvage=self._salvage,
            dropped=self._dropped,
            throttling=self._throttling,
        )
        self._alerts.show(problems, datetime.now(timezone.utc))

    def _tell_clock_step(self) -> None:
        before, self._wall_ahead_s = self._wall_ahead_s, self._read_wall_ahead_s()
        step_s = self._wall_ahead_s - before
        if abs(step_s) >= CLOCK_STEP_S:
            words = f"the system clock was set {'forward' if step_s > 0 else 'back'} by {abs(step_s):.0f} s"
            self._pipeline.tell("clock-step", words, "warning", {"step_s": round(step_s, 1)})

    def _tell_disk(self, free_bytes: int | None) -> None:
        floor_bytes = self._config.outbox.min_free_mb * 1024 * 1024
        if free_bytes is None or floor_bytes == 0:
            return
        if not self._is_disk_low and free_bytes < DISK_LOW_FACTOR * floor_bytes:
            self._is_disk_low = True
            words = f"{free_bytes / 2**20:.0f} MB left; at outbox.min_free_mb = {floor_bytes / 2**20:g} intake stops"
            self._pipeline.tell("disk-low", words, "warning", {"free_bytes": free_bytes})
        elif self._is_disk_low and free_bytes > DISK_FINE_FACTOR * floor_bytes:
            self._is_disk_low = False

    def _tell_expiries(self, expiries: Sequence[Expiry]) -> None:
        """Once for each file in a run; a renewed one may be told of again when its own time comes."""
        for expiry in expiries:
            if expiry.is_near and expiry.key not in self._told_expiries:
                detail = {"key": expiry.key, "days_left": round(expiry.days_left, 1)}
                self._pipeline.tell("certificate-expiring", expiry.words, "warning", detail)
        self._told_expiries = {expiry.key for expiry in expiries if expiry.is_near}

    def _look_into_outbox(self) -> None:
        """How many messages were set aside, and how many went for room since this start."""
        try:
            with self._open_outbox() as outbox:
                self._dead_letters, dropped = outbox.dead_letter_count(), outbox.dropped()
        except OutboxError:
            self._dead_letters = None
            return
        if self._dropped_before is None:
            self._dropped_before = dropped
        before = self._dropped_before
        self._dropped = {name: count - before.get(name, 0) for name, count in dropped.items()}
        self._dropped = {name: count for name, count in self._dropped.items() if count > 0}
