"""`hematovision review`: what it does and prints. The answer is the exit code."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent import RESEARCH_USE_ONLY, console
from agent.analysis.agreement import measure_agreement
from agent.analysis.cells import UNIDENTIFIED
from agent.config import load_config, state_folder
from agent.delivery.asking import ask as send_command
from agent.delivery.outbox import open_outbox
from agent.delivery.topics import Topics, is_part
from agent.errors import ConfigError, HematoVisionError
from agent.files import whole_file
from agent.report.document import agreement_body
from agent.report.words import kappa_words
from agent.reporting import ANSWERS, ARTEFACT, REVIEW, kept_key
from agent.review import CROPS_FOLDER, CropStore, KeptCell, as_begun, read_kept_cells

OK, SOME_FAILED = 0, 1

NO_CELL = "no-cell"
"""Folder for crops that show no cell that has a name, as `models.finetune` reads it."""

_WORDS: Mapping[str, tuple[int, int, str]] = {
    "list": (0, 1, "SAMPLE, or nothing for all"),
    "show": (1, 1, "CELL"),
    "answer": (2, 2, "CELL CLASS"),
    "export": (1, 1, "DIR"),
    "agreement": (0, 1, "SAMPLE, or nothing for all"),
}


def review(arguments: argparse.Namespace) -> int:
    """One of the actions."""
    fewest, most, words = _WORDS[arguments.action]
    if not fewest <= len(arguments.words) <= most:
        raise ConfigError(f"hematovision review {arguments.action}", (f"give {words}",))
    actions: Mapping[str, Callable[[argparse.Namespace], int]] = {
        "list": _list,
        "show": _show,
        "answer": _answer,
        "export": _export,
        "agreement": _agreement,
    }
    return actions[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    cells = [cell for cell in _read(arguments, *arguments.words) if cell.is_open or arguments.all]
    if arguments.json:
        print(json.dumps([_facts(cell) for cell in cells], indent=2))
        return OK
    for cell in cells:
        print(_line(cell))
    print(f"{sum(cell.is_open for cell in cells)} cells wait for a person. {RESEARCH_USE_ONLY}")
    return OK


def _show(arguments: argparse.Namespace) -> int:
    (cell_id,) = arguments.words
    cell = next((one for one in _read(arguments) if one.cell_id == cell_id), None)
    if cell is None:
        raise HematoVisionError(
            f"cell {cell_id}: not in the review list; `hematovision review list --all` shows which are"
        )
    facts = _facts(cell)
    facts["picture"] = str(_crops(arguments).path(cell.sid, cell.cell_id).absolute()) if cell.jpeg else None
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    return OK


def _answer(arguments: argparse.Namespace) -> int:
    cell_id, name = arguments.words
    sid, mark, number = cell_id.rpartition("-")
    if not mark or not number.isdecimal():
        raise ConfigError("hematovision review answer", (f"found {cell_id!r}; allowed: a cell's id, as s-17-204",))
    if arguments.by is None:
        raise ConfigError("hematovision review answer", ("--by: missing; an answer says who gives it",))
    config = load_config(arguments.config)
    request = {"sample": sid, "cell_id": cell_id, "class": name, "by": arguments.by}
    if arguments.reason is not None:
        request["reason"] = arguments.reason
    topics = Topics(config.site, config.device)
    reply = send_command(config.broker, topics, "amend", request, timeout_s=arguments.timeout)
    print(f"{reply['status']}: {reply['message']}")
    return OK if reply["status"] == "ok" else SOME_FAILED


def _export(arguments: argparse.Namespace) -> int:
    """Folders named by class, as `python -m models.finetune` reads them; several devices may share them.

    A cell stands in the folder of its newest answer alone, and in none when that is `unidentified`.
    """
    target = Path(arguments.words[0])
    device = load_config(arguments.config).device
    written: Counter[str] = Counter()
    told: Counter[str] = Counter()
    for cell in _read(arguments):
        if not cell.answers:
            continue
        name = cell.answers[-1].person
        folder = None if name == UNIDENTIFIED else target / (NO_CELL if name == ARTEFACT else name)
        try:
            is_there = _put(target, folder, f"{device}-{cell.cell_id}.jpg", cell.jpeg, told)
            _rename_old(target, cell, told)
        except OSError as error:
            raise ConfigError(f"review export {target}", (f"cannot be written: {error.strerror}",)) from error
        if folder is None:
            told["left out: a person could not name it either"] += 1
        elif not is_there:
            told["left out: its picture is not here any more"] += 1
        else:
            written[folder.name] += 1
    for name, count in sorted(written.items()):
        print(f"{count:>6}  {target / name}")
    for words, count in told.items():
        print(f"{count:>6}  {words}")
    further = (
        f"Next: python -m models.finetune {target} --output NEW" if written else "`review answer` names cells first"
    )
    print(f"{sum(written.values())} crops. {further}. {RESEARCH_USE_ONLY}")
    return OK if written else SOME_FAILED


def _put(target: Path, folder: Path | None, file: str, jpeg: bytes, told: Counter[str]) -> bool:
    """Have the picture in this folder and in no other; None = in none. Returns whether it is there. Raises OSError.

    jpeg: empty where the device does not have it any more; one that was exported before is taken then.
    """
    before = list(target.glob(f"*/{file}"))
    jpeg = jpeg or next((path.read_bytes() for path in before), b"")
    if folder is not None and jpeg:
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / file) as sink:
            sink.write(jpeg)
    for path in before:
        if path.parent != folder:
            path.unlink()
            told["answered anew: taken out of the folder of the answer before"] += 1
    return folder is not None and bool(jpeg)


def _rename_old(target: Path, cell: KeptCell, told: Counter[str]) -> None:
    """Take away what an older version exported of this cell, under a name without the device. Raises OSError.

    Another device may have cells of the same ids: what is not this very picture stays and is told.
    """
    for path in target.glob(f"*/{cell.cell_id}.jpg"):
        if path.read_bytes() == cell.jpeg:
            path.unlink()
        else:
            told[f"named as an older version did, perhaps of another device; stays in {path.parent}"] += 1


def _agreement(arguments: argparse.Namespace) -> int:
    answers = [cell.answers[-1] for cell in _read(arguments, *arguments.words) if cell.answers]
    print_agreement(agreement_body(measure_agreement(answers)), as_json=arguments.json)
    return OK


def print_agreement(body: Mapping[str, Any], *, as_json: bool) -> None:
    """The table, the share of each class and kappa."""
    if as_json:
        print(json.dumps({**body, "notice": RESEARCH_USE_ONLY}, indent=2))
        return
    persons = sorted({person for row in body["table"].values() for person in row})
    rows = [(model, *(str(row.get(person, 0)) for person in persons)) for model, row in body["table"].items()]
    console.print_table(console.plain_table("model (rows) against person (columns)", ("model", *persons), rows))
    for one in body["by_class"]:
        share = "" if one["pct"] is None else f" = {one['pct']} % ({one['low_pct']} to {one['high_pct']})"
        print(f"{one['class']:<20} {one['agreed']} of {one['cells']}{share}")
    print(f"agreed {body['agreed']} of {body['named']} that the model named, {body['declined']} that it did not name")
    print(f"Cohen's kappa: {kappa_words(body)}")
    print(f"Of cells that the model was unsure of: not its accuracy on all. {RESEARCH_USE_ONLY}")


# ------------------------------------------------------------------------------------------------------- the parts


def _read(arguments: argparse.Namespace, sid: str = "") -> Sequence[KeptCell]:
    if sid and not is_part(sid):
        raise ConfigError("hematovision review", (f"found {sid!r}; allowed: a sample's id (a-z, 0-9 and hyphen)",))
    config = load_config(arguments.config)
    folder = arguments.folder or state_folder(config.outbox)
    of_sample = f"{sid}/" if sid else ""
    with open_outbox(folder, device=config.device, verify=False, create=False) as outbox:
        listed, answers = outbox.notes(f"{REVIEW}{of_sample}"), outbox.notes(f"{ANSWERS}{of_sample}")
        ended = outbox.notes(kept_key(""))
    return as_begun(read_kept_cells(listed, answers, CropStore(folder / CROPS_FOLDER)), ended)


def _crops(arguments: argparse.Namespace) -> CropStore:
    folder = arguments.folder or state_folder(load_config(arguments.config).outbox)
    return CropStore(folder / CROPS_FOLDER)


def _line(cell: KeptCell) -> str:
    said = f"{cell.answers[-1].person} by {cell.answers[-1].by}" if cell.answers else "waits" if cell.is_open else "-"
    margin = "-" if cell.margin is None else f"{cell.margin:.2f}"
    picture = "" if cell.jpeg else "  (no picture)"
    name = cell.class_name if cell.class_name == cell.guess else f"{cell.class_name} ({cell.guess}?)"
    return f"{cell.cell_id:<24} {name:<32} {cell.probability:.2f}  margin {margin}  {cell.reason:<13} {said}{picture}"


def _facts(cell: KeptCell) -> dict[str, Any]:
    facts = asdict(cell)
    facts["answers"] = [asdict(answer) for answer in cell.answers]
    facts["is_open"] = cell.is_open
    facts["has_picture"] = bool(facts.pop("jpeg"))
    facts["class"] = facts.pop("class_name")
    return facts
