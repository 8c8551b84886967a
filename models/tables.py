"""The tables of the model cards, as Markdown, from figures that `models.evaluate --json` has printed.

    for what in detector large-frames close-ups classifier two-stage eight-classes microscopes framings no-cell; do
        python -m models.evaluate $what --json > models/figures/$what.json
        python -m models.evaluate $what --json --models runs/float > models/figures/float-$what.json
    done
    for name in mobilenetv2-x0.5 darknet-19-x0.25; do     # the other classifiers of the manifest
        F=models/figures
        python -m models.evaluate classifier --classifier $name --json > $F/classifier-$name.json
        python -m models.evaluate classifier --classifier $name --json --models runs/float \\
            > $F/float-classifier-$name.json
        python -m models.evaluate microscopes --classifier $name --json > $F/microscopes-$name.json
    done
    python -m models.robustness --split val --json > models/figures/robustness.json
    python -m models.tables models/figures                                     # on standard output
    python -m models.tables models/figures models/*/MODEL_CARD.md              # into the cards, between their marks

The figures of the shipped files lie in `models/figures`, each with the SHA-256 of the files that it was measured with.
Files that are missing leave their tables out. In a card the tables of `detector` stand between the lines
`<!-- figures: detector -->` and `<!-- end of figures -->`.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from models.common.programs import Unfit, run_program

Figures = dict[str, Any]


def main() -> None:
    folder, *cards = (Path(word) for word in sys.argv[1:] or ["missing"])
    if not folder.is_dir():
        raise SystemExit(
            "usage: python -m models.tables FOLDER [CARD ...]   (FOLDER: of JSON files from models.evaluate)"
        )
    found = {what: draw(folder, what) for what in TABLES if (folder / f"{what}.json").exists()}
    if any(folder.glob("classifier-*.json")):
        found["classifiers"] = draw_classifiers(folder)
    for card in cards:
        card.write_text(fill(card.read_text(), found))
    if not cards:
        for what, text in found.items():
            print(f"### {what}\n\n{text}")


def draw(folder: Path, what: str) -> str:
    """The tables of one evaluation: the shipped file and, where it was measured, the float net."""
    figures = read_whole(folder / f"{what}.json")
    return printed(lambda: TABLES[what](figures, read(folder / f"float-{what}.json")))


def printed(show: Callable[[], None]) -> str:
    """What a function writes to standard output."""
    drawn = io.StringIO()
    with contextlib.redirect_stdout(drawn):
        show()
    return drawn.getvalue()


def draw_classifiers(folder: Path) -> str:
    """A line for each classifier that was measured: `classifier.json`, and `classifier-NAME.json` of the others."""
    rows = []
    for file in [*folder.glob("classifier.json"), *sorted(folder.glob("classifier-*.json"))]:
        figures, other = read_whole(file), read(folder / f"float-{file.name}")
        elsewhere = read(folder / file.name.replace("classifier", "microscopes", 1)) or {"sources": {}}
        row: list[object] = [figures["names"]["classifier"], figures["accuracy"], other["accuracy"] if other else "-"]
        row += [figures["macro_f1"], figures["accuracy_at_coverage"]["0.95"], figures["calibration_error"]["after"]]
        row.append(figures["morphology"]["mean_accuracy"] if figures.get("morphology") else "-")
        row += [elsewhere["sources"].get(source, {}).get("accuracy", "-") for source in ELSEWHERE]
        rows.append([f"{value:.4f}" if isinstance(value, float) else value for value in row])
    header = ("classifier", "accuracy", "float", "macro-F1", "surest 95 %", "calibration error", "morphology")
    return printed(lambda: table((*header, *(f"{source} accuracy" for source in ELSEWHERE)), rows))


ELSEWHERE = ("bccd", "raabin")


def fill(card: str, found: Mapping[str, str]) -> str:
    """The card with the tables of each evaluation between its marks; one that was not measured keeps its old ones."""

    def renew(marked: re.Match[str]) -> str:
        what = marked["what"]
        return f"<!-- figures: {what} -->\n\n{found[what]}{END}" if what in found else marked[0]

    return re.sub(rf"<!-- figures: (?P<what>[a-z-]+) -->.*?{END}", renew, card, flags=re.DOTALL)


END = "<!-- end of figures -->"


def read(file: Path) -> Figures | None:
    """The figures of a file; None = they were not measured."""
    return read_whole(file) if file.exists() else None


def read_whole(file: Path) -> Figures:
    """The figures of a file. `Unfit` for one that a measurement which ended early has left."""
    try:
        found: Figures = json.loads(file.read_text())
    except ValueError as error:
        raise Unfit(
            f"{file}: not what `models.evaluate --json` prints ({error}); measure it again, or delete it"
        ) from error
    return found


def table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """One Markdown table on standard output; floats get three decimals."""
    names = list(header)
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(f'{v:.3f}' if isinstance(v, float) else str(v) for v in row)} |")
    print()


def draw_detector(figures: Figures, other: Figures | None) -> None:
    keys = ("cells", "precision", "recall", "map50", "map50_95")
    group = figures["groups"]["complete"]
    floats = other["groups"]["complete"] if other else {}
    table(
        ("class", "cells", "P", "R", "mAP50", "mAP50-95", "float mAP50", "float mAP50-95"),
        (
            (name, *(f[k] for k in keys), *(floats[name][k] if floats else "" for k in keys[3:]))
            for name, f in group.items()
        ),
    )
    draw_groups(figures, other)


def draw_groups(figures: Figures, _other: Figures | None) -> None:
    """mAP50 of each class, and the means, a row for each group of fields."""
    classes = list(dict.fromkeys(name for found in figures["groups"].values() for name in found if name != "all"))
    rows = []
    for name, found in figures["groups"].items():
        by_class = [found[c]["map50"] if c in found else "-" for c in classes]
        rows.append((name, figures["fields"][name], *by_class, found["all"]["map50"], found["all"]["map50_95"]))
    table(("fields", "n", *classes, "mean mAP50", "mean mAP50-95"), rows)


def draw_eight_classes(figures: Figures, _other: Figures | None) -> None:
    keys = ("cells", "precision", "recall", "map50", "map50_95")
    table(
        (f"class (in {figures['fields']['pbc']} fields)", "cells", "P", "R", "mAP50", "mAP50-95"),
        ((name, *(f[k] for k in keys)) for name, f in figures["groups"]["pbc"].items()),
    )


def draw_names(figures: Figures, other: Figures | None) -> None:
    floats = other["classes"] if other else {}
    print(f"accuracy {figures['accuracy']:.4f}", end="")
    print(f" (float {other['accuracy']:.4f})" if other else "", end="")
    print(f", macro-F1 {figures['macro_f1']:.4f}, n = {figures['n']}", end="")
    print(f", missed {figures['missed']}, unidentified {figures['unidentified']}\n" if "missed" in figures else "\n")
    rows = (
        (name, f["n"], f["precision"], f["recall"], f["f1"], floats[name]["f1"] if floats else "")
        for name, f in figures["classes"].items()
    )
    table(("class", "n", "P", "R", "F1", "float F1"), rows)
    names = list(figures["classes"])
    table(("true, named", *names), ((n, *row) for n, row in zip(names, figures["confusion"], strict=True)))
    if "calibration_error" in figures:
        error = figures["calibration_error"]
        print(f"calibration error {error['before']:.4f} before, {error['after']:.4f} after the temperature\n")
        at = figures["accuracy_at_coverage"]
        table(("coverage", *at), (("accuracy", *(f"{v:.4f}" for v in at.values())),))
    if figures.get("morphology"):
        found = figures["morphology"]
        rows = ((n, f["accuracy"], f["macro_f1"]) for n, f in found["attributes"].items())
        mean = ("mean", found["mean_accuracy"], found["mean_macro_f1"])
        table((f"attribute (n = {found['n']})", "accuracy", "macro-F1"), (*rows, mean))


def draw_microscopes(figures: Figures, _other: Figures | None) -> None:
    rows = []
    for source, f in figures["sources"].items():
        given = f["accuracy_of_accepted"]
        rows.append((source, f["n"], f["accuracy"], f["accepted"], "-" if given is None else given))
    table(("fields of", "cells", "accuracy", "accepted", "accuracy of accepted"), rows)


def draw_framings(figures: Figures, _other: Figures | None) -> None:
    rows = (
        (width, f["n"], f["accuracy"], f["accepted"], "-" if (r := f["accuracy_of_accepted"]) is None else r)
        for width, f in figures["framings"].items()
    )
    table(("picture, in boxes of the cell", "cells", "accuracy", "accepted", "accuracy of accepted"), rows)


def draw_no_cell(figures: Figures, _other: Figures | None) -> None:
    rows = (
        (kind, f["n"], f["named"], "-" if f["auroc"] is None else f"{f['auroc']:.4f}")
        for kind, f in figures["kinds"].items()
    )
    table(("crop of", "n", "gets a name", "AUROC against cells"), rows)
    print("Drawn into fields, between their cells:\n")
    rows_in_fields = ((kind, f["n"], f["boxed"], f["named"]) for kind, f in figures["in_fields"].items())
    table(("in a field", "n", "gets a box of a nucleated cell or platelet", "is counted by the agent"), rows_in_fields)


KINDS = {
    "detector": "Cells found: mean mAP50 on the complete fields (n = {fields})",
    "classifier": "Middle cell of a PBC picture found and named rightly (n = {cells})",
    "agent": "The same, and trusted, so that it is counted (n = {cells})",
    "microscopes": "Cells of other microscopes named rightly (n = {foreign_cells})",
}


def draw_robustness(figures: Figures, _other: Figures | None) -> None:
    steps = list(next(iter(figures["looks"].values())))
    for kind, title in KINDS.items():
        print(f"{title.format_map(figures)}:\n")
        table(("look", *steps), ((look, *(by[step][kind] for step in steps)) for look, by in figures["looks"].items()))


TABLES: dict[str, Callable[[Figures, Figures | None], None]] = {
    "detector": draw_detector,
    "large-frames": draw_groups,
    "close-ups": draw_groups,
    "classifier": draw_names,
    "two-stage": draw_names,
    "eight-classes": draw_eight_classes,
    "microscopes": draw_microscopes,
    "framings": draw_framings,
    "no-cell": draw_no_cell,
    "robustness": draw_robustness,
}


if __name__ == "__main__":
    run_program(main)
