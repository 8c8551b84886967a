"""The publisher: the thread that owns the connection to the broker and empties the outbox through it, in order.

    outbox rows ------------------------> window ------> broker
    state, info, health (newest of each) ---^               |
    retained documents, replies ------------^               |
    outbox.acknowledge <----------------- PUBACK -----------+
    outbox.confirm <--------------------- ack/{receiver} ---+
    queue of commands <------------------ cmd/{name} -------+

Rules
  * With `delivery.confirm: broker` a row leaves the outbox on its own PUBACK and on nothing else; not on one that says
    that nobody subscribes: then its stream waits. With `receiver` it leaves when all receivers have acknowledged it,
    and is sent again when they have not for a while. After every new connection sending begins again at the first row
    that is left, so a message may come twice, and never not at all.
  * On every connection state, info and health are sent before any row: a broker that was restarted knows nothing.
  * Nobody waits for the publisher. Other threads hand over documents, or wake it; both return at once.
  * A message that the broker refuses for good is set aside (dead letter) and told as an event; one that it refuses for
    now is sent again later. A message over which the broker hangs up again and again is refused for good too: MQTT
    3.1.1 knows no other word for "too large".
"""

from __future__ import annotations

import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

from agent.config import BrokerSection, DeliverySection
from agent.delivery.acks import read_ack
from agent.delivery.commands import InboundCommand, reply_topic
from agent.delivery.link import BrokerLink, HungUp, Passing, ProtocolRefused, Received, Waker, Will, open_link
from agent.delivery.messages import Body, serialise, state_body
from agent.delivery.outbox import Outbox
from agent.delivery.reports import Alert, Reply, alert_body, reply_body
from agent.delivery.topics import Topics
from agent.delivery.window import IDLE_TURN_S, PAUSE_S, Documents, Passings, Window
from agent.domain import AgentState
from agent.errors import BrokerRefused, BrokerUnavailable, OutboxDamaged, OutboxError
from agent.health import BrokerState, Health

logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.25
"""A broker that was restarted is back within a second; asking sooner is of no use."""

STEADY_AFTER_S = 10.0
"""A connection that has held for this long, or has taken a row, makes the next pause short again."""

VERSIONS = ("5", "3.1.1")
"""Of MQTT, the better one first: only version 5 says when nobody has subscribed."""

SILENT_ENDS = 3
"""Connections closed without an answer, after which `protocol: auto` tries the other version."""

SILENT_ENDS_OF_A_KNOWN_BROKER = 50
"""The same where version 5 was spoken before: the broker is going down, or cut off behind a relay, or was exchanged."""

SHORT_ENDS = 5
"""Connections in a row that did not hold, after which the operator is told what that often means."""

FAREWELL_S = 2.0
"""For the last word of state and the goodbye."""

PRUNE_EVERY_S = 60.0
"""How often history is looked through when nothing is confirmed."""

LAST_WORDS = (AgentState.STOPPING, AgentState.DISCONNECTED)

LONGEST_CONNECT_S = 20.0
"""TCP, TLS and the answer, each with its own limit; a stop that comes in between waits for the end of it."""


class Backoff:
    """Pauses between attempts: doubled each time, up to a limit, and jittered, so that not all devices come at once."""

    def __init__(self, longest_s: float, jitter: Callable[[], float] = random.random) -> None:
        self._longest_s = longest_s
        self._jitter = jitter
        self._pause_s = min(FIRST_BACKOFF_S, longest_s)

    def next_s(self) -> float:
        """The next pause: between half and all of the current step."""
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, self._longest_s)
        return pause_s * (0.5 + 0.5 * self._jitter())

    def reset(self) -> None:
        self._pause_s = min(FIRST_BACKOFF_S, self._longest_s)

    def lengthen(self) -> None:
        self._pause_s = self._longest_s


class Publisher(threading.Thread):
    """The thread. Make it, `start` it, `stop` it; `failure` holds what ended it if that was not `stop`.

    open_outbox: opens this thread's own connection to the outbox (`open_outbox(..., verify=False)`).
    take_command: is given each arrived command and says whether there was room for it; None = we listen to none.
    """

    def __init__(
        self,
        *,
        topics: Topics,
        broker: BrokerSection,
        boot: int,
        open_outbox: Callable[[], Outbox],
        health: Health,
        health_interval_s: float = 30.0,
        delivery: DeliverySection | None = None,
        take_command: Callable[[InboundCommand], bool] | None = None,
        environ: Mapping[str, str] = os.environ,
        monotonic_ns: Callable[[], int] = time.monotonic_ns,
        now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        jitter: Callable[[], float] = random.random,
    ) -> None:
        # daemon: a name server that does not answer blocks connecting for longer than anybody wants to wait at the end
        super().__init__(name="publisher", daemon=True)
        self.failure: Exception | None = None
        self._topics = topics
        self._broker = broker
        self._boot = boot
        self._client_id = f"hv-{topics.site}-{topics.device}"
        self._open_outbox = open_outbox
        self._health = health
        self._health_expiry_s = math.ceil(3 * health_interval_s)
        self._environ = environ
        self._monotonic_ns = monotonic_ns
        self._now = now
        self._backoff = Backoff(broker.max_backoff_s, jitter)
        self._protocols: tuple[str, ...] = VERSIONS if broker.protocol == "auto" else (broker.protocol,)
        self._spoken: set[str] = set()
        self._silent_ends = 0
        self._short_ends = 0
        self._told = ""
        self._waker = Waker()
        self._documents = Documents()
        self._passings = Passings()
        self._take_command = take_command
        delivery = delivery or DeliverySection()
        self._delivery = delivery
        self._ack_topics = (
            {topics.ack(receiver): receiver for receiver in delivery.receivers}
            if delivery.confirm == "receiver"
            else {}
        )
        self._missed: queue.SimpleQueue[tuple[str, int, int]] = queue.SimpleQueue()
        self._complaints: set[str] = set()
        self._unheard: tuple[str, ...] = ()
        self._pruned_at_s = -math.inf
        self._state_lock = threading.Lock()
        self._state: AgentState | None = None
        self._stop_at_s: float | None = None
        self._is_drained = False
        self._reported_at_s = -math.inf
        self.publish_state(AgentState.INIT)

    # ---- for other threads

    def publish_state(self, state: AgentState) -> None:
        """Say how the agent is: the newest word wins, the same again does nothing, nothing follows the last words."""
        with self._state_lock:
            is_after_last_word = self._state in LAST_WORDS and state not in LAST_WORDS
            if state is self._state or is_after_last_word:
                return
            self._state = state
            self._documents.put("state", self._topics.state, self._state_body(state))
        self._waker.wake()

    def publish_info(self, body: Body) -> None:
        """Publish the birth certificate, now and on every new connection."""
        self._documents.put("info", self._topics.info, body)
        self._waker.wake()

    def publish_health(self, body: Body) -> None:
        """Publish these numbers; with MQTT 5 they expire after three intervals."""
        self._documents.put("health", self._topics.health, body, self._health_expiry_s)
        self._waker.wake()

    def publish_alert(self, alert_id: str, alert: Alert | None) -> None:
        """Raise an alert, or clear it: now and on every new connection, whether the outbox takes anything or not."""
        body = None if alert is None else alert_body(alert, self._topics, boot=self._boot)
        self._documents.put(f"alert/{alert_id}", self._topics.alert(alert_id), body)
        self._waker.wake()

    def publish_reply(self, topic: str, body: Body, correlation: bytes | None = None) -> None:
        """Answer a command. Not kept: while no broker is there, the newest answers wait."""
        self._passings.put(Passing(topic, serialise(body, topic), correlation=correlation))
        self._waker.wake()

    def publish_picture(self, topic: str, jpeg: bytes) -> None:
        """Publish a picture as it is. Not kept, as replies."""
        self._passings.put(Passing(topic, jpeg, content_type="image/jpeg"))
        self._waker.wake()

    def send_again(self, stream: str, first: int, last: int) -> None:
        """A receiver misses these numbers: do not wait with those that it has not confirmed."""
        self._missed.put((stream, first, last))
        self._waker.wake()

    def wake(self) -> None:
        """There is something new in the outbox."""
        self._waker.wake()

    def stop(self, drain_s: float) -> bool:
        """Send what waits for up to drain_s, as far as the broker is there, say goodbye and end; waits for that.

        Returns whether the outbox is empty. What was not sent stays there for the next start.
        """
        self.publish_state(AgentState.STOPPING)
        self._stop_at_s = time.monotonic() + drain_s
        self._waker.wake()
        if self.is_alive():
            self.join(drain_s + LONGEST_CONNECT_S + FAREWELL_S)
        return self._is_drained

    # ---- the thread

    def run(self) -> None:
        try:
            self._run()
        except Exception as error:  # the top of the thread: the supervisor finds it dead and ends the process
            self.failure = error
            logger.exception("the publisher has ended")
        finally:
            self._waker.close()

    def _run(self) -> None:
        outbox = self._open_patiently()
        if outbox is None:
            return
        with outbox:
            window = Window(
                outbox,
                self._documents,
                self._topics,
                passings=self._passings,
                delivery=self._delivery,
                limit=self._broker.window,
                monotonic_ns=self._monotonic_ns,
                now=self._now,
            )
            self._report(outbox)
            self._deliver(window, outbox)
            self._report(outbox, is_due=True)
            self._is_drained = outbox.depth() == 0

    def _deliver(self, window: Window, outbox: Outbox) -> None:
        """Connect and serve, again and again, until stopped; a stop that comes in a pause is worth one more attempt."""
        while not self._is_overdue:
            is_last_try = self._is_stopping
            link = self._connect()
            if link is None and is_last_try:
                return
            if link is not None and self._serve(link, window, outbox):
                return
            self._wait(self._backoff.next_s(), outbox)

    def _open_patiently(self) -> Outbox | None:
        """The outbox as soon as it can be opened; None when stopped before."""
        told = ""
        while True:
            try:
                return self._open_outbox()
            except OutboxDamaged:
                raise
            except OutboxError as error:
                if str(error) != told:
                    told = str(error)
                    logger.error("%s", told)  # noqa: TRY400 - foreseen: its words say all
            if self._is_stopping:
                return None
            self._wait(PAUSE_S, None)

    def _serve(self, link: BrokerLink, window: Window, outbox: Outbox) -> bool:
        """Deliver over this connection until it ends; True when a stop was asked for and the goodbye is said."""
        connected_at_s = time.monotonic()
        is_ending = False
        window.begin(link)
        self._subscribe(link)
        self._note_packet_limit(link, outbox)
        try:
            while not link.is_closed:
                self._report(outbox)
                if time.monotonic() - connected_at_s > STEADY_AFTER_S:
                    self._note_steady(link)
                if self._is_stopping and not is_ending:
                    is_ending = True
                    window.look()  # for what was appended just before the stop
                window.fill(link)
                if is_ending and (window.is_empty or self._is_overdue):
                    self._say_goodbye(link, window)
                    return True
                window.turn(link, self._waker)
                self._hear(link, window)
                self._tell_unheard(link, window)
        finally:
            link.abandon()
            window.end(link)
        self._note_the_end(link, has_progressed=window.has_progressed)
        return False

    def _subscribe(self, link: BrokerLink) -> None:
        """Anew on each connection: no broker has to remember it."""
        commands = () if self._take_command is None else (self._topics.commands, self._topics.dotted_commands)
        if filters := (*commands, *self._ack_topics):
            link.subscribe(filters)

    @staticmethod
    def _note_packet_limit(link: BrokerLink, outbox: Outbox) -> None:
        """What is too large is to be known before it enters. MQTT 3.1.1 brokers do not tell: the last word holds."""
        if not link.is_v5:
            return
        try:
            outbox.note_packet_limit(link.max_packet_bytes)
        except OutboxDamaged:
            raise
        except OutboxError as error:
            logger.debug("%s", error)

    def _hear(self, link: BrokerLink, window: Window) -> None:
        """Hand on what has come: acknowledgements to the outbox, commands to the pipeline, which judges and does them
        between two frames.
        """
        for subscribed in link.take_subscribed():
            if not subscribed.is_granted and subscribed.topic_filter != self._topics.dotted_commands:
                logger.error("the broker does not let us hear %s: %s", subscribed.topic_filter, subscribed.reason)
        for received in link.take_received():
            if (receiver := self._ack_topics.get(received.topic)) is not None:
                self._take_ack(received, receiver, window)
                continue
            command = self._command(received)
            if command is not None and self._take_command is not None and not self._take_command(command):
                reply = Reply(command.name, None, "refused", "busy", "too many commands wait; send it again later", {})
                body = reply_body(reply, self._topics, boot=self._boot, at=self._now())
                self.publish_reply(reply_topic(command, self._topics), body, command.correlation)
        while not self._missed.empty():
            window.send_again(*self._missed.get())

    def _take_ack(self, received: Received, receiver: str, window: Window) -> None:
        device = self._topics.device
        ack = read_ack(received.payload, receiver=receiver, device=device, is_retained=received.is_retained)
        if isinstance(ack, str):
            self._complain(f"an acknowledgement of {receiver} is not believed: {ack}")
        elif not window.take_ack(ack):
            self._complain(f"{receiver} acknowledges what was never sent: {ack.stream} {ack.boot}:{ack.seq}")

    def _complain(self, words: str) -> None:
        """Once for each kind: whoever sends nonsense sends it often."""
        kind = words.partition(":")[0]
        if kind not in self._complaints:
            self._complaints.add(kind)
            logger.warning("%s", words)

    def _tell_unheard(self, link: BrokerLink, window: Window) -> None:
        if window.unheard == self._unheard:
            return
        self._unheard = window.unheard
        self._tell_connected(link)

    def _command(self, received: Received) -> InboundCommand | None:
        name = self._topics.command(received.topic)
        if name is None:
            return None
        return InboundCommand(
            name=name,
            payload=received.payload,
            is_retained=received.is_retained,
            response_topic=received.response_topic,
            correlation=received.correlation,
            received_monotonic_s=time.monotonic(),
            expires_in_s=received.expires_in_s,
        )

    def _say_goodbye(self, link: BrokerLink, window: Window) -> None:
        self.publish_state(AgentState.DISCONNECTED)
        end_s = time.monotonic() + FAREWELL_S
        while not link.is_closed and not window.are_documents_taken and time.monotonic() < end_s:
            window.send_documents(link)
            window.turn(link, self._waker)
        link.disconnect()
        self._tell("lost", "disconnected: the agent stops")

    def _wait(self, pause_s: float, outbox: Outbox | None) -> None:
        """Sleep, in short pieces that feed the watchdog. A stop ends it; while stopping it is short."""
        was_stopping = self._is_stopping
        end_s = time.monotonic() + (min(pause_s, FIRST_BACKOFF_S) if was_stopping else pause_s)
        while (left_s := end_s - time.monotonic()) > 0 and self._is_stopping == was_stopping:
            self._report(outbox)
            self._waker.wait(min(left_s, IDLE_TURN_S))
        self._report(outbox)

    @property
    def _is_stopping(self) -> bool:
        return self._stop_at_s is not None

    @property
    def _is_overdue(self) -> bool:
        return self._stop_at_s is not None and time.monotonic() >= self._stop_at_s

    # ---- connecting

    def _connect(self) -> BrokerLink | None:
        """One attempt, with the version that the broker is thought to speak; None when it failed, which is told."""
        self._health.beat("publisher")
        try:
            link = open_link(
                self._broker,
                client_id=self._client_id,
                protocol=self._protocols[0],
                will=Will(self._topics.state, serialise(self._state_body(AgentState.LOST))),
                environ=self._environ,
            )
        except ProtocolRefused as error:
            if len(self._protocols) == 1:
                self._tell("refused", str(error))
                return None
            self._protocols = self._protocols[1:]  # remembered: it will not learn another version while we run
            logger.info("%s; going on with MQTT %s", error, self._protocols[0])
            return self._connect()
        except BrokerRefused as error:
            self._tell("refused", str(error))
            return None
        except BrokerUnavailable as error:
            self._tell("lost", str(error))
            self._count_silent_end(error)
            return None
        self._silent_ends = 0
        self._spoken.add(link.protocol)
        self._protocols = tuple(sorted(self._protocols, key=VERSIONS.index))  # for the next connection
        self._health.broker_certificate(link.certificate_ends_at)
        self._tell_connected(link)
        return link

    def _count_silent_end(self, error: BrokerUnavailable) -> None:
        """Some brokers of 3.1.1 hang up on version 5 without a word, and so does any broker that is going down."""
        if not isinstance(error, HungUp):
            return
        self._silent_ends += 1
        enough = 1 if self._spoken else SILENT_ENDS
        if "5" in self._spoken:
            enough = SILENT_ENDS_OF_A_KNOWN_BROKER
        if self._silent_ends % enough == 0:
            self._protocols = self._protocols[::-1]

    def _note_steady(self, link: BrokerLink) -> None:
        """The connection holds."""
        was_unsteady = self._is_unsteady
        self._short_ends = 0
        self._backoff.reset()
        if was_unsteady:
            self._tell_connected(link)

    def _note_the_end(self, link: BrokerLink, *, has_progressed: bool) -> None:
        """Tell why the connection ended. Not every broker says that another client has taken our name."""
        reason = link.closed_reason or ""
        if has_progressed:
            self._backoff.reset()
        if link.is_taken_over:
            reason = f"another client has connected as {self._client_id}; give each device its own site and device name"
            self._backoff.lengthen()
        elif self._short_ends + 1 >= SHORT_ENDS:
            reason += (
                "; it does not hold, time after time: does another device, or a second agent, connect as "
                f"{self._client_id} too?"
            )
        self._tell("lost", f"broker {self._broker.host}:{self._broker.port}: {reason}")
        self._short_ends += 1

    @property
    def _is_unsteady(self) -> bool:
        return self._short_ends >= SHORT_ENDS

    def _tell_connected(self, link: BrokerLink) -> None:
        words = f"{self._broker.host}:{self._broker.port}, MQTT {link.protocol}"
        if self._unheard:
            words += f"; nobody subscribes to {', '.join(self._unheard)}: that waits here"
        self._tell("connected", words)

    def _tell(self, state: BrokerState, detail: str) -> None:
        """To health always; to the log when it has changed, and not each time while no connection holds."""
        self._health.broker_state(state, detail)
        told = state if state == "lost" else f"{state}: {detail}"  # a lost broker is lost in many words
        if told == self._told or (self._is_unsteady and state != "refused"):
            return
        self._told = told
        if state == "connected":
            logger.info("broker connected: %s", detail)
        elif not self._is_stopping:
            logger.warning("broker %s: %s; trying on for as long as it takes", state, detail)

    # ---- bookkeeping

    def _state_body(self, state: AgentState) -> Body:
        return state_body(state, device=self._topics.device, site=self._topics.site, boot=self._boot, at=self._now())

    def _report(self, outbox: Outbox | None, *, is_due: bool = False) -> None:
        """A sign of life, and once a second how much waits."""
        self._health.beat("publisher")
        if outbox is None or (not is_due and time.monotonic() - self._reported_at_s < IDLE_TURN_S):
            return
        self._reported_at_s = time.monotonic()
        try:
            self._health.storage(outbox.depth(), outbox.oldest_age_s())
            if time.monotonic() - self._pruned_at_s >= PRUNE_EVERY_S:
                self._pruned_at_s = time.monotonic()
                outbox.prune()
        except OutboxDamaged:
            raise
        except OutboxError as error:
            logger.debug("%s", error)
