"""sd_notify over a real socket, and the unit file as systemd reads it."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import systemd

UNITS = sorted((Path(__file__).parent.parent / "systemd").glob("*.service"))

EXPOSURE_LIMIT = 25
"""`systemd-analyze security` in tenths: 92 is a unit without care; ours has 19, newer versions ask for more."""


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """The service manager's end of NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(5)
        yield channel


def test_ready_stopping_and_watchdog_reach_the_manager(manager: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    assert systemd.ready("counting")
    assert manager.recv(4096) == b"READY=1\nSTATUS=counting"
    assert systemd.feed_watchdog()
    assert manager.recv(4096) == b"WATCHDOG=1"
    assert systemd.extend_start(60)
    assert manager.recv(4096) == b"EXTEND_TIMEOUT_USEC=60000000"
    assert systemd.status("camera lost")
    assert manager.recv(4096) == b"STATUS=camera lost"
    assert systemd.stopping()
    assert manager.recv(4096).startswith(b"STOPPING=1")


def test_an_abstract_socket_is_found_too() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0hematovision-test-notify")
        manager.settimeout(5)
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": "@hematovision-test-notify"})
        assert manager.recv(4096) == b"READY=1"


def test_without_a_service_manager_nothing_happens() -> None:
    assert not systemd.notify("READY=1", {})
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": "relative/path"})


def test_a_manager_that_is_gone_does_not_stop_the_agent(tmp_path: Path) -> None:
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "nobody")})


def test_a_line_end_in_a_status_begins_no_second_assignment(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.getsockname())
    systemd.status("lost\nREADY=1")
    assert manager.recv(4096) == b"STATUS=lost READY=1"


def test_the_watchdog_is_fed_three_times_in_its_interval() -> None:
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "30000000"}) == pytest.approx(10.0)
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 7) == pytest.approx(10.0)


def test_a_watchdog_that_is_off_or_watches_another_process_is_not_fed() -> None:
    assert systemd.watchdog_interval_s({}) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "0"}) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "nonsense"}) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 8) is None


needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian package systemd)"
)


@pytest.fixture(params=UNITS, ids=lambda path: path.stem)
def unit(request: pytest.FixtureRequest) -> Path:
    """Each shipped unit."""
    path: Path = request.param
    return path


@pytest.fixture
def unit_to_verify(unit: Path, tmp_path: Path) -> Path:
    """The unit, with a program that exists on this machine: verify complains about a missing one."""
    lines = unit.read_text().splitlines(keepends=True)
    copy = tmp_path / unit.name
    copy.write_text("".join("ExecStart=/bin/true\n" if line.startswith("ExecStart=") else line for line in lines))
    return copy


@needs_systemd_analyze
def test_systemd_has_nothing_to_say_about_the_unit(unit_to_verify: Path) -> None:
    """An unknown key is only a line of output with exit code 0, so any output is a fault."""
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit_to_verify)], capture_output=True, text=True, check=False
    )
    assert (verify.returncode, verify.stdout, verify.stderr) == (0, "", "")


@needs_systemd_analyze
def test_a_mistyped_key_in_the_unit_would_be_noticed(unit_to_verify: Path) -> None:
    unit_to_verify.write_text(unit_to_verify.read_text().replace("NoNewPrivileges=", "NoNewPriviledges="))
    verify = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit_to_verify)], capture_output=True, text=True, check=False
    )
    assert "NoNewPriviledges" in verify.stdout + verify.stderr


@needs_systemd_analyze
def test_the_unit_is_well_confined(unit_to_verify: Path) -> None:
    security = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            "--no-pager",
            f"--threshold={EXPOSURE_LIMIT}",
            str(unit_to_verify),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert security.returncode == 0, security.stdout[-400:] + security.stderr


def test_the_unit_does_not_wait_for_the_network(unit: Path) -> None:
    """Waiting for network-online.target held the boot up; the agent counts with the broker away."""
    assert "network-online" not in "".join(line for line in unit.read_text().splitlines() if not line.startswith("#"))


def test_every_setting_of_the_unit_has_its_reason(unit: Path) -> None:
    """A setting stands below a comment, or in one block with settings that share it."""
    has_reason = False
    for line in unit.read_text().splitlines():
        if not line.strip() or line.startswith("["):
            has_reason = False
        elif line.startswith("#"):
            has_reason = True
        else:
            assert has_reason, line
