"""The main path: real queue, real outbox on a real disk; the models are doubles that say what the test wants."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from agent import pipeline as pipeline_module
from agent.analysis import placing
from agent.analysis.cells import NamingRules
from agent.analysis.control_charts import Plan
from agent.analysis.crops import CropCutter, cut_crop
from agent.analysis.differential import Rules
from agent.analysis.drift import DriftMemory, DriftPlan
from agent.analysis.preprocessing import TAUGHT_LOOK, preprocess
from agent.analysis.quality import from_text
from agent.bench import Bench
from agent.bench import make_bench as bench_from_config
from agent.camera.camera import UnreadableFrame
from agent.camera.grabber import FrameQueue
from agent.camera.hashing import hash_pixels
from agent.config import ModelsSection, PreprocessingSection, QualitySection, ReviewSection, loads
from agent.delivery.messages import load_schema
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.topics import Topics
from agent.domain import (
    Box,
    Classification,
    ClockReading,
    Detection,
    Frame,
    ModelIdentity,
    Pixels,
    Provenance,
    SampleState,
)
from agent.errors import OutboxDamaged, OutboxError
from agent.health import Health, SelfTest
from agent.inference.models import open_models
from agent.pipeline import (
    DRIFT_NOTE,
    GATE_NOTE,
    NOT_STORED,
    STAGES_OF_A_FRAME,
    UNSAYABLE,
    Outcome,
    Pipeline,
    process_frame,
)
from tests.proofs.scanning import Window, World, simulated_world, take

jsonschema = pytest.importorskip("jsonschema")

CLOCK = ClockReading(is_synchronised=True, offset_ms=0.5)


def make_pixels(seed: int = 1, width_px: int = 64, height_px: int = 48) -> Pixels:
    """A light ground with a little noise and some dark discs: what the gate lets through."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(195, 205, (height_px, width_px, 3)).astype(np.uint8)
    for x, y in rng.uniform(0, 1, (8, 2)):
        cv2.circle(pixels, (int(x * width_px), int(y * height_px)), max(2, height_px // 10), (120, 110, 130), -1)
    return pixels


def make_frame(
    seed: int = 1, *, key: str | None = None, repeats_last: bool = False, pixels: Pixels | None = None
) -> Frame:
    pixels = make_pixels(seed) if pixels is None else pixels
    return Frame(
        number=seed,
        pixels_bgr=pixels,
        captured_at=datetime(2026, 11, 23, 12, 0, tzinfo=timezone.utc),
        captured_monotonic_ns=time.monotonic_ns() + (seed - 600) * 10**9,  # a second apart: the stage stood still
        sha256=hash_pixels(pixels),
        source=f"frame {seed}",
        origin_key=key,
        repeats_last=repeats_last,
    )


def make_models(detections: tuple[Detection, ...], answer: Callable[[Pixels], Classification] | None = None) -> Any:
    """Models that see the same cells in every frame; `white` goes on to the classifier, `red` does not."""

    def classify(_crop: Pixels) -> Classification:
        return Classification("round", 0.75, {"round": 0.75, "lobed": 0.25})

    return SimpleNamespace(
        detector=SimpleNamespace(
            detect=lambda _pixels, _min_score=None: detections, identity=ModelIdentity("d", "1", "0" * 64)
        ),
        classifier=SimpleNamespace(classify=answer or classify, identity=ModelIdentity("c", "1", "1" * 64)),
        manifest=SimpleNamespace(
            detector=SimpleNamespace(classified=("white",)),
            classifier=SimpleNamespace(crop=SimpleNamespace(margin=0.2)),
        ),
        cutter=lambda pixels, _detections: CropCutter(pixels, 0.2, None),
        runtime="double 1.0",
        delegate="none",
    )


WHITE = Detection(Box(10, 10, 20, 22), "white", 0.9)
RED = Detection(Box(30, 12, 40, 21), "red", 0.8)


def make_bench(models: Any = None, *, with_cells: bool = True, min_probability: float = 0.5) -> Bench:
    models = models or make_models((WHITE, RED))
    return Bench(
        models=models,
        quality=QualitySection(),
        min_score=None,
        rules=NamingRules(min_probability, {"white": ("round", "lobed")}),
        provenance=Provenance(
            "0.0", models.detector.identity, models.classifier.identity, models.runtime, models.delegate, "2" * 64
        ),
        topics=Topics("site", "dev"),
        with_cells=with_cells,
    )


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, min_free_mb=0, device="dev") as opened:
        yield opened


class Runner:
    """A pipeline that runs, with all around it."""

    def __init__(self, outbox: Outbox, bench: Bench | None = None, sample: SampleState | None = None) -> None:
        self.frames = FrameQueue(8)
        self.outbox = outbox
        self.health = Health()
        self.stored = 0
        self.pipeline = Pipeline(
            frames=self.frames,
            outbox=outbox,
            bench=bench or make_bench(),
            sample=sample or SampleState("s-1"),
            health=self.health,
            on_stored=self._count,
            retry_s=0.02,
        )

    def _count(self) -> None:
        self.stored += 1

    def give(self, *taken: Frame | UnreadableFrame) -> None:
        for one in taken:
            assert self.frames.put_waiting(one, 5)

    def run_to_end(self) -> None:
        self.frames.end()
        self.pipeline.run()

    def wait_until(self, is_so: Callable[[], bool], timeout_s: float = 10) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline_s, "it did not come to it"
            time.sleep(0.005)

    @property
    def messages(self) -> list[dict[str, Any]]:
        with open_outbox(self.outbox.path.parent, device="dev", verify=False) as mine:  # one connection a thread
            return [json.loads(row.payload) for row in mine.pending(0, 100_000)]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["schema"] == f"hv/1/{kind}"]

    @property
    def told(self) -> list[dict[str, Any]]:
        """The events, without the two that end every finite source."""
        return [event for event in self.of_kind("event") if event["kind"] not in ("sample-finished", "source-ended")]


# ------------------------------------------------------------------------------------------ what one frame gives


def test_a_frame_gives_its_cells_named_and_counted() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1", next_cell_number=8), make_bench(), CLOCK)
    assert outcome.field is not None
    white, red = outcome.field.cells
    assert (white.cell_id, white.class_name, white.probability) == ("s-1-8", "round", 0.75)
    assert (red.cell_id, red.class_name, red.classification) == ("s-1-9", "red", None)
    assert outcome.field.counts == {"red": 1, "round": 1}
    assert outcome.field.clock == CLOCK
    assert (outcome.sample.next_cell_number, outcome.sample.fields) == (10, 1)
    assert outcome.sample.counts == {"red": 1, "round": 1}


def test_every_stage_of_a_field_is_timed_and_the_whole_is_not_less_than_its_parts() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(), CLOCK)
    assert outcome.field is not None
    timing_ms = outcome.field.timing_ms
    assert set(timing_ms) == set(STAGES_OF_A_FRAME)
    assert timing_ms["total"] >= sum(timing_ms[stage] for stage in STAGES_OF_A_FRAME if stage != "total") - 0.001
    assert timing_ms["classify"] > 0


def test_stages_that_had_nothing_to_do_took_no_time() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(make_models((RED,))), CLOCK)
    assert outcome.field is not None
    assert outcome.field.timing_ms["crop"] == outcome.field.timing_ms["classify"] == 0


def test_the_classifier_sees_the_look_that_the_manifest_asks_for_and_messages_the_frame_as_it_came() -> None:
    seen: list[Pixels] = []

    def classify(crop: Pixels) -> Classification:
        seen.append(crop)
        return Classification("round", 0.75, {"round": 0.75, "lobed": 0.25})

    models = make_models((WHITE,), classify)
    given: list[object] = []

    def cutter(pixels: Pixels, detections: Sequence[Detection]) -> CropCutter:
        given.extend(detections)
        return CropCutter(pixels, 0.2, TAUGHT_LOOK)

    models.cutter = cutter
    frame = make_frame()
    outcome = process_frame(frame, SampleState("s-1"), make_bench(models), CLOCK)
    assert outcome.field is not None
    assert np.array_equal(seen[0], CropCutter(frame.pixels_bgr, 0.2, TAUGHT_LOOK).around(WHITE.box))
    assert not np.array_equal(seen[0], cut_crop(frame.pixels_bgr, WHITE.box, 0.2))
    assert given == [WHITE]  # which say whether the stain can be told
    assert np.array_equal(outcome.field.frame.pixels_bgr, make_pixels(1))


def test_the_models_see_the_preprocessed_frame_and_everybody_else_the_frame_as_it_came() -> None:
    seen: list[Pixels] = []

    def classify(crop: Pixels) -> Classification:
        seen.append(crop)
        return Classification("round", 0.75, {"round": 0.75, "lobed": 0.25})

    frame, section = make_frame(), PreprocessingSection(white_balance=True)
    bench = replace(make_bench(make_models((WHITE,), classify)), preprocessing=section)
    outcome = process_frame(frame, SampleState("s-1"), bench, CLOCK)
    assert outcome.field is not None
    assert np.array_equal(seen[0], cut_crop(preprocess(frame.pixels_bgr, section), WHITE.box, 0.2))
    assert not np.array_equal(seen[0], cut_crop(frame.pixels_bgr, WHITE.box, 0.2))
    assert np.array_equal(outcome.field.frame.pixels_bgr, make_pixels(1))
    assert outcome.field.timing_ms["preprocess"] > 0


def test_the_configured_probability_goes_before_the_manifests() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(min_probability=0.9), CLOCK)
    assert outcome.field is not None
    assert outcome.field.counts == {"red": 1, "unidentified": 1}


def test_a_field_without_cells_is_a_result_too() -> None:
    outcome = process_frame(make_frame(), SampleState("s-1"), make_bench(make_models(())), CLOCK)
    assert outcome.field is not None
    assert outcome.field.counts == {}
    assert len(outcome.drafts) == 1


def test_a_frame_that_repeats_the_last_one_is_not_analysed() -> None:
    def fail(_crop: Pixels) -> Classification:
        raise AssertionError("a frozen frame was analysed")

    bench = make_bench(make_models((WHITE,), fail))
    frozen = process_frame(make_frame(key="k", repeats_last=True), SampleState("s-1"), bench, CLOCK)
    assert (frozen.field, frozen.dropped, frozen.finished_key) == (None, "frozen", "k")


def test_a_repeat_is_known_after_a_restart_from_the_samples_state() -> None:
    frame = make_frame(key="k")
    sample = process_frame(frame, SampleState("s-1"), make_bench(), CLOCK).sample
    again = process_frame(frame, sample, make_bench(), CLOCK)
    assert (again.field, again.dropped) == (None, "frozen")
    assert again.sample == replace(sample, refused={"frozen": 1})


def test_a_dark_frame_is_refused_by_its_reason_and_is_done_with() -> None:
    dark = make_frame(pixels=np.full((48, 64, 3), 3, np.uint8), key="k")
    outcome = process_frame(dark, SampleState("s-1"), make_bench(), CLOCK)
    assert (outcome.field, outcome.dropped, outcome.finished_key, outcome.drafts) == (None, "dark", "k", ())
    assert outcome.sample.refused == {"dark": 1}


@pytest.mark.parametrize("size_px", [(1, 1), (2, 1), (1, 300), (5000, 3)])
def test_frames_of_strange_shapes_pass(size_px: tuple[int, int]) -> None:
    pixels = make_pixels(3, *size_px)
    outcome = process_frame(make_frame(pixels=pixels), SampleState("s-1"), make_bench(make_models(())), CLOCK)
    assert isinstance(outcome, Outcome)


def test_the_gate_learns_a_device_and_not_a_folder_that_is_read_once() -> None:
    models = open_models(ModelsSection())
    cameras = {"{kind: usb}": True, "{kind: folder, folder: {path: /x}}": False}
    cameras["{kind: folder, folder: {path: /x, watch: true}}"] = True
    for camera, is_learning in cameras.items():
        config = loads(f"camera: {camera}", "test", environment={})
        assert bench_from_config(config, models).quality.learn is is_learning


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
    assert runner.pipeline._drift == DriftMemory()


# ---------------------------------------------------------------------------------------------------- the thread


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


def test_an_unreadable_frame_is_an_event_and_done_with(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.give(UnreadableFrame("a/b.png", "truncated", "key-b"), make_frame(2))
    runner.run_to_end()
    (event,) = runner.told
    jsonschema.Draft202012Validator(load_schema("event")).validate(event)
    assert (event["kind"], event["severity"]) == ("frame-unreadable", "warning")
    assert "a/b.png: truncated" in event["message"]
    assert outbox.finished_keys() == {"key-b"}
    assert runner.health.snapshot().dropped == {"unreadable": 1}
    assert len(runner.of_kind("field")) == 1


def test_a_camera_on_a_bad_cable_is_counted_each_time_and_told_once_a_minute(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(outbox)
    runner.give(*(UnreadableFrame("camera 0", "torn") for _ in range(5)))
    runner.run_to_end()
    assert len(runner.told) == 1
    assert runner.health.snapshot().dropped == {"unreadable": 5}
    monkeypatch.setattr("agent.pipeline.TELL_AGAIN_S", 0)
    again = Runner(outbox)
    again.give(*(UnreadableFrame("camera 0", "torn") for _ in range(2)), UnreadableFrame("camera 1", "torn"))
    again.run_to_end()
    assert len(again.told) == 1 + 3


def test_an_event_from_another_thread_is_stored(outbox: Outbox) -> None:
    runner = Runner(outbox)
    runner.pipeline.tell("camera-lost", "unplugged", "warning", {"attempt": 1})
    runner.run_to_end()
    (event,) = runner.told
    assert (event["kind"], event["detail"]) == ("camera-lost", {"attempt": 1})


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


class FullOutbox:
    """A real outbox in front of which a test can say that the disk is full."""

    def __init__(self, outbox: Outbox) -> None:
        self.outbox = outbox
        self.is_full = True
        self.refused = 0

    def append(self, *args: Any, **kwargs: Any) -> tuple[int, ...]:
        if self.is_full:
            self.refused += 1
            raise OutboxError("outbox.db: the disk is full; free space there")
        return self.outbox.append(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.outbox, name)


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


# ------------------------------------------------------------------------------------------------- count once


def make_slide_frame(world: World, number: int, x: float) -> Frame:
    frame = take(world, Window(x, 100), (640, 480), np.random.default_rng(number), number)
    return replace(frame, origin_key=f"f{number}", captured_monotonic_ns=time.monotonic_ns() + (number - 600) * 10**9)


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
        runner.pipeline._slide  # noqa: B018 - made again from the outbox, for the second run
        for _ in some:
            taken = runner.frames.take(1)
            assert isinstance(taken, Frame)
            runner.pipeline._store(runner.pipeline._process(taken))
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


def count_along(outbox: Outbox, world: World, numbers: Sequence[int]) -> Runner:
    """Fields of a slide, 200 px from one to the next and back again; each shows the cells that stand every 100 px."""
    models = make_models(())
    bench = replace(make_bench(models), counting=Rules({"round": "leukocyte"}), review=ReviewSection(gallery=3))
    runner = Runner(outbox, bench, sample=outbox.sample_state() or SampleState("s-1"))
    for number in numbers:
        x = 60.0 + 200 * abs((number + 4) % 10 - 5)
        edges = range(int(-x % 100) + 10, 600, 100)
        cells = tuple(Detection(Box(edge, 200, edge + 37, 240), "white", 0.9) for edge in edges)
        models.detector.detect = lambda _pixels, _min_score=None, cells=cells: cells
        runner.pipeline._store(runner.pipeline._process(make_slide_frame(world, number, x)))
    return runner


def test_a_sample_that_nobody_ends_keeps_the_notes_of_the_newest_fields_and_goes_on_after_a_restart(
    outbox: Outbox, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 6)
    monkeypatch.setattr(pipeline_module, "CELLS_NAMEABLE", 40)
    world, other = simulated_world(51, 1700, 800), tmp_path_factory.mktemp("restarted")
    count_along(outbox, world, range(1, 27))
    assert list(outbox.notes("slide/")) == [f"slide/s-1/{number:07}" for number in range(21, 27)]
    last = outbox.sample_state().next_cell_number - 1  # type: ignore[union-attr]
    assert last > 80
    numbers = sorted(int(key.rpartition("-")[2]) for key in outbox.notes("cells/"))
    assert last - 40 < numbers[0] < numbers[-1] <= last
    assert len(outbox.notes("review/")) == 3, "the gallery of the first cells"
    begin_boot(other)
    with open_outbox(other, min_free_mb=0, device="dev") as restarted:
        for numbers in (range(1, 10), range(10, 20), range(20, 27)):
            count_along(restarted, world, numbers)
        assert restarted.notes("slide/") == outbox.notes("slide/")
        assert restarted.notes("cells/") == outbox.notes("cells/")
        states = [one.sample_state() for one in (restarted, outbox)]
        assert states[0] == states[1]


def test_the_oldest_cells_leave_the_review_list_and_the_gallery_stays(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline_module, "CELLS_NAMEABLE", 2)
    reasons = {2: "gallery", 3: "low-margin"}
    listed = {f"review/s-1/s-1-{number}": json.dumps({"reason": reason}) for number, reason in reasons.items()}
    outbox.append((), notes={**listed, "answers/s-1/s-1-3": "[]"})
    runner = Runner(outbox, sample=SampleState("s-1", next_cell_number=4))
    runner.give(make_frame(1))
    runner.run_to_end()
    assert runner.pipeline.sample.next_cell_number == 6
    assert sorted(outbox.notes("review/")) == ["review/s-1/s-1-2"]
    assert list(outbox.notes("answers/")) == ["answers/s-1/s-1-3"]


def test_what_an_older_version_has_noted_of_every_field_is_read_once_and_shortened(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placing, "FIELDS_REMEMBERED", 6)
    world = simulated_world(51, 1700, 800)
    written: dict[str, str] = {}
    for begin in range(1, 20, 6):
        count_along(outbox, world, range(begin, begin + 6)[: 20 - begin])
        written |= outbox.notes("slide/")
    without = {key: json.dumps({**json.loads(text), "before": None}) for key, text in written.items()}
    outbox.append((), notes=without)
    assert len(outbox.notes("slide/")) == 19
    monkeypatch.setattr(pipeline_module, "NOTES_AT_ONCE", 5)
    Runner(outbox, sample=outbox.sample_state())
    assert outbox.notes("slide/") == {f"slide/s-1/{n:07}": written[f"slide/s-1/{n:07}"] for n in range(14, 20)}


def test_a_map_that_cannot_be_read_begins_anew_and_leaves_none_of_the_old_notes(outbox: Outbox) -> None:
    world = simulated_world(51, 1700, 800)
    count_along(outbox, world, range(1, 4))
    outbox.append((), notes={"slide/s-1/0000002": "rubbish"})
    count_along(outbox, world, range(4, 6))
    assert list(outbox.notes("slide/")) == ["slide/s-1/0000004", "slide/s-1/0000005"]


def test_a_new_sample_begins_a_new_slide_and_forgets_the_old_one(outbox: Outbox) -> None:
    world = simulated_world(51, 1700, 800)
    for sid in ("s-1", "s-2"):
        runner = Runner(outbox, sample=SampleState(sid))
        runner.give(make_slide_frame(world, 1, 60.0))
        runner.run_to_end()
        assert runner.of_kind("field")[-1]["place"]["source"] == "unknown"
        assert [key.split("/")[1] for key in outbox.notes("slide/")] == [sid]
