"""What people see in the terminal: tables, progress, errors.

Results go to standard output, all else to standard error.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from agent import RESEARCH_USE_ONLY

PIPE_WIDTH = 120
"""Columns of a table that goes into a file or a pipe, where no terminal says its width."""

RECENT_CELLS = 12
"""Cells that the demo's table shows: with the counts below it they fit on a terminal of 40 lines."""

Body = Mapping[str, Any]
ThingT = TypeVar("ThingT")


def results_console() -> Console:
    """Standard output; tables keep one width when it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def print_table(table: Table) -> None:
    """A table on standard output."""
    results_console().print(table)


def print_error(text: str) -> None:
    """One failure on standard error, without a traceback."""
    print(f"hematovision: error: {text}", file=sys.stderr, flush=True)


@contextmanager
def with_progress(things: Iterable[ThingT], total: int, label: str) -> Iterator[Iterator[ThingT]]:
    """Walk over things with a progress bar on standard error; without one when that is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or total < 2:
        yield iter(things)
        return
    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield iter(progress.track(things, total=total))


# Cells ----------------------------------------------------------------------------------------------------------------


def cells_table(title: str, cells: Iterable[Body]) -> Table:
    """The cells of a field as they stand in its message."""
    table = Table(title=escape(title), title_justify="left")
    for name in ("cell", "class"):
        table.add_column(name, overflow="fold")
    for name in ("probability", "detector", "box (px)"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status")
    for cell in cells:
        detector = f"{cell['detector']['class']} {cell['detector']['score']:.2f}"
        row = (cell["cell_id"], cell["class"], f"{cell['probability']:.3f}", detector, box_words(cell), cell["status"])
        table.add_row(*(Text(word, style=_style(cell)) for word in row))
    return table


def counts_table(counts: Mapping[str, int], title: str = "counts") -> Table:
    """Counted cells by class."""
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    table.add_column("cells", justify="right")
    for name, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])):
        table.add_row(Text(name), str(count))
    return table


def plain_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Words in rows; all but the first column are numbers."""
    table = Table(title=escape(title), title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(word) for word in row))
    return table


def counts_words(counts: Mapping[str, int]) -> str:
    """Counts in one line, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{name} {count}" for name, count in ordered) or "no cells"


def probabilities_table(source: str, probabilities: Mapping[str, float]) -> Table:
    """The classifier's answer for one crop."""
    table = Table(title=escape(source), title_justify="left")
    table.add_column("class")
    table.add_column("probability", justify="right")
    for name, probability in sorted(probabilities.items(), key=lambda pair: -pair[1]):
        table.add_row(Text(name), f"{probability:.3f}")
    return table


def box_words(cell: Body) -> str:
    """A box in whole pixels: left, top, right, bottom."""
    return " ".join(f"{round(edge)}" for edge in cell["box"])


def _style(cell: Body) -> str:
    return {"accepted": "", "edge": "dim", "duplicate": "dim", "unidentified": "yellow"}.get(cell["status"], "dim")


# The demo -------------------------------------------------------------------------------------------------------------


class LiveCells:
    """What a subscriber has seen so far: the newest cells, the counts by class, the agent's state, the outcome."""

    def __init__(self) -> None:
        self.heading: Sequence[str] = ("starting",)
        self.counts: Counter[str] = Counter()
        self.cells = 0
        self.fields = 0
        self.state = "starting"
        self.event = ""
        self.sample = ""
        self.outcome: Sequence[str] = ()
        self._recent: deque[Body] = deque(maxlen=RECENT_CELLS)

    def take(self, kind: str, body: Body) -> None:
        """Take in one message of any kind."""
        if kind == "state":
            self.state = str(body["state"])
        elif kind == "field":
            self.fields += 1
            self.counts.update(body["unique_counts"])
        elif kind == "differential":
            self.outcome = outcome_lines(body)
        elif kind == "sample":
            wanted = body["stop_at"]["cells"]
            self.sample = "" if wanted is None else f"   nucleated: {body['nucleated']} of {wanted}"
        elif kind == "event":
            self.event = event_line(body)
        elif kind == "cell":
            self.cells += 1
            self._recent.append(body)

    def summary(self) -> str:
        """The counts in one line, below the differential where there is one."""
        fields = "1 field" if self.fields == 1 else f"{self.fields} fields"
        counts = f"{fields}, {self.cells} cells, each counted once: {counts_words(+self.counts)}."
        return "\n".join((*self.outcome, f"{counts} {RESEARCH_USE_ONLY}"))

    def __rich__(self) -> RenderableType:
        heading = [Text(line, style="dim") for line in self.heading]
        status = Text(f"agent: {self.state}   fields: {self.fields}   cells: {self.cells}{self.sample}", style="bold")
        counts = counts_table(+self.counts, "counted cells by class")
        event = [Text(self.event, style="yellow")] if self.event else []
        return Group(*heading, status, *event, self._recent_table(), counts)

    def _recent_table(self) -> Table:
        table = Table(title="newest cells, read from MQTT", title_justify="left")
        table.add_column("time (UTC)", no_wrap=True)
        table.add_column("class", min_width=18)
        for name in ("probability", "box (px)"):
            table.add_column(name, justify="right", no_wrap=True, min_width=11)
        table.add_column("status", min_width=12)
        for cell in self._recent:
            row = (_time_words(cell), cell["class"], f"{cell['probability']:.3f}", box_words(cell), cell["status"])
            table.add_row(*(Text(word, style=_style(cell)) for word in row))
        return table


def outcome_lines(differential: Body) -> list[str]:
    """A final differential, a line for each class that was seen: share of the leukocytes with its interval."""
    if differential["status"] == "preliminary":
        return []
    heading = (
        f"differential of {differential['leukocytes']} leukocytes, {differential['interval']['level_pct']} % intervals:"
    )
    return [
        heading,
        *(
            f"  {share['class']:<22}{share['pct']:5.1f} %   ({share['low_pct']:.1f} to {share['high_pct']:.1f})"
            for share in differential["shares"]
            if share["count"]
        ),
    ]


def cell_line(cell: Body) -> str:
    """One cell of the demo where there is no terminal."""
    words = (_time_words(cell), f"{cell['class']:<18}", f"{cell['probability']:.3f}", f"{box_words(cell):<19}")
    return "  ".join((*words, cell["status"]))


def event_line(event: Body) -> str:
    """Something that happened to the agent, in one line."""
    return f"{event['severity']}: {' '.join(str(event['message']).split())}"


def _time_words(cell: Body) -> str:
    return str(cell["captured_at"])[11:23]
