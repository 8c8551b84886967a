"""`hematovision collect` and `hematovision export`: what they do and print. The answer is the exit code."""

from __future__ import annotations

import argparse
import logging
import os

from agent import RESEARCH_USE_ONLY
from agent.central.collector import Collector
from agent.central.database import open_database
from agent.central.settings import load_settings, template
from agent.signals import stop_on_signals

OK = 0


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
    time_words = "" if "JOURNAL_STREAM" in os.environ else "%(asctime)s "
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
