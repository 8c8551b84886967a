"""The count stands where the outbox stands: what was learnt, and what is on the slide."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from agent.analysis.control_charts import Plan
from agent.analysis.differential import Rules
from agent.analysis.drift import DriftMemory, DriftPlan
from agent.analysis.quality import from_text
from agent.bench import Bench
from agent.delivery.messages import load_schema
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.domain import Box, Detection, Frame, SampleState
from agent.errors import OutboxError
from agent.pipeline import DRIFT_NOTE, GATE_NOTE
from tests.counting.running import Place, Runner, make_slide_frame
from tests.frames import make_bench, make_frame, make_models, make_pixels
from tests.proofs.scanning import simulated_world


def test_what_the_gate_has_learnt_is_stored_with_the_frame(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.give(*(make_frame(seed, pixels=make_pixels(seed, 320, 240)) for seed in range(1, 8)))
    runner.run_to_end()
    assert runner.pipeline.sample.fields == 7
    assert from_text(outbox.note(GATE_NOTE)).usual.frames == 7


def watched_bench() -> Bench:
    plan = DriftPlan("basis", Plan(learn=5, weight=0.25, tail=1e-4), ("round",))
    return replace(make_bench(), drift=plan, counting=Rules({"round": "leukocyte"}))


def see_slide(outbox: Outbox, number: int, tint: float = 1.0, bench: Bench | None = None) -> Runner:
    """A run of the agent with one slide of four fields. tint: of the red channel."""
    runner = Runner(outbox, bench or watched_bench(), SampleState(f"s-{number}"))
    for turn in range(4):
        pixels = make_pixels(10 * number + turn, 320, 240) * np.asarray((1.0, 1.0, tint))
        runner.give(make_frame(10 * number + turn, pixels=np.clip(pixels, 0, 255).astype(np.uint8)))
    runner.run_to_end()
    assert runner.pipeline.failure is None
    assert runner.pipeline.sample.fields == 4
    return runner


def test_what_is_usual_is_learnt_over_restarts_and_what_moves_is_in_health(outbox: Outbox) -> None:
    for number in range(6):
        runner = see_slide(outbox, number)
    drift = runner.health.snapshot().drift
    assert drift is not None
    assert drift.slides == 5
    assert drift.figures["ground-red"].moved is None
    for number in range(6, 12):
        runner = see_slide(outbox, number, tint=1.15)
    drift = runner.health.snapshot().drift
    assert drift is not None
    assert "red over green of the ground moved from" in (drift.figures["ground-red"].moved or "")
    # A new start tells it before its first frame.
    assert Runner(outbox, watched_bench()).health.snapshot().drift == drift


def test_a_device_that_is_not_watched_keeps_nothing_of_it(outbox: Outbox) -> None:
    runner = see_slide(outbox, 1, bench=make_bench())
    assert runner.health.snapshot().drift is None
    assert outbox.note(DRIFT_NOTE) is None


def test_a_field_that_cannot_be_stored_is_not_learnt_from(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(outbox, watched_bench())

    def refuse(*_args: object, **_more: object) -> None:
        raise OutboxError("the disk is full")

    runner.give(make_frame(1, pixels=make_pixels(1, 320, 240)))
    monkeypatch.setattr(outbox, "append", refuse)
    runner.pipeline.start()
    runner.wait_until(lambda: runner.health.snapshot().outbox == "stopped")
    assert runner.pipeline.stop(5)
    assert runner.pipeline._count._drift == DriftMemory()


def test_a_restart_in_the_middle_of_a_slide_neither_loses_nor_doubles_a_cell(outbox: Outbox) -> None:
    world = simulated_world(51, 1700, 800)
    ways = [(1, 60.0, (100, 600)), (2, 260.0, (400,)), (3, 60.0, (100, 600)), (4, 460.0, (200,))]
    # White cells stand at 160 and 660 px of the slide; each field is given those that it shows, by their place in it.
    seen = {
        number: tuple(Detection(Box(edge, 200, edge + 37, 240), "white", 0.9) for edge in edges)
        for number, _, edges in ways
    }
    answers = iter(seen[number] for number, _, _ in ways)
    models = make_models(())
    models.detector.detect = lambda _pixels, _min_score=None: next(answers)
    for some in (ways[:2], ways[2:]):
        stored = outbox.sample_state()
        runner = Runner(outbox, make_bench(models), sample=stored or SampleState("s-1"))
        for number, x, _ in some:
            runner.give(make_slide_frame(world, number, x))
        runner.frames.end()
        for _ in some:
            taken = runner.frames.take(1)
            assert isinstance(taken, Frame)
            runner.pipeline._store_frame(taken)
    fields = runner.of_kind("field")
    assert [field["unique_counts"] for field in fields] == [{"round": 2}, {}, {}, {}]
    assert [field["counts"]["round"] for field in fields] == [2, 1, 2, 1]
    assert [field["duplicates"] for field in fields] == [0, 1, 2, 1]
    assert [field["place"]["source"] for field in fields] == ["unknown", "registered", "registered", "registered"]
    assert {cell["duplicate_of"] for field in fields[1:] for cell in field["cells"]} == {"s-1-1", "s-1-2"}
    assert runner.pipeline.sample.counts == {"round": 2}
    assert (runner.pipeline.sample.duplicates, runner.pipeline.sample.unplaced) == (4, 0)
    for message in fields:
        jsonschema.Draft202012Validator(load_schema("field")).validate(message)


def test_a_sample_survives_a_restart_in_the_middle_without_losing_or_doubling_a_cell(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
        place = Place(outbox)
        place.do("start", "t-1", sample="s-1", accession="A-1", age_band="elder", stop_at_half_width_pct=5.0)
        place.give(1, 2, 3)
        place.run_a_while(lambda: place.pipeline.sample.fields == 3)
        before = place.pipeline.sample
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as outbox:
        stored = outbox.sample_state()
        assert stored == before
        place = Place(outbox, stored)
        place.give(3, 4)  # the frame of the last moment comes again
        place.run_a_while(lambda: place.pipeline.sample.fields == 4)
        cells = [cell["cell_id"] for field in place.messages("field") for cell in field["cells"]]
        assert len(cells) == len(set(cells)) == 8
        assert place.pipeline.sample.counts == {"red": 4, "round": 4}


def test_a_new_sample_counts_the_field_at_which_the_one_before_has_ended(outbox: Outbox) -> None:
    place = Place(outbox, SampleState("s-1"))
    scene = make_pixels(1, 320, 240)
    reasons = []
    for seed in range(1, 6):
        if seed == 3:
            place.do("stop", "t-1")
            place.pipeline._finish_when_drained(None)
            place.do("start", "t-2", sample="s-2")
        noise = np.random.default_rng(seed).integers(0, 3, scene.shape).astype(np.uint8)
        reasons.append(place.pipeline._store_frame(make_frame(seed, pixels=scene + noise)).dropped)
    assert reasons == [None, "unchanged", None, "unchanged", "unchanged"]
    assert (place.pipeline.sample.sid, place.pipeline.sample.fields) == ("s-2", 1)


@pytest.mark.parametrize(("before_stop", "fields"), [(("pause",), 1), ((), 2), (("pause", "resume"), 2)])
def test_a_frame_on_its_way_when_the_sample_is_stopped_counts_unless_it_was_paused(
    outbox: Outbox, before_stop: tuple[str, ...], fields: int
) -> None:
    place = Place(outbox, SampleState("s-1"))
    place.pipeline._store_frame(make_frame(1))
    for name in before_stop:
        place.do(name, name)
    on_its_way = replace(make_frame(2), captured_monotonic_ns=time.monotonic_ns())
    place.do("stop", "stop")
    place.pipeline._finish_when_drained(on_its_way)
    place.pipeline._store_frame(on_its_way)
    place.pipeline._finish_when_drained(None)
    assert (place.phase, place.pipeline.sample.fields) == ("finished", fields)
