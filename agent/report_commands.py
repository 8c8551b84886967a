"""`hematovision report`: what it does and prints. The answer is the exit code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from agent import RESEARCH_USE_ONLY
from agent.analysis.cohort import compare
from agent.analysis.fleet import compare_fleet
from agent.collected import open_collected
from agent.config import load_config, state_folder
from agent.delivery.commands import TOKEN
from agent.delivery.messages import rfc3339_ms
from agent.delivery.outbox import Outbox, has_outbox, open_outbox
from agent.delivery.topics import Topics, is_part
from agent.errors import ConfigError, HematoVisionError, OutboxError
from agent.files import whole_file
from agent.report.cohort import compose_cohort, render_cohort
from agent.report.device import read_device, reported_samples
from agent.report.document import compose
from agent.report.fleet import compose_fleet, render_fleet
from agent.report.formats import Document
from agent.report.render import render
from agent.report.signature import ENDING, KEY_NAME, SignatureWrong, open_key, public_hex, sign, verify
from agent.review import CROPS_FOLDER, CropStore, KeptCell

if TYPE_CHECKING:
    from agent.central.records import Collection

OK, SOME_FAILED = 0, 1


def report(arguments: argparse.Namespace) -> int:
    """A sample on paper, the list of those that can be, the key that signs, or whether a signature holds."""
    actions = {"list": _list, "key": _key, "verify": _verify, "cohort": _cohort, "fleet": _fleet}
    if arguments.what in actions:
        return actions[arguments.what](arguments)
    _check_signing(arguments)
    document, crops = _compose(arguments)
    rendered = render(document, crops, arguments.format)
    return _hand_out(arguments, rendered, document["sample"], f"sample {document['sample']}, {document['status']}")


def _cohort(arguments: argparse.Namespace) -> int:
    """Samples of one age band beside those of another."""
    if arguments.database is None:
        raise ConfigError("hematovision report cohort", ("--database: missing; it compares what was collected there",))
    _check_signing(arguments)
    with _collection(arguments) as collection:
        collected = collection.cohort(arguments.site, arguments.device, arguments.since, arguments.until)
    comparison = compare(collected.samples, arguments.fewest_samples, arguments.fewest_cells)
    asked = {
        "site": arguments.site,
        "device": arguments.device,
        "since": None if arguments.since is None else rfc3339_ms(arguments.since),
        "until": None if arguments.until is None else rfc3339_ms(arguments.until),
    }
    document = compose_cohort(comparison, collected.left_out, asked, datetime.now(timezone.utc))
    words = f"{document['samples']} samples in {len(document['groups'])} age bands"
    return _hand_out(arguments, render_cohort(document, arguments.format), "cohort", words)


def _fleet(arguments: argparse.Namespace) -> int:
    """Each microscope beside the others, as they are now."""
    faults = []
    if arguments.database is None:
        faults.append("--database: missing; it compares what was collected there")
    for name in ("device", "since", "until"):
        if getattr(arguments, name) is not None:
            faults.append(f"--{name}: leave it out; all devices are compared, as they are now")
    if faults:
        raise ConfigError("hematovision report fleet", tuple(faults))
    _check_signing(arguments)
    now = datetime.now(timezone.utc)
    with _collection(arguments) as collection:
        fleet = collection.fleet(now, arguments.site)
    standings = compare_fleet(fleet.devices)
    document = compose_fleet(fleet.devices, standings, fleet.left_out, arguments.site, now)
    out = sum(any(one.stands_out for one in listed) for listed in standings.values())
    words = f"{len(fleet.devices)} devices, {out} stand out"
    return _hand_out(arguments, render_fleet(document, arguments.format), "fleet", words)


def _check_signing(arguments: argparse.Namespace) -> None:
    faults = []
    if arguments.sign and arguments.output is None:
        faults.append("--sign: give --output too; the signature is written beside it")
    if arguments.sign and arguments.database is not None and arguments.key_file is None:
        faults.append("--sign: give --key-file too; the key of a device stays on the device, the centre needs its own")
    if arguments.by is not None and not re.fullmatch(TOKEN, arguments.by):
        faults.append(f"--by: found {arguments.by!r}; allowed: an opaque token")
    if faults:
        raise ConfigError("hematovision report", tuple(faults))


def _hand_out(arguments: argparse.Namespace, rendered: bytes, subject: str, words: str) -> int:
    """To standard output, or into a file, signed if asked for. words: what it is, for people."""
    if arguments.output is None:
        if arguments.format == "pdf" and sys.stdout.isatty():
            raise ConfigError("hematovision report", ("--output: missing; a PDF is not for a terminal",))
        sys.stdout.buffer.write(rendered)
        return OK
    files = {arguments.output: rendered}
    if arguments.sign:
        key = open_key(_key_file(arguments), create=True)
        beside = arguments.output.with_name(arguments.output.name + ENDING)
        files[beside] = sign(rendered, subject, key, at=datetime.now(timezone.utc), by=arguments.by)
    for path, content in files.items():
        with whole_file(path) as sink:
            sink.write(content)
    names = " and ".join(str(path) for path in files)
    print(f"{names}: {words}. {RESEARCH_USE_ONLY}", file=sys.stderr)
    return OK


def _key(arguments: argparse.Namespace) -> int:
    print(public_hex(open_key(_key_file(arguments), create=True)))
    return OK


def _verify(arguments: argparse.Namespace) -> int:
    if arguments.file is None:
        raise ConfigError("hematovision report verify", ("FILE: missing; name the report, its .sig lies beside it",))
    beside = arguments.file.with_name(arguments.file.name + ENDING)
    try:
        signed = verify(arguments.file.read_bytes(), beside.read_bytes(), arguments.public_key)
    except OSError as error:
        raise HematoVisionError(f"{error.filename}: cannot be read: {error.strerror}") from error
    except SignatureWrong as error:
        print(f"FAIL  {arguments.file}: {error}. {RESEARCH_USE_ONLY}")
        return SOME_FAILED
    who = f"by {signed.by} with" if signed.by else "with"
    known = "" if arguments.public_key else " (whose key that is was not checked: see --public-key)"
    print(f"pass  {arguments.file}: sample {signed.sample}, signed {signed.at} {who} key {signed.public_key}{known}")
    return OK


def _key_file(arguments: argparse.Namespace) -> Path:
    """Where the key of reports is, or is to be made: as asked for, else beside the outbox.

    Raises OutboxError where there is none: what is made there would be the key of no device.
    """
    if arguments.key_file is not None:
        return Path(arguments.key_file)
    folder: Path = arguments.folder or state_folder(load_config(arguments.config).outbox)
    if not has_outbox(folder) and not (folder / KEY_NAME).exists():
        words = "there is no outbox and no key; give the folder of a running agent (outbox.folder), or --key-file"
        raise OutboxError(f"{folder}: {words}")
    return folder / KEY_NAME


def _list(arguments: argparse.Namespace) -> int:
    if arguments.database is not None:
        with _collection(arguments) as collection:
            for place, sid, status in collection.samples(arguments.site, arguments.device):
                print(f"{place.site}/{place.device}  {sid}  {status}")
    else:
        with _device(arguments) as (outbox, topics):
            for sid, status in reported_samples(outbox, topics):
                print(f"{sid}  {status}")
    print(RESEARCH_USE_ONLY)
    return OK


def _compose(arguments: argparse.Namespace) -> tuple[Document, Mapping[str, KeptCell]]:
    if not is_part(arguments.what):
        words = "a sample's id (a-z, 0-9 and hyphen), list, cohort, fleet, key or verify"
        fault = f"found {arguments.what!r}; allowed: {words}"
        raise ConfigError("hematovision report", (fault,))
    if arguments.database is not None:
        with _collection(arguments) as collection:
            place = collection.find(arguments.what, arguments.site, arguments.device)
            record = collection.read(place, arguments.what)
            return compose(record, datetime.now(timezone.utc)), record.crops
    with _device(arguments) as (outbox, topics):
        record = read_device(outbox, topics, arguments.what, CropStore(outbox.path.parent / CROPS_FOLDER))
        return compose(record, datetime.now(timezone.utc)), record.crops


@contextmanager
def _device(arguments: argparse.Namespace) -> Iterator[tuple[Outbox, Topics]]:
    """The outbox of this device, beside a running agent, and its topics."""
    config = load_config(arguments.config)
    folder = arguments.folder or state_folder(config.outbox)
    with open_outbox(folder, device=config.device, verify=False, create=False) as outbox:
        yield outbox, Topics(config.site, config.device)


def _collection(arguments: argparse.Namespace) -> AbstractContextManager[Collection]:
    return open_collected(arguments.database, arguments.database_password_file, "report")
