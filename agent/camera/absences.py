"""Pictures of a watched folder that went while the agent was off: which of them nobody need remember any more.

What does not lie in the folder may have been deleted, or it is out of reach: a share that is not mounted or shows
nothing, another card in the reader. Two signs together tell that it was deleted:

    the directory    is the one from which every picture that is remembered was taken, by a name that outlasts restarts
                     (`files.directory_identity`); noted before the first is taken, and taken back before the first
                     that comes from elsewhere
    its contents     a picture of an earlier run still lies in it as it was; or, where all of those are gone, one of
                     this run does and the directory has been watched for as long as `deletions` asks

Where one of them is missing all is remembered. Each look tries at most STEP files, so that one through a folder of
100,000 stays short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Final

from agent.camera import deletions

STEP: Final = 1000
"""Files that one look tries, and that one transaction of the outbox forgets."""

ELSEWHERE: Final = "elsewhere"
"""Noted in place of a directory: pictures were taken from several, or from one that has no lasting name."""


class Absences:
    """Follows one opening of a folder.

    folder: its path. identify: names the directory that is there now; None = it has no lasting name. done: origin keys
    of the pictures that are finished. noted: the directory that an earlier opening noted; note: notes another one, or
    raises.
    """

    def __init__(
        self,
        folder: Path,
        identify: Callable[[], str | None],
        done: Collection[str],
        noted: str | None,
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._identify = identify
        self._done = done
        self._noted = noted
        self._note = note
        self._absent: deque[str] | None = None
        self._device = -1
        self._identity: str | None = None
        self._watched_since_ns: int | None = None

    def look(self, listed: Mapping[str, Path], device: int, taken: Mapping[Path, str], now_ns: int) -> list[str]:
        """Keys of pictures that are found to be deleted with this listing; STEP at most, mostly none.

        listed: by origin key, those on the folder's own file system alone. device: of the folder. taken: keys of this
        opening, by path. now_ns: monotonic.
        """
        self._identity, self._device = self._identify(), device
        if self._absent is None:
            self._absent = deque(key for key in self._done if key not in listed)
            if self._done and not self._absent:
                self._write(self._identity or ELSEWHERE)  # whatever was noted: all that is remembered lies here
        is_same = self._identity is not None and self._identity == self._noted
        if not is_same:
            self._watched_since_ns = None
        elif self._watched_since_ns is None:
            self._watched_since_ns = now_ns
        if not self._absent or not is_same or not self._is_inhabited(listed, taken, now_ns):
            return []
        tried = [self._absent.popleft() for _ in range(min(STEP, len(self._absent)))]
        written_anew = frozenset(listed.values())
        devices: dict[Path, int | None] = {}
        gone = [key for key in tried if key not in listed and self._is_deleted(key, written_anew, devices)]
        return gone if self._identify() == self._identity else []  # it may have gone while they were tried

    def before_taking(self, device: int) -> None:
        """A picture on this device is about to be taken; raises what `note` does, and then it must not be."""
        here = self._identity if device == self._device and self._identity is not None else ELSEWHERE
        is_first = self._noted is None and not self._done
        self._write(here if is_first or here == self._noted else ELSEWHERE)

    def _write(self, place: str) -> None:
        if place != self._noted:
            self._note(place)
            self._noted = place

    def _is_inhabited(self, listed: Mapping[str, Path], taken: Mapping[Path, str], now_ns: int) -> bool:
        if any(key in self._done for key in listed):
            return True
        watched_ns = 0 if self._watched_since_ns is None else now_ns - self._watched_since_ns
        is_watched_long = watched_ns >= deletions.FORGET_AFTER_S * 1e9
        return is_watched_long and any(taken.get(path) == key for key, path in listed.items())

    def _is_deleted(self, key: str, written_anew: Collection[Path], devices: dict[Path, int | None]) -> bool:
        path = _place(self._folder, key)
        if path is None:
            return False
        if path.parent not in devices:
            devices[path.parent] = _device_above(path.parent)
        if devices[path.parent] != self._device:
            return False  # another disk is mounted over the place
        return path in written_anew or deletions.is_free(path)


def _place(folder: Path, key: str) -> Path | None:
    """Where the picture of an origin key lay; None where the key does not tell, or is of another kind of source."""
    name, *facts = key.rsplit("|", 2)
    is_of_folder = len(facts) == 2 and name.rpartition(".")[2].isalnum() and not Path(name).is_absolute()
    return folder / name if is_of_folder and "\\" not in name else None  # a backslash may stand for a byte: `printable`


def _device_above(path: Path) -> int | None:
    """The device of a directory, or of the nearest above it that exists; None where that cannot be seen."""
    for place in (path, *path.parents):
        try:
            return place.stat().st_dev
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None
