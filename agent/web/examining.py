"""Having an uploaded picture examined, by a program of its own (`agent.examiner`), one picture at a time.

    page --picture--> [ Examiner ] ==pipe==> agent.examiner: models, decoders
                          ^---- found cells, JPEG ----'

Started with the first picture, ended IDLE_S after the last, so that its memory is only taken while it is used. One that
does not answer is killed; the next picture starts another.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import agent
from agent.config import BROKER_PASSWORD_VARIABLE, CAMERA_PASSWORD_VARIABLE, WEB_PASSWORD_VARIABLE, Config

ANSWER_WITHIN_S = 90.0
"""s; loading the models from a slow card, and a picture of the largest size on a slow board."""

IDLE_S = 120.0
"""s; a person who has looked at one picture often has another."""

ENDS_WITHIN_S = 1.0
"""s; it ends with its input; one that is at work then is killed, and nothing is lost by it."""

LENGTH_BYTES = 8
LONGEST_BLOCK_BYTES = 256 * 2**20

SECRETS = frozenset({BROKER_PASSWORD_VARIABLE, CAMERA_PASSWORD_VARIABLE, WEB_PASSWORD_VARIABLE})
"""Variables that are none of its business."""


class ExaminerBusy(Exception):
    """Another picture is being examined."""


class ExaminerFailed(Exception):
    """It has ended without an answer, or gave none in time."""


class Examiner:
    """The program while it runs. config: by which it works; where that has changed, another one is started."""

    def __init__(self, config: Callable[[], Config]) -> None:
        self._config = config
        self._works_by: Config | None = None
        self._process: Process | None = None
        self._busy = asyncio.Lock()
        self._idle: asyncio.TimerHandle | None = None
        self._ending: asyncio.Future[None] | None = None

    async def examine(self, content: bytes) -> tuple[dict[str, Any], bytes]:
        """What is found in a picture, and the picture as JPEG. Raises ExaminerBusy, ExaminerFailed.

        content: a file's bytes, not empty: on the pipe a block of no bytes tells the program to end.
        """
        assert content
        if self._busy.locked():
            raise ExaminerBusy("another picture is being examined; try again in a moment")
        async with self._busy:
            if self._idle is not None:
                self._idle.cancel()
            try:
                return await asyncio.wait_for(self._ask(content), ANSWER_WITHIN_S)
            except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, ValueError) as error:
                await self.close()
                reason = "took too long" if isinstance(error, asyncio.TimeoutError) else "could not bear this picture"
                raise ExaminerFailed(f"the examination {reason} and was ended; the counting goes on") from error
            finally:
                self._idle = asyncio.get_running_loop().call_later(IDLE_S, self._end_if_idle)

    async def close(self) -> None:
        """End the program, whatever it does."""
        process, self._process = self._process, None
        if self._idle is not None:
            self._idle.cancel()
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), 0 if self._busy.locked() else ENDS_WITHIN_S)
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _ask(self, content: bytes) -> tuple[dict[str, Any], bytes]:
        process = await self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(_head(content))
        process.stdin.write(content)
        await process.stdin.drain()
        found = json.loads(await _read_block(process.stdout))
        return found, await _read_block(process.stdout)

    async def _running(self) -> Process:
        config = self._config()
        if self._process is not None and (self._process.returncode is not None or config != self._works_by):
            await self.close()
        if self._process is None:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "agent.examiner",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=Path(agent.__file__).parents[1],
                env={name: value for name, value in os.environ.items() if name not in SECRETS},
                start_new_session=True,
            )
            self._works_by = config
            assert self._process.stdin is not None
            words = config.model_dump_json().encode()
            self._process.stdin.write(_head(words) + words)
        return self._process

    def _end_if_idle(self) -> None:
        if not self._busy.locked():
            self._ending = asyncio.ensure_future(self.close())  # kept: the loop alone does not hold it


# ---------------------------------------------------------------------------------------------------- on the pipes


def write_block(stream: IO[bytes], content: bytes) -> None:
    """A block: its length, its bytes."""
    stream.write(_head(content))
    stream.write(content)
    stream.flush()


def read_block(stream: IO[bytes]) -> bytes:
    """The next block; empty at the end of the stream, or where it breaks off."""
    head = stream.read(LENGTH_BYTES)
    length = int.from_bytes(head, "big") if len(head) == LENGTH_BYTES else 0
    content = stream.read(length)
    return content if len(content) == length else b""


def _head(content: bytes) -> bytes:
    return len(content).to_bytes(LENGTH_BYTES, "big")


async def _read_block(stream: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await stream.readexactly(LENGTH_BYTES), "big")
    if length > LONGEST_BLOCK_BYTES:
        raise ValueError(f"a block of {length} bytes")
    return await stream.readexactly(length)
