"""The audit: a numbered chain of what was asked of this device and done, in which nothing can be changed unseen.

    entry n:   hash = SHA-256(canonical JSON of all its keys but these: hash, id, seq, historical)
    entry n+1: previous = hash of entry n

Each entry goes out on the stream `audit` like any other message, and the head of the chain (its last number and hash)
lies in the outbox and changes in the same transaction. The chain proves order and wholeness to whoever keeps the
entries; it does not prove who wrote them: somebody who owns the device could write a new chain from its beginning, and
would be found out by the receiver, who has the old one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from agent.delivery.commands import canonical_json
from agent.delivery.messages import LONGEST_TEXT, Body, Draft, rfc3339_ms, schema_name
from agent.delivery.topics import Topics

BEGINNING = "0" * 64
"""`previous` of the first entry."""

Outcome = Literal["done", "refused", "failed"]

_OUTSIDE = frozenset({"hash", "id", "seq", "historical"})
"""Given, or changed, after the hash was made."""


@dataclass(frozen=True, slots=True)
class ChainHead:
    """Where the chain ends: the number of its last entry and that entry's hash. n 0 = there is none yet."""

    n: int = 0
    hash: str = BEGINNING


@dataclass(frozen=True, slots=True)
class Entry:
    """What happened. action: a word, `cmd.start` for a command. by: the token of who asked. detail: flat facts."""

    action: str
    outcome: Outcome
    message: str
    by: str | None = None
    role: str | None = None
    transaction: str | None = None
    detail: Mapping[str, object] | None = None


def chain(
    entries: Iterable[Entry], head: ChainHead, topics: Topics, *, boot: int, at: datetime
) -> tuple[tuple[Draft, ...], ChainHead]:
    """The messages of these entries and the new head; both must be stored in one transaction."""
    drafts = []
    for entry in entries:
        body: Body = {
            "schema": schema_name("audit"),
            "device": topics.device,
            "site": topics.site,
            "boot": boot,
            "at": rfc3339_ms(at),
            "n": head.n + 1,
            "previous": head.hash,
            "action": entry.action,
            "outcome": entry.outcome,
            "message": entry.message[:LONGEST_TEXT] or entry.outcome,
            "by": entry.by,
            "role": entry.role,
            "transaction": entry.transaction,
            "detail": {key: _plain(value) for key, value in (entry.detail or {}).items()},
            "ruo": True,
        }
        # As it will be read: what is no text (lone surrogates) is `?` on the wire.
        body = json.loads(canonical_json(body))
        head = ChainHead(head.n + 1, entry_hash(body))
        drafts.append(Draft("audit", topics.audit, {**body, "hash": head.hash}))
    return tuple(drafts), head


def entry_hash(message: Mapping[str, Any]) -> str:
    """64 hex digits over what an entry says."""
    return hashlib.sha256(
        canonical_json({key: value for key, value in message.items() if key not in _OUTSIDE})
    ).hexdigest()


# ------------------------------------------------------------------------------------------------------- verifying


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a file of audit messages shows. faults: in words, with the line; empty = an unbroken chain.

    entries: different ones; repeats: the same again. chains: beginnings at n 1 (a device whose outbox was lost begins
    anew, and says so by the event `outbox-set-aside`). missing: numbers that lie between entries of the file.
    """

    entries: int
    repeats: int
    chains: int
    missing: int
    first: int | None
    last: int | None
    faults: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        return not self.faults


def verify(lines: Iterable[str]) -> Verdict:
    """Check the messages of one device: JSON Lines, each an audit message or an exported row that holds one.

    Order and repeats do not matter: deliveries come twice. Lines of other kinds are passed over.
    """
    faults: list[str] = []
    entries: dict[tuple[int, int, str], tuple[int, Mapping[str, Any]]] = {}
    repeats = 0
    for number, line in enumerate(lines, start=1):
        message = _audit_message(line)
        if message is None:
            continue
        try:
            key = (int(message["boot"]), int(message["n"]), str(message["hash"]))
            is_true = entry_hash(message) == message["hash"] and isinstance(message["previous"], str)
        except (KeyError, TypeError, ValueError, OverflowError):  # JSON's 1e999 is infinite
            faults.append(f"line {number}: not an audit entry: a key is missing, or holds no such number")
            continue
        if not is_true:
            faults.append(f"line {number}: entry {key[1]} was changed: its hash is not that of its content")
        elif key in entries:
            repeats += 1
        else:
            entries[key] = (number, message)
    chains, missing = _follow(sorted(entries.values(), key=_place), faults)
    numbers = [int(message["n"]) for _, message in entries.values()]
    return Verdict(
        len(entries), repeats, chains, missing, min(numbers, default=None), max(numbers, default=None), tuple(faults)
    )


def _follow(entries: Sequence[tuple[int, Mapping[str, Any]]], faults: list[str]) -> tuple[int, int]:
    """Walk along; returns how many chains begin and how many numbers are missing."""
    chains = missing = 0
    before: Mapping[str, Any] | None = None
    for line, message in entries:
        n = int(message["n"])
        if n == 1:
            chains += 1
            if message["previous"] != BEGINNING:
                faults.append(f"line {line}: entry 1 does not begin a chain")
            if chains > 1:
                faults.append(f"line {line}: a chain begins anew in boot {message['boot']}; was the outbox lost then?")
        elif before is not None:
            gap = n - int(before["n"]) - 1
            if gap > 0:
                missing += gap
                faults.append(f"line {line}: {gap} entries before {n} are missing")
            elif gap < 0:
                faults.append(f"line {line}: there are two different entries {n}")
            elif message["previous"] != before["hash"]:
                faults.append(f"line {line}: entry {n} does not follow the entry {before['n']} of this file")
        before = message
    return chains, missing


def _place(numbered: tuple[int, Mapping[str, Any]]) -> tuple[int, int]:
    message = numbered[1]
    return int(message["boot"]), int(message["n"])


def _audit_message(line: str) -> Mapping[str, Any] | None:
    try:
        read = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(read, dict) and isinstance(read.get("message"), dict):
        read = read["message"]
    return read if isinstance(read, dict) and read.get("schema") == schema_name("audit") else None


def _plain(value: object) -> object:
    """Facts whose canonical JSON is the same in every language: no fractions."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [str(part) for part in value]
    return str(value)
