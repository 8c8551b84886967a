"""What can be read of a damaged file without SQLite: page by page, rows known by their checksum.

A row is believed only when its checksum over topic and payload is right, so nothing that the disk has changed comes
back as a result. Pages that were given up are read too: a row that had left may come back, which only sends it twice.

The format: sqlite.org/fileformat2.html, sections 1.6 (b-tree pages), 2.1 (records) and 4.1 (write-ahead log).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from agent.delivery.outbox.rows import ASKED, KEPT, WAITING, NumberedRow, checksum

PAGE_BYTES = 4096
"""SQLite's default since 2016, and ours."""

TABLE_LEAF = 0x0D
WAL_HEADER_BYTES, FRAME_HEADER_BYTES = 32, 24

LARGEST_ROW_BYTES = 64 * 1024 * 1024
"""A length beyond it is damage."""

COLUMNS_OF_A_ROW = range(8, 13)
"""Without its row id, which is the cell's key and stands as NULL in the record: rows 9 or 10, dead letters 11."""


@dataclass(frozen=True, slots=True)
class FoundRow(NumberedRow):
    """A row whose checksum is right. reason, rejected_at: of a dead letter, else empty."""

    row_id: int
    state: int = WAITING
    reason: str = ""
    rejected_at: str = ""


def find_rows(path: Path) -> Iterator[FoundRow]:
    """All rows and dead letters in the pages of a file and of its write-ahead log; the same may come twice.

    Raises OSError when the disk gives nothing; a page that it does not give is passed over.
    """
    log = path.with_name(path.name + "-wal")
    with path.open("rb") as file:
        pages = path.stat().st_size // PAGE_BYTES

        def read_page(number: int) -> bytes:
            return _read(file, (number - 1) * PAGE_BYTES)

        for number in range(1, pages + 1):
            yield from _rows_of_page(read_page(number), read_page, 100 if number == 1 else 0)
        if log.exists():
            yield from _rows_of_log(log, read_page)


def rows_cut_off(path: Path) -> list[FoundRow]:
    """Rows in the write-ahead log behind a frame that is not what was written.

    SQLite takes the first such frame for the end of the log (4.1: after a power cut it is) and says nothing. Frames
    that were written in the same run of the log (with the same salts) may follow all the same.
    """
    log = path.with_name(path.name + "-wal")
    try:
        content = log.read_bytes()
    except OSError:
        return []
    step = FRAME_HEADER_BYTES + PAGE_BYTES
    frames = max(0, len(content) - WAL_HEADER_BYTES) // step
    begin = _valid_frames(content, frames)
    newest: dict[int, bytes] = {}
    kept: list[bytes] = []
    for frame in range(frames):
        at = WAL_HEADER_BYTES + frame * step
        # With a broken head nobody knows which run is the last. Earlier ones hold only what the file has too.
        if begin is not None and content[at + 8 : at + 16] != content[16:24]:
            continue
        page = content[at + FRAME_HEADER_BYTES : at + step]
        newest[int.from_bytes(content[at : at + 4], "big")] = page
        if begin is None or frame >= begin:
            kept.append(page)
    if not kept:
        return []
    with path.open("rb") as file:

        def read_page(number: int) -> bytes:
            return newest[number] if number in newest else _read(file, (number - 1) * PAGE_BYTES)

        return [row for page in kept for row in _rows_of_page(page, read_page, 0)]


def _valid_frames(content: bytes, frames: int) -> int | None:
    """How many frames from the first on SQLite will believe; None = not even the head of the log (4.1, 4.2)."""
    magic = int.from_bytes(content[:4], "big")
    if magic not in (0x377F0682, 0x377F0683):
        return None
    order = ">" if magic & 1 else "<"
    sums = _checksums(content[:24], order, (0, 0))
    if sums != struct.unpack(">II", content[24:32]):
        return None
    for frame in range(frames):
        at = WAL_HEADER_BYTES + frame * (FRAME_HEADER_BYTES + PAGE_BYTES)
        if content[at + 8 : at + 16] != content[16:24]:
            return frame
        sums = _checksums(content[at : at + 8], order, sums)
        sums = _checksums(content[at + 24 : at + 24 + PAGE_BYTES], order, sums)
        if sums != struct.unpack(">II", content[at + 16 : at + 24]):
            return frame
    return frames


def _checksums(part: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    first, second = sums
    for one, other in struct.iter_unpack(f"{order}II", part):
        first = (first + one + second) & 0xFFFFFFFF
        second = (second + other + first) & 0xFFFFFFFF
    return first, second


def _rows_of_log(log: Path, read_page: Callable[[int], bytes]) -> Iterator[FoundRow]:
    """Of each page in the log all versions: nobody can tell any more which were committed last."""
    with log.open("rb") as file:
        step = FRAME_HEADER_BYTES + PAGE_BYTES
        places: dict[int, int] = {}
        frames = max(0, log.stat().st_size - WAL_HEADER_BYTES) // step
        for frame in range(frames):
            at = WAL_HEADER_BYTES + frame * step
            places[int.from_bytes(_read(file, at, 4), "big")] = at + FRAME_HEADER_BYTES

        def read_newest(number: int) -> bytes:
            return _read(file, places[number]) if number in places else read_page(number)

        for frame in range(frames):
            at = WAL_HEADER_BYTES + frame * step
            number = int.from_bytes(_read(file, at, 4), "big")
            page = _read(file, at + FRAME_HEADER_BYTES)
            yield from _rows_of_page(page, read_newest, 100 if number == 1 else 0)


def _read(file: BinaryIO, at: int, length: int = PAGE_BYTES) -> bytes:
    try:
        file.seek(at)
        return file.read(length)
    except (OSError, ValueError):
        return b""


def _rows_of_page(page: bytes, read_page: Callable[[int], bytes], begin: int) -> Iterator[FoundRow]:
    if len(page) < PAGE_BYTES or page[begin] != TABLE_LEAF:
        return
    count = int.from_bytes(page[begin + 3 : begin + 5], "big")
    pointers = begin + 8
    for number in range(min(count, (PAGE_BYTES - pointers) // 2)):
        at = int.from_bytes(page[pointers + 2 * number : pointers + 2 * number + 2], "big")
        try:
            found = _row(*_cell(page, at, read_page))
        except (IndexError, ValueError, UnicodeDecodeError):
            continue  # the checksum would not be right either
        if found is not None:
            yield found


def _cell(page: bytes, at: int, read_page: Callable[[int], bytes]) -> tuple[int, bytes]:
    """The key and the record of a cell, put together from its overflow pages."""
    length, at = _varint(page, at)
    row_id, at = _varint(page, at)
    if not 0 < length <= LARGEST_ROW_BYTES:
        raise ValueError("no record has this length")
    # How much of a record lies in the page itself (1.6, "the amount of payload").
    most, least = PAGE_BYTES - 35, (PAGE_BYTES - 12) * 32 // 255 - 23
    here = length
    if length > most:
        here = least + (length - least) % (PAGE_BYTES - 4)
        here = here if here <= most else least
    parts = [page[at : at + here]]
    missing = length - here
    following = int.from_bytes(page[at + here : at + here + 4], "big") if missing else 0
    while missing > 0:
        overflow = read_page(following) if following else b""
        if len(overflow) < PAGE_BYTES:
            raise ValueError("an overflow page is missing")
        parts.append(overflow[4 : 4 + missing])
        missing -= len(parts[-1])
        following = int.from_bytes(overflow[:4], "big")
    return row_id, b"".join(parts)


def _row(row_id: int, record: bytes) -> FoundRow | None:
    """None = it is a record of another table, or not what was stored."""
    values = _values(record)
    if len(values) not in COLUMNS_OF_A_ROW or values[0] is not None:
        return None
    _, stream, boot, seq, topic, captured_ns, appended_s, payload, crc32, *rest = values
    if not (isinstance(stream, str) and isinstance(topic, str) and isinstance(payload, bytes)):
        return None
    if not (isinstance(boot, int) and isinstance(seq, int) and isinstance(captured_ns, int)):
        return None
    if not isinstance(appended_s, (int, float)) or checksum(topic, payload) != crc32:
        return None
    state, reason, rejected_at = WAITING, "", ""
    if len(rest) >= 2 and isinstance(rest[0], str) and isinstance(rest[1], str):
        reason, rejected_at = rest[0], rest[1]
    elif rest and rest[0] in (KEPT, ASKED):
        state = KEPT
    return FoundRow(
        *(stream, boot, seq, topic, captured_ns, float(appended_s), payload, crc32),
        *(row_id, state, reason, rejected_at),
    )


def _values(record: bytes) -> list[object]:
    """The columns of a record (2.1)."""
    header_end, at = _varint(record, 0)
    if header_end > 64:
        raise ValueError("none of our records has so many columns")
    kinds = []
    while at < header_end:
        kind, at = _varint(record, at)
        kinds.append(kind)
    values: list[object] = []
    at = header_end
    for kind in kinds:
        if kind >= 12:
            length = (kind - 12) // 2
            part = record[at : at + length]
            if len(part) < length:
                raise ValueError("the record ends too soon")
            values.append(part if kind % 2 == 0 else part.decode("utf-8"))
        elif kind in (8, 9):
            length = 0
            values.append(kind - 8)
        elif kind == 0:
            length = 0
            values.append(None)
        elif kind == 7:
            length = 8
            values.append(_double(record[at : at + 8]))
        else:
            length = (0, 1, 2, 3, 4, 6, 8)[kind]
            values.append(int.from_bytes(record[at : at + length], "big", signed=True))
        at += length
    return values


def _double(eight: bytes) -> float:
    return float(struct.unpack(">d", eight)[0]) if len(eight) == 8 else 0.0


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of one to nine bytes, and where it ends."""
    value = 0
    for number in range(9):
        byte = data[at + number]
        if number == 8:
            return (value << 8) | byte, at + 9
        value = (value << 7) | (byte & 0x7F)
        if byte < 0x80:
            return value, at + number + 1
    raise AssertionError("nine bytes at most")
