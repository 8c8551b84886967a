"""What was deleted is forgotten; what is merely out of reach never is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.camera.deletions import FORGET_AFTER_S, FORGET_EVERY_S, LONGEST_PAUSE_S, Deletions

LONG_S = FORGET_AFTER_S + 2 * FORGET_EVERY_S
HERE, OTHER_DISK = (8, 100), (9, 2)


class Follow:
    """Listings of one folder, one every `step_s`; a key is the name with a version: `a.png|1`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deletions = Deletions()
        self.now_s = 50_000.0

    def look(self, *keys: str, for_s: float = 0, step_s: float = 30, place: tuple[int, int] = HERE) -> list[str]:
        gone: list[str] = []
        until_s = self.now_s + for_s
        while True:
            self.now_s += step_s
            listed = {key: self.folder / key.partition("|")[0] for key in keys}
            gone += self.deletions.follow(listed, place, round(self.now_s * 1e9))
            if self.now_s >= until_s:
                return gone


@pytest.fixture
def follow(tmp_path: Path) -> Follow:
    return Follow(tmp_path)


def test_a_deleted_picture_is_told_once_and_not_at_once(follow: Follow) -> None:
    assert follow.look("a.png|1", "b.png|1", for_s=LONG_S) == []
    assert follow.look("b.png|1", for_s=FORGET_AFTER_S - 60) == []
    assert follow.look("b.png|1", for_s=2 * FORGET_EVERY_S) == ["a.png|1"]
    assert follow.look("b.png|1", for_s=LONG_S) == []


def test_a_folder_that_is_emptied_is_forgotten(follow: Follow) -> None:
    follow.look("a.png|1", "b.png|1")
    assert follow.look(for_s=LONG_S) == ["a.png|1", "b.png|1"]


def test_a_picture_that_comes_back_within_the_hour_is_not_forgotten(follow: Follow) -> None:
    follow.look("a.png|1")
    follow.look(for_s=FORGET_AFTER_S / 2)
    assert follow.look("a.png|1", for_s=LONG_S) == []


def test_of_a_picture_that_is_written_anew_the_old_one_is_forgotten(follow: Follow) -> None:
    (follow.folder / "live.png").touch()
    follow.look("live.png|1")
    assert follow.look("live.png|2", for_s=LONG_S) == ["live.png|1"]


def test_an_empty_mount_point_or_another_disk_in_its_place_empties_nothing(follow: Follow) -> None:
    follow.look("a.png|1")
    assert follow.look(for_s=2 * LONG_S, place=OTHER_DISK) == []
    assert follow.look("a.png|1", for_s=LONG_S) == []


def test_after_a_long_pause_only_a_picture_that_stayed_shows_that_it_is_the_same_disk(follow: Follow) -> None:
    follow.look("a.png|1", "b.png|1")
    assert follow.look(step_s=LONGEST_PAUSE_S + 1) == []
    assert follow.look(for_s=LONG_S) == []
    follow.look("c.png|1", "d.png|1")
    assert follow.look("d.png|1", step_s=LONGEST_PAUSE_S + 1) == []
    assert follow.look("d.png|1", for_s=LONG_S) == ["c.png|1"]


def test_a_picture_that_is_there_or_of_which_nobody_knows_is_not_forgotten(
    follow: Follow, monkeypatch: pytest.MonkeyPatch
) -> None:
    (follow.folder / "a.png").touch()
    follow.look("a.png|1", "b.png|1")  # a sub-folder without permission is left out of the listing
    lstat = os.lstat

    def refuse(path: Path) -> os.stat_result:
        if path.name == "b.png":
            raise PermissionError
        return lstat(path)

    monkeypatch.setattr("agent.camera.deletions.os.lstat", refuse)
    assert follow.look(for_s=LONG_S) == []
