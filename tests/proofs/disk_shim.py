"""Builds `disk_shim.c` and starts programs behind it; reads what it has recorded."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.brokers import NotInstalled

SOURCE = Path(__file__).with_name("disk_shim.c")


@dataclass(frozen=True, slots=True)
class Operation:
    """kind: W write, T truncate (offset = new length), S sync, M mark (offset = its number)."""

    kind: str
    path: str
    offset: int
    payload: bytes


def build(folder: Path) -> Path:
    """The shared library. Raises NotInstalled without a C compiler."""
    if shutil.which("gcc") is None:
        raise NotInstalled("gcc is not installed (apt install gcc libc6-dev)")
    library = folder / "disk_shim.so"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


def start(
    library: Path, folder: Path, module: str, *arguments: str, log: Path | None = None, **options: Any
) -> subprocess.Popen[str]:
    """A Python module behind the shim, which looks at the files below `folder`."""
    environment = {**os.environ, "LD_PRELOAD": str(library), "HV_SHIM_FOLDER": str(folder.resolve())}
    if log is not None:
        environment["HV_SHIM_LOG"] = str(log)
    return subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment, text=True, **options)


def shim() -> Any:
    """The functions of the shim, in a process that was started behind it."""
    library = ctypes.CDLL(None)
    library.shim_operations.restype = ctypes.c_long
    library.shim_mark.argtypes = [ctypes.c_long]
    library.shim_arm.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_long]
    return library


def read_log(log: Path) -> Iterator[Operation]:
    """What was recorded, in order."""
    with log.open("rb") as file:
        while head := file.read(19):
            kind, path_length, offset, length = struct.unpack("=cHQQ", head)
            path = file.read(path_length).decode()
            payload = file.read(length) if kind == b"W" else b""
            yield Operation(kind.decode(), path, offset, payload)
