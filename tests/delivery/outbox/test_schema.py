"""The tables: what is in files out there, and which of those are opened."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path

import pytest

from agent.delivery.outbox import DATABASE_NAME, ReplayAnswer, begin_boot
from agent.delivery.outbox.rows import NUMBERED_COLUMNS
from agent.delivery.outbox.tables import APPLICATION_ID, TABLES_OF_VERSION
from agent.errors import OutboxError
from tests.delivery.outbox.making import make_draft, make_outbox

RELEASED = {1: "6fc5a641959ed6b3", 2: "636f88f4aa5416b6", 3: "0bff5fcee0f379b3"}


def test_the_tables_are_to_the_letter_those_of_files_out_there() -> None:
    """A file is known by the text of its tables: a space more, and every device sets its outbox aside as damaged."""
    texts = {number: "\n".join(statements) for number, statements in TABLES_OF_VERSION.items()}
    assert {number: hashlib.sha256(text.encode()).hexdigest()[:16] for number, text in texts.items()} == RELEASED


def test_a_file_of_a_newer_agent_is_left_alone(tmp_path: Path) -> None:
    make_outbox(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE_NAME) as newer:
        newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(OutboxError, match="newer agent"):
        make_outbox(tmp_path)
    assert list(tmp_path.glob("*.bad-*")) == []


@pytest.mark.parametrize("version", [1, 2])
def test_an_outbox_of_an_older_version_is_taken_over_with_every_row(tmp_path: Path, version: int) -> None:
    with make_outbox(tmp_path / "new") as outbox:
        outbox.append([make_draft(), make_draft("cell")])
    begin_boot(tmp_path)
    with sqlite3.connect(tmp_path / "outbox.db") as old:
        for number in range(1, version + 1):
            for statement in TABLES_OF_VERSION[number]:
                old.execute(statement)
        old.execute("ATTACH ? AS new", (str(tmp_path / "new" / "outbox.db"),))
        old.execute(f"INSERT INTO rows (row_id, {NUMBERED_COLUMNS}) SELECT row_id, {NUMBERED_COLUMNS} FROM new.rows")
        old.execute("INSERT INTO streams SELECT * FROM new.streams")
        old.execute("UPDATE tally SET depth = 2, boot = 1")
        old.execute(f"PRAGMA application_id={APPLICATION_ID}")
        old.execute(f"PRAGMA user_version={version}")
    old.close()
    with make_outbox(tmp_path, keep_mb=1, keep_hours=1) as outbox:
        assert outbox.depth() == 2
        assert [(row.stream, row.seq, row.is_intact) for row in outbox.pending(0, 9)] == [
            ("field", 1, True),
            ("cell", 1, True),
        ]
        outbox.append([make_draft()])
        outbox.acknowledge([row.row_id for row in outbox.pending(0, 2)])
        assert [row.seq for row in outbox.pending(0, 9)] == [2]
        assert outbox.request_replay("field", 1, 2) == ReplayAnswer(1, 1, ())
        outbox.append((), notes={"k": "v"})
        assert outbox.note("k") == "v"
