"""What a picture file says about itself, read from its bytes before a decoder may take memory for it.

Two questions are answered for JPEG, PNG, BMP, TIFF and WebP: how many pixels it will have, and whether the file is
whole. Decoders differ in what they do with half a picture, some fill the rest with grey and say nothing; half a field
must not be counted as a field. Damage inside a file is known for PNG only (its chunks carry checksums).

Formats: ITU T.81 annex B (JPEG), PNG specification (W3C), BITMAPFILEHEADER / BITMAPINFOHEADER (Microsoft), TIFF 6.0 and
BigTIFF, RFC 9649 (WebP).
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

MAX_PARTS: Final = 1_000_000
"""Segments or chunks that a file may have. Real ones have up to some ten thousand; more is a trap for our loop."""


class PictureFault(Exception):
    """The file cannot be taken; the text says why, in words for the operator. Never leaves this package."""


@dataclass(frozen=True, slots=True)
class PictureHeader:
    """Format and size of a whole picture file. decoded_px: pixels that the decoder needs memory for, tiles included."""

    format: str
    width_px: int
    height_px: int
    decoded_px: int


def read_header(content: bytes) -> PictureHeader:
    """Format and size of the picture in these bytes. Raises PictureFault where it is none, or not whole."""
    if not content:
        raise PictureFault("the file is empty")
    for signature, read in _READERS:
        if signature.match(content):
            try:
                return read(content)
            except (struct.error, IndexError):  # a field lies behind the end of the file
                raise _truncated("its header") from None
    raise PictureFault(
        f"not a picture that is understood (JPEG, PNG, BMP, TIFF, WebP); it begins with {content[:8].hex(' ')}"
    )


def _truncated(what: str) -> PictureFault:
    return PictureFault(f"the file is cut off: {what} is not complete; copy it again")


def _damaged(what: str) -> PictureFault:
    return PictureFault(f"the file is damaged: {what}; copy it again")


# Start of frame: C0 to CF without C4 (Huffman tables), C8 (reserved) and CC (arithmetic conditioning).
_JPEG_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xD8)))
# In the compressed pixels FF 00 is a stuffed byte, FF D0 to FF D7 are restart marks, FF FF is filling.
_JPEG_END_OF_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


def _read_jpeg(content: bytes) -> PictureHeader:
    """Walk the segments up to the end mark. Searching for one is not enough: a thumbnail inside has its own."""
    size: tuple[int, int] | None = None
    has_pixels = False
    at = 2
    for _ in range(MAX_PARTS):
        if at + 2 > len(content):
            raise _truncated("the picture (no end mark)")
        if content[at] != 0xFF:
            raise _damaged(f"no marker at byte {at}")
        marker = content[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker == 0xD9:
            if size is None or not has_pixels:
                raise _damaged("it holds no pixels")
            return PictureHeader("JPEG", *size, decoded_px=size[0] * size[1])
        elif marker in _JPEG_WITHOUT_LENGTH:
            at += 2
        else:
            (length,) = struct.unpack_from(">H", content, at + 2)
            if marker in _JPEG_START_OF_FRAME:
                height_px, width_px = struct.unpack_from(">HH", content, at + 5)
                size = (width_px, height_px)
            at += 2 + max(2, length)
            if marker == 0xDA:
                has_pixels = True
                end_of_scan = _JPEG_END_OF_SCAN.search(content, at)
                if end_of_scan is None:
                    raise _truncated("the picture (no end mark)")
                at = end_of_scan.start()
    raise _damaged("too many segments")


def _read_png(content: bytes) -> PictureHeader:
    width_px, height_px = struct.unpack_from(">II", content, 16)
    if content[12:16] != b"IHDR":
        raise _damaged("no IHDR chunk at the beginning")
    whole = memoryview(content)
    at = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if end > len(content):
            raise _truncated("the picture")
        # The checksum is looked at here because libpng writes its own complaint to standard error.
        if zlib.crc32(whole[at + 4 : end - 4]) != struct.unpack_from(">I", content, end - 4)[0]:
            raise _damaged(f"wrong checksum at byte {at}")
        if kind == b"IEND":
            return PictureHeader("PNG", width_px, height_px, decoded_px=width_px * height_px)
        at = end
    raise _damaged("too many chunks")


def _read_bmp(content: bytes) -> PictureHeader:
    file_bytes, pixels_at, header_bytes = struct.unpack_from("<I4xII", content, 2)
    if header_bytes == 12:  # the form of OS/2
        width_px, height_px, _, bits = struct.unpack_from("<HHHH", content, 18)
        compression = 0
    else:
        width_px, height_px, _, bits, compression = struct.unpack_from("<iiHHI", content, 18)
        height_px = abs(height_px)  # negative: stored from the top down
    is_packed = compression in (0, 3, 6)
    row_bytes = (width_px * bits + 31) // 32 * 4
    needed_bytes = pixels_at + row_bytes * height_px if is_packed else file_bytes
    if len(content) < needed_bytes:
        raise _truncated("the picture")
    return PictureHeader("BMP", width_px, height_px, decoded_px=width_px * height_px)


def _read_webp(content: bytes) -> PictureHeader:
    (riff_bytes,) = struct.unpack_from("<I", content, 4)
    kind = content[12:16]
    if kind == b"VP8X":
        width_px = int.from_bytes(content[24:27], "little") + 1
        height_px = int.from_bytes(content[27:30], "little") + 1
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        width_px, height_px = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width_px, height_px = (side & 0x3FFF for side in struct.unpack_from("<HH", content, 26))
    if len(content) < 8 + riff_bytes:
        raise _truncated("the picture")
    return PictureHeader("WebP", width_px, height_px, decoded_px=width_px * height_px)


# Tag numbers and field types of TIFF 6.0, section 8.
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLES = 256, 257, 258, 262, 277
_TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 322, 323
_TIFF_ORIENTATION, _TIFF_UPRIGHT = 274, 1
_TIFF_STORED: Final = ((273, 279), (324, 325))
"""(offsets, byte counts) of strips and of tiles."""
_TIFF_NUMBERS: Final = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TIFF_CMYK: Final = 5
MAX_TIFF_BITS: Final = 16
MAX_TIFF_SAMPLES: Final = 4


def _read_tiff(content: bytes) -> PictureHeader:
    """The first picture of the file; further ones (pages, focus planes) are not looked at."""
    tags = _read_tiff_tags(content)

    def first(tag: int, default: int = 0) -> int:
        return tags[tag][0] if tags.get(tag) else default

    width_px, height_px = first(_TIFF_WIDTH), first(_TIFF_HEIGHT)
    if max(tags.get(_TIFF_BITS, (1,))) > MAX_TIFF_BITS:
        raise PictureFault(f"it has {max(tags[_TIFF_BITS])} bits a sample; save it with 8 or 16")
    if first(_TIFF_SAMPLES, 1) > MAX_TIFF_SAMPLES or first(_TIFF_PHOTOMETRIC) == _TIFF_CMYK:
        raise PictureFault("its channels are not grey, RGB or RGB with alpha; save it as RGB")
    for offsets, counts in _TIFF_STORED:
        ends = map(sum, zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False))
        if max(ends, default=0) > len(content):
            raise _truncated("the picture")
    tile_px = first(_TIFF_TILE_WIDTH) * first(_TIFF_TILE_HEIGHT)
    return PictureHeader("TIFF", width_px, height_px, decoded_px=max(width_px * height_px, tile_px))


def without_orientation(tiff: bytes) -> bytes:
    """The file as one whose pixels are not to be turned or mirrored. tiff: one that `read_header` has taken."""
    upright = bytearray()
    for tag, at, form in _tiff_entries(tiff):
        marks = struct.unpack_from(form, tiff, at)
        if tag == _TIFF_ORIENTATION and any(mark != _TIFF_UPRIGHT for mark in marks):
            upright = upright or bytearray(tiff)
            struct.pack_into(form, upright, at, *[_TIFF_UPRIGHT] * len(marks))
    return bytes(upright) or tiff


def _read_tiff_tags(content: bytes) -> Mapping[int, tuple[int, ...]]:
    """All whole numbers of the first directory, by tag."""
    return {tag: struct.unpack_from(form, content, at) for tag, at, form in _tiff_entries(content)}


def _tiff_entries(content: bytes) -> Iterator[tuple[int, int, str]]:
    """Tag of each entry of the first directory that holds whole numbers, where they stand, and their form."""
    order = "<" if content[:2] == b"II" else ">"
    is_big = 43 in content[2:4]
    offset, count, entry_bytes = ("Q", "Q", 20) if is_big else ("I", "H", 12)
    (directory_at,) = struct.unpack_from(order + offset, content, 8 if is_big else 4)
    (entries,) = struct.unpack_from(order + count, content, directory_at)
    for entry in range(min(entries, MAX_PARTS)):
        at = directory_at + struct.calcsize(count) + entry * entry_bytes
        tag, kind, length = struct.unpack_from(f"{order}HH{offset}", content, at)
        number = _TIFF_NUMBERS.get(kind)
        if number is None:
            continue
        value_at = at + 4 + struct.calcsize(offset)
        if length * struct.calcsize(number) > struct.calcsize(offset):  # too long for the entry: stored elsewhere
            (value_at,) = struct.unpack_from(order + offset, content, value_at)
        if value_at + length * struct.calcsize(number) > len(content):
            raise _truncated("its header")
        yield tag, value_at, f"{order}{length}{number}"


_READERS: Final[tuple[tuple[re.Pattern[bytes], Callable[[bytes], PictureHeader]], ...]] = (
    (re.compile(rb"\xff\xd8\xff"), _read_jpeg),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), _read_png),
    (re.compile(rb"BM"), _read_bmp),
    (re.compile(rb"II[*+]\x00|MM\x00[*+]"), _read_tiff),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), _read_webp),
)
