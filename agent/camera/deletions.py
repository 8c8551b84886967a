"""Which pictures of a watched folder were deleted for good, so that nobody need remember any more that they were taken.

A picture that is merely out of reach (a disk not mounted, a share that is away, rights that were taken) comes back and
must not be counted again. So a deletion counts only when it was watched: the picture was listed, and then for
FORGET_AFTER_S was not, in one and the same folder, looked at without a long pause, and its name is free at the end.
Of what went while the agent was off `absences` decides.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

FORGET_AFTER_S: Final = 3600
"""s; who moves pictures away and back again does it within the hour."""

FORGET_EVERY_S: Final = 600
"""s; each time is a transaction of the outbox, whose card wears."""

LONGEST_PAUSE_S: Final = 60
"""s; in a longer one another disk may have come and gone, with the numbers of this one."""


class Deletions:
    """Follows the listings of one folder."""

    def __init__(self) -> None:
        self._listed: Mapping[str, Path] = {}
        self._missing: dict[str, tuple[Path, int]] = {}
        self._folder: tuple[int, int] | None = None
        self._looked_ns = 0
        self._told_ns = 0

    def follow(self, listed: Mapping[str, Path], folder: tuple[int, int], now_ns: int) -> list[str]:
        """Keys of the pictures that are found to be deleted with this listing; mostly none.

        listed: by origin key, those on the folder's own file system alone: another one may be mounted below it.
        folder: device and inode of the folder itself. now_ns: monotonic.
        """
        if self._is_continued(listed, folder, now_ns):
            missing = {key: (path, now_ns) for key, path in self._listed.items() if key not in listed}
            self._missing = {key: seen for key, seen in (missing | self._missing).items() if key not in listed}
        else:
            self._missing = {}
        self._listed, self._folder, self._looked_ns = listed, folder, now_ns
        if now_ns - self._told_ns < FORGET_EVERY_S * 1e9:
            return []
        self._told_ns = now_ns
        due = {
            key: path for key, (path, since_ns) in self._missing.items() if now_ns - since_ns >= FORGET_AFTER_S * 1e9
        }
        for key in due:
            del self._missing[key]
        written_anew = set(listed.values())
        return [key for key, path in due.items() if path in written_anew or is_free(path)]

    def _is_continued(self, listed: Mapping[str, Path], folder: tuple[int, int], now_ns: int) -> bool:
        if folder != self._folder:
            return False
        return now_ns - self._looked_ns <= LONGEST_PAUSE_S * 1e9 or not self._listed.keys().isdisjoint(listed)


def is_free(path: Path) -> bool:
    """Whether nothing has this name; False where nobody knows."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False
