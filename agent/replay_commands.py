"""`hematovision replay`: what it does and prints. The answer is the exit code."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent import RESEARCH_USE_ONLY
from agent.bench import make_bench
from agent.collected import open_collected
from agent.config import Config, load_config, state_folder
from agent.delivery.outbox import open_outbox
from agent.delivery.topics import Topics, is_part
from agent.errors import ConfigError, HematoVisionError
from agent.models_in_use import open_models_in_use
from agent.pictures import PICTURES_FOLDER, PictureStore
from agent.replaying import Difference, PictureMissing, Pictures, Verdict
from agent.replaying import replay as analyse_fields
from agent.report.device import read_messages

OK, SOME_FAILED = 0, 1

MOST_TOLD = 20
"""Differences of one field in words; --json has all."""

Message = Mapping[str, Any]


def replay(arguments: argparse.Namespace) -> int:
    """Fields that were counted, analysed again."""
    config = load_config(arguments.config)
    folder = arguments.folder or state_folder(config.outbox)
    in_use = open_models_in_use(config, arguments.models, state=folder)
    in_use.tell(as_json=arguments.json)
    bench = make_bench(config, in_use.models)
    pictures = _pictures(arguments, config, folder)
    verdicts = []
    for verdict in analyse_fields(_messages(arguments, config, folder), pictures.find, bench):
        verdicts.append(verdict)
        if not arguments.json:
            print("\n".join(_lines(verdict)))
    missing = [verdict for verdict in verdicts if isinstance(verdict, PictureMissing)]
    differing = [verdict for verdict in verdicts if isinstance(verdict, Verdict) and not verdict.is_identical]
    identical = len(verdicts) - len(missing) - len(differing)
    if arguments.json:
        fields = [asdict(one) | {"identical": one.is_identical} for one in verdicts if isinstance(one, Verdict)]
        models = {"folder": str(in_use.folder), **dict(zip(("detector", "classifier"), in_use.names, strict=True))}
        told = {
            "models": models,
            "fields": fields,
            "missing": [str(one) for one in missing],
            "notice": RESEARCH_USE_ONLY,
        }
        print(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        words = "identical" if identical == len(verdicts) else "NOT IDENTICAL"
        print(
            f"{words}: {identical} of {len(verdicts)} fields the same to the last digit, {len(differing)} differ,"
            f" {len(missing)} without their picture. {RESEARCH_USE_ONLY}"
        )
    return OK if identical == len(verdicts) else SOME_FAILED


def _pictures(arguments: argparse.Namespace, config: Config, folder: Path) -> Pictures:
    kept = folder / PICTURES_FOLDER
    folders = [] if arguments.images is None else [arguments.images]
    if arguments.images is None and config.camera.kind == "folder" and config.camera.folder.path is not None:
        folders.append(config.camera.folder.path)
    store = PictureStore(kept, 0) if kept.is_dir() else None
    return Pictures(arguments.image, store, folders, config.camera.max_megapixels)


def _messages(arguments: argparse.Namespace, config: Config, folder: Path) -> Sequence[Message]:
    """What was said of the field, or of all fields of the sample. Raises HematoVisionError: it is not here."""
    number = re.fullmatch(r"([a-z0-9-]{1,63}):([0-9]{1,15}):([0-9]{1,15})", arguments.what)
    if number is None and not is_part(arguments.what):
        fault = f"found {arguments.what!r}; allowed: a field's id, as microscope-1:12:345, or a sample's id"
        raise ConfigError("hematovision replay", (fault,))
    if arguments.image is not None and number is None:
        raise ConfigError("hematovision replay", ("--image: is of one field; for a sample give --images DIR",))
    if arguments.database is not None:
        found = _collected(arguments, number)
        where = "the database"
    else:
        with open_outbox(folder, device=config.device, verify=False, create=False) as outbox:
            where = str(outbox.path)
            if number is None:
                topic = Topics(config.site, config.device).field(arguments.what)
                found = list(read_messages(outbox, "field", topic))
            else:
                row = outbox.numbered("field", int(number[2]), int(number[3]))
                is_it = row is not None and row.is_intact and number[1] == config.device
                found = [json.loads(row.payload)] if row is not None and is_it else []
    if not found:
        kept = " (delivery.keep_hours); a collector has them for good: --database URL"
        raise HematoVisionError(
            f"{where}: there is no field of {arguments.what} here{'' if arguments.database else kept}"
        )
    return found


def _collected(arguments: argparse.Namespace, number: re.Match[str] | None) -> list[Message]:
    with open_collected(arguments.database, arguments.database_password_file, "replay") as collection:
        if number is None:
            place = collection.find(arguments.what, arguments.site, arguments.device)
            return list(collection.read(place, arguments.what).fields)
        return collection.fields(number[1], int(number[2]), int(number[3]), arguments.site)


def _lines(verdict: Verdict | PictureMissing) -> Iterator[str]:
    if isinstance(verdict, PictureMissing):
        yield f"MISSING    {verdict}"
        return
    scope = "with its place on the slide" if verdict.with_slide else "as the models see it"
    words = "identical" if verdict.is_identical else "DIFFERS"
    what = f"{verdict.field_id} of sample {verdict.sample}, {verdict.cells} cells"
    yield f"{words:<10} {what}, {scope}: {verdict.picture}"
    for difference in verdict.differences[:MOST_TOLD]:
        yield f"{'':<10} {_words(difference)}"
    if (left := len(verdict.differences) - MOST_TOLD) > 0:
        yield f"{'':<10} and {left} more (--json has all)"
    for difference in verdict.provenance:
        yield f"{'':<10} other {_words(difference)}"


def _words(difference: Difference) -> str:
    what = " ".join(word for word in (difference.where, difference.key) if word)
    return f"{what}: {_short(difference.then)}, now {_short(difference.now)}"


def _short(value: Any) -> str:
    if isinstance(value, str):
        return f"{value[:16]}..." if re.fullmatch(r"[0-9a-f]{64}", value) else value
    return "none" if value is None else json.dumps(value)
