"""The name of a picture by its content."""

from __future__ import annotations

import hashlib

from agent.domain import Pixels


def hash_pixels(pixels: Pixels) -> str:
    """SHA-256 of the shape and the pixel bytes, 64 hex digits: equal where each byte is."""
    digest = hashlib.sha256(str(pixels.shape).encode("ascii"))
    digest.update(pixels.tobytes())
    return digest.hexdigest()
