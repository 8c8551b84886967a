"""The record of a sample from a real outbox."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from making import AT, TOPICS, make_field, make_report

from agent.cli import main
from agent.delivery.messages import Draft, RetainedDocument
from agent.delivery.outbox import Outbox, begin_boot, open_outbox
from agent.delivery.reports import differential_draft
from agent.report.device import read_device, reported_samples
from agent.report.document import compose
from agent.report.record import NothingToReport


@pytest.fixture
def outbox(tmp_path: Path) -> Iterator[Outbox]:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, device="scope", min_free_mb=0, keep_mb=1, keep_hours=1) as opened:
        yield opened


def fill(outbox: Outbox) -> list[int]:
    """A sample with its report, two fields, and a field of another sample."""
    drafts = [Draft("field", TOPICS.field(sid), {"schema": "x", **make_field(1)}) for sid in ("s-1", "s-1", "s-2")]
    report = make_report({"round": 3})
    rows = outbox.append((*drafts, differential_draft(report, TOPICS, "s-1")))
    outbox.append((), documents=[RetainedDocument(TOPICS.differential("s-1"), report)])
    return list(rows)


def test_fields_are_found_whether_they_were_confirmed_or_not(outbox: Outbox) -> None:
    rows = fill(outbox)
    outbox.acknowledge(rows[:1])
    document = compose(read_device(outbox, TOPICS, "s-1"), AT)
    assert (document["quality"]["fields_here"], document["report"]) == (2, "s-1-r1")


def test_the_retained_differential_stays_when_the_messages_have_gone(tmp_path: Path) -> None:
    begin_boot(tmp_path)
    with open_outbox(tmp_path, device="scope", min_free_mb=0) as outbox:
        outbox.acknowledge(fill(outbox))
        document = compose(read_device(outbox, TOPICS, "s-1"), AT)
    assert (document["report"], document["quality"]["fields_here"]) == ("s-1-r1", 0)


def test_a_sample_that_runs_has_its_running_differential(outbox: Outbox) -> None:
    running = make_report({"round": 3}, 0)
    outbox.append((), documents=[RetainedDocument(TOPICS.differential("s-1"), running)])
    assert compose(read_device(outbox, TOPICS, "s-1"), AT)["status"] == "preliminary"
    assert reported_samples(outbox, TOPICS) == [("s-1", "preliminary")]


def test_samples_are_listed_behind_any_number_of_topics_that_no_broker_has_cleared_yet(outbox: Outbox) -> None:
    """Without a broker each sample leaves two of them behind."""
    outbox.append((), documents=[RetainedDocument(TOPICS.sample(f"old-{number}"), None) for number in range(1200)])
    fill(outbox)
    assert reported_samples(outbox, TOPICS) == [("s-1", "final")]


def test_an_unknown_sample_is_refused_in_words(outbox: Outbox) -> None:
    with pytest.raises(NothingToReport, match="report list"):
        read_device(outbox, TOPICS, "s-9")


def make_config(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(f"site: lab\ndevice: scope\noutbox: {{folder: {tmp_path}}}\n")
    return file


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


def test_the_command_writes_a_whole_file_and_lists_samples(
    outbox: Outbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(outbox)
    config, file = str(make_config(tmp_path)), tmp_path / "s-1.html"
    assert run("report", "s-1", "--output", str(file), "--config", config) == 0
    assert file.read_text().startswith("<!DOCTYPE html>")
    assert run("report", "list", "--config", config) == 0
    assert "s-1  final" in capsys.readouterr().out


def test_the_command_says_what_is_wrong(tmp_path: Path, outbox: Outbox, capsys: pytest.CaptureFixture[str]) -> None:
    fill(outbox)
    config = str(make_config(tmp_path))
    assert run("report", "s-9", "--config", config) == 1
    assert run("report", "../s-1", "--config", config) == 2
    assert run("report", "s-1", "--output", str(tmp_path / "no" / "file.html"), "--config", config) == 2
    (tmp_path / "folder").mkdir()
    assert run("report", "s-1", "--output", str(tmp_path / "folder"), "--config", config) == 2
    assert not list(tmp_path.glob(".*"))
    errors = capsys.readouterr().err
    assert "no differential of sample s-9" in errors
    assert f"--output {tmp_path / 'no' / 'file.html'}: 1 fault\n  cannot be written: No such file" in errors
    assert f"--output {tmp_path / 'folder'}: 1 fault\n  cannot be written: Is a directory" in errors
