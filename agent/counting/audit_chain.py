"""The end of this device's audit chain, kept in step with the outbox."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from agent.delivery.audit import ChainHead, Entry, chain
from agent.delivery.messages import Draft
from agent.delivery.outbox import NO_NOTES, Outbox
from agent.delivery.topics import Topics

CHAIN_KEY = "audit/head"
"""Note: number and hash of the last entry of the audit chain."""


@dataclass(frozen=True, slots=True)
class Link:
    """An entry as it follows the chain's end, or nothing: its message and the note of the new end, to store at once."""

    drafts: tuple[Draft, ...]
    notes: Mapping[str, str | None]
    head: ChainHead


class AuditChain:
    """Knows where the chain ends. A link that was stored becomes its end with `take`."""

    def __init__(self, outbox: Outbox, topics: Topics) -> None:
        self._topics = topics
        self._boot = outbox.boot
        self._head = _read_head(outbox)

    def link(self, entry: Entry | None) -> Link:
        """What is to be stored for this entry. None = nothing was done that is audited."""
        if entry is None:
            return Link((), NO_NOTES, self._head)
        now = datetime.now(timezone.utc)
        drafts, head = chain((entry,), self._head, self._topics, boot=self._boot, at=now)
        return Link(drafts, {CHAIN_KEY: f"{head.n} {head.hash}"}, head)

    def take(self, link: Link) -> None:
        """The link is stored."""
        self._head = link.head


def _read_head(outbox: Outbox) -> ChainHead:
    n, _, digest = (outbox.note(CHAIN_KEY) or "").partition(" ")
    return ChainHead(int(n), digest) if digest else ChainHead()
