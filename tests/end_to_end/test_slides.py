"""Two slides under one microscope, and nobody says a word: two samples, each with its own report."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent_process import START_S, Bench

ABSENCE_S = 2


def put(pictures: Path, folder: Path, slide: str) -> None:
    """As a camera program saves them: under another name first."""
    for picture in sorted(pictures.iterdir()):
        part = folder / f"{slide}-{picture.name}.part"
        shutil.copyfile(picture, part)
        part.rename(part.with_suffix(""))


def has_fields(count: int) -> Callable[[list[Any]], bool]:
    return lambda heard: sum(message.kind == "field" for message in heard) >= count


def test_the_next_slide_ends_one_sample_and_begins_another(
    bench: Bench, make_fields: Callable[..., Path], mosquitto: Any, subscriber: Any, tmp_path: Path
) -> None:
    first, second = make_fields(3, seed=1), make_fields(2, seed=2)
    watched = tmp_path / "watched"
    watched.mkdir()
    broker = mosquitto()
    ears = subscriber(broker, "hv/1/#")
    bench.use_broker(broker.port)
    bench.use_folder(watched, watch=True, settle_s=0)
    bench.config["sample"] = {"start": "each-slide", "absence_s": ABSENCE_S}
    agent = bench.start()
    put(first, watched, "a")
    ears.wait_for(has_fields(3), START_S)
    time.sleep(ABSENCE_S + 0.5)
    put(second, watched, "b")
    ears.wait_for(has_fields(5), START_S)
    assert agent.terminate() == 0
    samples = [message.body["sample"] for message in ears.of_kind("field")]
    one, other = samples[0], samples[-1]
    assert samples == [one] * 3 + [other] * 2
    assert one != other
    finals = [m.body for m in ears.of_kind("differential") if m.body and m.body["status"] == "final"]
    assert {(report["sample"], report["fields"]) for report in finals} == {(one, 3)}
