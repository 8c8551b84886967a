"""Whole fields that were counted, on this device: without loss, each named by its digest.

    pictures/{sha256}.png      written after the field is stored; a power cut can cost the picture of the last field

A picture that was torn or changed is found out when it is read: its pixels have another digest then.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections import deque
from pathlib import Path

import cv2

from agent.domain import Frame

logger = logging.getLogger(__name__)

PICTURES_FOLDER = "pictures"
"""Beside the outbox."""


class PictureStore:
    """The pictures of one device up to a size; written by one thread, the oldest go first."""

    def __init__(self, folder: Path, max_bytes: int, min_free_bytes: int = 0) -> None:
        """min_free_bytes: of the disk; nothing is kept below it, and what was kept makes room."""
        self.folder = folder
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._bytes = 0
        self._oldest: deque[tuple[Path, int]] = deque()
        for path in sorted(folder.glob("*.png"), key=lambda path: path.stat().st_mtime_ns):
            self._note(path, path.stat().st_size)

    def keep(self, frame: Frame) -> None:
        """Keep the picture of a field. One that the disk does not take is not kept, and the log says so."""
        path = self.path(frame.sha256)
        if path.exists():
            return
        content = cv2.imencode(".png", frame.pixels_bgr)[1].tobytes()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self._has_made_room(len(content)):
                return
            path.write_bytes(content)
        except OSError as error:
            logger.warning("a picture is not kept: %s: %s", path, error.strerror)
            with contextlib.suppress(OSError):  # a part of it would count nowhere, and be taken for the whole
                path.unlink(missing_ok=True)
            return
        self._note(path, len(content))

    def size_bytes(self) -> int:
        """Of all pictures together."""
        return self._bytes

    def count(self) -> int:
        """How many pictures are here."""
        return len(self._oldest)

    def let_go(self) -> bool:
        """Throw the oldest picture away, to leave the disk to the results; False = there is none."""
        if not self._oldest:
            return False
        path, freed_bytes = self._oldest.popleft()
        path.unlink(missing_ok=True)
        self._bytes -= freed_bytes
        return True

    def path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.png"

    def _note(self, path: Path, size_bytes: int) -> None:
        self._oldest.append((path, size_bytes))
        self._bytes += size_bytes

    def _has_made_room(self, size_bytes: int) -> bool:
        """Whether a picture of this size fits, the oldest ones let go for it."""
        while not self._fits(size_bytes):
            if not self.let_go():
                return False
        return True

    def _fits(self, size_bytes: int) -> bool:
        if self._bytes + size_bytes > self._max_bytes:
            return False
        return shutil.disk_usage(self.folder).free - size_bytes >= self._min_free_bytes
