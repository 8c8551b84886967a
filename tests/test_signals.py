"""Signals end the wait of the main thread: real ones."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from agent.signals import stop_on_signals


def test_a_signal_ends_the_wait_at_once_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert not stop.wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        begun_s = time.monotonic()
        assert stop.wait(30)
        assert time.monotonic() - begun_s < 5
        assert stop.wait(30), "it stays asked for"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_during_the_wait_ends_it() -> None:
    with stop_on_signals() as stop:
        timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        begun_s = time.monotonic()
        assert stop.wait(30)
        assert time.monotonic() - begun_s < 5
        timer.join()


def test_a_second_ctrl_c_ends_the_program_at_once() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(5)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_signals_wake_the_wait_once_and_ask_for_nothing() -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert not stop.wait(5)
            begun_s = time.monotonic()
            assert not stop.wait(0.2)
            assert time.monotonic() - begun_s >= 0.15, "a stray signal must not make the wait spin"
    finally:
        signal.signal(signal.SIGUSR1, before)
