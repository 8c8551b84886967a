"""What a field said then against what it says now: word for word, and nothing that it cannot know."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from agent.camera.hashing import hash_pixels
from agent.pictures import PictureStore
from agent.replaying import Difference, PictureMissing, Pictures, compare, compare_provenance, is_first
from tests.central.fake_device import FakeDevice


def make_message(cells: int = 3) -> dict[str, Any]:
    message = FakeDevice().field(cells).body
    counts: dict[str, int] = {}
    for cell in message["cells"]:
        counts[cell["class"]] = counts.get(cell["class"], 0) + 1
    return {**message, "counts": dict(sorted(counts.items()))}


def differences(then: dict[str, Any], now: dict[str, Any], *, with_slide: bool = False) -> list[tuple[str, str]]:
    return [(one.where, one.key) for one in compare(then, now, with_slide=with_slide)]


def test_the_same_message_is_identical() -> None:
    message = make_message()
    assert differences(message, copy.deepcopy(message)) == []
    assert differences(message, copy.deepcopy(message), with_slide=True) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("probability", 0.9001), ("class", "monocyte"), ("box", [1.1, 2.0, 11.0, 12.0]), ("margin", None)],
)
def test_a_cell_that_differs_in_the_last_digit_is_named(key: str, value: object) -> None:
    then, now = make_message(), make_message()
    now["cells"][1][key] = value
    assert ("s-1-2", key) in differences(then, now)


def test_a_detector_score_that_differs_in_the_last_digit_is_named() -> None:
    then, now = make_message(), make_message()
    now["cells"][2]["detector"]["score"] = 0.9501
    assert differences(then, now) == [("s-1-3", "detector")]


def test_a_cell_that_has_come_or_gone_changes_the_counts_too() -> None:
    then, now = make_message(3), make_message(2)
    assert differences(then, now) == [("s-1-3", "cell"), ("counts", "")]
    assert differences(now, then) == [("s-1-3", "cell"), ("counts", "")]


def test_counts_that_do_not_fit_their_cells_are_found() -> None:
    then = make_message()
    then["counts"]["neutrophil"] += 1
    assert differences(then, make_message()) == [("counts", "")]


def test_what_a_cell_is_to_the_slide_is_compared_only_where_it_can_be_known() -> None:
    then, now = make_message(), make_message()
    then["cells"][0] |= {"status": "duplicate", "duplicate_of": "s-1-0", "counted": False}
    then["cells"][1] |= {"status": "artefact", "counted": False}
    del then["counts"][then["cells"][1]["class"]]  # dirt is no count
    assert differences(then, now) == []
    assert {where for where, _ in differences(then, now, with_slide=True)} >= {"s-1-1", "s-1-2"}


def test_another_focus_is_another_picture_or_another_measure() -> None:
    then, now = make_message(), make_message()
    now["frame"]["focus"] += 0.01
    assert differences(then, now) == [("frame", "focus")]


def test_what_counts_now_is_compared_word_for_word_and_what_was_not_told_is_not() -> None:
    then = {"agent": "1", "detector": {"name": "d", "sha256": "a"}, "software": {"numpy": "1.26"}}
    now = {
        "agent": "2",
        "detector": {"name": "d", "sha256": "b"},
        "software": {"numpy": "2.0", "opencv": "4"},
        "new": 1,
    }
    assert list(compare_provenance(then, now)) == [
        Difference("provenance", "agent", "1", "2"),
        Difference("provenance", "detector.sha256", "a", "b"),
        Difference("provenance", "software.numpy", "1.26", "2.0"),
    ]


def test_only_the_first_field_of_a_sample_begins_its_slide() -> None:
    place = {"source": "unknown", "part": 1, "confidence": 0.0}
    first = {**make_message(), "place": place}
    assert is_first(first)
    assert not is_first({**make_message()})  # an agent that followed no slide
    later = copy.deepcopy(first)
    for number, cell in enumerate(later["cells"], start=7):
        cell["cell_id"] = f"s-1-{number}"
    assert not is_first(later)
    assert not is_first({**first, "cells": []})


# ------------------------------------------------------------------------------------------------- finding pictures


def write(path: Path, seed: int) -> str:
    """A picture file, and the digest of its pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)
    return hash_pixels(pixels)


def of_digest(digest: str, **frame: Any) -> dict[str, Any]:
    return {"frame": {"n": 7, "sha256": digest, "sha256_16": digest[:16], **frame}}


def test_a_picture_is_found_by_its_pixels_whatever_its_name(tmp_path: Path) -> None:
    digests = [write(tmp_path / "deep" / f"{name}.png", seed) for seed, name in enumerate("cab")]
    pictures = Pictures(None, None, [tmp_path], 1)
    for digest, name in zip(digests, "cab", strict=True):
        path, frame = pictures.find(of_digest(digest, um_per_px=0.2, stage_um=[1.0, 2.0]))
        assert (path.name, frame.sha256, frame.stage_um) == (f"{name}.png", digest, (1.0, 2.0))
    with pytest.raises(PictureMissing, match=str(tmp_path)):
        pictures.find(of_digest("f" * 64))


def test_an_older_message_is_found_by_its_sixteen_digits(tmp_path: Path) -> None:
    digest = write(tmp_path / "a.png", 1)
    message = of_digest(digest)
    del message["frame"]["sha256"]
    assert Pictures(None, None, [tmp_path], 1).find(message)[1].sha256 == digest


def test_another_picture_is_refused(tmp_path: Path) -> None:
    digest = write(tmp_path / "a.png", 1)
    write(tmp_path / "b.png", 2)
    with pytest.raises(PictureMissing, match="another picture"):
        Pictures(tmp_path / "b.png", None, [], 1).find(of_digest(digest))


def test_a_kept_picture_that_was_changed_is_not_the_one_that_was_counted(tmp_path: Path) -> None:
    digest = write(tmp_path / "x.png", 1)
    store = PictureStore(tmp_path / "kept", 10**6)
    write(store.path(digest), 2)
    with pytest.raises(PictureMissing):
        Pictures(None, store, [], 1).find(of_digest(digest))
    (tmp_path / "x.png").rename(store.path(digest))
    assert Pictures(None, store, [], 1).find(of_digest(digest))[0] == store.path(digest)


def test_where_nothing_was_told_where_to_look_it_is_said_what_can_be() -> None:
    with pytest.raises(PictureMissing, match=r"--image FILE or --images DIR; with pictures\.keep_mb"):
        Pictures(None, None, [], 1).find(of_digest("f" * 64))
