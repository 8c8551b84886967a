"""The thread that counts: takes what comes, stores it, and ends as it should."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any

import jsonschema
import numpy as np
import pytest

from agent.counting.thread import Pipeline
from agent.delivery.messages import load_schema
from agent.delivery.outbox import Outbox
from agent.domain import Classification, Pixels, SampleState
from agent.errors import OutboxDamaged
from agent.health import SelfTest
from tests.counting.running import FullOutbox, Runner
from tests.frames import WHITE, make_bench, make_frame, make_models


def test_all_messages_of_a_field_match_their_schemas(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.give(make_frame(1), make_frame(2))
    runner.run_to_end()
    assert runner.pipeline.failure is None
    assert runner.pipeline.is_source_finished
    assert [len(runner.of_kind("field")), len(runner.of_kind("cell"))] == [2, 4]
    for message in runner.messages:
        schema = load_schema(message["schema"].rsplit("/", 1)[1])
        jsonschema.Draft202012Validator(schema).validate(message)
    field, cell = runner.of_kind("field")[0], runner.of_kind("cell")[0]
    assert cell["field_id"] == field["id"]
    assert cell["cell_id"] == field["cells"][0]["cell_id"]


def test_cells_one_by_one_can_be_switched_off(outbox: Outbox) -> None:
    runner = Runner(outbox, make_bench(with_cells=False))
    runner.give(make_frame(1))
    runner.run_to_end()
    assert (len(runner.of_kind("field")), len(runner.of_kind("cell"))) == (1, 0)


def test_field_sample_and_finished_key_are_stored_together(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.give(make_frame(1, key="one"), make_frame(2, key="two"))
    runner.run_to_end()
    assert outbox.finished_keys() == {"one", "two"}
    assert outbox.sample_state() == runner.pipeline.sample
    assert runner.pipeline.sample.fields == 2
    assert runner.health.snapshot().fields == 2
    assert runner.stored == 4  # the end of the sample, and of the source


def test_the_end_of_a_source_is_told_with_what_it_gave(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.give(make_frame(1), make_frame(2))
    runner.run_to_end()
    finished, ended = runner.of_kind("event")
    assert (finished["kind"], finished["detail"]["reason"]) == ("sample-finished", "source-ended")
    assert (ended["kind"], ended["detail"]["fields"]) == ("source-ended", 2)


def test_dropped_frames_are_counted_and_done_with(outbox: Outbox) -> None:
    runner = Runner(outbox)
    frame = make_frame(1, key="one")
    dark = make_frame(pixels=np.zeros((48, 64, 3), np.uint8), key="dark")
    runner.give(frame, make_frame(1, key="again"), dark, make_frame(9, key="marked", repeats_last=True))
    runner.run_to_end()
    assert runner.health.snapshot().dropped == {"frozen": 2, "dark": 1}
    assert outbox.finished_keys() == {"one", "again", "dark", "marked"}
    assert runner.pipeline.sample.fields == 1


@pytest.mark.usefixtures("no_thread_left")
def test_stop_finishes_the_frame_in_hand_and_leaves_the_rest(outbox: Outbox) -> None:
    def answer_slowly(_crop: Pixels) -> Classification:
        time.sleep(0.3)
        return Classification("round", 1.0, {"round": 1.0, "lobed": 0.0})

    runner = Runner(outbox, make_bench(make_models((WHITE,), answer_slowly)))
    runner.give(make_frame(1, key="one"), make_frame(2, key="two"))
    runner.pipeline.start()
    runner.wait_until(lambda: len(runner.frames) == 1)
    assert runner.pipeline.stop(5)
    assert outbox.finished_keys() == {"one"}
    assert not runner.pipeline.is_source_finished
    assert runner.pipeline.failure is None


def test_while_a_self_test_has_failed_nothing_is_counted_and_nothing_is_lost(outbox: Outbox) -> None:
    runner = Runner(outbox)
    now = datetime.now(timezone.utc)
    bad = SelfTest(now, is_passed=False, detail="self-test: field a: the neutrophil at 3, 4 px is not found")
    due: list[SelfTest] = [bad, bad, SelfTest(now, is_passed=True, detail="as known")]

    def run_due() -> SelfTest | None:
        if not due:
            return None
        test = due.pop(0)
        runner.health.self_test(test)
        return test

    runner.pipeline = Pipeline(
        frames=runner.frames,
        outbox=outbox,
        bench=make_bench(),
        sample=SampleState("s-1"),
        health=runner.health,
        due_self_test=run_due,
    )
    runner.health.self_test(bad)
    runner.give(make_frame(1, key="one"), make_frame(2, key="two"))
    runner.run_to_end()
    kinds = [(body["schema"], body.get("kind")) for body in runner.messages if body["schema"] != "hv/1/cell"]
    told = [kind for schema, kind in kinds if schema == "hv/1/event"]
    assert told[:2] == ["self-test-failed", "self-test"], "a failure that goes on is told once"
    assert [schema for schema, _ in kinds].index("hv/1/field") > kinds.index(("hv/1/event", "self-test"))
    assert sum(schema == "hv/1/field" for schema, _ in kinds) == 2
    assert dict(runner.health.snapshot().dropped) == {}


def test_a_damaged_outbox_ends_the_thread_with_its_failure(outbox: Outbox) -> None:
    class Damaged(FullOutbox):
        def append(self, *_args: Any, **_kwargs: Any) -> tuple[int, ...]:
            raise OutboxDamaged("outbox.db: damaged")

    runner = Runner(Damaged(outbox))  # type: ignore[arg-type]
    runner.give(make_frame(1))
    runner.run_to_end()
    assert isinstance(runner.pipeline.failure, OutboxDamaged)
    assert not runner.pipeline.is_source_finished


def test_a_model_that_fails_ends_the_thread_with_its_failure(outbox: Outbox) -> None:
    def fail(_crop: Pixels) -> Classification:
        raise RuntimeError("the interpreter is broken")

    runner = Runner(outbox, make_bench(make_models((WHITE,), fail)))
    runner.give(make_frame(1, key="one"))
    runner.run_to_end()
    assert isinstance(runner.pipeline.failure, RuntimeError)
    assert outbox.finished_keys() == frozenset()
