"""The camera thread: real threads, a real queue, the real health; only the camera and the time are made."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from agent.camera.camera import NOTHING_YET, SYSTEM_CLOCKS, Camera, UnreadableFrame, make_frame, open_camera
from agent.camera.grabber import END_OF_FRAMES, FROZEN_FRAMES, FROZEN_S, FrameQueue, Grabber
from agent.config import CameraSection
from agent.domain import Frame
from agent.errors import CameraError, FrameUnreadable
from agent.health import Health

LONG_S = 5.0
"""s; longer than any of these tests takes. It is waited out only when one fails."""


def make(shade: int, key: str | None = None, repeats_last: bool = False) -> Frame:
    frame = make_frame(1, np.full((32, 32, 3), shade, np.uint8), source="made", clocks=SYSTEM_CLOCKS, origin_key=key)
    return frame if not repeats_last else Frame(**{**fields_of(frame), "repeats_last": True})


def fields_of(frame: Frame) -> dict[str, Any]:
    return {name: getattr(frame, name) for name in Frame.__slots__}


class MadeCamera:
    """A camera that plays a list: frames, NOTHING_YET, None and exceptions, then waits for ever as live cameras do."""

    description = "made camera"

    def __init__(self, *answers: Any, is_live: bool = False) -> None:
        self.is_live = is_live
        self.is_closed = False
        self._answers = iter(answers)

    def read(self) -> Any:
        answer = next(self._answers, NOTHING_YET)
        if answer is NOTHING_YET:
            time.sleep(0.001)
        if isinstance(answer, BaseException):
            raise answer
        return answer() if callable(answer) else answer

    def close(self) -> None:
        self.is_closed = True


class MadeTime:
    """A clock that only the grabber's own pauses move, and tests."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.pauses_s: list[float] = []

    def sleep(self, seconds: float) -> bool:
        self.now_s += seconds
        self.pauses_s.append(seconds)
        return False


class Bench:
    """A grabber with all around it. `openings` are cameras, or errors of opening; the last one is used again."""

    def __init__(self, made_time: MadeTime, *openings: Any, capacity: int = 100, **keys: Any) -> None:
        self.stop = threading.Event()
        self.time = made_time
        self.health = Health()
        self.queue = FrameQueue(capacity)
        self.openings = list(openings)
        self.opened = 0
        self.states: list[str] = []
        self._note_states()
        self.grabber = Grabber(
            self.open,
            self.queue,
            self.health,
            self.stop,
            **{"clock": lambda: self.time.now_s, "sleep": self.time.sleep, "jitter": lambda: 0.5, **keys},
        )

    def _note_states(self) -> None:
        tell = self.health.camera_state

        def note(state: Any, detail: str = "") -> None:
            if self.states[-1:] != [state]:
                self.states.append(state)
            tell(state, detail)

        self.health.camera_state = note  # type: ignore[method-assign]

    def open(self) -> Camera:
        opening = self.openings[min(self.opened, len(self.openings) - 1)]
        self.opened += 1
        if isinstance(opening, BaseException):
            raise opening
        return opening() if callable(opening) else opening  # type: ignore[no-any-return]

    def take(self) -> Any:
        taken = self.queue.take(LONG_S)
        assert taken is not NOTHING_YET, (self.states, self.grabber.failure)
        return taken

    def take_all(self) -> list[Any]:
        """Everything up to the end."""
        return list(iter(self.take, END_OF_FRAMES))

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        until = time.monotonic() + LONG_S
        while not is_so():
            assert time.monotonic() < until, (self.states, self.health.snapshot())
            time.sleep(0.002)


@pytest.fixture
def made_time() -> MadeTime:
    return MadeTime()


@pytest.fixture
def bench(made_time: MadeTime) -> Iterator[Callable[..., Bench]]:
    benches: list[Bench] = []

    def build(*openings: Any, **keys: Any) -> Bench:
        benches.append(Bench(made_time, *openings, **keys))
        benches[-1].grabber.start()
        return benches[-1]

    yield build
    for each in benches:
        each.stop.set()
        each.grabber.join(LONG_S)
        assert not each.grabber.is_alive()
        assert each.grabber.failure is None or isinstance(each.grabber.failure, ZeroDivisionError)


# ------------------------------------------------------------------------------------------------- the queue
def test_the_queue_gives_in_order_and_says_nothing_yet_when_empty() -> None:
    queue = FrameQueue(3)
    assert queue.take(0) is NOTHING_YET
    first, second = make(1), make(2)
    assert queue.put_waiting(first, 0)
    assert queue.put_waiting(second, 0)
    assert len(queue) == 2
    assert queue.take(0) is first
    assert queue.take(0) is second
    assert queue.take(0) is NOTHING_YET


def test_a_full_queue_makes_a_finite_source_wait_until_one_is_taken() -> None:
    queue = FrameQueue(1)
    first, second = make(1), make(2)
    assert queue.put_waiting(first, 0)
    assert not queue.put_waiting(second, 0.01)
    taker = threading.Timer(0.05, queue.take, (LONG_S,))
    taker.start()
    assert queue.put_waiting(second, LONG_S)
    taker.join()
    assert queue.take(0) is second


def test_the_newest_frame_displaces_the_oldest_one() -> None:
    queue = FrameQueue(2)
    first, second, third = make(1), make(2), make(3)
    assert queue.put_newest(first) is None
    assert queue.put_newest(second) is None
    assert queue.put_newest(third) == "superseded"
    assert [queue.take(0), queue.take(0)] == [second, third]


def test_a_repeat_never_displaces_a_fresh_frame() -> None:
    queue = FrameQueue(1)
    fresh = make(1)
    queue.put_newest(fresh)
    assert queue.put_newest(make(1, repeats_last=True)) == "frozen"
    assert queue.put_newest(UnreadableFrame("made", "broken")) == "unreadable"
    assert queue.take(0) is fresh


def test_a_fresh_frame_displaces_a_repeat_before_an_older_fresh_one() -> None:
    queue = FrameQueue(2)
    first, repeat, newest = make(1), make(1, repeats_last=True), make(2)
    queue.put_newest(first)
    queue.put_newest(repeat)
    assert queue.put_newest(newest) == "frozen"
    assert [queue.take(0), queue.take(0)] == [first, newest]


def test_the_end_is_told_after_the_last_frame_and_then_always() -> None:
    queue = FrameQueue(2)
    last = make(1)
    queue.put_waiting(last, 0)
    queue.end()
    assert queue.take(0) is last
    assert queue.take(0) is END_OF_FRAMES
    assert queue.take(0) is END_OF_FRAMES


def test_the_end_wakes_a_thread_that_waits_for_a_frame() -> None:
    queue = FrameQueue(1)
    timer = threading.Timer(0.05, queue.end)
    timer.start()
    assert queue.take(LONG_S) is END_OF_FRAMES
    timer.join()


# ------------------------------------------------------------------------------------------------- a finite source
def test_a_finite_source_is_handed_on_whole_and_in_order_however_slow_the_models_are(bench: Any) -> None:
    frames = [make(shade, f"key{shade}") for shade in range(20)]
    camera = MadeCamera(*frames, None)
    run = bench(camera, capacity=2)
    taken = run.take_all()
    assert [frame.origin_key for frame in taken] == [f"key{shade}" for shade in range(20)]
    run.grabber.join(LONG_S)
    assert camera.is_closed
    assert run.states == ["opening", "open", "ended"]
    assert dict(run.health.snapshot().dropped) == {}


def test_after_the_end_the_watchdog_no_longer_waits_for_the_camera(bench: Any) -> None:
    run = bench(MadeCamera(None))
    assert run.take_all() == []
    run.grabber.join(LONG_S)
    assert "camera" not in run.health.snapshot().beats


def test_an_unreadable_picture_is_passed_on_in_its_place_with_its_key(bench: Any) -> None:
    run = bench(MadeCamera(make(1), FrameUnreadable("b.png", "empty", "b.png|0|1"), make(3), None))
    first, second, third = run.take_all()
    assert isinstance(first, Frame)
    assert second == UnreadableFrame("b.png", "empty", "b.png|0|1")
    assert isinstance(third, Frame)


def test_a_frame_like_the_last_one_is_marked_and_one_between_lifts_the_mark(bench: Any) -> None:
    run = bench(MadeCamera(make(1), make(1), make(2), make(1), None))
    assert [frame.repeats_last for frame in run.take_all()] == [False, True, False, False]


def test_the_last_frame_of_the_run_before_counts_for_the_first_one(bench: Any) -> None:
    run = bench(MadeCamera(make(1), make(2), None), last_sha256_16=make(1).sha256_16)
    assert [frame.repeats_last for frame in run.take_all()] == [True, False]


def test_a_source_that_is_opened_again_does_not_give_a_picture_twice(bench: Any) -> None:
    bad = FrameUnreadable("bad.png", "empty", "bad")
    run = bench(
        MadeCamera(make(1, "a"), bad, make(2, "b"), CameraError("stick pulled")),
        MadeCamera(make(1, "a"), bad, make(2, "b"), make(3, "c"), None),
    )
    taken = run.take_all()
    assert [frame.origin_key if isinstance(frame, Frame) else frame.key for frame in taken] == ["a", "bad", "b", "c"]


def test_a_stop_is_no_end_because_the_end_closes_the_sample(bench: Any) -> None:
    run = bench(MadeCamera(make(1)))
    run.take()
    run.stop.set()
    run.grabber.join(LONG_S)
    assert run.queue.take(0) is NOTHING_YET


def test_a_stop_ends_a_thread_that_waits_for_room_in_the_queue(bench: Any) -> None:
    run = bench(MadeCamera(make(1), make(2), make(3)), capacity=1)
    run.wait_for(lambda: len(run.queue) == 1)
    began = time.monotonic()
    run.stop.set()
    run.grabber.join(LONG_S)
    assert time.monotonic() - began < 1.5


def test_the_heart_beats_while_the_models_are_slow_and_while_there_is_nothing_to_do(bench: Any) -> None:
    for run in (bench(MadeCamera(make(1), make(2), make(3)), capacity=1), bench(MadeCamera())):
        run.wait_for(lambda run=run: run.health.snapshot().beats["camera"] > 0)
        beats = run.health.snapshot().beats["camera"]
        run.wait_for(lambda run=run, beats=beats: run.health.snapshot().beats["camera"] > beats + 1)


def test_the_heart_stops_while_a_read_does_not_return(bench: Any) -> None:
    release = threading.Event()
    run = bench(MadeCamera(make(1), lambda: release.wait(LONG_S) and None))
    run.take()
    beats = run.health.snapshot().beats["camera"]
    time.sleep(0.1)
    assert run.health.snapshot().beats["camera"] == beats
    release.set()


def test_a_source_without_new_pictures_is_idle_and_open_again_with_the_next_one(
    bench: Any, made_time: MadeTime
) -> None:
    def pass_time() -> Any:
        made_time.now_s += 4
        return NOTHING_YET

    run = bench(MadeCamera(make(1), pass_time, pass_time, pass_time, make(2), None))
    run.take_all()
    run.grabber.join(LONG_S)
    assert run.states == ["opening", "open", "idle", "open", "ended"]


# ------------------------------------------------------------------------------------------------- a live camera
def test_a_live_camera_never_waits_and_what_is_displaced_is_counted(bench: Any) -> None:
    frames = [make(shade) for shade in range(10)]
    run = bench(MadeCamera(*frames, is_live=True), capacity=2)
    run.wait_for(lambda: run.health.snapshot().dropped.get("superseded") == 8)
    assert [run.take().sha256_16, run.take().sha256_16] == [frames[8].sha256_16, frames[9].sha256_16]


def test_repeats_of_a_live_camera_are_counted_when_the_queue_is_full(bench: Any) -> None:
    run = bench(MadeCamera(*[make(1)] * 5, is_live=True), capacity=1)
    run.wait_for(lambda: run.health.snapshot().dropped.get("frozen") == 4)
    assert not run.take().repeats_last


def still_camera(made_time: MadeTime, seconds_a_frame: float) -> MadeCamera:
    def show() -> Frame:
        made_time.now_s += seconds_a_frame
        return make(1)

    return MadeCamera(*[show] * (3 * FROZEN_FRAMES), is_live=True)


def test_a_live_camera_that_stands_still_is_lost_and_opened_again(bench: Any, made_time: MadeTime) -> None:
    first = still_camera(made_time, 2 * FROZEN_S / FROZEN_FRAMES)
    run = bench(first, MadeCamera(make(1), make(2), is_live=True))
    run.wait_for(lambda: run.states == ["opening", "open", "frozen", "open"])
    assert first.is_closed
    assert run.opened == 2
    fresh = [taken for taken in iter(lambda: run.queue.take(0), NOTHING_YET) if not taken.repeats_last]
    assert [frame.sha256_16 for frame in fresh] == [make(1).sha256_16, make(2).sha256_16]


def test_a_camera_that_stands_still_after_opening_stays_frozen_and_is_opened_ever_more_rarely(
    bench: Any, made_time: MadeTime
) -> None:
    run = bench(lambda: still_camera(made_time, 2 * FROZEN_S / FROZEN_FRAMES))
    run.wait_for(lambda: run.opened >= 5)
    assert run.states == ["opening", "open", "frozen"]
    assert sum(run.time.pauses_s) >= 1 + 2 + 4 + 8


def test_many_repeats_in_a_short_time_are_a_scene_at_rest_and_no_fault(bench: Any, made_time: MadeTime) -> None:
    run = bench(still_camera(made_time, 0.04), capacity=1000)
    run.wait_for(lambda: len(run.queue) == 3 * FROZEN_FRAMES)
    assert run.states == ["opening", "open"]


def test_a_finite_source_may_repeat_as_often_as_it_likes(bench: Any, made_time: MadeTime) -> None:
    def show() -> Frame:
        made_time.now_s += FROZEN_S
        return make(1)

    run = bench(MadeCamera(*[show] * (2 * FROZEN_FRAMES), None), capacity=1000)
    assert len(run.take_all()) == 2 * FROZEN_FRAMES
    assert run.opened == 1


# ------------------------------------------------------------------------------------------------- lost and back
def test_a_camera_that_is_not_there_is_tried_after_1_2_4_and_at_most_30_seconds(
    bench: Any, made_time: MadeTime
) -> None:
    starts: list[float] = []

    def refuse() -> Camera:
        starts.append(made_time.now_s)
        if len(starts) > 8:
            return MadeCamera(None)  # type: ignore[return-value]
        raise CameraError("/dev/video0: no such camera")

    run = bench(refuse)
    run.take_all()
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_pauses_vary_so_that_a_whole_laboratory_does_not_knock_at_once(bench: Any) -> None:
    for lot, pause_s in ((0.0, 0.8), (1.0, 1.2)):
        run = bench(CameraError("gone"), MadeCamera(None), jitter=lambda lot=lot: lot)
        run.take_all()
        assert sum(run.time.pauses_s[:3]) == pytest.approx(pause_s, abs=0.31)
        assert run.health.snapshot().camera == "ended"


def test_the_loss_is_told_once_in_the_log_and_always_in_health(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="agent.camera.grabber")
    run = bench(*[CameraError("/dev/video0: no such camera")] * 4, MadeCamera(make(1)))
    run.wait_for(lambda: run.states == ["opening", "lost", "open"])
    run.wait_for(lambda: len(caplog.records) >= 2)  # the log comes after the state
    assert [record.message for record in caplog.records] == [
        "camera lost: /dev/video0: no such camera",
        "made camera: camera is back",
    ]


def test_the_state_lost_says_what_is_wrong_and_when_the_next_attempt_is(bench: Any) -> None:
    run = bench(CameraError("/dev/video0: no such camera"), sleep=lambda _: bool(time.sleep(0.01)))
    run.wait_for(lambda: run.health.snapshot().camera == "lost")
    assert "/dev/video0: no such camera; next attempt in" in run.health.snapshot().camera_detail


def test_a_camera_that_dies_after_each_first_frame_is_opened_ever_more_rarely(bench: Any) -> None:
    shades = itertools.cycle(range(250))
    run = bench(lambda: MadeCamera(make(next(shades)), CameraError("died"), is_live=True))
    run.wait_for(lambda: run.opened >= 5)
    assert sum(run.time.pauses_s) >= 1 + 2 + 4 + 8


def test_a_camera_that_worked_for_a_while_is_opened_again_at_once(bench: Any, made_time: MadeTime) -> None:
    def pass_time() -> Frame:
        made_time.now_s += 20
        return make(7)

    openings = iter([CameraError("gone")] * 4)
    starts: list[float] = []

    def open_late() -> Camera:
        starts.append(made_time.now_s)
        error = next(openings, None)
        if error is not None:
            raise error
        died = MadeCamera(make(1), pass_time, CameraError("unplugged"), is_live=True)
        return died if len(starts) == 5 else MadeCamera(None)  # type: ignore[return-value]

    run = bench(open_late)
    run.wait_for(lambda: run.states[-1] == "ended")
    assert starts[5] - starts[4] == pytest.approx(20 + 1)


def test_a_camera_that_worked_for_a_while_and_stays_away_is_tried_ever_more_rarely(
    bench: Any, made_time: MadeTime
) -> None:
    def pass_time() -> Frame:
        made_time.now_s += 20
        return make(7)

    starts: list[float] = []

    def open_once() -> Camera:
        starts.append(made_time.now_s)
        if 1 < len(starts) < 8:
            raise CameraError("/dev/video0: no such camera")
        answers = (make(1), pass_time, CameraError("unplugged")) if len(starts) == 1 else (None,)
        return MadeCamera(*answers, is_live=True)  # type: ignore[return-value]

    run = bench(open_once)
    run.wait_for(lambda: run.states[-1] == "ended")
    pauses = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert pauses == [20 + 1, 2, 4, 8, 16, 30, 30]


def test_a_stop_interrupts_the_pause_at_once(bench: Any) -> None:
    run = bench(CameraError("gone"), sleep=None, jitter=lambda: 1.0)
    run.wait_for(lambda: run.health.snapshot().camera == "lost")
    began = time.monotonic()
    run.stop.set()
    run.grabber.join(LONG_S)
    assert time.monotonic() - began < 0.4


def test_the_heart_beats_during_a_pause(bench: Any) -> None:
    run = bench(CameraError("gone"), sleep=lambda _: bool(time.sleep(0.005)))
    beats = run.health.snapshot().beats["camera"]
    run.wait_for(lambda: run.health.snapshot().beats["camera"] > beats + 5)


def test_an_unexpected_failure_ends_the_thread_and_is_kept_for_the_supervisor(bench: Any) -> None:
    camera = MadeCamera(make(1), ZeroDivisionError("a fault in our code"))
    run = bench(camera)
    run.grabber.join(LONG_S)
    assert not run.grabber.is_alive()
    assert isinstance(run.grabber.failure, ZeroDivisionError)
    assert camera.is_closed
    assert isinstance(run.take(), Frame)
    assert run.queue.take(0) is NOTHING_YET, "a failure is no end"


def test_a_real_simulated_slide_goes_through_the_whole_thread(bench: Any) -> None:
    section = CameraSection.model_validate({"simulated": {"interval_s": 0, "fields": 4}})
    run = bench(lambda: open_camera(section), capacity=2)
    assert [frame.number for frame in run.take_all()] == [1, 2, 3, 4]
