"""Commands: what comes in on `cmd/{name}`, read and judged before anything is done.

    InboundCommand --read_command--> Command  --applied between frames--> reply, audit, effect in one transaction
                                 `-> Refusal  ---------------------------> reply

Rules
  * Nothing that arrives can raise: what is not understood is a `Refusal` with a code and words.
  * A retained command is refused: it would be done again at every connection, by a person who is long gone.
  * A command older than EXPIRES_S is refused: a microscope must not start because a network came back.
  * Commands that change models or configuration need the operator's role (`docs/decisions/0004-who-may-command.md`).
  * The same transaction again is not done again; its first reply is given again (`agent.desk`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agent.config import Accession, Identifier
from agent.delivery.topics import Topics
from agent.domain import AgeBand

EXPIRES_S = 30.0
"""From the contract: between sending and being taken up, wherever the time was spent."""

LARGEST_COMMAND_BYTES = 16 * 1024
"""The longest honest command has some hundred bytes."""

LONGEST_TOPIC = 256

LARGEST_REPLAY_ROWS = 1_000_000
"""A range beyond it was typed wrongly."""

Role = Literal["anyone", "operator"]
"""anyone: whom the broker lets write to `cmd/`. operator: who may change what counts here, and how."""

RefusalCode = Literal[
    "retained",
    "expired",
    "too-large",
    "not-json",
    "unknown-command",
    "bad-request",
    "not-allowed",
    "transaction-reused",
]

OperatorProof = Literal["none", "broker", "key"]
"""What shows that a command is an operator's: nothing does (all are refused); the broker's ACL; a pre-shared key."""

TOKEN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Token = Annotated[str, Field(pattern=TOKEN)]
CellId = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,80}$")]
ClassName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,63}$")]
Seq = Annotated[int, Field(ge=1, le=2**53)]


@dataclass(frozen=True, slots=True)
class InboundCommand:
    """A message on `cmd/{name}` as it arrived; nothing in it is trusted yet.

    received_monotonic_s: `time.monotonic()` at its arrival. expires_in_s: what was left of its MQTT 5 expiry then.
    response_topic, correlation: of MQTT 5, where the sender wants the reply.
    hear_reply: takes the reply of a command that did not come over the broker; returns at once, on any thread.
    """

    name: str
    payload: bytes
    is_retained: bool = False
    response_topic: str | None = None
    correlation: bytes | None = None
    received_monotonic_s: float = 0.0
    expires_in_s: float | None = None
    hear_reply: Callable[[Mapping[str, Any]], None] | None = None


# ------------------------------------------------------------------------------------------------ what can be asked


class Request(BaseModel):
    """What every command holds. transaction: chosen by the sender, new for each; the same again is not done again.

    at: when it was sent; needed with a key. by: an opaque token of the person, for the audit. auth: see `sign`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    transaction: Token
    at: datetime | None = None
    by: Token | None = None
    auth: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None


class Ping(Request):
    """Are you there?"""


class Start(Request):
    """Begin a sample. What is not given is taken from the configuration, but for the accession: none given = none.

    sample: its id; given neither here nor there = one is made.
    """

    sample: Identifier | None = None
    accession: Accession | None = None
    age_band: AgeBand | None = None
    stop_at_cells: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    stop_at_half_width_pct: Annotated[float, Field(ge=0.5, le=50)] | None = None


class OfSample(Request):
    """Pause, resume. sample: only if this one is open; not given = whichever is."""

    sample: Identifier | None = None


class Stop(OfSample):
    """End the sample: finished with its final differential, or with `abort` thrown over without one."""

    abort: bool = False


class Snapshot(Request):
    """Publish the next frame as a JPEG picture."""


class SelfTest(Request):
    """Try the models now."""


class Reload(Request):
    """Read the configuration again."""


class Relearn(Request):
    """Learn anew what is usual on this device: lamp, stain or objective were changed on purpose."""


class Replay(Request):
    """Send these numbers of a stream again."""

    stream: Literal["field", "cell", "event", "audit", "differential"]
    from_seq: Seq
    to_seq: Seq


class ModelStage(Request):
    """Check the models in this folder of the staging place and copy them into the slot that is not in use."""

    folder: Identifier


class ModelSwitch(Request):
    """Activate the staged models, or go back to the ones before."""


class Amend(Request):
    """A person's name for a cell. cell_class: a class of the manifest, `unidentified` or `artefact`."""

    sample: Identifier
    cell_id: CellId
    cell_class: Annotated[ClassName, Field(alias="class")]
    reason: Annotated[str, Field(max_length=200)] | None = None


@dataclass(frozen=True, slots=True)
class CommandKind:
    """One word of the command list. is_audited: it changes something, or tries to."""

    request: type[Request]
    role: Role = "anyone"
    is_audited: bool = True


COMMANDS: Mapping[str, CommandKind] = MappingProxyType(
    {
        "start": CommandKind(Start),
        "stop": CommandKind(Stop),
        "pause": CommandKind(OfSample),
        "resume": CommandKind(OfSample),
        "snapshot": CommandKind(Snapshot),
        "selftest": CommandKind(SelfTest),
        "reload": CommandKind(Reload, "operator"),
        "relearn": CommandKind(Relearn, "operator"),
        "ping": CommandKind(Ping, is_audited=False),
        "replay": CommandKind(Replay),
        "model.stage": CommandKind(ModelStage, "operator"),
        "model.activate": CommandKind(ModelSwitch, "operator"),
        "model.rollback": CommandKind(ModelSwitch, "operator"),
        "amend": CommandKind(Amend),
    }
)


@dataclass(frozen=True, slots=True)
class Command:
    """A command that may be done. digest: 16 hex digits of its content; tells a repeat from a reused transaction."""

    name: str
    request: Request
    kind: CommandKind
    digest: str

    @property
    def transaction(self) -> str:
        return self.request.transaction


@dataclass(frozen=True, slots=True)
class Refusal:
    """A command that is not done, why, and whose it is as far as that could be read."""

    name: str
    code: RefusalCode
    message: str
    transaction: str | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Gatekeeper:
    """What shows that a command is an operator's. base: the device's topic base; key: for proof `key`."""

    base: str
    proof: OperatorProof = "none"
    key: bytes | None = None


# --------------------------------------------------------------------------------------------------------- reading


def read_command(
    inbound: InboundCommand, gatekeeper: Gatekeeper, *, monotonic_s: float, now: datetime | None
) -> Command | Refusal:
    """What an arrived message asks for, or why it is not done.

    now: the time of a clock that follows a reference; None = this device does not know the time, `at` is not judged.
    """
    # 1. What can be said without reading it.
    kind = COMMANDS.get(inbound.name)
    if inbound.is_retained:
        return Refusal(inbound.name, "retained", "a retained command is never done; send it without retain, clear it")
    if kind is None:
        return Refusal(inbound.name, "unknown-command", f"known are: {', '.join(sorted(COMMANDS))}")
    if len(inbound.payload) > LARGEST_COMMAND_BYTES:
        message = f"{len(inbound.payload)} bytes; a command has at most {LARGEST_COMMAND_BYTES}"
        return Refusal(inbound.name, "too-large", message)

    # 2. What it says.
    try:
        spoken = json.loads(inbound.payload.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        return Refusal(inbound.name, "not-json", f"not a JSON object: {_short(error)}")
    if not isinstance(spoken, dict):
        return Refusal(inbound.name, "not-json", f"not a JSON object but {type(spoken).__name__}")
    transaction, by = _token(spoken.get("transaction")), _token(spoken.get("by"))

    def refuse(code: RefusalCode, message: str) -> Refusal:
        return Refusal(inbound.name, code, message, transaction, by)

    try:
        request = kind.request.model_validate_json(json.dumps(spoken), strict=False)
    except (ValidationError, ValueError, RecursionError) as error:
        return refuse("bad-request", _faults(error))
    if isinstance(request, Replay) and not 0 <= request.to_seq - request.from_seq < LARGEST_REPLAY_ROWS:
        return refuse("bad-request", f"from_seq to to_seq: a range of 1 to {LARGEST_REPLAY_ROWS}, in rising order")

    # 3. Whether it is still wanted.
    waited_s = monotonic_s - inbound.received_monotonic_s
    if waited_s > min(EXPIRES_S, EXPIRES_S if inbound.expires_in_s is None else inbound.expires_in_s):
        return refuse("expired", f"it waited {waited_s:.0f} s for its turn; commands expire after {EXPIRES_S:g} s")
    if now is not None and request.at is not None:
        if request.at.tzinfo is None:
            return refuse("bad-request", "at: a time without its zone; end it with Z")
        age_s = (now - request.at).total_seconds()
        if abs(age_s) > EXPIRES_S:
            words = "ago" if age_s > 0 else "in the future"
            return refuse("expired", f"it was sent {abs(age_s):.0f} s {words}; commands expire after {EXPIRES_S:g} s")

    # 4. Whether its sender may.
    if kind.role == "operator" and (fault := _why_no_operator(inbound.name, spoken, request, gatekeeper)):
        return refuse("not-allowed", fault)
    return Command(inbound.name, request, kind, _digest(spoken))


def reply_topic(inbound: InboundCommand, topics: Topics) -> str:
    """Where the reply goes: the response topic that was asked for, else `reply/{name}`.

    Nobody may have this device write below `hv/` with the device's rights, except to its own replies.
    """
    asked = inbound.response_topic
    is_word = re.fullmatch(r"[a-z.-]{1,32}", inbound.name) is not None
    own = topics.reply(inbound.name if is_word else "unknown")
    if asked is None or not 0 < len(asked) <= LONGEST_TOPIC or any(mark in asked for mark in "+#\0"):
        return own
    is_foreign = not asked.startswith(("hv/", "$"))
    return asked if is_foreign or asked.startswith(f"{topics.base}/reply/") else own


def sign(name: str, request: Mapping[str, Any], base: str, key: bytes) -> str:
    """The `auth` of an operator's command: 64 hex digits of HMAC-SHA256 over topic and canonical JSON without `auth`.

    base: the device's topic base: what was signed for one device is worth nothing at another.
    """
    unsigned = {word: value for word, value in request.items() if word != "auth"}
    return hmac.new(key, f"{base}/cmd/{name}\n".encode() + canonical_json(unsigned), hashlib.sha256).hexdigest()


def canonical_json(value: Any) -> bytes:
    """One and the same bytes for one and the same value: keys sorted, no blanks, UTF-8."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8", errors="replace")


def utc_now() -> datetime:
    """The system's clock."""
    return datetime.now(timezone.utc)


# ------------------------------------------------------------------------------------------------------- the parts


def _why_no_operator(name: str, spoken: Mapping[str, Any], request: Request, gatekeeper: Gatekeeper) -> str | None:
    if gatekeeper.proof == "broker":
        return None  # who may write to this topic was decided by the broker's access list
    if gatekeeper.proof == "none" or gatekeeper.key is None:
        return f"{name} needs the operator's role, and this device has none set up; see commands.operator"
    if request.auth is None or request.at is None:
        return f"{name} needs the operator's role: auth and at are missing"
    if not hmac.compare_digest(request.auth, sign(name, spoken, gatekeeper.base, gatekeeper.key)):
        return f"{name} needs the operator's role: auth is not made with this device's key"
    return None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A key that stands twice means two things to two readers."""
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("a key stands there twice")
    return read


def _token(value: object) -> str | None:
    """What may be a token, to echo it in a refusal; anything else is not repeated."""
    is_token = isinstance(value, str) and 0 < len(value) <= 64 and all(c.isascii() and c.isprintable() for c in value)
    return cast("str", value) if is_token else None


def _digest(spoken: Mapping[str, Any]) -> str:
    same = {word: value for word, value in spoken.items() if word not in ("at", "auth")}
    return hashlib.sha256(canonical_json(same)).hexdigest()[:16]


def _faults(error: Exception) -> str:
    if isinstance(error, ValidationError):
        faults = (f"{'.'.join(str(part) for part in fault['loc'])}: {fault['msg']}" for fault in error.errors()[:5])
        return _short("; ".join(faults))
    return _short(error)


def _short(error: object) -> str:
    return str(error)[:300]
