"""A damaged file: set aside as it was found, and a new one begun with all that can be read of it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from agent.delivery.messages import Draft
from agent.delivery.outbox import DATABASE_NAME, begin_boot, open_outbox
from agent.errors import OutboxDamaged
from tests.delivery.outbox.making import make_draft, make_outbox, messages


def fill(folder: Path) -> Path:
    with make_outbox(folder) as outbox:
        outbox.append([make_draft(text="x" * 5_000)] * 50)
        return outbox.path


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def garble(path: Path) -> None:
    path.write_bytes(os.urandom(20_000))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def break_pages(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096 * 2)
        file.write(b"\xff" * 4096 * 20)


def replace_by_another(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE shopping (thing TEXT)")
    other.close()


@pytest.mark.parametrize("damage", [zero, garble, truncate, break_pages, replace_by_another])
def test_a_damaged_file_is_set_aside_and_a_new_one_begun(tmp_path: Path, damage: Any) -> None:
    path = fill(tmp_path)
    damage(path)
    as_found = path.read_bytes()
    with pytest.raises(OutboxDamaged, match=r"damaged|another program"):
        make_outbox(tmp_path, verify=False).pending(0, 1000)
    boot = begin_boot(tmp_path)
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is not None
        assert outbox.salvage.bad.name.startswith("outbox.db.bad-")
        assert outbox.salvage.bad.read_bytes() == as_found
        assert outbox.boot > boot  # no id may come twice, whatever was lost
        left = [(row.boot, row.seq) for row in outbox.pending(0, 10_000)]
        assert len(left) == outbox.salvage.rows == len(set(left))
        assert (len(left) > 0) == (damage in (truncate, break_pages))
        outbox.append([make_draft()])
        newest = messages(outbox)[-1]
        assert newest["id"] == f"scope:{outbox.boot}:{newest['seq']}"
        assert newest["seq"] > max((seq for _, seq in left), default=0)
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == len(left) + 1


def test_a_second_damage_in_the_same_second_overwrites_nothing(tmp_path: Path) -> None:
    for _ in range(3):
        garble(tmp_path / "outbox.db") if (tmp_path / "outbox.db").exists() else fill(tmp_path)
        make_outbox(tmp_path).close()
    assert len(list(tmp_path.glob("outbox.db.bad-*"))) == 2


def test_a_write_ahead_log_that_is_rubbish_too_does_not_live_on_beside_the_new_file(tmp_path: Path) -> None:
    path = fill(tmp_path)
    garble(path)
    garble(tmp_path / "outbox.db-wal")
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is not None
        outbox.append([make_draft()])
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is None
        assert outbox.depth() == 1


@pytest.mark.parametrize("column", ["captured_monotonic_ns", "state", "origin_key", "crc32"])
def test_a_file_in_whose_tables_a_column_has_another_name_is_set_aside_and_read(tmp_path: Path, column: str) -> None:
    """A flipped bit in the text of the schema, which SQLite's own check passes."""
    with make_outbox(tmp_path) as outbox:
        outbox.append([make_draft(text=f"text {n}") for n in range(20)], finished_keys=["a"])
    path = tmp_path / "outbox.db"
    content = path.read_bytes()
    changed = f"{column[:-1]}{chr(ord(column[-1]) ^ 1)}"
    path.write_bytes(content.replace(column.encode(), changed.encode()))
    with make_outbox(tmp_path) as outbox:
        assert outbox.salvage is not None
        assert [message["text"] for message in messages(outbox)] == [f"text {n}" for n in range(20)]
        outbox.append([make_draft()])


def test_a_salvaged_outbox_keeps_its_beginning_unless_nothing_numbered_is_left(tmp_path: Path) -> None:
    for name, spoil in (("rows", 8192), ("head", 0)):
        folder = tmp_path / name
        begin_boot(folder)
        with open_outbox(folder, device="dev", min_free_mb=0) as outbox:
            for n in range(40):
                outbox.append([Draft("field", "t", {"schema": "s", "n": n, "text": "x" * 900})])
        content = bytearray((folder / DATABASE_NAME).read_bytes())
        content[spoil:] = bytes(100) + content[spoil + 100 :] if spoil else bytes(len(content))
        (folder / DATABASE_NAME).write_bytes(content)
        begin_boot(folder)
        with open_outbox(folder, device="dev", min_free_mb=0) as outbox:
            assert outbox.salvage is not None
            assert outbox.numbered_since_boot() == (1 if spoil else outbox.boot)
