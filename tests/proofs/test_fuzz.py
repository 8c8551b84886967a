"""The fuzzing program in short, and that it finds what it looks for."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from agent.errors import ConfigError

from . import fuzz
from .fuzz import Finding, Subject, main, mutate_json, run


def make_subject(target: Any) -> Subject:
    return Subject("subject", target, [b'{"a": 1, "b": [2, 3]}'], 1.0)


def test_whatever_arrives_is_refused_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--inputs", "2000", "--seed", "7"]) == 0
    out = capsys.readouterr().out
    assert "pass " in out
    for name in ("commands", "acknowledgements", "configuration", "manifest", "audit file", "messages at the receiver"):
        assert name in out
    taken = [line.split()[-1] for line in out.splitlines() if line.split()[-2:-1] in (["done"], ["taken"], ["sound"])]
    assert len(taken) >= 4, "some inputs must get past all checks, else nothing behind them is tried"


@pytest.mark.soak
@pytest.mark.timeout(14_400)
def test_a_million_inputs_are_refused_in_words() -> None:
    """In a process of its own, see test_growing_memory_is_seen."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.proofs.fuzz", "--inputs", "1000000"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_crash_is_found_with_its_input() -> None:
    def target(content: bytes) -> str:
        if b"[" not in content:
            raise KeyError("list")
        return "taken"

    with pytest.raises(Finding, match="KeyError: 'list'"):
        run([make_subject(target)], 2000, 1)


def test_a_foreseen_error_that_is_not_caught_is_a_finding_too() -> None:
    def target(_content: bytes) -> str:
        raise ConfigError("x", ("y",))

    with pytest.raises(Finding, match="ConfigError"):
        run([make_subject(target)], 10, 1)


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 0.1)

    def target(_content: bytes) -> str:
        while True:
            pass

    with pytest.raises(Finding, match=r"it takes more than 0\.1 s"):
        run([make_subject(target)], 10, 1)


LEAKS = """
from tests.proofs.fuzz import MOST_GROWTH_BYTES, Subject, run
kept = []
subject = Subject("subject", lambda content: kept.append(bytes(40_000)) or "taken", [b'{"a": 1, "b": [2, 3]}'], 1.0)
growth_bytes = run([subject], 12_000, 1).growth_bytes
assert growth_bytes > MOST_GROWTH_BYTES, growth_bytes
"""


def test_growing_memory_is_seen() -> None:
    """In a process of its own: one in which other tests ran has free memory left over, and need not grow."""
    done = subprocess.run([sys.executable, "-c", LEAKS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_same_seed_makes_the_same_inputs() -> None:
    seen: list[list[bytes]] = [[], []]
    for one in seen:
        run([make_subject(lambda content, one=one: one.append(content) or "taken")], 200, 3)
    assert seen[0] == seen[1]
    assert len(set(seen[0])) > 100


def test_values_of_json_are_exchanged_and_it_stays_json() -> None:
    import random

    made = {mutate_json(b'{"a": 1, "b": [2, 3]}', random.Random(n)) for n in range(200)}
    assert len(made) > 50
    assert all(json.loads(one) is not None for one in made)
