"""`hematovision report`: what it does and prints. The answer is the exit code."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone

from agent import RESEARCH_USE_ONLY
from agent.config import load_config, state_folder
from agent.delivery.outbox import Outbox, open_outbox
from agent.delivery.topics import Topics
from agent.errors import ConfigError
from agent.files import whole_file
from agent.report.device import read_device, reported_samples
from agent.report.document import Document, compose
from agent.report.html import render_html
from agent.report.tables import render_csv
from agent.review import CROPS_FOLDER, CropStore, KeptCell

OK, SOME_FAILED = 0, 1


def report(arguments: argparse.Namespace) -> int:
    """A sample on paper, or the list of those that can be."""
    if arguments.what == "list":
        return _list(arguments)
    document, crops = _compose(arguments)
    rendered = render(document, crops, arguments.format)
    if arguments.output is None:
        sys.stdout.buffer.write(rendered)
        return OK
    with whole_file(arguments.output) as sink:
        sink.write(rendered)
    print(
        f"{arguments.output}: sample {document['sample']}, {document['status']}. {RESEARCH_USE_ONLY}", file=sys.stderr
    )
    return OK


def render(document: Document, crops: Mapping[str, KeptCell], wanted: str) -> bytes:
    """The report in one of its formats."""
    if wanted == "json":
        return json.dumps(document, indent=2, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if wanted == "csv":
        return render_csv(document).encode("utf-8", "replace")
    return render_html(document, crops).encode("utf-8", "replace")


def _list(arguments: argparse.Namespace) -> int:
    with _device(arguments) as (outbox, topics):
        for sid, status in reported_samples(outbox, topics):
            print(f"{sid}  {status}")
    print(RESEARCH_USE_ONLY)
    return OK


def _compose(arguments: argparse.Namespace) -> tuple[Document, Mapping[str, KeptCell]]:
    if not re.fullmatch(r"[a-z0-9-]{1,63}", arguments.what):
        fault = f"found {arguments.what!r}; allowed: a sample's id (a-z, 0-9 and hyphen), or list"
        raise ConfigError("hematovision report", (fault,))
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
