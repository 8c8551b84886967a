"""What is around the agent is told once, when somebody should do something about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.config import Config
from agent.delivery.certificates import Expiry
from agent.delivery.outbox import open_outbox
from agent.watching.surroundings import Surroundings


def make_surroundings(folder: Path, told: list[tuple[Any, ...]], **more: Any) -> Surroundings:
    return Surroundings(Config(), folder, lambda *words: told.append(words), open_outbox, **more)


def test_a_clock_that_is_set_is_told_once(tmp_path: Path) -> None:
    ahead_s = [100.0]
    told: list[tuple[Any, ...]] = []
    around = make_surroundings(tmp_path, told, wall_ahead_s=lambda: ahead_s[0])
    around.tell_clock_step()
    ahead_s[0] += 1.0  # slewed
    around.tell_clock_step()
    assert told == []
    ahead_s[0] -= 86_400.0
    around.tell_clock_step()
    around.tell_clock_step()
    assert told == [("clock-step", "the system clock was set back by 86400 s", "warning", {"step_s": -86400.0})]


def test_a_disk_that_runs_low_is_told_before_intake_stops_and_again_only_after_it_was_mended(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    around = make_surroundings(tmp_path, told)
    for free_mb in (10_000, 255, 250, 300, 400, 200):  # outbox.min_free_mb is 64
        around._tell_disk(free_mb * 2**20)
    assert [(kind, words.split(";")[0]) for kind, words, *_ in told] == [
        ("disk-low", "255 MB left"),
        ("disk-low", "200 MB left"),
    ]


def test_a_certificate_that_ends_soon_is_told_once_for_each_file(tmp_path: Path) -> None:
    told: list[tuple[Any, ...]] = []
    around = make_surroundings(tmp_path, told)
    near, far = (Expiry("broker.tls.certificate_file", tmp_path / "scope.pem", days) for days in (29.96, 31.0))
    authority = Expiry("broker.tls.ca_file", tmp_path / "ca.pem", 3000)
    for expiries in ((far, authority), (near, authority), (near, authority), (), (far, authority), (near, authority)):
        around._tell_expiries(expiries)
    assert [(kind, severity, detail) for kind, _, severity, detail in told] == 2 * [
        ("certificate-expiring", "warning", {"key": "broker.tls.certificate_file", "days_left": 30.0})
    ]
