"""The command line, from outside: what is printed, on which stream, and the exit code."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from agent import RESEARCH_USE_ONLY, __version__
from agent.camera.camera import open_camera
from agent.camera.simulated import render_training_crop
from agent.cli import build_parser, main
from agent.config import CameraSection, SimulatedSection, json_schema, packaged_folder
from agent.delivery.audit import ChainHead, Entry, chain
from agent.delivery.messages import Draft, load_schema
from agent.delivery.outbox import begin_boot, open_outbox
from agent.delivery.topics import Topics
from agent.demo import AgentEnded
from agent.domain import Frame
from agent.errors import (
    BrokerRefused,
    BrokerUnavailable,
    CameraError,
    ConfigError,
    FrameUnreadable,
    HematoVisionError,
    ModelError,
    OutboxDamaged,
    OutboxError,
)
from agent.inference.manifest import load_manifest
from agent.offline import AlbumError
from tests.model_folders import put_models

TOP = Path(__file__).resolve().parent.parent
COMMANDS = ("run", "infer", "classify", "demo", "check-config", "selftest", "outbox", "ask", "audit", "version")

needs_models = pytest.mark.skipif(
    not (packaged_folder() / "models" / "manifest.json").is_file(), reason="the models are not there"
)


def environment(**more: str) -> dict[str, str]:
    """The variables of this process, without settings of the agent."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HEMATOVISION_")}
    return {**kept, "PYTHONPATH": str(TOP), **more}


def hematovision(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "agent", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(**more),
    )


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """The command in this process: exit code, standard output, standard error."""
    for name in [name for name in os.environ if name.startswith("HEMATOVISION_")]:
        monkeypatch.delenv(name)

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        assert "Traceback" not in output.err
        return int(end.value.code or 0), output.out, output.err

    return call


@pytest.fixture(scope="session")
def fields_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fields of the simulated slide; their names sort as 2, 10, sub/1."""
    folder = tmp_path_factory.mktemp("fields")
    (folder / "sub").mkdir()
    camera = open_camera(CameraSection(simulated=SimulatedSection(seed=3, fields=3, interval_s=0)))
    for name in ("field2.png", "field10.png", "sub/field1.png"):
        frame = camera.read()
        assert isinstance(frame, Frame)
        cv2.imwrite(str(folder / name), frame.pixels_bgr)
    camera.close()
    return folder


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# Help and usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example_and_the_exit_codes(
    command: str, call: Callable[..., tuple[int, str, str]]
):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert RESEARCH_USE_ONLY in out
    assert f"example:\n  hematovision {command}" in out
    assert "130  ended by Ctrl-C" in out


def test_the_help_names_every_command_and_every_command_is_one_that_does_something():
    from agent import commands

    words = build_parser().format_help()
    for command in COMMANDS:
        assert re.search(rf"^    {command}\b", words, re.MULTILINE)
        assert callable(getattr(commands, command.replace("-", "_")))


def test_the_version_is_one_line(call: Callable[..., tuple[int, str, str]]):
    assert call("--version") == (0, f"hematovision-agent {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "COMMAND"),
        (("walk",), "invalid choice: 'walk'"),
        (("infer",), "PATH"),
        (("infer", "--min-score", "2", "x"), "found '2'; allowed: a number from 0 to 1"),
        (("demo", "--fields", "many"), "found 'many'; allowed: a whole number from 1"),
        (("demo", "--port", "70000"), "found '70000'; allowed: a whole number from 1 to 65535"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: tuple[str, ...], expected: str, call: Callable[..., tuple[int, str, str]]
):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert expected in err


# infer ----------------------------------------------------------------------------------------------------------------


@needs_models
def test_infer_prints_the_field_payload_of_each_picture_in_natural_order(
    fields_folder: Path, call: Callable[..., tuple[int, str, str]]
):
    code, out, err = call("infer", "--json", fields_folder)
    lines = json_lines(out)
    assert (code, err) == (0, "")
    sources = [line.pop("source") for line in lines]
    assert sources == [str(fields_folder / name) for name in ("field2.png", "field10.png", "sub/field1.png")]
    validator = jsonschema.Draft202012Validator(load_schema("field"))
    for number, line in enumerate(lines, start=1):
        validator.validate(line)
        assert (line["seq"], line["frame"]["n"], line["ruo"]) == (number, number, True)
    ids = [cell["cell_id"] for line in lines for cell in line["cells"]]
    assert len(ids) == len(set(ids))


@needs_models
def test_infer_names_cells_with_the_classifier_that_the_configuration_names(
    fields_folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    config = tmp_path / "config.yaml"
    for entry in load_manifest(packaged_folder() / "models").classifiers:
        config.write_text(f"models: {{classifier: {entry.name}}}\n")
        code, out, _ = call("infer", "--json", "--config", config, fields_folder / "field2.png")
        (line,) = json_lines(out)
        assert (code, line["provenance"]["classifier"]["name"]) == (0, entry.name)
        assert line["provenance"]["classifier"]["sha256"] == entry.sha256
    config.write_text("models: {classifier: resnet}\n")
    code, out, err = call("infer", config.parent, "--config", config)
    assert (code, out) == (3, "")
    assert "these models have no classifier resnet, but" in err


@pytest.fixture
def activated(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A device that counts with the models 9.9, which were activated in slot a: its configuration, those, and the
    configured ones, 8.8.
    """
    configured = put_models(tmp_path / "mine", "8.8")
    slot = put_models(tmp_path / "models" / "a", "9.9")
    (tmp_path / "models" / "active.json").write_text('{"slot": "a", "before": "base", "trial_starts": null}')
    config = tmp_path / "config.yaml"
    config.write_text(f"outbox: {{folder: {tmp_path}}}\nmodels: {{folder: {configured}}}\n")
    return config, slot, configured


@needs_models
@pytest.mark.parametrize("command", ["infer", "classify"])
def test_stored_pictures_are_named_by_the_models_that_the_agent_uses_unless_others_are_named(
    command: str,
    fields_folder: Path,
    activated: tuple[Path, Path, Path],
    call: Callable[..., tuple[int, str, str]],
) -> None:
    config, slot, configured = activated
    asked = (command, "--config", config, fields_folder / "field2.png")
    _, out, err = call(*asked)
    assert out.startswith(f"models {slot}: yolov10n ")
    assert " 9.9; " in out.splitlines()[0]
    assert err == ""
    _, out, err = call(*asked, "--json")
    assert json_lines(out)[0]["provenance"]["classifier"]["version"] == "9.9"
    assert err.startswith(f"hematovision: models {slot}: yolov10n ")
    assert f"slot a is in use ({slot}), {configured} is not" in err
    _, out, err = call(*asked, "--json", "--models", configured)
    assert json_lines(out)[0]["provenance"]["classifier"]["version"] == "8.8"
    assert err == ""
    (slot.parent / "active.json").write_text("{")
    _, out, err = call(*asked, "--json")
    assert json_lines(out)[0]["provenance"]["classifier"]["version"] == "8.8"
    assert "active.json: is damaged; which models were activated is not known; the configured ones are used" in err


@needs_models
def test_infer_goes_on_after_what_it_cannot_read_and_ends_with_1(
    fields_folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
):
    bad, empty, missing = tmp_path / "bad.png", tmp_path / "empty", tmp_path / "missing.png"
    bad.write_bytes(b"no picture")
    empty.mkdir()
    good = fields_folder / "field2.png"
    code, out, err = call("infer", "--json", bad, empty, missing, good)
    lines = json_lines(out)
    assert code == 1
    assert [line["source"] for line in lines] == [str(bad), str(empty), str(missing), str(good)]
    assert [sorted(line) for line in lines[:3]] == [["error", "source"]] * 3
    assert "no pictures in this folder" in lines[1]["error"]
    assert "cells" in lines[3]
    assert [line.startswith("hematovision: error: ") for line in err.splitlines()] == [True] * 3


@needs_models
def test_infer_without_json_shows_a_table_of_cells_for_one_picture_and_a_line_for_each_of_many(
    fields_folder: Path, call: Callable[..., tuple[int, str, str]]
):
    code, out, err = call("infer", fields_folder / "field2.png")
    assert (code, err) == (0, "")
    assert "probability" in out
    assert RESEARCH_USE_ONLY in out
    code, out, _ = call("infer", fields_folder)
    assert out.count("field2.png: ") == 1
    assert "3 fields" in out
    assert RESEARCH_USE_ONLY in out


@needs_models
def test_infer_analyses_a_dark_frame_and_tells_what_the_gate_says(
    tmp_path: Path, fields_folder: Path, call: Callable[..., tuple[int, str, str]]
):
    dark = tmp_path / "dark.png"
    cv2.imwrite(str(dark), cv2.imread(str(fields_folder / "field2.png")) // 32)
    code, out, _ = call("infer", "--json", dark)
    assert (code, json_lines(out)[0]["quality"]["accepted"]) == (0, False)
    assert "refuse this frame: dark" in call("infer", dark, dark)[1]


@needs_models
def test_a_lower_min_score_finds_no_fewer_cells(fields_folder: Path, call: Callable[..., tuple[int, str, str]]):
    def cells(*options: str) -> int:
        return len(json_lines(call("infer", "--json", *options, fields_folder / "field2.png")[1])[0]["cells"])

    assert cells("--min-score", "0.05") >= cells() >= cells("--min-score", "0.99")


@needs_models
def test_annotated_pictures_are_saved_under_their_names_and_do_not_overwrite_each_other(
    fields_folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
):
    album = tmp_path / "album"
    code, _, _ = call("infer", "--save-annotated", album, fields_folder, fields_folder / "field2.png")
    assert code == 0
    saved = {str(path.relative_to(album)) for path in album.rglob("*.png")}
    assert saved == {"field2.png", "field2-2.png", "field10.png", "sub/field1.png"}
    picture = cv2.imread(str(album / "field2.png"))
    assert picture.shape[0] > 480


@pytest.mark.parametrize(("asked", "place"), [("field2.png", "."), (".", "sub"), ("sub/../field2.png", "sub/..")])
def test_annotated_pictures_never_go_where_a_picture_that_is_analysed_lies(
    asked: str, place: str, fields_folder: Path, call: Callable[..., tuple[int, str, str]]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in fields_folder.rglob("*")}
    code, out, err = call("infer", fields_folder / asked, "--save-annotated", fields_folder / place)
    assert (code, out) == (2, "")
    assert "lies in it, and could be overwritten; name a folder without pictures to analyse" in err
    assert {path: path.stat().st_mtime_ns for path in fields_folder.rglob("*")} == before


@needs_models
def test_a_place_that_takes_no_annotated_pictures_is_exit_code_5(
    fields_folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]
):
    (tmp_path / "file").touch()
    code, _, err = call("infer", "--save-annotated", tmp_path / "file" / "album", fields_folder)
    assert code == 5
    assert "the annotated picture cannot be written" in err


@needs_models
def test_ctrl_c_ends_infer_with_130_and_no_traceback(fields_folder: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "infer", "--json", *[str(fields_folder)] * 500],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "hematovision: ended by Ctrl-C\n")


@needs_models
def test_a_reader_that_goes_away_ends_infer_quietly(fields_folder: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "infer", "--json", *[str(fields_folder)] * 500],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) == 141
    assert process.stderr.read() == ""
    process.stderr.close()


@needs_models
def test_the_progress_bar_is_drawn_on_a_terminal_only(fields_folder: Path):
    assert hematovision("infer", "--json", fields_folder).stderr == ""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "infer", "--json", str(fields_folder)],
        stdout=subprocess.DEVNULL,
        stderr=follower,
        env=environment(TERM="xterm"),
    )
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
    assert b"fields" in shown
    assert b"/3" in shown


# classify -------------------------------------------------------------------------------------------------------------


@needs_models
def test_classify_names_each_crop(fields_folder: Path, tmp_path: Path, call: Callable[..., tuple[int, str, str]]):
    crop, bad = tmp_path / "crop.png", tmp_path / "bad.png"
    cv2.imwrite(str(crop), cv2.imread(str(fields_folder / "field2.png"))[100:180, 100:180])
    bad.touch()
    code, out, err = call("classify", "--json", crop, bad)
    named, failed = json_lines(out)
    assert code == 1
    described = ["cell_probability", "morphology", "provenance"]
    assert list(named) == ["source", "class", "probability", "is_trusted", "probabilities", *described]
    assert list(named["probabilities"]) == list(load_manifest(packaged_folder() / "models").classifier.classes)
    assert sum(named["probabilities"].values()) == pytest.approx(1)
    assert named["probability"] == max(named["probabilities"].values()) == named["probabilities"][named["class"]]
    assert sorted(failed) == ["error", "source"]
    assert str(bad) in err


@needs_models
def test_classify_without_json_is_readable(fields_folder: Path, call: Callable[..., tuple[int, str, str]]):
    code, out, _ = call("classify", fields_folder / "field2.png")
    assert code == 0
    assert "probability" in out
    assert RESEARCH_USE_ONLY in out


@needs_models
def test_classify_says_where_the_agent_would_trust_no_name(tmp_path: Path, call: Callable[..., tuple[int, str, str]]):
    nothing, cell = tmp_path / "nothing.png", tmp_path / "cell.png"
    cv2.imwrite(str(nothing), np.full((120, 120, 3), 245, np.uint8))
    cv2.imwrite(str(cell), render_training_crop(np.random.default_rng(2), "neutrophil", 128)[..., ::-1])
    assert [line["is_trusted"] for line in json_lines(call("classify", "--json", nothing)[1])] == [False]
    assert "unidentified: no name is trusted" in call("classify", nothing)[1]
    _, out, _ = call("classify", nothing, cell)
    assert f"{nothing}: unidentified, most like " in out
    assert f"{cell}: neutrophil 0." in out


# Failures of what the commands need -----------------------------------------------------------------------------------


def test_a_configuration_with_faults_is_exit_code_2_with_all_of_them(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("site: X\nbroker: {port: 0}\n")
    for command in (("run", "--config"), ("check-config",)):
        done = hematovision(*command, file)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"hematovision: error: {file}: 2 faults\n  site (line 1)")
        assert "Traceback" not in done.stderr


def test_models_that_cannot_be_used_are_exit_code_3(tmp_path: Path, fields_folder: Path):
    for command in (("infer", fields_folder), ("classify", fields_folder), ("version",)):
        done = hematovision(*command, HEMATOVISION_MODELS__FOLDER=str(tmp_path))
        assert done.returncode == 3
        assert "there is no model manifest here" in done.stderr
        assert "Traceback" not in done.stderr


def test_an_outbox_that_cannot_be_stored_is_exit_code_5(tmp_path: Path):
    (tmp_path / "file").touch()
    done = hematovision("run", HEMATOVISION_OUTBOX__FOLDER=str(tmp_path / "file" / "state"))
    assert done.returncode == 5
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HematoVisionError("x"), 1),
        (ConfigError("x", ("y",)), 2),
        (ModelError("x"), 3),
        (CameraError("x"), 4),
        (FrameUnreadable("x", "y"), 4),
        (OutboxError("x"), 5),
        (OutboxDamaged("x"), 5),
        (AlbumError("x"), 5),
        (BrokerUnavailable("x"), 6),
        (BrokerRefused("x"), 6),
        (AgentEnded(3, "last words"), 3),
        (AgentEnded(-9, "last words"), 1),
    ],
)
def test_every_failure_that_is_foreseen_has_its_exit_code_and_a_message_without_traceback(
    error: HematoVisionError, code: int, call: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
):
    def fail(_arguments: object) -> int:
        raise error

    monkeypatch.setattr("agent.commands.version", fail)
    assert call("version") == (code, "", f"hematovision: error: {error}\n")


# check-config ---------------------------------------------------------------------------------------------------------


def write_config(folder: Path, port: int, **sections: Any) -> Path:
    file = folder / "c.yaml"
    outbox = {"folder": str(folder / "state")}
    file.write_text(json.dumps({"broker": {"port": port}, "outbox": outbox, **sections}))
    return file


@needs_models
def test_check_config_passes_where_all_is_well(
    mosquitto: Callable[..., Any], tmp_path: Path, call: Callable[..., tuple[int, str, str]]
):
    code, out, err = call("check-config", write_config(tmp_path, mosquitto().port))
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()[:-1]] == [
        ["pass", "configuration"],
        ["pass", "passwords"],
        ["pass", "models"],
        ["pass", "commands"],
        ["pass", "reference"],
        ["pass", "camera"],
        ["pass", "broker"],
        ["pass", "outbox"],
        ["pass", "page"],
    ]
    assert RESEARCH_USE_ONLY in out
    assert not (tmp_path / "state").exists(), "a check leaves nothing behind"


def test_check_config_tries_everything_and_says_what_fails(tmp_path: Path, call: Callable[..., tuple[int, str, str]]):
    (tmp_path / "state").touch()  # a file where a folder should be
    sections = {"camera": {"kind": "folder", "folder": {"path": "absent"}}, "models": {"folder": "absent"}}
    code, out, err = call("check-config", write_config(tmp_path, 1, **sections))
    assert (code, err) == (1, "")
    assert [line.split()[:2] for line in out.splitlines()[2:-1]] == [
        ["FAIL", "models"],
        ["pass", "commands"],
        ["pass", "reference"],
        ["FAIL", "camera"],
        ["FAIL", "broker"],
        ["FAIL", "outbox"],
        ["pass", "page"],
    ]


def test_check_config_prints_the_schema_and_the_template(call: Callable[..., tuple[int, str, str]]):
    assert json.loads(call("check-config", "--schema")[1]) == json_schema()
    assert call("check-config", "--template")[1] == (TOP / "config.yaml").read_text()


# audit ----------------------------------------------------------------------------------------------------------------


def test_audit_verify_tells_an_unbroken_chain_from_a_changed_one(
    tmp_path: Path, call: Callable[..., tuple[int, str, str]]
):
    drafts, _ = chain(
        [Entry("cmd.start", "done", f"sample s-{n}") for n in range(3)],
        ChainHead(),
        Topics("lab", "scope"),
        boot=1,
        at=datetime(2026, 11, 25, tzinfo=timezone.utc),
    )
    lines = [json.dumps({**draft.body, "seq": n, "historical": False}) for n, draft in enumerate(drafts)]
    file = tmp_path / "audit.jsonl"
    file.write_text("\n".join(lines))
    code, out, _ = call("audit", "verify", file)
    assert (code, "3 entries (1 to 3)" in out, "pass: an unbroken chain" in out) == (0, True, True)
    file.write_text("\n".join(lines).replace("s-1", "s-9"))
    code, out, _ = call("audit", "verify", file)
    assert (code, "entry 2 was changed" in out) == (1, True)


def test_audit_verify_of_no_audit_message_at_all_is_no_proof(tmp_path: Path, call: Callable[..., tuple[int, str, str]]):
    """An empty file, or one of something else: whoever emptied it would pass."""
    file = tmp_path / "audit.jsonl"
    for content in ("", '{"schema":"hv/1/event"}\n'):
        file.write_text(content)
        code, out, _ = call("audit", "verify", file)
        assert (code, "pass" in out, "no audit message" in out) == (1, False, True)


def test_audit_verify_passes_over_pictures_between_the_messages(
    monkeypatch: pytest.MonkeyPatch, call: Callable[..., tuple[int, str, str]]
):
    """What `mosquitto_sub` writes of all topics of a device holds JPEG bytes too."""
    drafts, _ = chain(
        [Entry("cmd.start", "done", "s")], ChainHead(), Topics("lab", "scope"), boot=1, at=datetime.now(timezone.utc)
    )
    content = json.dumps({**drafts[0].body, "historical": False}).encode() + b"\n\xff\xd8\xff\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    code, out, _ = call("audit", "verify", "-")
    assert (code, "1 entries (1 to 1)" in out) == (0, True)


def test_audit_verify_of_a_missing_file_is_told(tmp_path: Path, call: Callable[..., tuple[int, str, str]]):
    code, _, err = call("audit", "verify", tmp_path / "none.jsonl")
    assert (code, "cannot be read" in err) == (1, True)


# outbox ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def outbox_folder(tmp_path: Path) -> Path:
    """Three events wait, one more is a dead letter."""
    folder = tmp_path / "state"
    begin_boot(folder)
    with open_outbox(folder, min_free_mb=0, device="m") as outbox:
        body = {"schema": "hv/1/event", "device": "m"}
        rows = outbox.append([Draft("event", f"hv/1/s/m/event/{number}", body) for number in range(4)])
        outbox.reject(rows[0], "not authorised")
    return folder


def test_outbox_tells_depth_age_and_dead_letters(outbox_folder: Path, call: Callable[..., tuple[int, str, str]]):
    code, out, _ = call("outbox", "--folder", outbox_folder)
    assert code == 0
    assert re.search(r"waiting +3 messages\noldest +\d+ s\ndead letters +1\n", out)
    assert RESEARCH_USE_ONLY in out


def test_outbox_lists_and_exports_what_waits_and_what_was_refused(
    outbox_folder: Path, call: Callable[..., tuple[int, str, str]]
):
    assert call("outbox", "list", "--folder", outbox_folder)[1].count("hv/1/s/m/event/") == 3
    assert call("outbox", "list", "--limit", "2", "--folder", outbox_folder)[1].count("hv/1/s/m/event/") == 2
    assert "not authorised" in call("outbox", "list", "--dead", "--folder", outbox_folder)[1]
    waiting = json_lines(call("outbox", "export", "--folder", outbox_folder)[1])
    assert [line["message"]["seq"] for line in waiting] == [2, 3, 4]
    dead = json_lines(call("outbox", "export", "--dead", "--folder", outbox_folder)[1])
    assert [(line["message"]["seq"], line["reason"]) for line in dead] == [(1, "not authorised")]


def test_outbox_sends_dead_letters_again_when_asked(outbox_folder: Path, call: Callable[..., tuple[int, str, str]]):
    assert "1 dead letters wait again, 0 stay" in call("outbox", "requeue", "--folder", outbox_folder)[1]
    assert "4 messages" in call("outbox", "--folder", outbox_folder)[1]


def test_a_dead_letter_can_be_looked_at_sent_again_and_thrown_away_by_its_number(
    outbox_folder: Path, call: Callable[..., tuple[int, str, str]]
):
    assert json.loads(call("outbox", "inspect", "1", "--folder", outbox_folder)[1])["reason"] == "not authorised"
    assert "1 dead letters wait again, 0 stay" in call("outbox", "requeue", "1", "--folder", outbox_folder)[1]
    code, _, err = call("outbox", "discard", "1", "--folder", outbox_folder)
    assert (code, "there is no dead letter 1" in err) == (5, True)
    with open_outbox(outbox_folder, min_free_mb=0, device="m") as outbox:
        outbox.reject(outbox.pending(0, 1)[0].row_id, "too large")
        (letter,) = outbox.dead_letters()
    assert "name the dead letters" in call("outbox", "discard", "--folder", outbox_folder)[2]
    out = call("outbox", "discard", str(letter.letter_id), "--folder", outbox_folder)[1]
    assert "1 dead letters thrown away, 0 stay" in out


def test_outbox_finds_its_folder_in_the_configuration(outbox_folder: Path, call: Callable[..., tuple[int, str, str]]):
    config = outbox_folder.parent / "c.yaml"
    config.write_text("outbox: {folder: state}")
    assert "3 messages" in call("outbox", "--config", config)[1]


def test_without_an_outbox_the_exit_code_is_5(tmp_path: Path, call: Callable[..., tuple[int, str, str]]):
    code, _, err = call("outbox", "--folder", tmp_path)
    assert code == 5
    assert "there is no outbox" in err


# version --------------------------------------------------------------------------------------------------------------


@needs_models
def test_version_names_agent_runtime_and_models_with_their_digests(call: Callable[..., tuple[int, str, str]]):
    code, out, _ = call("version")
    assert code == 0
    manifest = load_manifest(packaged_folder() / "models")
    for word in (__version__, manifest.detector.sha256, manifest.classifier.sha256, "tflite", RESEARCH_USE_ONLY):
        assert word in out or (word == "tflite" and "litert" in out)


@needs_models
def test_version_names_the_models_that_were_activated_and_how_to_come_back_to_the_configured_ones(
    call: Callable[..., tuple[int, str, str]], activated: tuple[Path, Path, Path]
) -> None:
    config, slot, configured = activated
    code, out, _ = call("version", "--config", config)
    assert code == 0
    assert " 9.9, sha256" in out
    assert " 8.8, sha256" not in out
    assert f"slot a is in use ({slot}), {configured} is not; to use it" in out
    (slot.parent / "active.json").unlink()
    _, out, _ = call("version", "--config", config)
    assert " 8.8, sha256" in out
    assert "slot" not in out


# selftest -------------------------------------------------------------------------------------------------------------


@needs_models
def test_selftest_passes_for_the_shipped_models_and_says_how_each_field_was_compared(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"outbox: {{folder: {tmp_path}}}\n")
    code, out, err = call("selftest", "--config", config)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[1:-1]] == [["pass", name] for name in ("a", "b", "c", "empty")]
    assert lines[-1].startswith("pass: 4 golden fields")
    assert RESEARCH_USE_ONLY in lines[-1]


@needs_models
def test_models_without_answers_fail_until_one_command_has_made_them(
    call: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    folder = put_models(tmp_path / "mine", "9.9")
    (folder / "golden.json").unlink()
    code, out, _ = call("selftest", "--models", folder)
    assert code == 1
    assert f"FAIL: self-test: {folder / 'golden.json'}: these models have no known answers" in out
    assert "hematovision selftest --make-answers" in out
    assert call("selftest", "--models", folder, "--make-answers")[0] == 0
    code, out, _ = call("selftest", "--models", folder)
    assert code == 0
    assert "compared bit by bit" in out


# run ------------------------------------------------------------------------------------------------------------------


@needs_models
def test_run_ends_with_0_at_sigterm(tmp_path: Path, mosquitto: Callable[..., Any]):
    config = write_config(tmp_path, mosquitto().port, camera={"simulated": {"interval_s": 0.1}})
    process = subprocess.Popen(
        [sys.executable, "-m", "agent", "run", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline_s = time.monotonic() + 30
    while not (tmp_path / "state" / "outbox.db").exists() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    time.sleep(2)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in err


@needs_models
@pytest.mark.parametrize("is_journal", [True, False])
def test_lines_of_the_log_have_their_time_but_in_the_journal(is_journal: bool, tmp_path: Path) -> None:
    """Terminals of desktops hand JOURNAL_STREAM on, whose journal is not where the lines go."""
    config = write_config(tmp_path, 1, camera={"simulated": {"fields": 1}})
    reader, writer = os.pipe()
    place = os.fstat(writer)
    stream = f"{place.st_dev}:{place.st_ino}" if is_journal else f"{place.st_dev}:{place.st_ino + 1}"
    command = [sys.executable, "-m", "agent", "run", "--config", str(config)]
    with os.fdopen(reader) as lines:
        process = subprocess.Popen(command, stderr=writer, env=environment(JOURNAL_STREAM=stream))
        os.close(writer)
        first = lines.readline()
        process.terminate()
        lines.read()
    process.wait(60)
    assert bool(re.match(r"20\d\d-\d\d-\d\d \d\d:", first)) is not is_journal, first


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("version",), ("check-config", "--schema"), ("check-config", "--template")])
def test_an_output_that_cannot_be_written_is_one_line_and_exit_code_5(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "agent", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr == "hematovision: error: the output cannot be written: No space left on device\n"


@needs_models
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_who_starts_it_with_closed_streams_gets_the_same_exit_code(closed: str) -> None:
    """As programs that start others, and lines of a crontab, do."""
    command = f'exec "{sys.executable}" -m agent version {closed}'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
    assert ("classifier" in done.stdout) is (closed == "2>&-")


def test_names_outside_the_terminals_encoding_are_written_with_escapes(fields_folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "größe.png"
    picture.write_bytes((fields_folder / "field2.png").read_bytes())
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "agent", "infer", str(picture)]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
