"""How the programs here end: a mistake of whoever started one is told in a line on standard error, not as a traceback.

Needs no PyTorch, so that a program can say that this is what is missing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from agent.camera.decoding import describe_os_error
from agent.cli import EXIT_CODE_OF, INTERRUPTED
from agent.errors import HematoVisionError

FOUND_WANTING, WRONG_USAGE = 1, 2
"""Exit codes, as of `hematovision`: what was measured is not good enough; what was asked for cannot be done."""

CONVERTER = ("litert_torch", "ai_edge_quantizer")
"""What makes an int8 file of a net; a program asks for it before it learns for minutes."""

EXTRA = frozenset({"torch", "matplotlib", "flatbuffers", "efficientnet_lite_pytorch", *CONVERTER})
"""Packages of the extra `train`."""


class Unfit(Exception):
    """What a program was given is not fit for it; says where, what was found and how to mend it."""


def require_place(output: Path) -> None:
    """Raises Unfit where what a program is to write under this name, in folders yet to be made, cannot be made."""
    above = next(place for place in output.absolute().parents if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise Unfit(f"{output}: cannot be made in {above}; give another --output")


def require_writable(output: Path) -> None:
    """Raises Unfit where this file cannot be written: asked before minutes of work."""
    if output.is_dir():
        raise Unfit(f"{output}: is a folder; --output takes the name of a file")
    if not output.exists():
        require_place(output)
    elif not os.access(output, os.W_OK):
        raise Unfit(f"{output}: cannot be overwritten; give another --output")


def run_program(main: Callable[[], None], needs: Sequence[str] = ()) -> None:
    """Run a program. needs: packages that it imports late.

    Ends the process where the program cannot go on, with the exit codes of `hematovision`; what nobody foresaw stays a
    traceback.
    """
    try:
        require_extra(needs)
        main()
    except HematoVisionError as error:
        end(str(error), next((code for kind, code in EXIT_CODE_OF.items() if isinstance(error, kind)), WRONG_USAGE))
    except Unfit as error:
        end(str(error))
    except SystemExit as asked:
        if isinstance(asked.code, str):
            end(asked.code)
        raise
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        end_without(str(error.name))
    except OSError as error:
        if error.filename is None:
            raise
        end(f"{error.filename}: {describe_os_error(error)}")
    except KeyboardInterrupt:
        end("ended by Ctrl-C", INTERRUPTED)


def require_extra(packages: Sequence[str]) -> None:
    """End the process in words where one of these is not installed."""
    for package in packages:
        if find_spec(package) is None:
            end_without(package)


def end_without(package: str) -> NoReturn:
    end(f"{package} is not installed: this needs the extra train: pip install -e '.[train]', see models/README.md")


def end(words: str, code: int = WRONG_USAGE) -> NoReturn:
    """End the process with words on standard error."""
    print(words, file=sys.stderr)
    raise SystemExit(code)
