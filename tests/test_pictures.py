"""Whole fields on the device: without loss, by their digest, within their room."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from agent.camera.camera import SYSTEM_CLOCKS, make_frame
from agent.camera.decoding import decode_file
from agent.camera.hashing import hash_pixels
from agent.domain import Frame
from agent.pictures import PictureStore

ONE_BYTES = 64 * 48 * 3
"""About what one of these pictures takes: noise cannot be packed."""


def make(seed: int) -> Frame:
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    return make_frame(seed, pixels, source="test", clocks=SYSTEM_CLOCKS)


def test_a_picture_comes_back_to_the_last_bit_under_the_name_of_its_digest(tmp_path: Path) -> None:
    store = PictureStore(tmp_path / "pictures", 10**6)
    frame = make(1)
    store.keep(frame)
    assert hash_pixels(decode_file(store.path(frame.sha256), 1)) == frame.sha256


def test_the_oldest_go_before_there_are_too_many_bytes(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, int(3.5 * ONE_BYTES))
    frames = [make(seed) for seed in range(6)]
    for frame in frames:
        store.keep(frame)
    assert [store.path(frame.sha256).exists() for frame in frames] == [False] * 3 + [True] * 3
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 3.5 * ONE_BYTES


def test_a_restart_knows_which_are_the_oldest(tmp_path: Path) -> None:
    frames = [make(seed) for seed in range(4)]
    first = PictureStore(tmp_path, 10**6)
    for age, frame in enumerate(frames[:3]):
        first.keep(frame)
        os.utime(first.path(frame.sha256), (100 - age, 100 - age))  # the last one is the oldest
    again = PictureStore(tmp_path, int(3.5 * ONE_BYTES))
    again.keep(frames[3])
    assert [again.path(frame.sha256).exists() for frame in frames] == [True, True, False, True]


def test_pictures_leave_the_disk_to_the_results(tmp_path: Path) -> None:
    store = PictureStore(tmp_path, 10**6)
    frame = make(1)
    store.keep(frame)
    full = PictureStore(tmp_path, 10**6, min_free_bytes=2**62)
    full.keep(make(2))
    assert list(tmp_path.iterdir()) == []


def test_what_the_disk_does_not_take_is_said_and_counting_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pictures").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING):
        PictureStore(tmp_path / "pictures", 10**6).keep(make(1))
    assert "a picture is not kept" in caplog.text


def test_of_a_picture_that_the_disk_takes_in_part_nothing_stays_and_it_is_kept_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_some(path: Path, content: bytes) -> int:
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    store, frame = PictureStore(tmp_path, 10**6), make(1)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", take_some)
        store.keep(frame)
    assert list(tmp_path.iterdir()) == []
    store.keep(frame)
    assert hash_pixels(decode_file(store.path(frame.sha256), 1)) == frame.sha256
