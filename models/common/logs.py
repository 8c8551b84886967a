"""The log of a training run: a line of JSON for each epoch, in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG_NAME = "log.jsonl"


def log_figures(folder: Path, **figures: Any) -> None:
    """Append one line of figures to the run's log and print it."""
    folder.mkdir(parents=True, exist_ok=True)
    rounded = {k: round(v, 5) if isinstance(v, float) else v for k, v in figures.items()}
    with (folder / LOG_NAME).open("a") as log:
        log.write(json.dumps(rounded) + "\n")
    print(json.dumps(rounded), flush=True)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log. Raises SystemExit where there is none."""
    try:
        return [json.loads(line) for line in (folder / LOG_NAME).read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise SystemExit(f"{folder}: not the folder of a training run: {error}") from error
