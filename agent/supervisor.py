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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import agent
from agent.camera.camera import Camera, open_camera
from agent.camera.grabber import FrameQueue, Grabber
from agent.config import (
    CameraSection,
    Config,
    config_sha256,
    models_folder,
    read_operator_key,
    read_web_password,
    state_folder,
)
from agent.counting.clerk import Service
from agent.counting.thread import Pipeline
from agent.delivery.audit import Entry
from agent.delivery.commands import Gatekeeper, InboundCommand, canonical_json
from agent.delivery.messages import Body, DescribedModel, info_body
from agent.delivery.outbox import START_ROOM_BYTES, Outbox, Salvage, begin_boot, lock_folder, open_outbox
from agent.delivery.publisher import Publisher
from agent.delivery.topics import Topics
from agent.desk import Desk, Done, Instruments
from agent.errors import CameraError, ConfigError, OutboxError
from agent.files import has_room
from agent.health import Health
from agent.inference.models import Models
from agent.inference.slots import ModelSlots
from agent.latest import Latest
from agent.machine import keep_big_blocks_apart, read_clock, read_disk_free, read_machine
from agent.pictures import PICTURES_FOLDER, PictureStore
from agent.review import CROPS_FOLDER, CropStore
from agent.samples import begin_sample, close_sample
from agent.signals import StopSignal, stop_on_signals
from agent.watching.alert_board import AlertBoard, read_raised
from agent.watching.surroundings import DISK_LOW_FACTOR, Surroundings
from agent.watching.watch import Watch
from agent.workshop import Work, Workshop

if TYPE_CHECKING:  # the page's framework comes with an extra
    from agent.web.page import Page

logger = logging.getLogger(__name__)

THREAD_DIED = 70
"""Exit code when a thread has ended unasked: EX_SOFTWARE of sysexits(3). systemd starts the agent again."""

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

START_FILES = 4
"""The boot counter, the outbox, its write-ahead log and its index are written anew by a start."""

MOST_COMMANDS_WAITING = 64
"""Persons send one; a program that sends more than this at once is told to wait."""

WORK_KEY = "audit/work"
"""Note: the agent, configuration and models of the last start."""

PICTURES_FROM_KEY = "pictures/from"
"""Note: the directory from which all stored pictures that are done with were taken."""


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
            outbox.boot,
            health,
            publisher,
            pipeline,
            grabber,
            Surroundings(config, folder, pipeline.tell, open_another),
            alerts=AlertBoard(publisher, pipeline, stale=read_raised(outbox)),
            fell_back=lambda: workshop.fell_back,
            salvage=None if outbox.salvage is None else salvage_words(outbox.salvage),
        )
        if latest is not None:
            watch.page = make_page(config, folder, latest, health, watch, pipeline, workshop, commands, open_another)
        logger.info("sample %s, boot %d, %d messages wait", sample.sid, outbox.boot, outbox.depth())
        record_work(pipeline, outbox, workshop)
        tell_start(pipeline, outbox, workshop, health, is_new_sample=is_new)
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

    Full is a disk without space, without files (inodes) or with a quota used up. Whole fields go before the cells that
    a person should look at. Where that does not suffice, the opening says so.
    """
    with contextlib.suppress(OSError):  # a disk that takes or lets go nothing tells more at the opening
        want = start_want(folder)
        if want is None:
            return  # nearly always: to know which pictures are old means to look at all of them
        pictures, crops = _what_may_go(folder)
        while want is not None and (pictures.let_go() or crops.let_go()):
            logger.warning("%s: the oldest pictures are let go", want)
            want = start_want(folder)


def could_make_room_to_start(folder: Path) -> bool:
    """Whether a start that lacks room would get it from our own pictures; none of them goes. Raises OSError."""
    pictures, crops = _what_may_go(folder)
    count = pictures.count() + crops.count()
    if count == 0:
        return False
    more_bytes = max(0, START_ROOM_BYTES - pictures.size_bytes() - crops.size_bytes())
    if count >= START_FILES and not has_room(folder, 0, 1):
        # Without a file to try with, what the disk says of its bytes has to do.
        free_bytes = read_disk_free(folder)
        return free_bytes is None or free_bytes >= more_bytes
    return has_room(folder, more_bytes, max(1, START_FILES - count))


def _what_may_go(folder: Path) -> tuple[PictureStore, CropStore]:
    """Our own pictures beside an outbox, in the order in which they go for room: whole fields, then cells."""
    return PictureStore(folder / PICTURES_FOLDER, 0), CropStore(folder / CROPS_FOLDER)


def start_want(folder: Path) -> str | None:
    """What the disk lacks for a start, in words; None = it has room. Raises OSError where it cannot be tried."""
    free_bytes = read_disk_free(folder)
    if free_bytes is not None and free_bytes < START_ROOM_BYTES:
        return f"the disk has {free_bytes / 2**20:.1f} MB left"
    if not has_room(folder, START_ROOM_BYTES, START_FILES):
        return "the disk has free bytes and yet takes no more: its files (inodes) or a quota are used up"
    return None


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
        models = now.models.model_copy(update={"folder": model_slots(now).path_in_use, "threads": 1})
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


def tell_start(pipeline: Pipeline, outbox: Outbox, workshop: Workshop, health: Health, *, is_new_sample: bool) -> None:
    """What this start was like, as events before the first frame."""
    if outbox.salvage is not None:
        pipeline.tell("outbox-set-aside", salvage_words(outbox.salvage), "error", {"rows": outbox.salvage.rows})
    if workshop.went_back is not None:
        pipeline.tell("model-rolled-back", workshop.went_back, "error")
    sid = pipeline.sample.sid
    pipeline.tell("agent-started", f"agent {agent.__version__}, sample {sid}", detail={"sample": sid})
    if is_new_sample:
        pipeline.tell("sample-opened", f"sample {sid}", detail={"sample": sid})
    if (tested := health.snapshot().last_self_test) is not None:
        pipeline.tell_self_test(tested)


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
            done, noted = outbox.finished_keys(), outbox.note(PICTURES_FROM_KEY)
    except OutboxError as error:
        raise CameraError(f"which pictures are done with cannot be looked up: {error}") from error
    forget, note = partial(forget_finished, open_outbox_here), partial(note_pictures_from, open_outbox_here)
    return open_camera(section, done=done, forget=forget, noted=noted, note=note)


def forget_finished(open_outbox_here: Callable[[], Outbox], keys: Sequence[str]) -> None:
    """These stored pictures were deleted: nobody need know any more that they are done with."""
    try:
        with open_outbox_here() as outbox:
            outbox.forget_finished(keys)
    except OutboxError as error:
        logger.debug("deleted pictures stay noted: %s", error)


def note_pictures_from(open_outbox_here: Callable[[], Outbox], place: str) -> None:
    """Remember from where all stored pictures that are done with were taken. Raises CameraError: it cannot be noted."""
    try:
        with open_outbox_here() as outbox:
            outbox.append((), notes={PICTURES_FROM_KEY: place})
    except OutboxError as error:
        raise CameraError(f"from where pictures are taken cannot be noted: {error}") from error


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
