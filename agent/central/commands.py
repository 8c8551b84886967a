"""`hematovision collect` and `hematovision export`: what they do and print. The answer is the exit code."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import IO

from agent import RESEARCH_USE_ONLY
from agent.central.codes import load_codes
from agent.central.collector import Collector
from agent.central.database import check_schema, open_database
from agent.central.export import Selection
from agent.central.export import export as write_export
from agent.central.settings import load_settings, template
from agent.files import whole_file
from agent.signals import stop_on_signals
from agent.systemd import is_journal

OK, SOME_FAILED = 0, 1


def collect(arguments: argparse.Namespace) -> int:
    """From the broker into the database, until it is stopped."""
    if arguments.template:
        print(template(), end="")
        return OK
    settings = load_settings(
        arguments.config,
        database=arguments.database,
        broker=arguments.broker,
        receiver=arguments.receiver,
        share=arguments.share,
    )
    time_words = "" if is_journal() else "%(asctime)s "
    logging.basicConfig(level=settings.log_level.upper(), format=f"{time_words}%(levelname)s %(name)s: %(message)s")
    logging.getLogger(__name__).info("%s", RESEARCH_USE_ONLY)
    assert settings.database.url is not None  # load_settings sees to it
    engine = open_database(settings.database.url, settings.database.password_file)
    try:
        with stop_on_signals() as stop:
            Collector(settings, engine, stop).run()
    finally:
        engine.dispose()
    return OK


def export(arguments: argparse.Namespace) -> int:
    """From the database into a file, or to standard output."""
    engine = open_database(arguments.database, arguments.database_password_file, read_only=True)
    check_schema(engine)
    selection = Selection(arguments.site, arguments.device, arguments.sample, arguments.since, arguments.until)
    codes = load_codes(arguments.codes) if arguments.format == "fhir" else None

    def write(sink: IO[bytes]) -> tuple[int, list[str]]:
        return write_export(engine, arguments.table, arguments.format, selection, sink, codes)

    try:
        if arguments.output is None:
            count, complaints = write(sys.stdout.buffer)
        else:
            with whole_file(arguments.output) as sink:
                count, complaints = write(sink)
    finally:
        engine.dispose()
    for complaint in complaints:
        print(f"hematovision: not exported: {complaint}", file=sys.stderr)
    what = "FHIR bundles" if arguments.format == "fhir" else f"rows of {arguments.table}"
    print(f"{count} {what}. {RESEARCH_USE_ONLY}", file=sys.stderr)
    return SOME_FAILED if complaints else OK
