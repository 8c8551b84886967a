"""Uploaded pictures: the real program with the shipped models, and what it does to the counting, which is nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from agent.camera.simulated import open_simulated
from agent.config import CameraSection, Config, ModelsSection, WebSection, models_folder
from agent.domain import Pixels, SampleState
from agent.inference.manifest import load_manifest
from agent.web import examining
from agent.web.examining import Examiner, ExaminerBusy, ExaminerFailed
from tests.web.beside import Beside

pytestmark = pytest.mark.skipif(
    not (models_folder(Config().models) / "manifest.json").exists(), reason="the shipped models are not in models/"
)

CONFIG = Config(models=ModelsSection(threads=1), web=WebSection(max_upload_megapixels=1))


@pytest.fixture(scope="module")
def field() -> Pixels:
    """A field of the simulated slide, 640 x 480."""
    camera = open_simulated(
        CameraSection.model_validate({"simulated": {"interval_s": 0, "nucleated_cells_per_field": 3}})
    )
    frame = camera.read()
    camera.close()
    assert frame is not None
    return frame.pixels_bgr  # type: ignore[union-attr]


def as_file(pixels: Pixels, suffix: str = ".png") -> bytes:
    return bytes(cv2.imencode(suffix, pixels)[1].tobytes())


def run(work: Callable[[Examiner], Awaitable[None]], config: Callable[[], Config] = lambda: CONFIG) -> None:
    """Have something done with an examiner, in a loop of its own; the program is gone afterwards."""

    async def within() -> None:
        examiner = Examiner(config)
        try:
            await work(examiner)
        finally:
            await examiner.close()
            assert examiner._process is None

    asyncio.run(within())


def test_a_field_and_a_crop_are_named_and_what_is_no_picture_is_told(field: Pixels) -> None:
    async def work(examiner: Examiner) -> None:
        found, jpeg = await examiner.examine(as_file(field))
        assert found["size_px"] == [640, 480]
        assert found["one_cell"] is None
        classes = set(load_manifest(models_folder(CONFIG.models)).cell_kinds)
        assert {cell["class"] for cell in found["cells"]} <= classes | {"WBC"}
        named = [cell for cell in found["cells"] if not cell["is_small"]]
        assert named
        assert len(found["cells"]) > len(named), "red cells too"
        assert any(cell["looks"] for cell in named)
        assert cv2.imdecode(np.frombuffer(jpeg, np.uint8), 1).shape == field.shape
        pid = examiner._process.pid  # type: ignore[union-attr]

        x_min, y_min, x_max, y_max = (round(edge) for edge in named[0]["box"])
        crop = field[max(0, y_min - 12) : y_max + 12, max(0, x_min - 12) : x_max + 12]
        one, _ = await examiner.examine(as_file(np.ascontiguousarray(crop), ".tiff"))
        assert one["one_cell"]["class"] in classes
        assert sum(one["one_cell"]["probabilities"].values()) == pytest.approx(1, abs=0.01)

        for content, words in (
            (b"this is no picture", "picture"),
            (as_file(field)[:5000], "cut off"),
            (as_file(np.zeros((1001, 1000, 3), np.uint8)), "web.max_upload_megapixels"),
        ):
            said, nothing = await examiner.examine(content)
            assert words in said["error"], said
            assert nothing == b""
        assert examiner._process.pid == pid, "one program for all of them"  # type: ignore[union-attr]

    run(work)


def test_a_program_that_dies_at_a_picture_is_told_and_the_next_picture_starts_another(field: Pixels) -> None:
    async def work(examiner: Examiner) -> None:
        await examiner.examine(b"to start it")
        process = examiner._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        asked = asyncio.ensure_future(examiner.examine(as_file(field)))
        await asyncio.sleep(0.1)
        with pytest.raises(ExaminerBusy, match="another picture"):
            await examiner.examine(as_file(field))
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(ExaminerFailed, match="could not bear this picture"):
            await asked
        assert "error" in (await examiner.examine(b"to start another"))[0]
        assert examiner._process is not None
        assert examiner._process.pid != process.pid

    run(work)


def test_a_program_that_takes_too_long_is_ended(field: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(examiner: Examiner) -> None:
        await examiner.examine(b"to start it")
        process = examiner._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        monkeypatch.setattr(examining, "ANSWER_WITHIN_S", 0.3)
        with pytest.raises(ExaminerFailed, match="took too long"):
            await examiner.examine(as_file(field))
        assert process.returncode == -signal.SIGKILL

    run(work)


def test_it_knows_no_secret_stands_back_and_ends_when_nobody_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEMATOVISION_WEB_PASSWORD", "tops3cret")
    monkeypatch.setenv("HEMATOVISION_BROKER_PASSWORD", "tops3cret")
    monkeypatch.setattr(examining, "IDLE_S", 0.5)

    async def work(examiner: Examiner) -> None:
        await examiner.examine(b"to start it")
        process = examiner._process
        assert process is not None
        place = Path(f"/proc/{process.pid}")
        assert b"tops3cret" not in (place / "environ").read_bytes()
        assert (place / "oom_score_adj").read_text().strip() == "1000"
        assert os.getpriority(os.PRIO_PROCESS, process.pid) > os.getpriority(os.PRIO_PROCESS, 0)
        await asyncio.wait_for(process.wait(), 20)
        assert process.returncode == 0
        assert examiner._process is None

    run(work)


def test_other_settings_of_the_agent_start_another_one() -> None:
    configs = [CONFIG, CONFIG, CONFIG.model_copy(update={"models": ModelsSection(min_score=0.5)})]

    async def work(examiner: Examiner) -> None:
        pids = []
        for _ in range(3):
            await examiner.examine(b"which one answers")
            assert examiner._process is not None
            pids.append(examiner._process.pid)
        assert pids[0] == pids[1] != pids[2]

    asked = iter(configs)
    run(work, lambda: next(asked))


def test_an_upload_is_answered_and_the_running_sample_and_its_outbox_know_nothing_of_it(
    beside: Callable[..., Beside], field: Pixels
) -> None:
    one = beside(sample=SampleState("s-1", fields=3, counts={"round": 3}))
    one.config = CONFIG
    one.state()
    before = [(row.stream, row.payload) for row in one.outbox.pending(0, 1000)]
    answer = one.ask("POST", "/api/picture", as_file(field, ".jpg"))
    assert answer.status == 200, answer.content
    assert answer.body["cells"]
    shown = one.get(f"/api/picture/{answer.body['picture']}.jpg")
    assert (shown.status, shown.content[:2]) == (200, b"\xff\xd8")
    bad = one.ask("POST", "/api/picture", b"GIF89a no picture that we know")
    assert bad.status == 422
    assert bad.words
    after = [(row.stream, row.payload) for row in one.outbox.pending(0, 1000)]
    assert after == before
    assert one.place.pipeline.sample.counts == {"round": 3}
    assert one.latest.read() == (None, None)
