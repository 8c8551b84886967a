"""Storing what frames give, and what happens while the outbox takes nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from agent.counting import intake
from agent.counting.intake import UNSAYABLE
from agent.counting.thread import NOT_STORED
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.domain import Box, Classification, Detection, Pixels, SampleState
from tests.counting.running import FullOutbox, Runner
from tests.frames import WHITE, make_bench, make_frame, make_models


def test_a_result_that_json_cannot_say_is_told_and_does_not_come_again(outbox: Outbox) -> None:
    def answer_nonsense(_crop: Pixels) -> Classification:
        return Classification("round", float("nan"), {"round": float("nan"), "lobed": 0.5})

    runner = Runner(outbox, make_bench(make_models((WHITE,), answer_nonsense)))
    runner.give(make_frame(1, key="one"))
    runner.run_to_end()
    (event,) = runner.told
    assert (event["kind"], event["detail"]["frame"]) == ("field-rejected", "one")
    assert outbox.finished_keys() == {"one"}
    assert runner.health.snapshot().dropped == {UNSAYABLE: 1}


@pytest.mark.usefixtures("no_thread_left")
def test_while_the_disk_is_full_the_frame_in_hand_waits_and_nothing_is_lost(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    analysed = []

    def answer(crop: Pixels) -> Classification:
        analysed.append(crop)
        return Classification("round", 1.0, {"round": 1.0, "lobed": 0.0})

    runner = Runner(full, make_bench(make_models((WHITE,), answer)))  # type: ignore[arg-type]
    runner.give(*(make_frame(seed, key=f"k{seed}") for seed in range(1, 5)))
    runner.frames.end()
    runner.pipeline.start()
    runner.wait_until(lambda: full.refused > 5)
    snapshot = runner.health.snapshot()
    assert snapshot.outbox == "stopped"
    assert "disk is full" in snapshot.outbox_detail
    assert len(analysed) == 1, "the frame in hand is kept, not analysed anew"
    assert len(runner.frames) == 3, "intake has stopped"
    mark = runner.health.snapshot()
    runner.wait_until(lambda: runner.health.snapshot().beats["pipeline"] > mark.beats["pipeline"])
    full.is_full = False
    runner.pipeline.join(10)
    assert runner.pipeline.is_source_finished
    assert runner.health.snapshot().outbox == "ok"
    assert [field["frame"]["n"] for field in runner.of_kind("field")] == [1, 2, 3, 4]
    assert [event["kind"] for event in runner.told] == ["outbox-stopped", "outbox-recovered"]


@pytest.mark.usefixtures("no_thread_left")
def test_a_stop_while_the_disk_is_full_leaves_the_frame_to_the_next_start(outbox: Outbox) -> None:
    full = FullOutbox(outbox)
    runner = Runner(full)  # type: ignore[arg-type]
    runner.give(make_frame(1, key="one"))
    runner.pipeline.start()
    runner.wait_until(lambda: full.refused > 2)
    assert runner.pipeline.stop(5)
    assert outbox.finished_keys() == frozenset()
    assert runner.health.snapshot().dropped == {NOT_STORED: 1}
    assert runner.pipeline.sample.fields == 0


def test_a_full_outbox_still_takes_the_word_that_it_is_full(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, max_mb=1, min_free_mb=0, device="dev") as outbox:
        cells = tuple(Detection(Box(n % 50, n % 40, n % 50 + 9, n % 40 + 8), "white", 0.5) for n in range(200))
        runner = Runner(outbox, make_bench(make_models(cells)))
        runner.pipeline.start()
        try:
            seeds = itertools.count(1)

            def is_stopped_by_another_frame() -> bool:
                runner.frames.put_waiting(make_frame(next(seeds)), 0.1)  # refused by a queue that is full
                return runner.health.snapshot().outbox == "stopped"

            runner.wait_until(is_stopped_by_another_frame, 60)
            runner.wait_until(lambda: bool(runner.told))
            assert "outbox.max_mb" in runner.told[0]["message"]
            # The broker takes all that is there: intake goes on.
            with open_outbox(tmp_path, device="dev", verify=False) as publishers:
                publishers.acknowledge([row.row_id for row in publishers.pending(0, 1_000_000)])
            runner.wait_until(lambda: runner.health.snapshot().outbox == "ok")
        finally:
            assert runner.pipeline.stop(5)


def test_the_oldest_cells_leave_the_review_list_and_the_gallery_stays(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "CELLS_NAMEABLE", 2)
    reasons = {2: "gallery", 3: "low-margin"}
    listed = {f"review/s-1/s-1-{number}": json.dumps({"reason": reason}) for number, reason in reasons.items()}
    outbox.append((), notes={**listed, "answers/s-1/s-1-3": "[]"})
    runner = Runner(outbox, sample=SampleState("s-1", next_cell_number=4))
    runner.give(make_frame(1))
    runner.run_to_end()
    assert runner.pipeline.sample.next_cell_number == 6
    assert sorted(outbox.notes("review/")) == ["review/s-1/s-1-2"]
    assert list(outbox.notes("answers/")) == ["answers/s-1/s-1-3"]
