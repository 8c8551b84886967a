"""What the machine under the agent says: temperature, power, memory, disk and clock; and how it hands out memory.

Each reading answers None where the machine does not tell; a board without a thermometer is not a fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
import shutil
from pathlib import Path

import cv2
import numpy as np

from agent.domain import ClockReading, Software
from agent.health import MachineReading, Throttling

THROTTLED_FILE = Path("devices/platform/soc/soc:firmware/get_throttled")
"""Below /sys on a Raspberry Pi; needs neither `vcgencmd` nor the video group."""

STA_UNSYNC = 0x0040
STA_NANO = 0x2000
TIME_ERROR = 5
"""From <sys/timex.h>: clock not synchronised; offset in nanoseconds; adjtimex's answer for an unsynchronised clock."""

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""From <malloc.h>."""

BIG_BLOCK_BYTES = 128 * 1024
"""glibc's own threshold before the first big block is freed; pictures and tensors are above it, all else is below."""

MOST_ARENAS = 2


def keep_big_blocks_apart() -> bool:
    """Have pictures and tensors given back to the system as soon as they are freed; once, before the threads begin.

    By itself glibc raises the size above which a block is mapped alone with each one that is freed, up to 32 MB: after
    the first frames pictures come out of the heaps, between small objects that live on, and the holes that they leave
    add up over days. Setting it once keeps it where it is (mallopt(3), M_MMAP_THRESHOLD). Heaps of their own for each
    of the threads, which wait more than they work, are no gain either. False where the C library has no such word.
    """
    try:
        mallopt = _c_library().mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, BIG_BLOCK_BYTES)) and bool(mallopt(M_ARENA_MAX, MOST_ARENAS))


def give_back_free_memory() -> None:
    """Hand the pages that are free within the heaps to the system (malloc_trim(3)); some milliseconds."""
    with contextlib.suppress(OSError, AttributeError):  # a C library without it keeps them
        _c_library().malloc_trim(0)


@functools.cache
def _c_library() -> ctypes.CDLL:
    """The C library of this process; opened once, since each opening makes a class. Errors: `OSError`."""
    return ctypes.CDLL(None, use_errno=True)


def read_machine(state_folder: Path, *, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> MachineReading:
    """One reading of everything. state_folder: the folder whose disk the outbox fills."""
    return MachineReading(
        temperature_c=read_temperature(sys),
        throttling=read_throttling(sys),
        rss_bytes=read_rss(proc),
        disk_free_bytes=read_disk_free(state_folder),
        clock=read_clock(),
    )


def read_kernel_boot(proc: Path = Path("/proc")) -> str:
    """What names this start of the computer (not of the agent); empty where the kernel does not tell."""
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def read_software() -> Software:
    """What the numbers depend on besides the models: decoding, crops and registration are OpenCV's and numpy's."""
    return Software(platform.machine(), platform.python_version(), np.__version__, cv2.__version__)


def read_temperature(sys: Path = Path("/sys")) -> float | None:
    """The hottest thermal zone, in degrees Celsius."""
    readings = (_read_integer(zone / "temp") for zone in sorted(sys.glob("class/thermal/thermal_zone*")))
    return max((millidegrees / 1000 for millidegrees in readings if millidegrees is not None), default=None)


def read_throttling(sys: Path = Path("/sys")) -> Throttling | None:
    """The firmware's word on under-voltage and throttling; None on anything but a Raspberry Pi."""
    bits = _read_integer(sys / THROTTLED_FILE, base=16)
    return None if bits is None else Throttling(bits=bits)


def read_rss(proc: Path = Path("/proc")) -> int | None:
    """Memory of this process that is in RAM, in bytes."""
    try:
        status = (proc / "self/status").read_text()
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024  # the kernel always writes kB here
    return None


def read_disk_free(folder: Path) -> int | None:
    """Bytes free for us on the disk of this folder."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


class _Timex(ctypes.Structure):
    """The head of `struct timex` (adjtimex(2)); the rest is room for the kernel to write into."""

    _fields_ = [
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    ]


def read_clock() -> ClockReading:
    """Whether the kernel's clock follows a reference and how far it is off; reading needs no right."""
    try:
        timex = _Timex()
        answer = _c_library().adjtimex(ctypes.byref(timex))
    except (OSError, AttributeError):
        return ClockReading(is_synchronised=False)
    return interpret_timex(answer, timex.status, timex.offset)


def interpret_timex(answer: int, status: int, offset: int) -> ClockReading:
    """Read adjtimex's answer. offset: the part still to be slewed, in microseconds, or nanoseconds with STA_NANO."""
    if answer < 0 or answer == TIME_ERROR or status & STA_UNSYNC:
        return ClockReading(is_synchronised=False)
    return ClockReading(is_synchronised=True, offset_ms=offset / (1e6 if status & STA_NANO else 1e3))


def _read_integer(path: Path, base: int = 10) -> int | None:
    try:
        return int(path.read_text().strip(), base)
    except (OSError, ValueError):
        return None
