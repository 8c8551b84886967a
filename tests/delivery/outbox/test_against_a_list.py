"""Whatever is done in whatever order, the outbox holds what a plain list would hold."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.delivery.messages import Draft
from agent.delivery.outbox import begin_boot
from agent.errors import MessageRejected
from tests.delivery.outbox.making import make_draft, make_outbox


class OutboxAgainstAList(RuleBasedStateMachine):
    """Whatever is done in whatever order, the outbox holds what a plain list would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="outbox-model-"))
        self.outbox = make_outbox(self.folder)
        self.rows: list[tuple[int, str, int]] = []
        self.dead: list[tuple[str, int]] = []
        self.last_seq = {"field": 0, "cell": 0, "event": 0}
        self.finished: set[str] = set()

    @rule(streams=st.lists(st.sampled_from(["field", "cell", "event"]), max_size=4), key=st.sampled_from("abc"))
    def append(self, streams: list[str], key: str) -> None:
        row_ids = self.outbox.append([make_draft(stream) for stream in streams], finished_keys=[key])
        for row_id, stream in zip(row_ids, streams, strict=True):
            self.last_seq[stream] += 1
            self.rows.append((row_id, stream, self.last_seq[stream]))
        self.finished.add(key)

    @rule(streams=st.lists(st.sampled_from(["field", "cell"]), max_size=2))
    def append_in_vain(self, streams: list[str]) -> None:
        bad = Draft("event", "t", {"schema": "hv/1/event", "value": float("inf")})
        with pytest.raises(MessageRejected):
            self.outbox.append([*(make_draft(stream) for stream in streams), bad], finished_keys=["never"])

    @precondition(lambda self: self.rows)
    @rule(place=st.integers(0, 1000), is_taken=st.booleans())
    def leave(self, place: int, is_taken: bool) -> None:
        row_id, stream, seq = self.rows.pop(place % len(self.rows))
        if is_taken:
            self.outbox.acknowledge([row_id])
        else:
            self.outbox.reject(row_id, "no")
            self.dead.append((stream, seq))

    @rule()
    def requeue(self) -> None:
        self.outbox.requeue()
        known = {row[0] for row in self.rows}
        back = [row.row_id for row in self.outbox.pending(0, 10_000) if row.row_id not in known]
        self.rows += [(row_id, stream, seq) for row_id, (stream, seq) in zip(back, self.dead, strict=True)]
        self.dead = []

    @rule()
    def restart(self) -> None:
        self.outbox.close()
        begin_boot(self.folder)
        self.outbox = make_outbox(self.folder)

    @invariant()
    def holds_what_the_list_holds(self) -> None:
        assert [(row.row_id, row.stream, row.seq) for row in self.outbox.pending(0, 10_000)] == self.rows
        assert [(letter.stream, letter.seq) for letter in self.outbox.dead_letters()] == self.dead
        assert self.outbox.depth() == len(self.rows)
        assert self.outbox.finished_keys() == self.finished

    def teardown(self) -> None:
        self.outbox.close()
        shutil.rmtree(self.folder)


OutboxAgainstAList.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


TestOutboxAgainstAList = OutboxAgainstAList.TestCase
