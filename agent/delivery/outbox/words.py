"""What is stored beside the rows: the newest word on each retained topic, notes, answers, and the sample's state.

Functions on a connection. Those that write are called inside a transaction, so that a word is stored together with the
rows it belongs to, or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from agent.delivery.messages import RetainedDocument, serialise
from agent.domain import SampleState

PACKET_LIMIT_NOTE = "broker/max-packet-bytes"
"""The largest PUBLISH that the broker takes, as it said last."""

NUMBERING_NOTE = "numbering/since-boot"
"""The boot in which this file began to number its streams at 1."""

NO_NOTES: Mapping[str, str | None] = MappingProxyType({})

MOST_ANSWERS = 512
"""Transactions that are remembered: more than a person or a program sends while any repeat of them is under way."""

_SAMPLE_KEYS = tuple(part.name for part in dataclasses.fields(SampleState))


# --------------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """The newest of a retained topic. payload: None = the topic is to be cleared. version: rises with each change."""

    topic: str
    payload: bytes | None
    version: int


def put_documents(connection: sqlite3.Connection, documents: Iterable[RetainedDocument]) -> None:
    """Replace what was said on these topics; raises MessageRejected for a body that JSON cannot say."""
    for document in documents:
        payload = None if document.body is None else serialise(document.body, document.topic)
        # The old row goes, the new one gets a higher version than any before.
        connection.execute("INSERT OR REPLACE INTO documents (topic, payload) VALUES (?, ?)", (document.topic, payload))


def settle_document(connection: sqlite3.Connection, document: StoredDocument) -> None:
    """Forget a topic that is cleared, unless it was written anew."""
    connection.execute(
        "DELETE FROM documents WHERE topic = ? AND version = ? AND payload IS NULL",
        (document.topic, document.version),
    )


def documents_after(connection: sqlite3.Connection, version: int, limit: int) -> list[StoredDocument]:
    """Those that were written after this version, in the order of writing."""
    found = connection.execute(
        "SELECT topic, payload, version FROM documents WHERE version > ? ORDER BY version LIMIT ?", (version, limit)
    ).fetchall()
    return [StoredDocument(*columns) for columns in found]


def document(connection: sqlite3.Connection, topic: str) -> bytes | None:
    """The newest word on a topic; None where nothing was said, or it is to be cleared."""
    found = connection.execute("SELECT payload FROM documents WHERE topic = ?", (topic,)).fetchone()
    return None if found is None else found[0]


def told_topics(connection: sqlite3.Connection, prefix: str) -> tuple[str, ...]:
    """The topics that begin so and are not to be cleared, in the order in which they were written last."""
    found = connection.execute(
        "SELECT topic FROM documents WHERE topic >= ? AND topic < ? AND payload IS NOT NULL ORDER BY version",
        from_to(prefix),
    ).fetchall()
    return tuple(topic for (topic,) in found)


# ------------------------------------------------------------------------------------------------- notes and answers


def put_note(connection: sqlite3.Connection, key: str, value: str | None) -> None:
    """Remember it; None = forget it, and with a key that ends in `/` all below it."""
    if value is not None:
        connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (key, value))
    elif key.endswith("/"):
        connection.execute("DELETE FROM notes WHERE key >= ? AND key < ?", from_to(key))
    else:
        connection.execute("DELETE FROM notes WHERE key = ?", (key,))


def note(connection: sqlite3.Connection, key: str) -> str | None:
    """What was noted under this key."""
    found = connection.execute("SELECT value FROM notes WHERE key = ?", (key,)).fetchone()
    return None if found is None else str(found[0])


def notes_below(connection: sqlite3.Connection, prefix: str) -> dict[str, str]:
    """All notes whose key begins so."""
    return dict(
        connection.execute("SELECT key, value FROM notes WHERE key >= ? AND key < ? ORDER BY key", from_to(prefix))
    )


def notes_between(connection: sqlite3.Connection, after: str, end: str, limit: int) -> list[tuple[str, str]]:
    """The next notes behind a key and before another, in the order of their keys."""
    return connection.execute(
        "SELECT key, value FROM notes WHERE key > ? AND key < ? ORDER BY key LIMIT ?", (after, end, limit)
    ).fetchall()


def from_to(prefix: str) -> tuple[str, str]:
    """Bounds of all keys that begin so; keys are ASCII."""
    return prefix, f"{prefix}\x7f"


def put_answer(connection: sqlite3.Connection, name: str, text: str) -> None:
    """Remember what was answered to a transaction; the newest MOST_ANSWERS are kept."""
    connection.execute("INSERT OR REPLACE INTO answers (name, text) VALUES (?, ?)", (name, text))
    connection.execute("DELETE FROM answers WHERE number <= (SELECT MAX(number) FROM answers) - ?", (MOST_ANSWERS,))


def answer(connection: sqlite3.Connection, name: str) -> str | None:
    """What was answered to this transaction, if it was done and not too long ago."""
    found = connection.execute("SELECT text FROM answers WHERE name = ?", (name,)).fetchone()
    return None if found is None else str(found[0])


# -------------------------------------------------------------------------------- the sample and its finished frames


def put_sample(connection: sqlite3.Connection, sample: SampleState) -> None:
    """The state of the sample that is being counted; there is one."""
    connection.execute("INSERT OR REPLACE INTO sample VALUES (1, ?)", (sample_text(sample),))


def stored_sample(connection: sqlite3.Connection) -> str | None:
    """The sample's state as it stands there, for `sample_from`; None = no sample is open."""
    found = connection.execute("SELECT state FROM sample").fetchone()
    return None if found is None or found[0] is None else str(found[0])


def forget_sample(connection: sqlite3.Connection, *, with_finished: bool) -> None:
    """with_finished: the finished frames too."""
    connection.execute("DELETE FROM sample")
    if with_finished:
        connection.execute("DELETE FROM finished")


def put_finished(connection: sqlite3.Connection, keys: Sequence[str]) -> None:
    """These frames are done with, by their origin keys."""
    connection.executemany("INSERT OR IGNORE INTO finished VALUES (?)", ((key,) for key in keys))


def forget_finished(connection: sqlite3.Connection, keys: Sequence[str]) -> None:
    """These frames cannot come again."""
    connection.executemany("DELETE FROM finished WHERE origin_key = ?", ((key,) for key in keys))


def finished_keys(connection: sqlite3.Connection) -> frozenset[str]:
    """Origin keys of the frames that are done with."""
    return frozenset(key for (key,) in connection.execute("SELECT origin_key FROM finished"))


def sample_text(sample: SampleState) -> str:
    """The state as JSON."""
    keys = {name: getattr(sample, name) for name in _SAMPLE_KEYS}
    tallies = {key: {name: int(count) for name, count in keys[key].items()} for key in ("counts", "refused")}
    return json.dumps({**keys, **tallies})


def sample_from(text: str) -> SampleState:
    """The state from its JSON; keys of a newer agent are passed over."""
    stored = json.loads(text)
    known = {name: stored[name] for name in _SAMPLE_KEYS if name in stored}
    return SampleState(**{**known, **{key: MappingProxyType(stored.get(key, {})) for key in ("counts", "refused")}})
