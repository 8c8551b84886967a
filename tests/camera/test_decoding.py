"""Picture files become pixels, or one sentence about why not: real encoders, real files, hand-made traps."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.camera.decoding import decode_bytes, decode_file, read_content
from agent.camera.headers import read_header
from agent.errors import FrameUnreadable

FORMATS = (".jpg", ".png", ".bmp", ".tiff", ".webp")
LOSSLESS = (".png", ".bmp", ".tiff")


def make_pixels(height_px: int = 90, width_px: int = 120, channels: int = 3, seed: int = 1) -> np.ndarray:
    """A picture with structure at all scales, so that no encoder finds it trivial."""
    shape = (height_px, width_px) if channels == 1 else (height_px, width_px, channels)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return cv2.GaussianBlur(noise, (5, 5), 1.5)


def encode(pixels: np.ndarray, suffix: str, *options: int) -> bytes:
    is_encoded, content = cv2.imencode(suffix, pixels, list(options))
    assert is_encoded
    return content.tobytes()


def decode(content: bytes, max_megapixels: float = 80) -> np.ndarray:
    return decode_bytes(content, "field.png", max_megapixels)


def refusal(content: bytes, max_megapixels: float = 80) -> str:
    with pytest.raises(FrameUnreadable) as caught:
        decode(content, max_megapixels)
    return caught.value.reason


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_bomb(width_px: int, height_px: int) -> bytes:
    """A whole PNG of black pixels: a few kilobytes that would need width x height bytes."""
    press = zlib.compressobj(9)
    row = bytes(width_px + 1)
    squeezed = b"".join(press.compress(row) for _ in range(height_px)) + press.flush()
    head = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", squeezed) + png_chunk(b"IEND", b"")


def with_exif(jpeg: bytes, orientation: int = 1, thumbnail: bytes = b"") -> bytes:
    """The JPEG with an APP1 segment behind its start mark; the thumbnail stands in it as cameras put it."""
    tiff = b"MM\x00*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    content = b"Exif\x00\x00" + tiff + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_a_lossless_picture_comes_back_byte_for_byte(suffix: str) -> None:
    pixels = make_pixels()
    decoded = decode(encode(pixels, suffix))
    assert np.array_equal(decoded, pixels)
    assert decoded.flags.c_contiguous


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_lossy_picture_comes_back_nearly_the_same(suffix: str) -> None:
    pixels = make_pixels()
    assert np.abs(decode(encode(pixels, suffix)).astype(int) - pixels).mean() < 6


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_header_tells_format_and_size_without_decoding(suffix: str) -> None:
    header = read_header(encode(make_pixels(70, 50), suffix))
    assert (header.width_px, header.height_px) == (50, 70)
    assert header.format.lower()[:3] == {".jpg": "jpe", ".tiff": "tif", ".webp": "web"}.get(suffix, suffix[1:])


def test_a_progressive_jpeg_with_restart_marks_is_whole() -> None:
    pixels = make_pixels()
    options = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
    assert decode(encode(pixels, ".jpg", *options)).shape == pixels.shape


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95, 0.9999])
def test_a_picture_that_is_cut_off_is_refused_and_not_half_decoded(suffix: str, share: float) -> None:
    content = encode(make_pixels(), suffix)
    reason = refusal(content[: int(len(content) * share)])
    assert "cut off" in reason or "not a picture" in reason


def test_a_cut_jpeg_is_refused_although_its_thumbnail_has_an_end_mark() -> None:
    thumbnail = encode(make_pixels(40, 40), ".jpg")
    content = with_exif(encode(make_pixels(), ".jpg"), thumbnail=thumbnail)
    assert decode(content).shape == (90, 120, 3)
    assert "cut off" in refusal(content[:-400])
    assert "cut off" in refusal(content[:-400] + bytes(400)), "a tail of zeros is what a power cut leaves"


def test_bytes_behind_the_end_of_a_jpeg_do_no_harm() -> None:
    assert decode(encode(make_pixels(), ".jpg") + b"instrument log").shape == (90, 120, 3)


def test_a_png_with_a_flipped_byte_is_refused() -> None:
    content = bytearray(encode(make_pixels(), ".png"))
    content[len(content) // 2] ^= 0xFF
    assert "checksum" in refusal(bytes(content))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "empty"),
        (b"\n", "not a picture"),
        (b"%PDF-1.7 not a picture at all", "not a picture"),
        (b"GIF89a" + bytes(100), "not a picture"),
        (b"\xff\xd8\xff\xd9", "no pixels"),
        (b"\xff\xd8\xff\xe0\x00\x02garbage", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "cut off"),
        (b"BM", "cut off"),
        (b"II*\x00\xff\xff\xff\x7f", "cut off"),
        (b"RIFF\x04\x00\x00\x00WEBP", "cut off"),
    ],
)
def test_what_is_no_picture_is_refused_with_its_reason(content: bytes, expected: str) -> None:
    assert expected in refusal(content)


def test_an_icon_is_refused() -> None:
    assert "at least 32" in refusal(encode(make_pixels(31, 200), ".png"))
    assert decode(encode(make_pixels(32, 32), ".png")).shape == (32, 32, 3)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_picture_over_the_limit_is_refused_with_both_figures(suffix: str) -> None:
    content = encode(make_pixels(200, 300), suffix)
    reason = refusal(content, max_megapixels=0.05)
    assert "300 x 200" in reason
    assert "0.05" in reason
    assert "camera.max_megapixels" in reason
    assert decode(content, max_megapixels=0.06).shape == (200, 300, 3)


def test_a_picture_of_108_megapixels_is_refused_without_taking_memory_for_it(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bomb(12_000, 9_000))
    assert path.stat().st_size < 1_000_000
    code = f"""
import resource
from pathlib import Path
from agent.camera.decoding import decode_file
from agent.errors import FrameUnreadable
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_file(Path({str(path)!r}), 80)
except FrameUnreadable as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, error.reason)
"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    grown_kb, _, reason = answer.partition(" ")
    assert "108.0 megapixels, the limit is 80" in reason
    assert int(grown_kb) < 20_000


def test_a_tiff_with_one_monstrous_tile_is_refused() -> None:
    entries = [(256, 4, 64), (257, 4, 64), (258, 3, 8), (259, 3, 1), (322, 4, 65536), (323, 4, 65536)]
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in entries
    )
    assert "tiles" in refusal(b"II*\x00" + struct.pack("<I", 8) + directory + bytes(4))


def test_a_file_too_large_for_any_permitted_picture_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    with path.open("wb") as file:
        file.truncate(200_000_000)  # sparse: takes no disk
    with pytest.raises(FrameUnreadable, match="200 MB"):
        decode_file(path, max_megapixels=10)


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_become_eight_over_the_full_range(suffix: str) -> None:
    pixels = make_pixels()
    assert np.array_equal(decode(encode(pixels.astype(np.uint16) * 257, suffix)), pixels)


def test_a_grey_picture_gets_three_equal_channels() -> None:
    grey = make_pixels(channels=1)
    for content in (encode(grey, ".png"), encode(grey.astype(np.uint16) * 257, ".png")):
        decoded = decode(content)
        assert all(np.array_equal(decoded[:, :, channel], grey) for channel in range(3))


def test_a_transparent_picture_is_laid_on_white() -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[:, :, 2] = 200
    pixels[:, 20:40, 3] = 128
    pixels[:, 40:, 3] = 255
    decoded = decode(encode(pixels, ".png"))
    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 30].tolist() == [127, 127, 227]
    assert decoded[0, 50].tolist() == [0, 0, 200]
    assert decode(encode(pixels.astype(np.uint16) * 257, ".png"))[0, 30].tolist() == [127, 127, 227]


def test_an_orientation_mark_is_ignored_because_boxes_refer_to_stored_pixels() -> None:
    jpeg = encode(make_pixels(90, 120), ".jpg")
    assert np.array_equal(decode(with_exif(jpeg, orientation=6)), decode(jpeg))


def oriented_tiff(pixels_bgr: np.ndarray, orientation: int, order: str) -> bytes:
    """A plain TIFF of one strip behind its directory. order: of its bytes, as `struct` has it."""
    height_px, width_px, samples = pixels_bgr.shape
    bits_at = 8 + 2 + 9 * 12 + 4
    tags = {
        256: (3, 1, width_px),
        257: (3, 1, height_px),
        258: (3, samples, bits_at),
        262: (3, 1, 2),
        273: (4, 1, bits_at + 6),
        274: (3, 1, orientation),
        277: (3, 1, samples),
        278: (3, 1, height_px),
        279: (4, 1, pixels_bgr.size),
    }
    directory = struct.pack(f"{order}H", len(tags))
    for tag, (kind, length, value) in tags.items():
        is_short = kind == 3 and length == 1
        directory += struct.pack(f"{order}HHI{'HH' if is_short else 'I'}", tag, kind, length, value, *[0] * is_short)
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HI", 42, 8)
    bits = struct.pack(f"{order}{samples}H", *[8] * samples)
    return head + directory + bytes(4) + bits + pixels_bgr[:, :, ::-1].tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_mark_of_a_tiff_is_ignored_too(orientation: int, order: str) -> None:
    """OpenCV turns a TIFF by it, whatever it is asked for."""
    pixels = make_pixels(90, 120)
    assert np.array_equal(decode(oriented_tiff(pixels, orientation, order)), pixels)


def test_floating_point_pixels_are_refused_with_a_way_out() -> None:
    assert "save it with 8 or 16" in refusal(encode(make_pixels().astype(np.float32), ".tiff"))


def test_only_the_first_page_of_a_tiff_is_taken() -> None:
    is_encoded, content = cv2.imencodemulti(".tiff", [make_pixels(50, 60, seed=1), make_pixels(70, 80, seed=2)])
    assert is_encoded
    assert np.array_equal(decode(content.tobytes()), make_pixels(50, 60, seed=1))


def test_the_error_carries_origin_and_key() -> None:
    with pytest.raises(FrameUnreadable) as caught:
        decode_bytes(b"", "slide7/field3.png", 80, key="field3.png|0|17")
    assert (caught.value.origin, caught.value.key) == ("slide7/field3.png", "field3.png|0|17")
    assert str(caught.value) == "slide7/field3.png: the file is empty"


def test_a_missing_file_a_folder_and_a_fifo_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(FrameUnreadable, match="not there"):
        decode_file(tmp_path / "absent.png", 80)
    with pytest.raises(FrameUnreadable, match="not a file but a folder"):
        decode_file(tmp_path, 80)
    with pytest.raises(FrameUnreadable, match="a pipe"):
        decode_file(tmp_path / "pipe.png", 80)


def test_a_file_without_permission_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encode(make_pixels(), ".png"))

    def refuse(*_: object) -> int:  # the tests may run as root, which may read everything
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(FrameUnreadable, match="chmod"):
        decode_file(path, 80)
    with pytest.raises(PermissionError):
        read_content(path, 80)


WHOLE_FILES = {suffix: encode(make_pixels(), suffix) for suffix in FORMATS}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(
    suffix=st.sampled_from(FORMATS),
    changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    tail=st.integers(0, 60),
)
def test_whatever_is_damaged_the_answer_is_pixels_or_one_sentence(
    suffix: str, changes: list[tuple[int, int]], tail: int
) -> None:
    content = bytearray(WHOLE_FILES[suffix])
    for place, value in changes:
        content[place % len(content)] = value
    try:
        decoded = decode(bytes(content[: len(content) - tail]))
    except FrameUnreadable:
        return
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    head=st.sampled_from(
        (b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00+", b"RIFF....WEBPVP8 ")
    ),
    rest=st.binary(max_size=200),
)
def test_random_bytes_are_refused(head: bytes, rest: bytes) -> None:
    assert refusal(head + rest)
