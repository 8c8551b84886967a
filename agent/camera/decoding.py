"""Turn the bytes of a picture file into pixels, or say in one sentence why not.

The same rules for the folder camera and for the command line:

- Formats: JPEG, PNG, BMP, TIFF (first page), WebP; known by their first bytes, not by their names.
- The size is read from the header before a decoder takes memory; too large is refused at the cost of the file's bytes.
- A file that is cut off is refused, never half analysed.
- 16 bits become 8 by dividing by 257, so that 0..65535 fills 0..255. This takes the full range for granted: a 12-bit
  camera that stores its values unshifted gives a dark frame, which the quality gate then refuses as `dark`.
- Grey becomes three equal channels; a transparent picture is laid on white, the colour of an empty field.
- An EXIF orientation is ignored: boxes refer to the pixels as they are stored, in every format and for every reader.
  Under a microscope there is no upright.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, Final, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from agent.camera.headers import PictureFault, PictureHeader, read_header, without_orientation
from agent.camera.opencv import quiet_opencv
from agent.domain import Pixels
from agent.errors import FrameUnreadable

MIN_FIELD_SIDE_PX: Final = 32
"""px; a red cell alone is larger than this in every source that we know. Smaller is an icon or a thumbnail."""

MIN_CROP_SIDE_PX: Final = 8
"""px; the crop of a platelet under a weak objective. Below it no structure is left to name."""

MAX_BYTES_PER_PX: Final = 8
"""Four channels of 16 bits, stored without compression: no file of a permitted picture needs more."""

EXTRA_BYTES: Final = 16_000_000
"""Room for what stands in a file besides pixels (profiles, thumbnails, instrument logs)."""


def decode_file(path: Path, max_megapixels: float, min_side_px: int = MIN_FIELD_SIDE_PX) -> Pixels:
    """The pixels of a picture file. Raises FrameUnreadable, with the path as origin, for whatever may be wrong."""
    try:
        content = read_content(path, max_megapixels)
    except OSError as error:
        raise FrameUnreadable(str(path), describe_os_error(error)) from error
    return decode_bytes(content, str(path), max_megapixels, min_side_px=min_side_px)


def read_content(path: Path, max_megapixels: float, *, key: str | None = None) -> bytes:
    """All bytes of a picture file.

    Raises FrameUnreadable where the file is not one to read (a folder, a FIFO, larger than any permitted picture), and
    OSError where the disk or the rights stand in the way: that file may be fine later.
    """
    # Non-blocking: opening a FIFO that nobody writes to would wait for ever.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise FrameUnreadable(str(path), "not a file but a folder, a device or a pipe", key)
        limit_bytes = int(max_megapixels * 1e6 * MAX_BYTES_PER_PX) + EXTRA_BYTES
        if status.st_size > limit_bytes:
            raise FrameUnreadable(
                str(path),
                f"the file has {status.st_size / 1e6:.0f} MB, more than a picture of {max_megapixels:g} megapixels "
                "can need (camera.max_megapixels)",
                key,
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(limit_bytes + 1)
    finally:
        os.close(handle)


def decode_bytes(
    content: bytes,
    origin: str,
    max_megapixels: float,
    *,
    key: str | None = None,
    min_side_px: int = MIN_FIELD_SIDE_PX,
) -> Pixels:
    """The pixels of a picture in memory: B G R, uint8, a new array.

    origin names the picture in messages, key is its `Frame.origin_key`. Raises FrameUnreadable.
    """
    try:
        header = read_header(content)
        _check_size(header, max_megapixels, min_side_px)
        return _to_bgr(_decode(content, header))
    except PictureFault as fault:
        raise FrameUnreadable(origin, str(fault), key) from None
    except MemoryError:
        raise FrameUnreadable(origin, "not enough memory to decode it; lower camera.max_megapixels", key) from None


def describe_os_error(error: OSError) -> str:
    """What the system said about a file, with the way out where there is one."""
    if isinstance(error, FileNotFoundError):
        return "it is not there (any more)"
    if isinstance(error, PermissionError):
        return "no permission to read it; let the user that runs the agent read it (chmod, chown)"
    return f"cannot be read: {error.strerror or error}"


def _check_size(header: PictureHeader, max_megapixels: float, min_side_px: int) -> None:
    if min(header.width_px, header.height_px) < min_side_px:
        raise PictureFault(
            f"{header.width_px} x {header.height_px} pixels; too small, at least {min_side_px} on each side are needed"
        )
    megapixels = header.width_px * header.height_px / 1e6
    if megapixels > max_megapixels:
        raise PictureFault(
            f"{header.width_px} x {header.height_px} pixels = {megapixels:.1f} megapixels, "
            f"the limit is {max_megapixels:g} (camera.max_megapixels)"
        )
    if header.decoded_px / 1e6 > max_megapixels:
        raise PictureFault(
            f"one of its tiles has {header.decoded_px / 1e6:.0f} megapixels, the picture itself {megapixels:.1f}"
        )


def _decode(content: bytes, header: PictureHeader) -> NDArray[Any]:
    """As the file has it: uint8 or uint16, shape (height, width) or (height, width, 3 or 4), B G R A."""
    if header.format == "TIFF":
        content = without_orientation(content)  # by which OpenCV turns the pixels even of IMREAD_UNCHANGED
    try:
        with quiet_opencv():
            decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        decoded = None
    if decoded is None:
        raise PictureFault(f"the {header.format} decoder refuses it: damaged, or a variant that is not supported")
    if decoded.shape[:2] != (header.height_px, header.width_px):
        raise PictureFault(
            f"its header says {header.width_px} x {header.height_px} pixels, it holds "
            f"{decoded.shape[1]} x {decoded.shape[0]}"
        )
    return decoded


def _to_bgr(decoded: NDArray[Any]) -> Pixels:
    channels = decoded.shape[2] if decoded.ndim == 3 else 1
    if decoded.dtype == np.uint16:
        decoded = cast(NDArray[Any], cv2.convertScaleAbs(decoded, alpha=1 / 257))
    if decoded.dtype != np.uint8 or channels not in (1, 3, 4):
        raise PictureFault(f"{channels} channels of {decoded.dtype}; save it with 8 or 16 bits as grey or RGB")
    if channels == 1:
        decoded = cast(NDArray[Any], cv2.cvtColor(decoded, cv2.COLOR_GRAY2BGR))
    return _lay_on_white(decoded) if channels == 4 else decoded


def _lay_on_white(bgra: NDArray[np.uint8]) -> Pixels:
    """Colour · alpha + white · (1 - alpha), per channel; rounded once, so that an opaque picture stays as it is."""
    alpha = cv2.cvtColor(bgra[:, :, 3], cv2.COLOR_GRAY2BGR)
    colour = cv2.multiply(bgra[:, :, :3], alpha, scale=1 / 255)
    return cast(Pixels, cv2.add(colour, cv2.bitwise_not(alpha)))
