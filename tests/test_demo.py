"""The demo, for real: its own broker, its own agent; nothing of it is left afterwards."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import psutil
import pytest

from agent import RESEARCH_USE_ONLY
from agent.camera.camera import open_camera
from agent.cli import main
from agent.config import CameraSection, SimulatedSection, packaged_folder
from agent.delivery.embedded_broker import HOW_TO_INSTALL
from agent.domain import Frame
from agent.errors import ConfigError
from agent.report.pdf import render_pdf
from tests.disks import mounted

TOP = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (packaged_folder() / "models" / "manifest.json").is_file(), reason="the models are not there"
)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the demo with its temporary folder in `tmp_path/t`; fails if a file or a child process stays behind."""
    folder = tmp_path / "t"
    folder.mkdir()
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str | Path, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HEMATOVISION_")}
        # A setting of the user's own must not reach the demo's agent.
        variables = {**kept, "PYTHONPATH": str(TOP), "TMPDIR": str(folder), "HEMATOVISION_BROKER__PORT": "1"}
        command = [sys.executable, "-m", "agent", "demo", *map(str, arguments)]
        process = subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=variables)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
    deadline_s = time.monotonic() + 10
    while left := processes_of(folder):
        assert time.monotonic() < deadline_s, f"still there: {left}"
        time.sleep(0.1)


def processes_of(folder: Path) -> list[str]:
    """Running programs that name the demo's folder in their command."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = " ".join(process.info["cmdline"] or ())
        if str(folder) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(command)
    return found


def wait_for_line(process: subprocess.Popen[str], pattern: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern, line):
            return line
    assert process.stderr is not None
    raise AssertionError(f"no line with {pattern}; {process.stderr.read()}")


CELL_LINE = r"^\d\d:\d\d:\d\d\.\d{3}  \S+ +[01]\.\d{3}  \d+ \d+ \d+ \d+ +(accepted|edge|unidentified)$"


def test_it_shows_the_cells_of_the_simulated_slide_and_ends_after_the_fields_asked_for(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    out, err = (process := start("--fields", "2")).communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    lines = out.splitlines()
    assert RESEARCH_USE_ONLY in lines[0]
    assert re.search(r"mosquitto_sub -p \d+ -t 'hv/1/#'", lines[1])
    assert re.fullmatch(r"page:   http://127\.0\.0\.1:\d+", lines[2])
    cells = [line for line in lines if re.match(CELL_LINE, line)]
    assert lines[-1].startswith(f"2 fields, {len(cells)} cells, each counted once: ")
    assert list((tmp_path / "t").iterdir()) == []


def test_its_page_shows_the_slide_while_it_is_counted(start: Callable[..., subprocess.Popen[str]]):
    process = start()
    page = wait_for_line(process, "^page: ").split()[1]
    wait_for_line(process, CELL_LINE)
    with urllib.request.urlopen(f"{page}/api/state", timeout=30) as answer:
        told = json.load(answer)
    assert (told["site"], told["sample"]["phase"]) == ("demo", "running")
    assert told["sample"]["fields"] > 0


def test_a_folder_as_source_is_read_to_its_end(start: Callable[..., subprocess.Popen[str]], tmp_path: Path):
    fields = tmp_path / "fields"
    fields.mkdir()
    camera = open_camera(CameraSection(simulated=SimulatedSection(seed=5, fields=3, interval_s=0)))
    for number in range(3):
        frame = camera.read()
        assert isinstance(frame, Frame)
        cv2.imwrite(str(fields / f"{number}.png"), frame.pixels_bgr)
    (fields / "bad.png").write_bytes(b"no picture")
    process = start("--source", fields)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.splitlines()[-1].startswith("3 fields, ")
    assert re.fullmatch(r"warning: .*bad\.png: .*\n", err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_it_with_all_its_children_and_files(
    number: signal.Signals, code: int, start: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    process = start()
    wait_for_line(process, CELL_LINE)
    assert len(processes_of(tmp_path / "t")) == 2, "broker and agent"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in err
    assert processes_of(tmp_path / "t") == []
    assert list((tmp_path / "t").iterdir()) == []


def test_its_children_die_with_it_when_it_is_killed(start: Callable[..., subprocess.Popen[str]]):
    process = start()
    wait_for_line(process, CELL_LINE)
    process.kill()  # the fixture looks for what is left


def test_on_a_terminal_it_draws_a_table(start: Callable[..., subprocess.Popen[str]]):
    leader, follower = pty.openpty()
    process = start("--fields", "1", stdout=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(leader)
    assert process.wait(timeout=30) == 0
    for words in (b"newest cells, read from MQTT", b"counted cells by class", RESEARCH_USE_ONLY.encode()):
        assert words in shown


def test_a_source_that_is_not_there_or_empty_is_exit_code_2(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
):
    for source, words in ((tmp_path / "absent", "there is no such folder"), (tmp_path / "t", "there are no pictures")):
        process = start("--source", source)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 2
        assert words in err
        assert "Traceback" not in err


def test_a_port_that_is_taken_is_exit_code_6(start: Callable[..., subprocess.Popen[str]]):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start("--port", str(port))
        _, err = process.communicate(timeout=30)
    assert process.returncode == 6
    assert f"port {port} cannot be used" in err


def end_of_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a demo, in this process, whose temporary folders are made in `folder`."""
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(SystemExit) as end:
        main(["demo", "--fields", "1"])
    return end.value.code


MEND = r"free space there, or name a folder with room: TMPDIR=/a/folder hematovision demo\n$"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "size=300m,nr_inodes=5",
            r"yet takes no more: its files \(inodes\) or a quota are used up; a demo needs 70 MB: ",
        ),
        ("size=4m", r"the disk has 4\.0 MB left; a demo needs 70 MB: "),
        ("size=40m", r"the disk has 40\.0 MB left; a demo needs 70 MB: "),
    ],
)
def test_a_temporary_folder_without_room_is_told_before_anything_is_started(
    options: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with mounted(tmp_path / "disk", options) as disk:
        assert end_of_demo(disk, monkeypatch) == 5
        assert list(disk.iterdir()) == []
    told = capsys.readouterr().err
    assert told.startswith(f"hematovision: error: {disk}: the disk has ")
    assert re.search(words + MEND, told)


def test_that_no_temporary_folder_can_be_made_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So it is where /tmp, /var/tmp and the working directory are full: Python finds no place for one."""
    assert end_of_demo(tmp_path / "absent", monkeypatch) == 5
    told = capsys.readouterr().err
    assert re.search(
        rf"no temporary folder for its files: {tmp_path}/absent/\S+: No such file or directory; {MEND}", told
    )


def test_without_a_broker_program_the_exit_code_is_6_and_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(shutil, "which", lambda *_args, **_kwargs: None)
    with pytest.raises(SystemExit) as end:
        main(["demo"])
    assert end.value.code == 6
    assert HOW_TO_INSTALL in capsys.readouterr().err


def makes_pdf() -> bool:
    try:
        render_pdf("<html><head></head><body></body></html>", "notice", "foot")
    except ConfigError:
        return False
    return True


def test_one_command_counts_a_sample_and_leaves_its_signed_report(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    pytest.importorskip("cryptography")
    target = tmp_path / "reports"
    process = start("--sample", "6", "--report", target)
    told, complaints = process.communicate(timeout=110)
    assert process.returncode == 0, complaints
    reports = ["demo-sample.html", "demo-sample.json", *(["demo-sample.pdf"] if makes_pdf() else [])]
    assert sorted(path.name for path in target.iterdir()) == sorted(
        name + ending for name in reports for ending in ("", ".sig")
    )
    document = json.loads((target / "demo-sample.json").read_text())
    assert document["status"] == "final"
    assert document["end_reason"] == "target-cells"
    assert document["differential"]["nucleated"] >= 6
    assert document["gallery"]
    differential = document["differential"]
    assert f"differential of {differential['leukocytes']} leukocytes" in told
    for share in differential["shares"]:
        assert bool(re.search(rf"^  {share['class']} +{share['pct']:.1f} %", told, re.M)) == (share["count"] > 0)
    assert f"RBC {differential['counts']['RBC']}" in told, "as in the report"
    assert told.count("signed report: ") == len(reports)
    for name in reports:
        with pytest.raises(SystemExit) as ended:
            main(["report", "verify", str(target / name)])
        assert ended.value.code == 0
