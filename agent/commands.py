"""What each command does: call the module that knows, print what it says. The answer is the exit code."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from rich.live import Live

from agent import RESEARCH_USE_ONLY, __version__, console
from agent.analysis.cells import UNIDENTIFIED
from agent.config import (
    CommandsSection,
    Config,
    json_schema,
    load_config,
    read_operator_key,
    state_folder,
    template,
)
from agent.delivery.asking import ask as send_command
from agent.delivery.audit import verify
from agent.delivery.commands import COMMANDS
from agent.delivery.messages import models_body, morphology_body, round_probabilities, serialise
from agent.delivery.outbox import Outbox, open_outbox
from agent.delivery.topics import Topics
from agent.demo import DemoAddresses, DemoOptions, run_demo
from agent.errors import HematoVisionError, OutboxError
from agent.inference.models import Models
from agent.inference.selftest import GoldenTest, make_answers
from agent.models_in_use import open_models_in_use
from agent.offline import (
    Album,
    Analysed,
    Classified,
    Unread,
    analyse_pictures,
    classify_pictures,
    find_pictures,
    refuse_to_overwrite,
)
from agent.preflight import run_checks
from agent.supervisor import run_agent
from agent.systemd import is_journal

OK, SOME_FAILED = 0, 1

TEXTS = frozenset({"transaction", "by", "sample", "accession", "cell_id", "class", "reason", "folder"})
"""Keys of commands that are texts even where they look like a number: the accession 00123."""


def run(arguments: argparse.Namespace) -> int:
    """The agent itself, until it has ended."""
    config = load_config(arguments.config)
    _start_logging(config)
    return run_agent(config, partial(load_config, arguments.config))


def infer(arguments: argparse.Namespace) -> int:
    """Stored fields through both models."""
    config = load_config(arguments.config)
    if arguments.min_score is not None:
        section = config.models.model_copy(update={"min_score": arguments.min_score})
        config = config.model_copy(update={"models": section})
    pictures = find_pictures(arguments.paths)
    if arguments.save_annotated is not None:
        refuse_to_overwrite(arguments.save_annotated, pictures)
    in_use = open_models_in_use(config, arguments.models)
    in_use.tell(as_json=arguments.json)
    models = in_use.models
    album = _album(arguments.save_annotated, models)
    totals: Counter[str] = Counter()
    failed = 0
    with console.with_progress(analyse_pictures(pictures, config, models), len(pictures), "fields") as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, Unread):
                failed += 1
                _report_unread(outcome, arguments.json)
                continue
            totals.update(outcome.field.counts)
            if album is not None:
                album.save(outcome)
            _print_field(outcome, arguments.json, is_only_one=len(pictures) == 1)
    if not arguments.json:
        _print_totals(totals, len(pictures) - failed, failed)
    return SOME_FAILED if failed else OK


def classify(arguments: argparse.Namespace) -> int:
    """Stored crops through the classifier."""
    config = load_config(arguments.config)
    in_use = open_models_in_use(config, arguments.models)
    in_use.tell(as_json=arguments.json)
    models = in_use.models
    pictures = find_pictures(arguments.paths)
    failed = 0
    with console.with_progress(classify_pictures(pictures, config, models), len(pictures), "crops") as outcomes:
        for outcome in outcomes:
            if isinstance(outcome, Unread):
                failed += 1
                _report_unread(outcome, arguments.json)
            else:
                _print_crop(outcome, models, arguments.json, is_only_one=len(pictures) == 1)
    if not arguments.json:
        print(RESEARCH_USE_ONLY)
    return SOME_FAILED if failed else OK


def demo(arguments: argparse.Namespace) -> int:
    """Everything on this computer, shown as it arrives."""
    options = DemoOptions(arguments.source, arguments.fields, arguments.port, arguments.sample, arguments.report)
    view = console.LiveCells()
    is_live = sys.stdout.isatty()

    def on_start(at: DemoAddresses) -> None:
        page = "not here; it needs the extra `web`" if at.page is None else at.page
        view.heading = (
            f"HematoVision demo, agent {__version__}. {RESEARCH_USE_ONLY}",
            f"broker: {at.broker}, listen yourself: mosquitto_sub -p {at.broker_port} -t 'hv/1/#' -v     (Ctrl-C ends)",
            f"page:   {page}",
        )
        if not is_live:
            print("\n".join(view.heading), flush=True)

    def on_message(kind: str, body: Mapping[str, Any]) -> None:
        if kind == "event" and body["severity"] == "info":
            return  # that a demo starts and ends is seen
        view.take(kind, body)
        if kind == "cell" and not is_live:
            print(console.cell_line(body), flush=True)
        elif kind == "event" and not is_live:
            print(console.event_line(body), file=sys.stderr, flush=True)

    try:
        if is_live:
            with Live(view, console=console.results_console(), refresh_per_second=4):
                written = run_demo(options, on_start, on_message)
        else:
            written = run_demo(options, on_start, on_message)
    finally:
        print(view.summary(), flush=True)
    for path in written:
        print(f"signed report: {path}     (hematovision report verify {path})")
    return OK


def check_config(arguments: argparse.Namespace) -> int:
    """The configuration, and all that it names."""
    if arguments.schema:
        print(json.dumps(json_schema(), indent=2))
        return OK
    if arguments.template:
        print(template(), end="")
        return OK
    config = load_config(arguments.file)
    print(f"{'pass':<5} configuration  {arguments.file or 'the packaged defaults'}: no faults", flush=True)
    failed = 0
    for check in run_checks(config):
        failed += not check.is_passed
        print(f"{'pass' if check.is_passed else 'FAIL':<5} {check.name:<13}  {check.words}", flush=True)
    print(f"{failed or 'no'} failure{'' if failed == 1 else 's'}. {RESEARCH_USE_ONLY}")
    return SOME_FAILED if failed else OK


def selftest(arguments: argparse.Namespace) -> int:
    """The models against the golden fields."""
    config = load_config(arguments.config)
    in_use = open_models_in_use(config, arguments.models, classifier=arguments.classifier)
    in_use.tell(as_json=False)
    models, folder = in_use.models, in_use.folder
    if arguments.make_answers:
        answers = make_answers(models, folder)
        cells = sum(len(field.cells) for field in answers.fields.values())
        path = folder / models.answers_name
        print(f"{path}: {len(answers.fields)} golden fields, {cells} cells, of these models now on")
    verdict = GoldenTest(folder).run(models)
    for field in verdict.fields:
        how = "bit by bit" if field.is_exact else "within the tolerance"
        print(f"{'pass' if field.is_passed else 'FAIL':<5} {field.name:<8} {field.cells} cells, compared {how}")
        for fault in field.faults:
            print(f"{'':<14} {fault}")
    print(f"{'pass' if verdict.is_passed else 'FAIL'}: {verdict.detail}. {RESEARCH_USE_ONLY}")
    return OK if verdict.is_passed else SOME_FAILED


def outbox(arguments: argparse.Namespace) -> int:
    """What waits for the broker."""
    config = load_config(arguments.config)
    folder = arguments.folder or state_folder(config.outbox)
    actions: Mapping[str, Callable[[Outbox, argparse.Namespace], None]] = {
        "status": _outbox_status,
        "list": _outbox_list,
        "inspect": _outbox_inspect,
        "requeue": _outbox_requeue,
        "discard": _outbox_discard,
        "export": _outbox_export,
    }
    # Not verified: an agent may be writing to it, and setting a damaged file aside is the agent's own business.
    with open_outbox(folder, device=config.device, verify=False, create=False) as outbox:
        actions[arguments.action](outbox, arguments)
    return OK


def _outbox_status(outbox: Outbox, _arguments: argparse.Namespace) -> None:
    oldest_age_s = outbox.oldest_age_s()
    print(f"outbox        {outbox.path}")
    print(f"waiting       {outbox.depth()} messages")
    print(f"oldest        {'-' if oldest_age_s is None else f'{oldest_age_s:.0f} s'}")
    print(f"dead letters  {outbox.dead_letter_count()}")
    print(f"kept          {outbox.kept_bytes() / 2**20:.1f} MB that were confirmed, to be sent again when asked for")
    dropped = ", ".join(f"{count} {stream}" for stream, count in outbox.dropped().items())
    print(f"dropped       {dropped or 'nothing'}{' (unconfirmed, for room)' if dropped else ''}")
    print(RESEARCH_USE_ONLY)


def _outbox_list(outbox: Outbox, arguments: argparse.Namespace) -> None:
    if arguments.dead:
        for letter in outbox.dead_letters()[: arguments.limit]:
            place = f"{letter.letter_id:>8}  {letter.topic}  {letter.stream} {letter.boot}:{letter.seq}"
            print(f"{place}  {len(letter.payload)} bytes  {letter.rejected_at}  {letter.reason}")
    else:
        for row in outbox.pending(0, arguments.limit):
            place = f"{row.row_id:>8}  {row.topic}  {row.stream} {row.boot}:{row.seq}"
            print(f"{place}  {len(row.payload)} bytes{'' if row.is_intact else '  DAMAGED'}")
    print(RESEARCH_USE_ONLY)


def _outbox_inspect(outbox: Outbox, arguments: argparse.Namespace) -> None:
    for line in outbox.export_rows(dead_letters=True, only=_numbers(outbox, arguments)):
        print(json.dumps(json.loads(line), indent=2, ensure_ascii=False))


def _outbox_discard(outbox: Outbox, arguments: argparse.Namespace) -> None:
    gone = outbox.discard(_numbers(outbox, arguments))
    print(f"{gone} dead letters thrown away, {outbox.dead_letter_count()} stay. {RESEARCH_USE_ONLY}")


def _numbers(outbox: Outbox, arguments: argparse.Namespace) -> list[int]:
    """The dead letters that were named. Raises OutboxError: none, or one that is not there."""
    if not arguments.numbers:
        raise OutboxError(f"outbox {arguments.action}: name the dead letters; `outbox list --dead` shows their numbers")
    there = {letter.letter_id for letter in outbox.dead_letters()}
    if missing := sorted(set(arguments.numbers) - there):
        raise OutboxError(f"{outbox.path}: there is no dead letter {missing[0]}; `outbox list --dead` shows which are")
    return list(arguments.numbers)


def _outbox_requeue(outbox: Outbox, arguments: argparse.Namespace) -> None:
    moved = outbox.requeue(_numbers(outbox, arguments) if arguments.numbers else None)
    print(f"{moved} dead letters wait again, {outbox.dead_letter_count()} stay. {RESEARCH_USE_ONLY}")


def _outbox_export(outbox: Outbox, arguments: argparse.Namespace) -> None:
    for line in outbox.export_rows(dead_letters=arguments.dead):
        print(line)


def ask(arguments: argparse.Namespace) -> int:
    """One command to a running agent."""
    config = load_config(arguments.config)
    if arguments.name not in COMMANDS:
        raise HematoVisionError(f"command {arguments.name!r}: known are {', '.join(sorted(COMMANDS))}")
    key = None
    if arguments.key_file is not None:
        key = read_operator_key(CommandsSection(operator="key", operator_key_file=arguments.key_file))
    topics = Topics(config.site, config.device)
    words = dict(map(_word_and_value, arguments.words))
    reply = send_command(config.broker, topics, arguments.name, words, key=key, timeout_s=arguments.timeout)
    print(json.dumps(reply, indent=2, ensure_ascii=False))
    return OK if reply["status"] == "ok" else SOME_FAILED


def _word_and_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE; a value that is a number, true, false or null is meant as one."""
    word, mark, value = text.partition("=")
    if not word or not mark:
        raise HematoVisionError(f"{text!r}: write KEY=VALUE")
    if word in TEXTS:
        return word, value
    try:
        return word, json.loads(value)
    except ValueError:
        return word, value


def audit(arguments: argparse.Namespace) -> int:
    """Whether the audit of a device is whole."""
    try:
        if str(arguments.file) == "-":
            # Of all topics of a device (mosquitto_sub) some are pictures: no text.
            verdict = verify(line.decode("utf-8", errors="replace") for line in sys.stdin.buffer)
        else:
            with arguments.file.open(encoding="utf-8", errors="replace") as lines:
                verdict = verify(lines)
    except OSError as error:
        raise HematoVisionError(
            f"{arguments.file}: cannot be read: {error.strerror}; name a file of messages"
        ) from error
    for fault in verdict.faults:
        print(f"FAIL  {fault}")
    span = f"{verdict.first} to {verdict.last}" if verdict.entries else "none"
    print(f"{verdict.entries} entries ({span}), {verdict.repeats} repeats, {verdict.missing} missing")
    if not verdict.entries and verdict.is_sound:
        words = "FAIL: there is no audit message in it; name a file with what came on the topic audit"
    else:
        words = "pass: an unbroken chain" if verdict.is_sound else "FAIL: not what the device wrote"
    print(f"{words}. {RESEARCH_USE_ONLY}")
    return OK if verdict.entries and verdict.is_sound else SOME_FAILED


def version(arguments: argparse.Namespace) -> int:
    """Who counts here."""
    print(f"hematovision-agent {__version__}")
    print(f"python             {platform.python_version()} on {platform.machine()}")
    print(RESEARCH_USE_ONLY)
    config = load_config(arguments.config)
    in_use = open_models_in_use(config)
    models = in_use.models
    print(f"runtime            {models.runtime}, delegate {models.delegate}")
    print(f"models             {in_use.fault or in_use.slot_words or in_use.folder}")
    for entry in (models.manifest.detector, models.manifest.classifier):
        print(f"{entry.role:<18} {entry.name} {entry.version}, sha256 {entry.sha256}")
        print(f"{'':<18} {', '.join(entry.classes)}")
    return OK


# Printing -------------------------------------------------------------------------------------------------------------


def _report_unread(unread: Unread, as_json: bool) -> None:
    console.print_error(f"{unread.source}: {unread.reason}")
    if as_json:
        _print_json({"source": unread.source, "error": unread.reason})


def _print_json(message: Mapping[str, Any]) -> None:
    sys.stdout.buffer.write(serialise(message) + b"\n")
    sys.stdout.buffer.flush()


def _print_field(analysed: Analysed, as_json: bool, *, is_only_one: bool) -> None:
    source, message = analysed.picture.source, analysed.message
    if as_json:
        _print_json({"source": source, **message})
    elif is_only_one:
        console.print_table(console.cells_table(source, message["cells"]))
    else:
        print(f"{source}: {console.counts_words(message['counts'])}{_quality_words(message['quality'])}", flush=True)


def _quality_words(quality: Mapping[str, Any]) -> str:
    return "" if quality["accepted"] else f" (the agent would refuse this frame: {', '.join(quality['reasons'])})"


def _print_totals(totals: Mapping[str, int], fields: int, failed: int) -> None:
    title = f"{fields} field{'' if fields == 1 else 's'}" + (f", {failed} not readable" if failed else "")
    if totals:
        console.print_table(console.counts_table(totals, title))
    else:
        print(f"{title}: no cells")
    print(RESEARCH_USE_ONLY)


def _print_crop(classified: Classified, models: Models, as_json: bool, *, is_only_one: bool) -> None:
    answer = classified.classification
    probabilities = round_probabilities(answer.probabilities)
    if as_json:
        named: dict[str, object] = {"class": answer.class_name, "probability": probabilities[answer.class_name]}
        named["is_trusted"] = classified.is_trusted
        seen = {"cell_probability": round(answer.cell_probability, 4), "morphology": morphology_body(answer.morphology)}
        by = {"provenance": models_body(models.detector.identity, models.classifier.identity)}
        _print_json({"source": classified.source, **named, "probabilities": probabilities, **seen, **by})
    elif is_only_one:
        console.print_table(console.probabilities_table(classified.source, probabilities))
        if not classified.is_trusted:
            print(f"{UNIDENTIFIED}: no name is trusted, in a field the agent would count it so")
        print(classified.looks or "the model does not describe this cell")
    else:
        likeliest = f"{answer.class_name} {answer.probability:.3f}"
        name = likeliest if classified.is_trusted else f"{UNIDENTIFIED}, most like {likeliest}"
        looks = f", {classified.looks}" if classified.looks else ""
        print(f"{classified.source}: {name}{looks}", flush=True)


def _album(folder: Path | None, models: Models) -> Album | None:
    names: Iterable[str] = (*models.manifest.classifier.classes, *models.manifest.detector.classes)
    return None if folder is None else Album(folder, tuple(dict.fromkeys(names)), RESEARCH_USE_ONLY)


def _start_logging(config: Config) -> None:
    """Log to standard error; under systemd the journal adds the time itself."""
    time_words = "" if is_journal() else "%(asctime)s "
    logging.basicConfig(level=config.log.level.upper(), format=f"{time_words}%(levelname)s %(name)s: %(message)s")
