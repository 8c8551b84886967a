"""Signed reports: what was changed, by one byte or one word, does not hold."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from making import AT, TOPICS, make_report

from agent.cli import main
from agent.delivery.messages import RetainedDocument
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.errors import ConfigError
from agent.report.signature import SignatureWrong, open_key, public_hex, sign, verify
from tests.disks import mounted, use_up_space

pytest.importorskip("cryptography")

REPORT = b"<!DOCTYPE html> a report"


def test_a_signature_holds_and_says_who_and_when(tmp_path: Path) -> None:
    key = open_key(tmp_path / "key.pem", create=True)
    signed = verify(REPORT, sign(REPORT, "s-1", key, at=AT, by="dr-2"), public_hex(key))
    assert (signed.sample, signed.by, signed.at) == ("s-1", "dr-2", "2026-11-25T09:00:00.000Z")


def test_the_key_is_made_once_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "key.pem"
    first = public_hex(open_key(path, create=True))
    assert public_hex(open_key(path, create=True)) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("change", ["sample", "sha256", "at", "by", "public_key", "signature", "ruo"])
def test_a_statement_that_was_changed_in_any_word_does_not_hold(tmp_path: Path, change: str) -> None:
    key, other = (open_key(tmp_path / name, create=True) for name in ("a.pem", "b.pem"))
    spoken = json.loads(sign(REPORT, "s-1", key, at=AT, by="dr-2"))
    of_other = json.loads(sign(b"another", "s-2", other, at=AT.replace(year=2025), by="dr-3"))
    spoken[change] = not spoken[change] if change == "ruo" else of_other[change]
    with pytest.raises(SignatureWrong):
        verify(REPORT, json.dumps(spoken).encode())


def test_a_report_that_was_changed_in_one_byte_does_not_hold(tmp_path: Path) -> None:
    signature = sign(REPORT, "s-1", open_key(tmp_path / "key.pem", create=True), at=AT)
    for place in range(len(REPORT)):
        changed = REPORT[:place] + bytes([REPORT[place] ^ 1]) + REPORT[place + 1 :]
        with pytest.raises(SignatureWrong, match="changed after it was signed"):
            verify(changed, signature)


def test_another_devices_key_is_told(tmp_path: Path) -> None:
    key, other = (open_key(tmp_path / name, create=True) for name in ("a.pem", "b.pem"))
    with pytest.raises(SignatureWrong, match="another key"):
        verify(REPORT, sign(REPORT, "s-1", key, at=AT), public_hex(other))


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b"\xff", b'{"schema": 1, "public_key": "zz"}', b"[" * 100_000])
def test_what_is_no_signature_is_refused(text: bytes) -> None:
    with pytest.raises(SignatureWrong, match="no signature"):
        verify(REPORT, text)


def test_a_key_file_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    with pytest.raises(ConfigError, match="Ed25519"):
        open_key(tmp_path / "key.pem", create=True)
    with pytest.raises(ConfigError, match="cannot be used"):
        open_key(tmp_path / "not-there.pem", create=False)


def test_a_disk_without_room_for_the_key_leaves_none_that_is_broken(tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=64k") as disk:
        path = disk / "key.pem"
        filler = use_up_space(disk)
        with pytest.raises(ConfigError, match="No space left"):
            open_key(path, create=True)
        filler.unlink()
        first = public_hex(open_key(path, create=True))
        assert public_hex(open_key(path, create=True)) == first
        assert [file.name for file in disk.iterdir()] == ["key.pem"]


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, device="scope", min_free_mb=0) as opened:
        opened.append((), documents=[RetainedDocument(TOPICS.differential("s-1"), make_report({"round": 3}))])
        yield opened


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_where_there_is_no_outbox_no_key_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It would be the key of no device: the outbox that was meant is elsewhere."""
    folder = tmp_path / "elsewhere"
    assert run("report", "key", "--folder", str(folder)) != 0
    assert "there is no outbox" in capsys.readouterr().err
    assert not folder.exists()
    assert run("report", "key", "--folder", str(folder), "--key-file", str(tmp_path / "centre.pem")) == 0


@pytest.mark.usefixtures("outbox")
def test_the_commands_sign_verify_and_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"site: lab\ndevice: scope\noutbox: {{folder: {tmp_path}}}\n")
    at = ("--config", str(config))
    file = tmp_path / "s-1.html"
    assert run("report", "s-1", "--output", str(file), "--sign", "--by", "dr-2", *at) == 0
    assert run("report", "key", *at) == 0
    key = capsys.readouterr().out.strip()
    assert run("report", "verify", str(file), "--public-key", key) == 0
    assert "by dr-2" in capsys.readouterr().out
    file.write_bytes(file.read_bytes().replace(b"s-1", b"s-2"))
    assert run("report", "verify", str(file)) == 1
    assert "FAIL" in capsys.readouterr().out
    assert run("report", "verify", str(tmp_path / "not-there.html")) == 1
    assert run("report", "verify") == 2
    assert run("report", "s-1", "--sign", *at) == 2
    assert run("report", "s-1", "--output", str(file), "--sign", "--by", "Erika Muster", *at) == 2
