"""The collector: hears the agents at the broker, commits, and only then acknowledges.

    broker --messages--> waiting --commit--> database
       ^                                        |
       +--- PUBACK, ack/{receiver} <--- after --+
       +--- cmd/replay <----- holes in the numbers
       +--- fleet/{receiver} <--- devices beside each other, every few minutes

Rules
  * Nothing is acknowledged before it is committed: neither to the broker (PUBACK) nor to the device (`ack`). Killed at
    any moment, the broker sends again what it has no PUBACK for, and the device what it has no `ack` for.
  * A commit holds whatever has come in while the one before was made: one by one when little comes, in hundreds when
    much does.
  * While the database is away nothing is acknowledged and the connection is held; what came is tried again.
  * A message that cannot be stored goes into `dead_letters` with its reason and is acknowledged: else it came for ever.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol

from sqlalchemy import Engine

from agent import systemd
from agent.central.database import describe, migrate
from agent.central.fleet import FLEET, FleetNews, look_at_fleet, standing_out
from agent.central.ledger import Ack, Question
from agent.central.settings import CollectorConfig
from agent.central.store import Arrival, Outcome, Store
from agent.delivery.certificates import read_expiries
from agent.delivery.link import BrokerLink, HungUp, ProtocolRefused, Received, Session, open_link
from agent.delivery.messages import rfc3339_ms, schema_name, serialise
from agent.delivery.publisher import Backoff
from agent.delivery.topics import CONTRACT_VERSION
from agent.errors import BrokerRefused, BrokerUnavailable, StoreUnavailable

logger = logging.getLogger(__name__)

STREAMS = ("field/+", "cell/+", "event", "audit")
DOCUMENTS = ("state", "info", "health", "sample/+", "differential/+", "alert/+", "reply/replay")
"""What is heard, below a device's base. A group of collectors divides the streams; a shared subscription gets no
retained messages, so each of them hears the documents. Pictures are not collected."""

IDLE_S = 0.25
"""How soon a stop is noticed while nothing comes."""

GATHER_S = 0.002
"""What follows within this time comes into the same commit."""

FAREWELL_S = 2.0
"""At the end, for the acknowledgements that are still to be sent."""

QUESTIONS_EVERY_S = 2.0

MOST_WAITING = 20_000
"""Messages held in memory while the database is away. MQTT 5 brokers stop at `window`; where one does not, the
connection is closed at this, and the broker keeps them."""

COMMAND_EXPIRY_S = 30
"""From the contract: an older command is refused."""

EXPIRIES_EVERY_S = 86_400.0
"""How often, and with each connection, it is looked at how long the certificates are good."""

STEADY_AFTER_S = 10.0
"""A connection that has held for this long makes the next pause short again."""

SHORT_ENDS = 5
"""Connections in a row that did not hold, after which the operator is told what that often means."""

SILENT_ENDS = 3
"""Connections closed without an answer, after which `protocol: auto` tries the other version."""


class Stop(Protocol):
    """How the collector is told to end; see `agent.signals`."""

    is_set: bool

    def wait(self, timeout_s: float) -> bool:
        """Sleep; True as soon as the end is asked for."""
        ...


@dataclass(frozen=True, slots=True)
class _Word:
    """What is to be said at the broker."""

    topic: str
    payload: bytes
    expiry_s: int | None = None
    is_retained: bool = False


@dataclass(frozen=True, slots=True)
class _Held:
    """A message that waits for its commit, and the broker's packet that waits for its PUBACK."""

    packet: Received
    arrival: Arrival


class Collector:
    """One collector with one connection and one database; everything happens on the thread that calls `run`."""

    def __init__(
        self,
        settings: CollectorConfig,
        engine: Engine,
        stop: Stop,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = Store(engine)
        self._stop = stop
        self._now = now
        self._broker_backoff = Backoff(settings.broker.max_backoff_s, jitter)
        self._database_backoff = Backoff(settings.broker.max_backoff_s, jitter)
        protocol = settings.broker.protocol
        self._protocols: list[str] = ["5", "3.1.1"] if protocol == "auto" else [protocol]
        self._silent_ends = 0
        self._short_ends = 0
        self._told = ""
        self._has_migrated = False
        self._feed_every_s = systemd.watchdog_interval_s()
        self._fed_at_s = 0.0
        self._broker_ends_at: datetime | None = None
        self._tell_expiries_at_s = 0.0

    def run(self) -> None:
        """Until it is asked to stop. Raises ConfigError: the database's schema is a newer version's."""
        self._tell(f"collecting as {self._settings.name} into {describe(self._engine)}")
        systemd.ready("collecting")
        while not self._stop.is_set:
            self._feed_watchdog()
            if not self._has_migrated:
                self._prepare_database()
                continue
            link = self._connect()
            if link is not None:
                self._serve(link)

    # ---- for the service

    @property
    def settings(self) -> CollectorConfig:
        return self._settings

    @property
    def is_asked_to_stop(self) -> bool:
        return self._stop.is_set

    @property
    def store(self) -> Store:
        return self._store

    def commit(self, held: list[_Held]) -> Outcome | None:
        """None: the database is away; the caller waits for `database_pause_s` and comes again with all of them."""
        try:
            outcome = self._store.commit([one.arrival for one in held])
        except StoreUnavailable as error:
            self.tell_database(error)
            return None
        self._database_backoff.reset()
        self._tell("collecting")
        return outcome

    def fleet_news(self, *, all_that_stands: bool = False) -> list[FleetNews]:
        """What stands out among the devices and was not told yet, or all of it. Raises StoreUnavailable."""
        if all_that_stands:
            return standing_out(self._engine, self._settings.site)
        return look_at_fleet(self._engine, self._settings.receiver, self._settings.site, self._now())

    def database_pause_s(self) -> float:
        return self._database_backoff.next_s()

    def work(self) -> None:
        """Called at every turn: that the loop turns is what the watchdog is told."""
        self._feed_watchdog()
        if time.monotonic() >= self._tell_expiries_at_s:
            self._tell_expiries_at_s = time.monotonic() + EXPIRIES_EVERY_S
            self._tell_expiries()

    def tell(self, words: str, level: int = logging.INFO) -> None:
        self._tell(words, level)

    def tell_database(self, error: StoreUnavailable) -> None:
        """Once for each outage, whatever the server says while it goes down and comes up."""
        self._tell(f"nothing is acknowledged: {error}", logging.ERROR, "database away")

    def now(self) -> datetime:
        return self._now()

    # ---- inside

    def _prepare_database(self) -> None:
        try:
            migrate(self._engine)
        except StoreUnavailable as error:
            self._tell(f"waiting for the database: {error}", logging.ERROR, "database away")
            self._rest(self._database_backoff)
        else:
            self._database_backoff.reset()
            self._has_migrated = True

    def _connect(self) -> BrokerLink | None:
        settings = self._settings
        session = Session(expiry_s=int(settings.session_expiry_h * 3600), receive_maximum=settings.window)
        try:
            link = open_link(
                settings.broker, client_id=settings.name, protocol=self._protocols[0], will=None, session=session
            )
        except BrokerRefused as error:
            self._tell(str(error), logging.ERROR)
        except BrokerUnavailable as error:
            self._tell(str(error), logging.WARNING)
            if isinstance(error, (ProtocolRefused, HungUp)):
                self._silent_ends += 1
                if isinstance(error, ProtocolRefused) or self._silent_ends >= SILENT_ENDS:
                    self._silent_ends = 0
                    self._protocols.append(self._protocols.pop(0))
        else:
            self._silent_ends = 0
            self._broker_ends_at = link.certificate_ends_at
            self._tell_expiries_at_s = 0.0
            return link
        self._rest(self._broker_backoff)
        return None

    def _serve(self, link: BrokerLink) -> None:
        begun_s = time.monotonic()
        _Service(self, link).run()
        if self._stop.is_set:
            return
        if time.monotonic() - begun_s >= STEADY_AFTER_S:
            self._broker_backoff.reset()
            self._short_ends = 0
        self._short_ends += 1
        if self._short_ends == SHORT_ENDS:
            words = f"{SHORT_ENDS} connections in a row ended at once; does another program use the client_id"
            logger.error("%s %s?", words, self._settings.name)
        self._rest(self._broker_backoff)

    def _rest(self, backoff: Backoff) -> None:
        """Sleep for the next pause, without being taken for dead."""
        until_s = time.monotonic() + backoff.next_s()
        while (left_s := until_s - time.monotonic()) > 0 and not self._stop.wait(min(left_s, 1.0)):
            self._feed_watchdog()

    def _tell(self, words: str, level: int = logging.INFO, about: str | None = None) -> None:
        """Once for each change. about: what has changed, where the words vary with every attempt."""
        if (about or words) == self._told:
            return
        self._told = about or words
        logger.log(level, "%s", words)
        systemd.status(words)

    def _tell_expiries(self) -> None:
        for expiry in read_expiries(self._settings.broker.tls, self._now(), self._broker_ends_at):
            if expiry.is_near:
                logger.warning("%s", expiry.words)

    def _feed_watchdog(self) -> None:
        if self._feed_every_s is not None and time.monotonic() - self._fed_at_s >= self._feed_every_s:
            self._fed_at_s = time.monotonic()
            systemd.feed_watchdog()


class _Service:
    """One connection's life: from the subscription to its end."""

    def __init__(self, collector: Collector, link: BrokerLink) -> None:
        self._collector = collector
        self._link = link
        self._held: list[_Held] = []
        self._outgoing: dict[tuple[str, ...], _Word] = {}
        self._under_way: set[int] = set()
        self._try_again_at_s = 0.0
        self._ask_at_s = 0.0
        self._compare_at_s = 0.0
        self._has_greeted = False
        self._complaints: set[str] = set()

    def run(self) -> None:
        settings, link = self._collector.settings, self._link
        share = settings.share if link.shares else None
        if settings.share and not link.shares:
            self._complain("the broker knows no shared subscriptions: this collector hears everything")
        link.subscribe(topic_filters(settings.site, share))
        while not link.is_closed and not self._collector.is_asked_to_stop:
            self._collector.work()
            self._turn(0.0 if self._outgoing else IDLE_S)
            self._gather()
            if self._held and time.monotonic() >= self._try_again_at_s:
                self._commit()
            self._look_after_gaps()
            self._compare_devices()
        if link.is_closed:
            reason = "another collector has the same client_id" if link.is_taken_over else link.closed_reason
            self._collector.tell(f"connection to the broker lost: {reason}", logging.WARNING)
            return
        until_s = time.monotonic() + FAREWELL_S
        while (self._outgoing or self._under_way) and not link.is_closed and time.monotonic() < until_s:
            self._turn(0.05)
        link.disconnect()

    def _turn(self, timeout_s: float) -> None:
        for published in self._link.turn(timeout_s):
            self._under_way.discard(published.mid)
            if not published.is_taken:
                name = self._collector.settings.receiver
                ours = f"+/+/ack/{name}, +/+/cmd/replay and +/+/fleet/{name}"
                self._complain(f"the broker refuses what we publish ({published.reason}): let us write to {ours}")
        for answer in self._link.take_subscribed():
            if not answer.is_granted:
                self._complain(f"the broker refuses the subscription to {answer.topic_filter} ({answer.reason})")
            elif not self._has_greeted:
                self._greet()
        now = self._collector.now()
        for packet in self._link.take_received():
            arrival = Arrival(packet.topic, packet.payload, now, packet.is_retained)
            self._held.append(_Held(packet, arrival))
        self._send()

    def _complain(self, words: str) -> None:
        """Once for each connection: an operator has to mend it."""
        if words not in self._complaints:
            self._complaints.add(words)
            logger.error("%s", words)

    def _gather(self) -> None:
        """What comes right behind belongs into the same commit."""
        most = self._collector.settings.window
        while self._held and len(self._held) < most and not self._link.is_closed:
            before = len(self._held)
            self._turn(GATHER_S)
            if len(self._held) == before:
                break
        if len(self._held) > MOST_WAITING:
            self._link.abandon(f"{len(self._held)} messages wait for the database")

    def _commit(self) -> None:
        outcome = self._collector.commit(self._held)
        if outcome is None:
            self._try_again_at_s = time.monotonic() + self._collector.database_pause_s()
            return
        for ack in outcome.acks:
            self._put_ack(ack)
        for one in self._held:
            self._link.confirm(one.packet)
        self._held.clear()

    def _greet(self) -> None:
        """Tell all devices what is here: an acknowledgement may have been lost with the last connection."""
        compares = self._collector.settings.fleet_every_s > 0
        try:
            acks = self._collector.store.acks()
            standing = self._collector.fleet_news(all_that_stands=True) if compares else []
        except StoreUnavailable as error:
            self._collector.tell_database(error)
            return
        self._has_greeted = True
        self._collector.tell("collecting")
        for ack in acks:
            self._put_ack(ack)
        for news in standing:
            self._put_news(news)

    def _compare_devices(self) -> None:
        every_s = self._collector.settings.fleet_every_s
        if every_s == 0 or not self._has_greeted or self._held or time.monotonic() < self._compare_at_s:
            return
        self._compare_at_s = time.monotonic() + every_s
        try:
            for news in self._collector.fleet_news():
                words = "stands out no more" if news.body is None else f"stands out: {news.body['message']}"
                logger.info("%s %s", news.place, words)
                self._put_news(news)
        except StoreUnavailable as error:
            self._collector.tell_database(error)

    def _put_news(self, news: FleetNews) -> None:
        topic = f"{news.place.base}/{FLEET}/{self._collector.settings.receiver}"
        payload = b"" if news.body is None else serialise(news.body)
        self._outgoing[topic,] = _Word(topic, payload, is_retained=True)

    def _look_after_gaps(self) -> None:
        if time.monotonic() < self._ask_at_s or self._held:
            return
        self._ask_at_s = time.monotonic() + QUESTIONS_EVERY_S
        try:
            questions = self._collector.store.questions(self._collector.now())
        except StoreUnavailable as error:
            self._collector.tell_database(error)
            return
        for question in questions:
            logger.info(
                "%s: asked for %s %d to %d", question.place, question.stream, question.span.first, question.span.last
            )
            topic, body = replay_command(question)
            self._outgoing[topic, question.transaction] = _Word(topic, serialise(body), COMMAND_EXPIRY_S)

    def _put_ack(self, ack: Ack) -> None:
        """Only the newest word for each numbering of a stream is worth sending."""
        receiver = self._collector.settings.receiver
        topic, body = ack_message(ack, receiver, self._collector.now())
        key = (topic, ack.stream, str(ack.boot))
        self._outgoing.pop(key, None)
        self._outgoing[key] = _Word(topic, serialise(body))

    def _send(self) -> None:
        """No more under way than the broker takes."""
        while self._outgoing and len(self._under_way) < self._link.window and not self._link.is_closed:
            key = next(iter(self._outgoing))
            word = self._outgoing.pop(key)
            mid = self._link.publish(word.topic, word.payload, retain=word.is_retained, expiry_s=word.expiry_s)
            self._under_way.add(mid)


# ------------------------------------------------------------------------------------------------------- the words


def topic_filters(site: str | None, share: str | None) -> list[str]:
    """What the collector subscribes to. share: the group of collectors, or None."""
    base = f"hv/{CONTRACT_VERSION}/{site or '+'}/+"
    prefix = f"$share/{share}/" if share else ""
    return [*(f"{prefix}{base}/{words}" for words in STREAMS), *(f"{base}/{words}" for words in DOCUMENTS)]


def ack_message(ack: Ack, receiver: str, at: datetime) -> tuple[str, dict[str, object]]:
    """Topic and body of an acknowledgement: all of the stream up to this message is on our disk."""
    body = {
        "schema": schema_name("ack"),
        "receiver": receiver,
        "device": ack.place.device,
        "stream": ack.stream,
        "boot": ack.boot,
        "seq": ack.seq,
        "at": rfc3339_ms(at),
        "ruo": True,
    }
    return f"{ack.place.base}/ack/{receiver}", body


def replay_command(question: Question) -> tuple[str, dict[str, object]]:
    """Topic and body of the request to send a range again.

    Without `at`: the device's clock may be wrong, and a request that comes late does no harm.
    """
    body = {
        "transaction": question.transaction,
        "stream": question.stream,
        "from_seq": question.span.first,
        "to_seq": question.span.last,
    }
    return f"{question.place.base}/cmd/replay", body
