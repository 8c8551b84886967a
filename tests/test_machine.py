"""Readings of the machine: a fake /sys for the hardware, the real kernel for the rest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent import machine


def make_zone(sys: Path, name: str, temperature: str) -> None:
    zone = sys / "class/thermal" / name
    zone.mkdir(parents=True)
    (zone / "temp").write_text(temperature)


def make_throttled(sys: Path, bits: str) -> None:
    file = sys / machine.THROTTLED_FILE
    file.parent.mkdir(parents=True)
    file.write_text(bits)


def test_the_hottest_zone_is_the_temperature(tmp_path: Path) -> None:
    make_zone(tmp_path, "thermal_zone0", "48312\n")
    make_zone(tmp_path, "thermal_zone1", "51000\n")
    make_zone(tmp_path, "thermal_zone2", "not a number")
    assert machine.read_temperature(tmp_path) == 51.0


def test_under_voltage_is_read_from_the_firmware_without_a_shell(tmp_path: Path) -> None:
    make_throttled(tmp_path, "50005\n")
    throttling = machine.read_throttling(tmp_path)
    assert throttling is not None
    assert throttling.is_under_voltage
    assert throttling.was_under_voltage


def test_a_start_of_the_computer_has_a_name_that_stays() -> None:
    assert len(machine.read_kernel_boot()) == 36
    assert machine.read_kernel_boot() == machine.read_kernel_boot()
    assert machine.read_kernel_boot(Path("/nowhere")) == ""


def test_a_machine_that_does_not_tell_is_no_fault(tmp_path: Path) -> None:
    reading = machine.read_machine(tmp_path / "missing", sys=tmp_path, proc=tmp_path)
    assert reading.temperature_c is None
    assert reading.throttling is None
    assert reading.rss_bytes is None
    assert reading.disk_free_bytes is None


def test_memory_disk_and_clock_come_from_the_kernel(tmp_path: Path) -> None:
    reading = machine.read_machine(tmp_path)
    assert reading.rss_bytes is not None
    assert reading.rss_bytes > 1_000_000
    assert reading.disk_free_bytes is not None
    assert reading.clock.is_synchronised == (reading.clock.offset_ms is not None)


def test_an_unsynchronised_clock_is_told_apart_from_one_that_is_off() -> None:
    assert not machine.interpret_timex(machine.TIME_ERROR, 0, 0).is_synchronised
    assert not machine.interpret_timex(0, machine.STA_UNSYNC, 0).is_synchronised
    assert not machine.interpret_timex(-1, 0, 0).is_synchronised
    assert machine.interpret_timex(0, 0, 1500).offset_ms == 1.5
    assert machine.interpret_timex(0, machine.STA_NANO, 1_500_000).offset_ms == 1.5


PICTURES_COME_AND_GO = """
import numpy as np
from agent.machine import keep_big_blocks_apart, read_rss
{first}
del first
before = read_rss()
kept = []
for _ in range(20):
    pictures = [np.ones(3 * 2**17) for _ in range(20)]  # 3 MB each
    kept.append(bytearray(60_000))
    del pictures
print((read_rss() - before) // 2**20)
"""


def added_mb(first: str) -> int:
    """Of memory after 400 pictures between small blocks that stay; in a process of its own."""
    program = PICTURES_COME_AND_GO.format(first=first)
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_memory_of_pictures_goes_back_to_the_system_whatever_lives_on_between_them() -> None:
    first = "first = np.ones(6 * 2**17)"
    assert added_mb(first) > 30  # what glibc does by itself: the holes stay
    assert added_mb(f"assert keep_big_blocks_apart(); {first}") < 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc_trim is glibc's")
def test_free_pages_between_small_blocks_go_back_when_asked_for() -> None:
    program = """
from agent.machine import give_back_free_memory, read_rss
blocks = [bytearray(60_000) for _ in range(1000)]
blocks = blocks[::50]
before = read_rss()
give_back_free_memory()
print((before - read_rss()) // 2**20)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, timeout=60)
    assert int(done.stdout) > 40
