"""Who is let in, and how fast: names, origins, sessions, pace; the clock is the test's."""

from __future__ import annotations

import socket

import pytest

from agent.web.guard import (
    MOST_SESSIONS,
    MOST_WRONG,
    SESSION_S,
    WRONG_WITHIN_S,
    Pace,
    Sessions,
    TooManyTries,
    is_own_name,
    is_own_origin,
    own_names,
)

PASSWORD = "a long enough one"


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1:8080", "192.168.1.7", "[::1]:8080", "[fe80::1%eth0]", "localhost:8080", "LOCALHOST", "scope.lab"],
)
def test_addresses_and_our_own_names_are_ours(host: str) -> None:
    assert is_own_name(host, own_names("scope.lab, other.lab"))
    assert is_own_name(f"{socket.gethostname()}:8080", own_names(None))


@pytest.mark.parametrize(
    "host",
    ["", "evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8080", "[::1", "scope.lab.evil", "a@b@c"],
)
def test_a_foreign_name_that_points_here_is_not_ours(host: str) -> None:
    assert not is_own_name(host, own_names("scope.lab"))


def test_only_a_page_of_ours_may_change_something() -> None:
    assert is_own_origin("http://scope:8080", "http", "scope:8080")
    for foreign in (None, "null", "", "http://evil.example", "http://scope", "https://scope:8080", "http://scope:8081"):
        assert not is_own_origin(foreign, "http", "scope:8080"), foreign


def test_without_a_password_everybody_is_in_and_with_one_only_who_gave_it() -> None:
    assert Sessions(None).is_in(None)
    clock = Clock()
    sessions = Sessions(PASSWORD, clock)
    assert not sessions.is_in(None)
    assert not sessions.is_in("made up")
    assert sessions.begin("another one") is None
    token = sessions.begin(PASSWORD)
    assert sessions.is_in(token)
    clock.now_s += SESSION_S
    assert not sessions.is_in(token), "a working day is over"
    token = sessions.begin(PASSWORD)
    sessions.end(token)
    assert not sessions.is_in(token)


def test_after_ten_wrong_passwords_the_right_one_waits_too_and_who_is_in_stays_in() -> None:
    clock = Clock()
    sessions = Sessions(PASSWORD, clock)
    inside = sessions.begin(PASSWORD)
    for _ in range(MOST_WRONG):
        assert sessions.begin("guess") is None
    with pytest.raises(TooManyTries, match="wait 60 s"):
        sessions.begin(PASSWORD)
    assert sessions.is_in(inside)
    clock.now_s += WRONG_WITHIN_S
    assert sessions.begin(PASSWORD) is not None


def test_the_first_session_goes_when_there_are_too_many() -> None:
    sessions = Sessions(PASSWORD, Clock())
    tokens = [sessions.begin(PASSWORD) for _ in range(MOST_SESSIONS + 1)]
    assert [sessions.is_in(token) for token in tokens] == [False, *[True] * MOST_SESSIONS]


def test_requests_wait_for_their_turn_and_too_many_are_refused() -> None:
    clock = Clock()
    pace = Pace(per_s=10, burst=3, longest_wait_s=0.5, monotonic_s=clock)
    clock.now_s += 60
    waits = [pace.wait_s() for _ in range(10)]
    assert waits[:3] == [0.0, 0.0, 0.0], "a burst is answered at once"
    assert waits[4:9] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
    assert waits[9] is None
    clock.now_s += 0.1
    assert pace.wait_s() == pytest.approx(0.5), "what was refused costs nobody his turn"
