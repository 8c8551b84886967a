"""What a head start brings: training runs of equal length side by side, a table in Markdown from their own logs.

    python -m models.transfer runs/ten-from-scratch runs/ten-with-teacher [--epochs 2 5 10]

The recipes of such runs say `epochs:`; they lie in models/*/recipes/transfer. The figures are those of the float net
with averaged weights on `val`, at the end of these epochs: they compare ways to train, they are not those of a shipped
file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.common.logs import read_log
from models.common.programs import run_program
from models.tables import table

FIGURES = (
    *("val_pbc_accuracy", "val_bccd_accuracy", "val_raabin_accuracy", "val_pbc_morphology"),
    *("all_map50", "all_map50_95", "WBC_map50", "RBC_map50", "platelet_map50"),
)
"""Keys of the logs of classifiers and of detectors, in the order of the columns."""


def main() -> None:
    args = parse()
    logs = {folder.name: read_log(folder) for folder in args.runs}
    shown = [name for name in FIGURES if any(name in line for log in logs.values() for line in log)]
    table(["run", "epochs", *(words(name) for name in shown)], rows_of(logs, args.epochs, shown))


def rows_of(logs: dict[str, list[dict[str, Any]]], epochs: Sequence[int], shown: Sequence[str]) -> list[list[object]]:
    """Of each run the epochs that were judged, in the order of the epochs, so that equal ones stand together."""
    rows: list[list[object]] = []
    for epoch in epochs:
        for name, log in logs.items():
            line = next((line for line in log if line["epoch"] == epoch), {})
            if any(key in line for key in shown):
                rows.append([name, epoch, *(f"{line[key]:.3f}" if key in line else "" for key in shown)])
    return rows


def words(name: str) -> str:
    """`val_pbc_accuracy` as the head of a column."""
    return name.removeprefix("val_").replace("map50_95", "mAP50-95").replace("map50", "mAP50").replace("_", " ")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of training runs")
    parser.add_argument("--epochs", type=int, nargs="+", default=[5, 10], help="which epochs to show")
    return parser.parse_args()


if __name__ == "__main__":
    run_program(main)
