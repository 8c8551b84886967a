"""A Debian system that is installed, booted and looked at: deploy/install.sh, the unit, READY, watchdog, stop.

Takes about two minutes, needs root, mmdebstrap, systemd-nspawn and the network; by name only: `tests/run.sh -m vm`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from agent.config import Config, models_folder
from agent.delivery.messages import load_schema

pytestmark = [pytest.mark.vm, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
SUITE, SUITE_PYTHON, SUITE_GLIBC_MINOR = "bookworm", "3.11", 36
PACKAGES = "systemd,systemd-sysv,dbus,procps,python3,python3-venv,mosquitto,mosquitto-clients"
MASKED = "systemd-networkd-wait-online systemd-logind systemd-resolved console-getty getty@tty1 apt-daily.timer"

CLOCK_CALLS = "--system-call-filter=adjtimex clock_adjtime"
"""What systemd-nspawn itself forbids and a real machine does not."""

PROBE_UNIT = """\
[Unit]
Description=Looks at the agent and powers off
After=mosquitto.service
[Service]
ExecStart=/bin/bash /srv/probe.sh
[Install]
WantedBy=multi-user.target
"""


def run(*command: str | Path, timeout_s: float = 600, **environment: str) -> str:
    """Run a command; its whole output is in the failure."""
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command[0]} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def copy_checkout(to: Path) -> None:
    unwanted = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, to, ignore=unwanted)


def collect_wheels(checkout: Path, folder: Path) -> None:
    """All that pip needs inside: this machine's own way to the packages (mirrors, proxies) is not known there."""
    pip = [sys.executable, "-m", "pip"]
    run(*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, checkout)
    (own,) = folder.glob("hematovision_agent-*.whl")
    machine = platform.machine()
    wanted = ["--only-binary=:all:", "--python-version", SUITE_PYTHON]
    tags = ["2014", *(f"_2_{minor}" for minor in range(5, SUITE_GLIBC_MINOR + 1))]
    wanted += [f"--platform=manylinux{tag}_{machine}" for tag in tags]
    run(*pip, "download", "--quiet", "--dest", folder, *wanted, f"{own}[web]", "hatchling")
    own.unlink()


class Installed:
    """The system after its boot: what the probe saw."""

    def __init__(self, probe: Path, install_logs: list[str]) -> None:
        self.install_logs = install_logs
        lines = (probe / "facts").read_text().splitlines()
        self.facts = dict(line.split("=", 1) for line in lines)
        self.messages = (probe / "messages").read_text().splitlines()
        self.last_state = (probe / "last-state").read_text()
        self.journal = (probe / "journal").read_text()


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root folder of a Debian with the agent installed by deploy/install.sh, run twice."""
    if os.geteuid() != 0:
        pytest.skip("making and booting a system needs root")
    for tool in ("mmdebstrap", "systemd-nspawn"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (apt install mmdebstrap systemd-container)")
    if not (models_folder(Config().models) / "manifest.json").exists():
        pytest.skip("the shipped models are not in models/")
    root = tmp_path_factory.mktemp("vm") / "root"
    run("mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, root)
    copy_checkout(root / "srv" / "checkout")
    (root / "srv" / "wheels").mkdir()
    collect_wheels(root / "srv" / "checkout", root / "srv" / "wheels")
    yield root
    subprocess.run(["rm", "-rf", "--one-file-system", str(root)], check=False)


def inside(root: Path, *command: str) -> str:
    """Run a command in the system while it is not booted, as while an image is made."""
    offline = ["--setenv=PIP_NO_INDEX=1", "--setenv=PIP_FIND_LINKS=/srv/wheels"]
    container = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe"]
    return run(*container, *offline, "-D", root, *command)


@pytest.fixture(scope="module")
def booted(system: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install, boot, probe, power off."""
    logs = [inside(system, "/srv/checkout/deploy/install.sh", "--device", "vm-scope", "--site", "lab")]
    with (system / "etc/hematovision/config.yaml").open("a") as settings:
        settings.write("# a line of the operator\n")
    logs.append(inside(system, "/srv/checkout/deploy/install.sh", "--device", "other"))

    # Shortened for the test: the watchdog, and the pace of the simulated slide. The page is on, as an operator sets it.
    override = system / "etc/systemd/system/hematovision.service.d"
    override.mkdir(parents=True)
    (override / "test.conf").write_text(
        "[Service]\nWatchdogSec=8\nEnvironment=HEMATOVISION_CAMERA__SIMULATED__INTERVAL_S=0.5\n"
        "Environment=HEMATOVISION_PUBLISH__HEALTH_INTERVAL_S=2\nEnvironment=HEMATOVISION_WEB__ENABLED=true\n"
    )
    shutil.copy(Path(__file__).with_name("probe.sh"), system / "srv/probe.sh")
    (system / "etc/systemd/system/probe.service").write_text(PROBE_UNIT)
    inside(system, "systemctl", "enable", "probe.service", "mosquitto.service")
    inside(system, "systemctl", "mask", *MASKED.split())

    probe = tmp_path_factory.mktemp("probe")
    container = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--private-network", "--console=pipe"]
    boot = subprocess.run(
        [*container, CLOCK_CALLS, f"--bind={probe}:/probe", "-D", str(system), "--boot"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=400,
        check=False,
    )
    assert (probe / "journal").exists(), f"the probe did not come to its end:\n{boot.stdout[-4000:]}"
    return Installed(probe, logs)


def test_the_installer_says_what_it_did_and_keeps_the_operators_configuration(booted: Installed) -> None:
    first, second = booted.install_logs
    assert "Made the user hematovision" in first
    assert "device vm-scope" in first
    assert "Enabled hematovision.service" in first
    assert "Kept your /etc/hematovision/config.yaml" in second
    assert booted.facts["settings"] == "root hematovision 640"
    assert booted.facts["outbox_in_a_shell"] == "found", "a command in a shell finds what the service stores"


def test_the_service_reaches_ready_without_waiting_for_the_network(booted: Installed) -> None:
    assert booted.facts["active"] == "active", booted.journal
    assert booted.facts["status"].startswith("ready: camera open"), booted.journal
    assert booted.facts["waits_for_network"] == "inactive"


def test_the_service_runs_confined_as_its_own_user(booted: Installed) -> None:
    assert booted.facts["user"].startswith("hematov")
    assert "video" in booted.facts["groups"].split(",")
    assert int(booted.facts["capabilities"], 16) == 0
    assert booted.facts["no_new_privileges"] == "1"
    assert booted.facts["state_folder"] == "hematovision 700"
    assert booted.facts.get("video_group") == "yes", "what belongs to the video group must open, as cameras do"


def test_the_service_publishes_and_each_message_matches_its_schema(booted: Installed) -> None:
    kinds = set()
    for line in booted.messages:
        topic, _, payload = line.partition(" ")
        assert topic.startswith("hv/1/lab/vm-scope/")
        kind = topic.split("/")[4]
        jsonschema.Draft202012Validator(load_schema(kind)).validate(json.loads(payload))
        kinds.add(kind)
    assert {"state", "info", "field", "cell"} <= kinds


def test_under_the_units_settings_the_models_run_on_xnnpack_and_the_clock_is_read(booted: Installed) -> None:
    bodies = [json.loads(line.partition(" ")[2]) for line in booted.messages]
    (info,) = [body for body in bodies if body["schema"] == "hv/1/info"][:1]
    assert info["delegate"] == "xnnpack"
    assert int(booted.facts["clock_answer"]) >= 0
    assert "Traceback" not in booted.journal, booted.journal


def test_the_page_shows_the_slide_and_examines_a_picture_within_the_units_walls(booted: Installed) -> None:
    assert int(booted.facts["page_cells"]) > 5, booted.journal
    assert int(booted.facts["page_examined_cells"]) > 5, booted.journal


def test_a_frozen_agent_is_ended_by_the_watchdog_and_started_again(booted: Installed) -> None:
    assert "Watchdog timeout" in booted.journal
    assert booted.facts["restarts"] == "1"
    assert booted.facts["active_after_watchdog"] == "active"
    assert booted.facts["boot_after_watchdog"] == "2"


def test_a_stop_is_quick_and_clean(booted: Installed) -> None:
    assert int(booted.facts["stop_seconds"]) <= 10
    assert booted.facts["stop_result"] == "success 0"
    assert '"state":"disconnected"' in booted.last_state


def test_a_refused_configuration_is_told_in_the_journal_and_not_tried_for_ever(booted: Installed) -> None:
    assert booted.facts["refused"] == "failed 2"
    assert "no-such-key" in booted.journal


def test_the_uninstaller_keeps_results_and_configuration_until_it_is_told_to_purge(
    booted: Installed, system: Path
) -> None:
    assert booted.facts
    said = inside(system, "/srv/checkout/deploy/install.sh", "--uninstall")
    assert "Kept the configuration" in said
    assert not (system / "opt/hematovision").exists()
    assert not (system / "etc/systemd/system/hematovision.service").exists()
    assert (system / "var/lib/hematovision/outbox.db").exists()
    inside(system, "/srv/checkout/deploy/install.sh", "--uninstall", "--purge")
    assert not (system / "var/lib/hematovision").exists()
    assert not (system / "etc/hematovision").exists()
    assert "hematovision" not in (system / "etc/passwd").read_text()
