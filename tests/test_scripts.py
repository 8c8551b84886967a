"""The shell scripts: what they say when they cannot go on. That they work is shown by running them (tests/vm)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import Config, OutboxSection, load_config

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    ROOT / name
    for name in ("deploy/install.sh", "deploy/quickstart.sh", "deploy/broker/make-site.sh", "tests/run.sh", ".ci/run")
]
SOURCED = ROOT / "deploy" / "python.sh"
(HAS_COLLECTOR,) = re.findall(r"^has_collector\(\) .*$", (ROOT / "deploy/install.sh").read_text(), re.MULTILINE)


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines of bash after those of deploy/python.sh."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'. "{SOURCED}"; {script}', "a-script"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def install(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "deploy/install.sh"), *arguments],
        env={**os.environ, **({} if path is None else {"PATH": path})},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def call_installer(*names: str, call: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Call functions of the installer, which run as root on a system otherwise. names: those that are needed."""
    text = (ROOT / "deploy/install.sh").read_text()
    functions = [text[text.index(f"\n{name}() {{") :].partition("\n}\n")[0] + "\n}" for name in names]
    values = [f"{name}={shlex.quote(value)}" for name, value in variables.items()]
    return bash("\n".join([*values, *functions, call]), PYTHONPATH=str(ROOT))


def write_settings(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What the installer does about the configuration, in a folder of our own."""
    (tmp_path / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    owners = 'chown() { :; }; install() { mkdir -p "${@: -1}"; }\n'
    return call_installer(
        *("configured_folder", "write_settings"),
        call=owners + "write_settings",
        settings=str(tmp_path / "etc"),
        results="/var/lib/hematovision",
        venv=str(tmp_path / "venv"),
        device="scope-3",
        site="lab",
        account="hematovision",
    )


@pytest.fixture
def nobodys_path(tmp_path: Path) -> str:
    """A PATH on which `id` says that we are an ordinary user."""
    stub = tmp_path / "bin" / "id"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 1000\n")
    stub.chmod(0o755)
    return f"{stub.parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_can_be_called_and_parsed(script: Path) -> None:
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (apt install shellcheck)")
def test_shellcheck_has_nothing_to_say() -> None:
    files = [str(path) for path in (*SCRIPTS, SOURCED, *ROOT.glob("tests/vm/*.sh"))]
    done = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_the_installer_asks_for_root(nobodys_path: str) -> None:
    done = install(path=nobodys_path)
    assert done.returncode == 1
    assert "needs root: sudo" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--devise", "x"), "unknown argument --devise"),
        (("--device",), "--device needs a value"),
        (("--device", "Big.Name"), "allowed are 1 to 63 of a-z, 0-9 and hyphen"),
        (("--site", "a b"), "allowed are 1 to 63 of a-z, 0-9 and hyphen"),
        (("--purge",), "--purge goes with --uninstall"),
    ],
)
def test_the_installer_refuses_what_it_does_not_understand(arguments: tuple[str, ...], words: str) -> None:
    """Before it touches anything: these run as root too."""
    done = install(*arguments)
    assert done.returncode == 1
    assert words in done.stderr


def check_machine(folder: Path, architecture: str) -> subprocess.CompletedProcess[str]:
    """What the installer says of a computer with a 64-bit kernel and programs of an architecture of Debian's."""
    for name, says in (("dpkg", architecture), ("uname", "aarch64"), ("apt-get", ""), ("systemctl", "")):
        stub = folder / name
        stub.write_text(f"#!/bin/sh\necho {says}\n")
        stub.chmod(0o755)
    return call_installer("check_machine", call=f'PATH="{folder}:$PATH"; check_machine')


def test_a_32_bit_raspberry_pi_os_is_refused_although_its_kernel_has_64(tmp_path: Path) -> None:
    """The kernel of Raspberry Pi OS has 64 bits either way; the models' interpreter comes for 64-bit programs."""
    done = check_machine(tmp_path, "armhf")
    assert done.returncode == 1
    assert "armhf is not supported" in done.stderr
    assert "64-bit Raspberry Pi OS" in done.stderr
    assert check_machine(tmp_path, "arm64").returncode == 0


def test_the_service_may_read_what_a_root_with_a_strict_umask_installs(tmp_path: Path) -> None:
    """As on computers that were hardened: the program is root's, and the service runs as another user."""
    venv = tmp_path / "opt" / "venv"
    pip = f'#!/bin/sh\nif [ "$2" = pip ]; then cp "$0" "{venv}/bin/hematovision"; fi\n'
    python = f'printf %s {shlex.quote(pip)} >"$2/bin/python"; chmod +x "$2/bin/python"'
    make = f'make_venv() {{ mkdir "$2" "$2/bin"; {python}; }}'
    done = call_installer(
        "install_program",
        call=f"umask 077; has_collector() {{ false; }}; find_python() {{ echo python3; }}; {make}; install_program",
        program=str(tmp_path / "opt"),
        venv=str(venv),
        command=str(tmp_path / "command"),
        source=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    made = list((tmp_path / "opt").rglob("*"))
    assert {path.name for path in made} == {"venv", "bin", "python", "hematovision"}
    assert all(path.stat().st_mode & 0o055 == 0o055 for path in made), "for others to read, and to enter or start"


def test_the_installer_explains_itself() -> None:
    done = install("--help")
    assert done.returncode == 0
    assert "--uninstall" in done.stdout
    assert "/etc/hematovision" in done.stdout


def test_a_new_configuration_names_the_folder_in_which_the_service_stores(tmp_path: Path) -> None:
    """The unit tells the service alone: without it `hematovision outbox` in a shell looks into somebody's home."""
    done = write_settings(tmp_path)
    assert done.returncode == 0, done.stderr
    written = load_config(tmp_path / "etc" / "config.yaml")
    outbox = OutboxSection(folder=Path("/var/lib/hematovision"))
    assert written == Config(device="scope-3", site="lab", outbox=outbox)
    assert "results in /var/lib/hematovision" in done.stdout
    again = write_settings(tmp_path)
    assert "Kept your" in again.stdout
    assert "outbox:" not in again.stdout


def test_of_a_kept_configuration_without_that_folder_the_line_to_add_is_told(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    config = tmp_path / "etc" / "config.yaml"
    config.write_text("device: scope-3\n")
    said = write_settings(tmp_path).stdout
    assert config.read_text() == "device: scope-3\n"
    (line,) = [line for line in said.splitlines() if "outbox:" in line]
    config.write_text(f"device: scope-3\n{line.strip()}\n")
    assert load_config(config).outbox.folder == Path("/var/lib/hematovision")
    assert "outbox:" not in write_settings(tmp_path).stdout
    config.write_text("no-such-key: 1\n")
    assert "outbox:" not in write_settings(tmp_path).stdout, "what cannot be read is told by the service"


def uninstall(folder: Path) -> subprocess.CompletedProcess[str]:
    """Uninstall in a folder of our own; without a running systemd, as in an image."""
    units = folder / "units"
    (folder / "opt" / "venv").mkdir(parents=True, exist_ok=True)
    units.mkdir(exist_ok=True)
    for file in (units / "hematovision.service", folder / "command"):
        file.touch()
    return call_installer(
        "uninstall",
        call=f"{HAS_COLLECTOR}; has_systemd() {{ false; }}; uninstall",
        units=str(units),
        unit=str(units / "hematovision.service"),
        collector="hematovision-collector.service",
        command=str(folder / "command"),
        program=str(folder / "opt"),
        settings=str(folder / "etc"),
        results=str(folder / "var"),
        purge="no",
    )


def test_uninstalling_the_agent_leaves_the_program_that_the_collector_runs_from(tmp_path: Path) -> None:
    collector = tmp_path / "units" / "hematovision-collector.service"
    collector.parent.mkdir()
    collector.touch()
    said = uninstall(tmp_path).stdout
    assert (tmp_path / "opt" / "venv").exists()
    assert (tmp_path / "command").exists()
    assert not (tmp_path / "units" / "hematovision.service").exists()
    assert "Kept" in said
    assert f"sudo rm {collector}" in said
    collector.unlink()
    assert "Removed the service and" in uninstall(tmp_path).stdout
    assert not (tmp_path / "opt").exists()
    assert not (tmp_path / "command").exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_an_update_of_the_agent_restarts_the_collector(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        (tmp_path / "a-collector.service").touch()
    done = call_installer(
        "restart_collector",
        call=f'{HAS_COLLECTOR}; has_systemd() {{ true; }}; systemctl() {{ echo "asked: $*"; }}; restart_collector',
        units=str(tmp_path),
        collector="a-collector.service",
    )
    assert done.returncode == 0, done.stderr
    assert ("asked: try-restart a-collector.service" in done.stdout) is is_there


def test_without_root_the_packages_to_install_are_named(nobodys_path: str) -> None:
    done = bash('need_packages "There is no broker." mosquitto', PATH=nobodys_path)
    assert done.returncode == 1
    assert "There is no broker. Install it with: sudo apt-get install mosquitto" in done.stderr


def test_a_python_that_does_not_fit_is_refused_with_what_fits() -> None:
    done = bash("find_python", PYTHON="false")
    assert done.returncode == 1
    assert "no Python from 3.10 to 3.13 found under the name false" in done.stderr


@pytest.mark.timeout(240)  # two real environments: 80 s beside two training runs
def test_an_environment_that_works_is_left_alone_and_a_broken_one_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    make = f'make_venv "$(find_python)" "{folder}"'
    assert "Making the virtual environment" in bash(make).stdout
    mark = folder / "mark"
    mark.touch()
    assert bash(make).stdout == ""
    assert mark.exists()
    (folder / "bin" / "python").unlink()
    assert "Making the virtual environment" in bash(make).stdout
    assert not mark.exists()


def test_an_environment_that_was_moved_is_made_anew(tmp_path: Path) -> None:
    """With the checkout around it: its programs begin with the path that its Python had, and do not start."""
    first, second = tmp_path / "Downloads" / "venv", tmp_path / "venv"
    (first / "bin").mkdir(parents=True)
    (first / "bin" / "python").symlink_to(sys.executable)
    (first / "bin" / "pip").write_text(f"#!{first}/bin/python\n")
    (first / "bin" / "pip").chmod(0o755)
    assert bash(f'make_venv true "{first}"').stdout == ""
    first.rename(second)
    assert f"Making the virtual environment {second}" in bash(f'make_venv true "{second}"').stdout
