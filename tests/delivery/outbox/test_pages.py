"""Rows found in the pages of a file and of its log, without SQLite."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from agent.delivery.outbox import DATABASE_NAME, Outbox
from agent.delivery.outbox.pages import FRAME_HEADER_BYTES, PAGE_BYTES, WAL_HEADER_BYTES, find_rows, rows_cut_off
from agent.delivery.outbox.rows import KEPT, WAITING
from tests.delivery.outbox.making import make_draft, make_outbox, messages

LOG_NAME = f"{DATABASE_NAME}-wal"


def as_it_lies(outbox: Outbox, folder: Path) -> Path:
    """The file and its log as a power cut now would leave them."""
    folder.mkdir()
    for name in (DATABASE_NAME, LOG_NAME):
        shutil.copy(outbox.path.with_name(name), folder / name)
    return folder / DATABASE_NAME


def test_rows_history_and_dead_letters_are_found_however_long_they_are(tmp_path: Path) -> None:
    with make_outbox(tmp_path, keep_mb=1, keep_hours=1) as outbox:
        row_ids = outbox.append([make_draft(text="x" * length) for length in (1, 3_000, 5_000, 50_000)])
        outbox.acknowledge(row_ids[:1])
        outbox.reject(row_ids[2], "refused")
        payloads = {row.seq: row.payload for row in outbox.pending(0, 9)}
    found = {(row.seq, row.state, row.reason): row for row in find_rows(tmp_path / DATABASE_NAME)}
    assert {(1, KEPT, ""), (2, WAITING, ""), (3, WAITING, "refused"), (4, WAITING, "")} <= set(found)
    assert found[4, WAITING, ""].payload == payloads[4]
    assert found[2, WAITING, ""].row_id == row_ids[1]


def test_a_row_of_which_one_byte_was_changed_is_not_found(tmp_path: Path) -> None:
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft(text=text) for text in ("first", "second", "third")])
    path = tmp_path / DATABASE_NAME
    path.write_bytes(path.read_bytes().replace(b"second", b"sekond"))
    assert {row.seq for row in find_rows(path)} == {1, 3}


def test_rows_that_stand_in_the_log_alone_are_found(outbox: Outbox, tmp_path: Path) -> None:
    outbox.append([make_draft(), make_draft()])
    assert {row.seq for row in find_rows(as_it_lies(outbox, tmp_path / "copy"))} == {1, 2}


@pytest.mark.parametrize("broken", ["head", "frame"])
def test_what_stands_behind_a_broken_place_of_the_log_is_cut_off_and_not_lost(tmp_path: Path, broken: str) -> None:
    with make_outbox(tmp_path / "device") as outbox:
        for n in range(1, 5):
            outbox.append([make_draft(text=f"text {n}")])
        path = as_it_lies(outbox, tmp_path / "copy")
    assert rows_cut_off(path) == []
    log = bytearray(path.with_name(LOG_NAME).read_bytes())
    at = WAL_HEADER_BYTES + FRAME_HEADER_BYTES + PAGE_BYTES if broken == "frame" else 8
    log[at + FRAME_HEADER_BYTES] ^= 1
    path.with_name(LOG_NAME).write_bytes(log)
    assert {row.seq for row in rows_cut_off(path)} == {1, 2, 3, 4}
    with make_outbox(path.parent) as salvaged:
        assert salvaged.salvage is not None
        assert [message["text"] for message in messages(salvaged)] == [f"text {n}" for n in range(1, 5)]
