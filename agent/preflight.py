"""Try what a configuration names, before the agent is started with it: models, camera, broker, folders."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from agent.camera.camera import NOTHING_YET, open_camera
from agent.config import (
    BROKER_PASSWORD_VARIABLE,
    CAMERA_PASSWORD_VARIABLE,
    BrokerSection,
    Config,
    load_reference_intervals,
    read_operator_key,
    read_secret,
    read_web_password,
    state_folder,
)
from agent.delivery.certificates import read_expiries
from agent.delivery.link import BrokerLink, Will, open_link
from agent.delivery.messages import Draft
from agent.delivery.outbox import DATABASE_NAME, FULL_DISK, open_outbox
from agent.delivery.topics import Topics
from agent.errors import (
    BrokerRefused,
    BrokerUnavailable,
    CameraError,
    FrameUnreadable,
    HematoVisionError,
    ModelError,
    OutboxError,
)
from agent.files import NO_ROOM
from agent.inference.selftest import GoldenTest
from agent.machine import read_disk_free
from agent.models_in_use import open_models_in_use
from agent.review import CROPS_FOLDER, CropStore
from agent.supervisor import could_make_room_to_start, import_page, open_pictures, start_want

FIRST_FRAME_TIMEOUT_S = 20.0
"""s; RTSP cameras send a whole picture only every few seconds, USB cameras need some seconds to set their exposure."""

WATCHED_FOLDER_TIMEOUT_S = 2.0
"""s; after `settle_s`, two more looks."""

PLAIN_PORT, TLS_PORT = 1883, 8883

OLDEST_PICTURES = "the oldest pictures beside the outbox"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried. words: what was found, or what failed and how to mend it."""

    name: str
    is_passed: bool
    words: str


def run_checks(config: Config) -> Iterator[Check]:
    """Try everything, one after the other; a failure does not keep the rest from being tried."""
    tries: tuple[tuple[str, Callable[[Config], str]], ...] = (
        ("passwords", _try_passwords),
        ("models", _try_models),
        ("commands", _try_commands),
        ("reference", _try_reference),
        ("camera", _try_camera),
        ("broker", _try_broker),
        ("outbox", _try_outbox),
        ("page", _try_page),
    )
    for name, try_it in tries:
        try:
            yield Check(name, True, try_it(config))
        except HematoVisionError as error:
            yield Check(name, False, str(error))


def _try_passwords(config: Config) -> str:
    """Read the secrets; a file that all users of the computer can read is warned about in the log."""
    secrets = {
        "broker": read_secret(config.broker.password_file, BROKER_PASSWORD_VARIABLE),
        "camera": read_secret(config.camera.network.password_file, CAMERA_PASSWORD_VARIABLE),
        "page": read_web_password(config.web) if config.web.enabled else None,
    }
    given = [name for name, secret in secrets.items() if secret is not None]
    return f"of the {' and the '.join(given)}: can be read" if given else "none are named"


def _try_models(config: Config) -> str:
    """Load both models and ask them the golden fields; opening checks their digests and tensors."""
    in_use = open_models_in_use(config)
    verdict = GoldenTest(in_use.folder).run(in_use.models)
    if not verdict.is_passed:
        raise ModelError(verdict.detail)
    words = f"{' and '.join(in_use.names)} load and run with {in_use.models.runtime}; their SHA-256 is the manifest's"
    return "; ".join(told for told in (words, verdict.detail, in_use.fault, in_use.slot_words) if told is not None)


def _try_commands(config: Config) -> str:
    """Read the operators' key, where commands are signed with one."""
    section = config.commands
    if not section.enabled:
        return "none are heard (commands.enabled)"
    read_operator_key(section)
    who = {"none": "nobody", "broker": "whom the broker's rights let", "key": "who signs with the operators' key"}
    return f"heard; models and configuration may be changed by: {who[section.operator]}"


def _try_reference(config: Config) -> str:
    """Read the table of reference intervals."""
    rows = load_reference_intervals(config.differential.reference_file)
    bands = len({row.age_band for row in rows})
    return f"intervals for {len({row.class_name for row in rows})} classes in {bands} age bands"


def _try_camera(config: Config) -> str:
    """Open the camera and wait for one good picture; in a watched folder there need not be one yet."""
    is_watching = config.camera.kind == "folder" and config.camera.folder.watch
    timeout_s = config.camera.folder.settle_s + WATCHED_FOLDER_TIMEOUT_S if is_watching else FIRST_FRAME_TIMEOUT_S
    with closing(open_camera(config.camera)) as camera:
        last_fault: FrameUnreadable | None = None
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            try:
                frame = camera.read()
            except FrameUnreadable as error:
                last_fault = error
                continue
            if frame is None:
                break
            if frame is not NOTHING_YET:
                return f"{camera.description} gives pictures of {frame.width_px} x {frame.height_px} px"
        if last_fault is not None:
            raise last_fault
        if is_watching:
            return f"{camera.description} can be read; no picture is there yet, the agent will wait for one"
        raise CameraError(f"{camera.description}: opens, but gave no picture")


def _try_broker(config: Config) -> str:
    """Connect as the agent will, but under another client id: the same would throw a running agent out."""
    broker, topics = config.broker, Topics(config.site, config.device)
    # An empty Will: should this process die here, the broker publishes nothing that anybody could believe.
    will = Will(topics.event, b"")
    protocols = ("5", "3.1.1") if broker.protocol == "auto" else (broker.protocol,)
    with closing(_Goodbye(_open_first(broker, f"hv-{config.site}-{config.device}-check", protocols, will))) as link:
        user = "without a user" if broker.username is None else f"as user {broker.username}"
        lock = "encrypted" if broker.tls.enabled else "not encrypted"
        expiries = read_expiries(broker.tls, datetime.now(timezone.utc), link.link.certificate_ends_at)
        near = [expiry.words for expiry in expiries if expiry.is_near]
        return "; ".join((f"{broker.host}:{broker.port} takes us {user}, MQTT {link.protocol}, {lock}", *near))


@dataclass(frozen=True, slots=True)
class _Goodbye:
    """Gives a link a `close` for `closing`."""

    link: BrokerLink

    @property
    def protocol(self) -> str:
        return self.link.protocol

    def close(self) -> None:
        self.link.disconnect()


def _open_first(broker: BrokerSection, client_id: str, protocols: tuple[str, ...], will: Will) -> BrokerLink:
    """The link in the first version that the broker speaks."""
    for protocol in protocols[:-1]:
        try:
            return open_link(broker, client_id=client_id, protocol=protocol, will=will)
        except BrokerRefused:
            raise
        except BrokerUnavailable:
            continue  # old brokers close the connection without a word when they meet a newer version
    try:
        return open_link(broker, client_id=client_id, protocol=protocols[-1], will=will)
    except BrokerRefused:
        raise
    except BrokerUnavailable as error:
        raise BrokerUnavailable(f"{error}; {_hint(broker, error)}") from error


def _hint(broker: BrokerSection, error: BrokerUnavailable) -> str:
    """What is most often wrong when a broker does not answer."""
    if not broker.tls.enabled and broker.port == TLS_PORT:
        return f"{TLS_PORT} is usually the port with TLS, and broker.tls.enabled is false"
    if broker.tls.enabled and isinstance(error.__cause__, ConnectionResetError):
        return f"does this port speak TLS? {PLAIN_PORT} is usually the port without, {TLS_PORT} the one with it"
    return (
        "is the broker running, and are broker.host and broker.port right?"
        " (The agent would start all the same and keep its results.)"
    )


def _try_outbox(config: Config) -> str:
    """Store a row in an outbox of our own beside the real one: same disk, same rights, same limits.

    What a start would let go for room is told and counts as room; none of it goes.
    """
    folder = state_folder(config.outbox)
    place = _nearest_existing(folder)
    try:
        want = start_want(place)
        if want is not None and could_make_room_to_start(folder):
            # Until then the disk takes no trial, and the outbox itself may not open.
            near = _near_the_floor(config, folder)
            return f"{folder}: {near or f'{want}: a start lets {OLDEST_PICTURES} go, no more than it needs'}"
        with (
            tempfile.TemporaryDirectory(prefix=".check-", dir=place) as trial,
            open_outbox(Path(trial), config.outbox.max_mb, min_free_mb=0) as outbox,
        ):
            outbox.append([Draft("event", "check", {"schema": "check"})])
    except OSError as error:
        if error.errno in NO_ROOM:
            raise OutboxError(f"{folder}: cannot be written: {FULL_DISK}") from error
        raise OutboxError(
            f"{folder}: cannot be made or written: {place} says: {error.strerror}; mend its rights or set outbox.folder"
        ) from error
    near = _near_the_floor(config, folder)
    return "; ".join(told for told in (_outbox_words(folder, place), near) if told is not None)


def _outbox_words(folder: Path, place: Path) -> str:
    """What is there now. place: the nearest folder above it that exists, or itself."""
    if place != folder:
        return f"{folder} does not exist yet and can be made; the disk takes rows"
    if not (folder / DATABASE_NAME).exists():
        return f"{folder} can be written"
    with open_outbox(folder, verify=False, create=False) as outbox:
        return f"{folder} can be written; {outbox.depth()} messages wait there"


def _near_the_floor(config: Config, folder: Path) -> str | None:
    """What goes at the first field when the disk has less left than must stay free; None = nothing.

    Raises OutboxError where all of it would not do: the agent would start, and take no field in.
    """
    least_mb = config.outbox.min_free_mb
    free_bytes = read_disk_free(_nearest_existing(folder))
    if free_bytes is None or free_bytes >= least_mb * 2**20:
        return None  # nearly always: to know what could go means to look at all pictures
    free_mb, to_go_mb = free_bytes / 2**20, _to_go_bytes(config, folder) / 2**20
    words = f"the disk has {free_mb:.1f} MB left, {least_mb:g} must stay free (outbox.min_free_mb)"
    if free_mb + to_go_mb < least_mb:
        also = f", and only {to_go_mb:.1f} MB of ours may go" if to_go_mb else ""
        raise OutboxError(f"{folder}: {words}{also}: the agent would take no field in; free space on the disk")
    return f"{words}: the agent lets {OLDEST_PICTURES} go, then confirmed messages"


def _to_go_bytes(config: Config, folder: Path) -> int:
    """Of ours on the disk, in the agent's order: pictures, then confirmed messages and what is empty in their file."""
    pictures, crops = open_pictures(config, folder), CropStore(folder / CROPS_FOLDER)
    to_go_bytes = crops.size_bytes() + (0 if pictures is None else pictures.size_bytes())
    if (folder / DATABASE_NAME).exists():
        with (
            contextlib.suppress(OutboxError),  # on a full disk it may not open: then the pictures count alone
            open_outbox(folder, verify=False, create=False) as outbox,
            outbox.file.reading(),
        ):
            to_go_bytes += outbox.kept_bytes() + outbox.file.empty_bytes()
    return to_go_bytes


def _try_page(config: Config) -> str:
    """Whether the page could be served: its extra, its certificate, and who could reach it."""
    section = config.web
    if not section.enabled:
        return "not served (web.enabled)"
    import_page()
    from agent.web.page import tls_context

    protocol = "http" if tls_context(section) is None else "https"
    who = "this computer alone" if section.is_local else "every computer that reaches this one, with the password"
    words = f"{protocol}://{section.host}:{section.port}, for {who}"
    if not section.is_local and protocol == "http":
        words += "; over http the password can be read on the way: see web.certificate_file"
    return words


def _nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest above it that exists: a check leaves no folder behind."""
    return next(place for place in (folder, *folder.parents) if place.exists())
