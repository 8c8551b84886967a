"""A technician at the page: the real agent on the simulated slide, seen and driven in a real browser."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.camera.simulated import open_simulated
from agent.config import CameraSection, Config, models_folder
from agent.delivery.outbox import open_outbox
from agent.domain import SampleState
from agent.review import CROPS_FOLDER, CropStore
from tests.brokers import free_port
from tests.end_to_end.agent_process import Agent, Bench, wait_until
from tests.web.beside import Beside, count
from tests.web.browser import DESKTOP, TABLET, UPRIGHT, Browser

pytestmark = pytest.mark.skipif(
    not (models_folder(Config().models) / "manifest.json").exists(), reason="the shipped models are not in models/"
)

PASSWORD = "pa55word-of-the-page"

SLIDE = {
    "interval_s": 0.2,
    "frame_width_px": 480,
    "frame_height_px": 360,
    "nucleated_cells_per_field": 2,
    "red_cells_per_field": 6,
}
"""Lively, so that a test need not wait long for a cell."""


def start(bench: Bench, browser: Browser, **web: Any) -> Agent:
    """An agent with its page, which the browser has opened and been let into."""
    port = free_port()
    bench.config["web"] = {"enabled": True, "port": port, **web}
    bench.use_broker(free_port())  # nobody listens there: the page works all the same
    agent = bench.start(HEMATOVISION_WEB_PASSWORD=PASSWORD)
    wait_until(lambda: "the page is at" in agent.log_text, agent.log_text)
    browser.open(f"http://127.0.0.1:{port}/")
    browser.click("#password")
    browser.type(PASSWORD)
    browser.press("Enter")
    browser.wait_for("document.getElementById('watch')")
    assert PASSWORD not in agent.log_text
    return agent


def audit(bench: Bench) -> list[dict[str, Any]]:
    with open_outbox(bench.outbox_folder, verify=False, create=False) as outbox:
        return [json.loads(row.payload) for row in outbox.pending(0, 100_000) if row.stream == "audit"]


def is_enabled(browser: Browser, name: str) -> bool:
    return bool(browser.evaluate(f"!document.querySelector('[data-may={name}]').disabled"))


def test_a_sample_is_begun_watched_paused_reviewed_and_finished(bench: Bench, browser: Browser, tmp_path: Path) -> None:
    bench.config["camera"] = {"kind": "simulated", "simulated": SLIDE}
    bench.config["sample"] = {"start": "command"}
    bench.config["review"] = {"max_margin": 1.0}  # every named cell is on the list
    agent = start(bench, browser)
    browser.wait_for("!document.getElementById('frame').hidden")
    assert "no-sample" in browser.text("#decision")
    assert [is_enabled(browser, name) for name in ("start", "pause", "resume", "stop", "abort")] == [True, *[False] * 4]

    # Begin, with what is no token first.
    browser.click("#start-form [name=accession]")
    browser.type("Jane Doe")
    browser.click("[data-may=start]")
    assert browser.evaluate("document.querySelector('#start-form').checkValidity()") is False
    browser.evaluate("document.querySelector('#start-form [name=accession]').value = ''")
    browser.click("#start-form [name=accession]")
    browser.type("A-4711")
    browser.evaluate("document.querySelector('#start-form [name=age_band]').value = 'adult'")
    browser.click("#start-form [name=stop_at_cells]")
    browser.type("5000")
    browser.click("[data-may=start]")
    browser.wait_for("document.getElementById('phase').innerText === 'running'")
    browser.wait_for("document.querySelectorAll('#boxes span b').length > 0")
    browser.wait_for("document.querySelectorAll('#shares tbody tr').length > 3")
    assert "A-4711" in browser.text("#sample-facts")
    assert "still needed" in browser.text("#progress-words")
    assert browser.evaluate("document.querySelector('#chart svg') !== null")
    assert "Research use only" in browser.text("#notice")
    browser.click("#map summary")
    browser.wait_for("document.querySelector('#map-words').innerText.includes('fields')")
    for name, size in (("desktop", DESKTOP), ("tablet", TABLET), ("upright", UPRIGHT)):
        browser.resize(*size)
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), f"too wide: {name}"
        browser.screenshot(tmp_path / f"watch-{name}.png")
    browser.resize(*DESKTOP)

    browser.click("[data-may=pause]")
    browser.wait_for("document.getElementById('phase').innerText === 'paused'")
    assert is_enabled(browser, "resume")
    assert not is_enabled(browser, "pause")

    # Name cells: by key and by click; each is asked who does it.
    browser.click("#tab-review")
    browser.wait_for("document.querySelectorAll('#strip button').length > 1")
    names = browser.evaluate("[...document.querySelectorAll('#answers button')].map((one) => one.dataset.name)")
    assert names[-2:] == ["unidentified", "artefact"]
    first = browser.text("#cell-id")
    browser.press("1")
    browser.wait_for("document.getElementById('review-said').innerText.includes('your token')")
    browser.type("mtl-7")
    assert browser.evaluate("localStorage.getItem('person')") is None, "what is still being typed is not kept"
    browser.press("Enter")
    browser.press("1")
    assert browser.evaluate("[document.getElementById('person').value, localStorage.getItem('person')]") == [
        *("mtl-7", "mtl-7")
    ]
    browser.wait_for(f"document.getElementById('review-said').innerText.includes('{first}')")
    browser.wait_for("document.getElementById('review-said').classList.contains('good')")
    second = browser.text("#cell-id")
    assert second != first
    browser.click("#answers button[data-name=artefact]")
    browser.wait_for("document.getElementById('review-title').innerText.includes('2 answered')")
    third, guess = browser.text("#cell-id"), browser.evaluate("document.querySelector('#answers .models').dataset.name")
    browser.press("Enter")
    browser.wait_for("document.getElementById('review-title').innerText.includes('3 answered')")
    fourth = browser.text("#cell-id")
    browser.click(f"#strip button:not([data-cell='{fourth}']):not(.done)")
    picked, also = browser.text("#cell-id"), browser.evaluate("document.querySelector('#answers .models').dataset.name")
    assert picked not in (first, second, third, fourth)
    browser.press("Enter")
    browser.wait_for("document.getElementById('review-title').innerText.includes('4 answered')")
    browser.screenshot(tmp_path / "review.png")

    # Finish: asked first.
    browser.click("#tab-watch")
    browser.click("[data-may=stop]")
    browser.wait_for("document.getElementById('ask').open")
    browser.click("#ask-yes")
    browser.wait_for("document.getElementById('phase').innerText === 'finished'")
    browser.wait_for("document.getElementById('differential-status').innerText.startsWith('final')")
    assert is_enabled(browser, "start")
    assert browser.errors == []

    told = [
        (entry["action"], entry["by"], entry["outcome"]) for entry in audit(bench) if entry["action"] != "work-changed"
    ]
    assert told == [
        ("cmd.start", None, "done"),
        ("cmd.pause", None, "done"),
        *[("cmd.amend", "mtl-7", "done")] * 4,
        ("cmd.stop", "mtl-7", "done"),
    ]
    amended = [entry["detail"] for entry in audit(bench) if entry["action"] == "cmd.amend"]
    assert [(one["cell_id"], one["to"]) for one in amended] == [
        *((first, names[0]), (second, "artefact")),
        *((third, guess), (picked, also)),  # Enter agrees with the model, whatever was clicked before
    ]
    assert agent.terminate() == 0, "an open page does not hold the agent up"
    assert "Traceback" not in agent.log_text


def test_a_cell_whose_answer_failed_comes_back_with_its_picture(
    beside: Callable[..., Beside], browser: Browser
) -> None:
    one = beside(sample=SampleState("s-1"))
    count(one, 1)
    crop = cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    CropStore(one.folder / CROPS_FOLDER).put("s-1", "s-1-1", crop)
    browser.open(f"http://127.0.0.1:{one.section.port}/#review")
    browser.wait_for("!document.getElementById('crop').hidden")
    one.is_taking = False
    browser.click("#person")
    browser.type("mtl-7")
    browser.press("Enter")
    browser.press("Enter")
    browser.wait_for("document.getElementById('no-crop').innerText === 'No cell waits for a person.'")
    browser.wait_for("document.getElementById('review-said').innerText.includes('s-1-1 has no answer')")
    browser.wait_for("document.getElementById('cell-id').innerText === 's-1-1'")
    browser.wait_for("!document.getElementById('crop').hidden && document.getElementById('no-crop').hidden", 5)


def test_a_picture_that_is_stored_a_moment_after_its_cell_is_shown(
    beside: Callable[..., Beside], browser: Browser
) -> None:
    """As it is with every field: its cells are in the list before their pictures are on the disk."""
    one = beside(sample=SampleState("s-1"))
    count(one, 1)
    browser.open(f"http://127.0.0.1:{one.section.port}/#review")
    browser.wait_for("document.getElementById('cell-id').innerText === 's-1-1'")
    browser.wait_for("!document.getElementById('no-crop').hidden")
    crop = cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
    CropStore(one.folder / CROPS_FOLDER).put("s-1", "s-1-1", crop)
    browser.wait_for("!document.getElementById('crop').hidden && document.getElementById('no-crop').hidden", 15)
    browser.wait_for("document.querySelector('#strip img')?.naturalWidth > 0", 5)


def test_all_cells_that_wait_are_told_where_the_list_shows_only_the_newest(
    beside: Callable[..., Beside], browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.web.views.MOST_REVIEW_CELLS", 1)
    one = beside(sample=SampleState("s-1"))
    count(one, 1, 2, 3)
    browser.open(f"http://127.0.0.1:{one.section.port}/#review")
    browser.wait_for("document.getElementById('open-count').innerText === '3'")
    assert browser.text("#review-title") == "3 waiting, 0 answered"
    assert browser.evaluate("document.querySelectorAll('#strip button').length") == 1
    browser.click("#person")
    browser.type("mtl-7")
    browser.press("Enter")
    browser.press("Enter")
    browser.wait_for("document.getElementById('review-title').innerText === '2 waiting, 1 answered'")


def test_no_cell_is_shown_with_the_picture_of_another_while_its_own_is_on_the_way(
    beside: Callable[..., Beside], browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = beside(sample=SampleState("s-1"))
    count(one, 1, 2)
    for cell in ("s-1-1", "s-1-3"):
        crop = cv2.imencode(".jpg", np.zeros((32, 32, 3), np.uint8))[1].tobytes()
        CropStore(one.folder / CROPS_FOLDER).put("s-1", cell, crop)
    read, go_on = CropStore.read, threading.Event()

    def read_slowly(crops: CropStore, sid: str, cell_id: str) -> bytes:
        assert cell_id == "s-1-3" or go_on.wait(20)
        return read(crops, sid, cell_id)

    monkeypatch.setattr(CropStore, "read", read_slowly)
    browser.open(f"http://127.0.0.1:{one.section.port}/#review")
    browser.wait_for("document.getElementById('cell-id').innerText === 's-1-3'")
    browser.wait_for("!document.getElementById('crop').hidden")
    try:
        browser.press("ArrowRight")
        browser.wait_for("document.getElementById('cell-id').innerText === 's-1-1'")
        assert browser.evaluate("document.getElementById('crop').hidden")
    finally:
        go_on.set()
    browser.wait_for("!document.getElementById('crop').hidden && document.getElementById('no-crop').hidden")


def test_a_picture_is_examined_and_an_agent_that_does_not_answer_makes_the_page_old(
    bench: Bench, browser: Browser, tmp_path: Path
) -> None:
    bench.config["camera"] = {"kind": "simulated", "simulated": SLIDE}
    agent = start(bench, browser)
    browser.wait_for("!document.getElementById('frame').hidden")
    camera = open_simulated(CameraSection.model_validate({"simulated": {"interval_s": 0, "seed": 5}}))
    frame: Any = camera.read()
    camera.close()
    picture, text = tmp_path / "field.png", tmp_path / "notes.png"
    cv2.imwrite(str(picture), frame.pixels_bgr)
    text.write_text("no picture")
    browser.click("#tab-picture")
    browser.choose_file("#file", text)
    browser.wait_for("document.getElementById('picture-said').classList.contains('bad')")
    browser.choose_file("#file", picture)
    browser.wait_for(
        "!document.getElementById('found').hidden && document.getElementById('found-frame').naturalWidth > 0"
    )
    assert "640 × 480" in browser.text("#picture-said")
    assert browser.evaluate("document.querySelectorAll('#found-boxes span').length") > 3
    browser.screenshot(tmp_path / "picture.png")

    browser.click("#tab-watch")
    assert is_enabled(browser, "pause")
    assert browser.evaluate("document.getElementById('old').hidden")
    os.kill(agent.pid, signal.SIGSTOP)
    browser.wait_for("document.body.classList.contains('is-old')")
    assert "what you see is old" in browser.text("#old")
    assert not is_enabled(browser, "pause"), "nothing can be asked now"
    browser.screenshot(tmp_path / "old.png")
    os.kill(agent.pid, signal.SIGCONT)
    browser.wait_for("document.getElementById('old').hidden")
    assert is_enabled(browser, "pause")
    browser.evaluate("fetch('https://example.invalid/').catch(() => {})")
    browser.wait_for("true")
    assert any("Content Security Policy" in error for error in browser.errors), "nothing from elsewhere"
    browser.click("#logout")
    browser.wait_for("document.getElementById('password')")
    assert agent.terminate() == 0
