"""What check-config tries: each failure is told with its remedy, and no check leaves anything behind."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent.config import Config, loads, packaged_folder
from agent.delivery.messages import Draft
from agent.delivery.outbox import begin_boot, open_outbox
from agent.errors import OutboxError
from agent.preflight import Check, run_checks
from agent.supervisor import make_room_to_start
from tests.disks import mounted, use_up_files, use_up_space
from tests.model_folders import put_models

needs_models = pytest.mark.skipif(
    not (packaged_folder() / "models" / "manifest.json").is_file(), reason="the models are not there"
)


def make_config(text: str, folder: Path) -> Config:
    return loads(text, "test", folder=folder, environment={})


def check(name: str, text: str, folder: Path) -> Check:
    """The outcome of one of the checks. The broker of the text should answer or refuse at once."""
    return next(check for check in run_checks(make_config(text, folder)) if check.name == name)


@needs_models
def test_a_model_file_of_which_one_byte_changed_fails(tmp_path: Path):
    shutil.copytree(packaged_folder() / "models", tmp_path / "models", ignore=shutil.ignore_patterns("*.py", "*.md"))
    file = next((tmp_path / "models").rglob("*.tflite"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = check("models", "models: {folder: models}", tmp_path)
    assert not found.is_passed
    assert "SHA-256" in found.words
    assert str(file) in found.words


@needs_models
def test_that_activated_models_are_in_use_and_the_configured_ones_are_not_is_told(tmp_path: Path):
    text = "outbox: {folder: state}"
    assert "in use" not in check("models", text, tmp_path).words
    put_models(tmp_path / "state" / "models" / "a", "9.9")
    note = tmp_path / "state" / "models" / "active.json"
    note.write_text('{"slot": "a", "before": "base", "trial_starts": null}')
    found = check("models", text, tmp_path)
    assert found.is_passed
    assert " 9.9 load" in found.words
    assert f"{packaged_folder() / 'models'} is not; to use it, put it into" in found.words
    note.write_text("{")
    assert f"{note}: is damaged; which models were activated is not known" in check("models", text, tmp_path).words


def test_a_watched_folder_may_be_empty_and_a_folder_read_once_may_not(tmp_path: Path):
    (tmp_path / "fields").mkdir()
    text = "camera: {{kind: folder, folder: {{path: fields, watch: {watch}, settle_s: 0}}}}"
    watched = check("camera", text.format(watch="true"), tmp_path)
    assert watched.is_passed
    assert "no picture is there yet" in watched.words
    assert not check("camera", text.format(watch="false"), tmp_path).is_passed


def test_a_folder_in_which_no_picture_can_be_read_fails_with_the_reason(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    found = check("camera", "camera: {kind: folder, folder: {path: .}}", tmp_path)
    assert not found.is_passed
    assert "a.png: not a picture" in found.words


def test_the_broker_takes_the_right_password_and_refuses_a_wrong_one(
    mosquitto: Callable[..., Any], mosquitto_password_file: Callable[[str, str], Path], tmp_path: Path
):
    users = mosquitto_password_file("bench", "right")
    broker = mosquitto(f"allow_anonymous false\npassword_file {users}")
    password = tmp_path / "password"
    password.touch(mode=0o600)
    text = f"broker: {{port: {broker.port}, username: bench, password_file: password}}"
    password.write_text("right\n")
    found = check("broker", text, tmp_path)
    assert found.is_passed
    assert "as user bench, MQTT 5, not encrypted" in found.words
    password.write_text("wrong\n")
    found = check("broker", text, tmp_path)
    assert not found.is_passed
    assert "refuses us" in found.words
    assert "wrong" not in found.words


def test_a_broker_without_mqtt_5_is_met_with_3_1_1(nats: Callable[..., Any], tmp_path: Path):
    found = check("broker", f"broker: {{port: {nats().port}}}", tmp_path)
    assert found.is_passed, found.words
    assert "MQTT 3.1.1" in found.words


def test_an_agent_that_runs_is_not_thrown_out(
    mosquitto: Callable[..., Any], subscriber: Callable[..., Any], tmp_path: Path
):
    """And nobody hears of the check: it has no Will that says anything."""
    broker = mosquitto()
    ears = subscriber(broker, "#")
    assert check("broker", f"broker: {{port: {broker.port}}}", tmp_path).is_passed
    assert ears.messages == []
    assert "-check" in broker.log_text()


def test_tls_to_a_port_without_it_fails_with_a_hint(mosquitto: Callable[..., Any], tmp_path: Path):
    found = check("broker", f"broker: {{port: {mosquitto().port}, tls: {{enabled: true}}}}", tmp_path)
    assert not found.is_passed
    assert "TLS" in found.words


def test_the_outboxs_disk_must_have_the_room_that_is_to_be_left_free(tmp_path: Path):
    found = check("outbox", "outbox: {folder: state, min_free_mb: 1000000}", tmp_path)
    assert not found.is_passed
    assert "min_free_mb" in found.words
    assert list(tmp_path.iterdir()) == []


def test_an_outbox_folder_that_is_not_there_yet_passes_and_is_not_made(tmp_path: Path):
    found = check("outbox", "outbox: {folder: a/b/state, min_free_mb: 0}", tmp_path)
    assert found.is_passed, found.words
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_files_left_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "state").mkdir()
    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    found = check("outbox", "outbox: {folder: state}", tmp_path)
    assert not found.is_passed
    assert f"{tmp_path / 'state'}: cannot be written: the disk is full; free space there, or files" in found.words


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB with room for 80 files."""
    with mounted(tmp_path / "small-disk", "size=16m,nr_inodes=80") as folder:
        yield folder


def put_pictures(state: Path, count: int, size_mb: float) -> list[Path]:
    """An outbox at its first boot, and whole fields beside it."""
    begin_boot(state)
    with open_outbox(state, min_free_mb=0) as outbox:
        outbox.append([Draft("event", "check", {"schema": "check"})])
    pictures = [state / "pictures" / f"{number}.png" for number in range(count)]
    pictures[0].parent.mkdir()
    for path in pictures:
        path.write_bytes(bytes(int(size_mb * 2**20)))
    return pictures


def start(state: Path) -> None:
    """What a start does for room, and all that it writes first. Raises OutboxError."""
    make_room_to_start(state)
    begin_boot(state)
    with open_outbox(state, min_free_mb=0) as outbox:
        outbox.append([Draft("event", "check", {"schema": "check"})])


@pytest.mark.parametrize("use_up", [use_up_space, lambda disk: use_up_files(disk / "others")], ids=["space", "files"])
def test_a_full_disk_on_which_a_start_makes_room_passes_and_nothing_goes(
    small_disk: Path, use_up: Callable[[Path], object]
):
    pictures = put_pictures(small_disk / "state", 8, 1)
    use_up(small_disk)
    before = sorted(small_disk.rglob("*"))
    found = check("outbox", "outbox: {folder: state, min_free_mb: 0}", small_disk)
    assert found.is_passed, found.words
    assert "a start lets the oldest pictures beside the outbox go" in found.words
    assert sorted(small_disk.rglob("*")) == before
    start(small_disk / "state")
    assert not all(path.exists() for path in pictures)


@pytest.mark.parametrize("use_up", [use_up_space, lambda disk: use_up_files(disk / "others")], ids=["space", "files"])
def test_a_full_disk_on_which_a_start_finds_too_few_pictures_fails_as_the_start_does(
    small_disk: Path, use_up: Callable[[Path], object]
):
    put_pictures(small_disk / "state", 1, 0)
    use_up(small_disk)
    before = sorted(small_disk.rglob("*"))
    found = check("outbox", "outbox: {folder: state, min_free_mb: 0}", small_disk)
    assert not found.is_passed
    assert "the disk is full; free space there, or files or quota" in found.words
    assert sorted(small_disk.rglob("*")) == before
    with pytest.raises(OutboxError, match="the disk is full"):
        start(small_disk / "state")


def test_below_the_room_that_is_to_be_left_free_pictures_count_as_room_while_they_are_kept(small_disk: Path):
    put_pictures(small_disk / "state", 4, 1)
    text = "outbox: {{folder: state, min_free_mb: {least}}}\npictures: {{keep_mb: {keep}}}"
    found = check("outbox", text.format(least=14, keep=100), small_disk)
    assert found.is_passed, found.words
    assert "14 must stay free (outbox.min_free_mb): the agent lets the oldest pictures" in found.words
    assert not check("outbox", text.format(least=14, keep=0), small_disk).is_passed
    found = check("outbox", text.format(least=20, keep=100), small_disk)
    assert not found.is_passed
    assert "and only 4.0 MB of ours may go: the agent would take no field in" in found.words


def test_an_outbox_below_a_file_fails(tmp_path: Path):
    (tmp_path / "state").touch()
    found = check("outbox", "outbox: {folder: state}", tmp_path)
    assert not found.is_passed
    assert "Not a directory" in found.words


def test_a_password_file_is_read_and_never_shown(tmp_path: Path):
    text = "broker: {username: bench, password_file: password}"
    found = check("passwords", text, tmp_path)
    assert not found.is_passed
    assert "password" in found.words
    (tmp_path / "password").touch(mode=0o600)
    (tmp_path / "password").write_text("hunter2\n")
    found = check("passwords", text, tmp_path)
    assert found.is_passed
    assert "hunter2" not in found.words
    assert check("passwords", "", tmp_path).words == "none are named"


def test_an_operators_key_must_be_there_and_long_enough(tmp_path: Path):
    text = "commands: {operator: key, operator_key_file: op.key}"
    assert "cannot be read" in check("commands", text, tmp_path).words
    (tmp_path / "op.key").write_text("short")
    short = check("commands", text, tmp_path)
    assert (short.is_passed, "openssl rand -hex 32" in short.words) == (False, True)
    (tmp_path / "op.key").write_text("0123456789abcdef" * 2)
    found = check("commands", text, tmp_path)
    assert found.is_passed
    assert "0123456789" not in found.words


def test_the_laboratorys_reference_table_is_read(tmp_path: Path):
    (tmp_path / "own.yaml").write_text("- {class: x, age_band: adult, low_pct: 9, high_pct: 2, source: s}")
    found = check("reference", "differential: {reference_file: own.yaml}", tmp_path)
    assert (found.is_passed, "row 1" in found.words) == (False, True)
    assert check("reference", "", tmp_path).is_passed


def test_the_page_is_tried_with_its_password_and_its_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HEMATOVISION_WEB_PASSWORD", raising=False)
    assert "not served" in check("page", "", tmp_path).words
    assert "for this computer alone" in check("page", "web: {enabled: true}", tmp_path).words
    assert "can be read on the way" in check("page", "web: {enabled: true, host: 0.0.0.0}", tmp_path).words
    assert not check("passwords", "web: {enabled: true, host: 0.0.0.0}", tmp_path).is_passed
    (tmp_path / "page.pem").write_text("no certificate")
    found = check("page", "web: {enabled: true, certificate_file: page.pem}", tmp_path)
    assert not found.is_passed
    assert "no certificate with its key" in found.words
