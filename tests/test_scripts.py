"""The shell scripts: what they say when they cannot go on. That they work is shown by running them (tests/vm)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    ROOT / name
    for name in ("deploy/install.sh", "deploy/quickstart.sh", "deploy/broker/make-site.sh", "tests/run.sh", ".ci/run")
]
SOURCED = ROOT / "deploy" / "python.sh"


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


def test_the_installer_explains_itself() -> None:
    done = install("--help")
    assert done.returncode == 0
    assert "--uninstall" in done.stdout
    assert "/etc/hematovision" in done.stdout


def test_without_root_the_packages_to_install_are_named(nobodys_path: str) -> None:
    done = bash('need_packages "There is no broker." mosquitto', PATH=nobodys_path)
    assert done.returncode == 1
    assert "There is no broker. Install it with: sudo apt-get install mosquitto" in done.stderr


def test_a_python_that_does_not_fit_is_refused_with_what_fits() -> None:
    done = bash("find_python", PYTHON="false")
    assert done.returncode == 1
    assert "no Python from 3.10 to 3.13 found under the name false" in done.stderr


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
