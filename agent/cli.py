"""The command line: parse, call, and end with the right exit code. What the commands do stands in `commands.py`."""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NoReturn, TypeVar

from agent import RESEARCH_USE_ONLY, __version__
from agent.delivery.topics import is_part
from agent.errors import (
    BrokerUnavailable,
    CameraError,
    ConfigError,
    FrameUnreadable,
    HematoVisionError,
    ModelError,
    OutboxError,
    StoreUnavailable,
)

NumberT = TypeVar("NumberT", int, float)

CENTRAL_COMMANDS = frozenset({"collect", "export"})
"""Those that run beside the database, not beside the microscope, and need the extra `central`."""


EXPORT_TABLES = (
    *("cells", "fields", "differentials", "shares", "samples", "events"),
    *("audit", "alerts", "devices", "gaps", "dead_letters"),
)

FEWEST_SAMPLES, LEAST_FEWEST, FEWEST_LEUKOCYTES = 10, 6, 50
"""Those of `agent.analysis.cohort`, which is not imported before it is needed; a test compares them."""

SOME_FAILED, INTERRUPTED, PIPE_CLOSED = 1, 130, 141

EXIT_CODE_OF: Mapping[type[HematoVisionError], int] = {
    ConfigError: 2,
    ModelError: 3,
    CameraError: 4,
    FrameUnreadable: 4,
    OutboxError: 5,
    StoreUnavailable: 5,
    BrokerUnavailable: 6,
}

EXIT_CODES = """\
exit codes:
  0    all is well
  1    some of the inputs could not be analysed, or some of the checks failed; the others were done
  2    wrong usage, or faults in the configuration
  3    the models cannot be used
  4    the camera cannot be used
  5    results cannot be stored (outbox, disk, central database)
  6    the broker cannot be used
  70   a part of the running agent failed; systemd starts it again
  130  ended by Ctrl-C (the agent itself stops in order and ends with 0)"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console command `hematovision`; ends the process with one of the documented exit codes."""
    _open_closed_streams()
    parsed = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names and frames that the terminal's encoding lacks
    try:
        code: int = _find(parsed.command)(parsed)
        sys.stdout.flush()
    except HematoVisionError as error:
        print(f"hematovision: error: {error}", file=sys.stderr)
        code = _exit_code(error)
    except KeyboardInterrupt:
        print("hematovision: ended by Ctrl-C", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        # `hematovision infer ... | head`: nobody reads any more. Python would complain again while it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = PIPE_CLOSED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EDQUOT):
            raise
        print(f"hematovision: error: the output cannot be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_CODE_OF[OutboxError]
    raise SystemExit(code)


def _open_closed_streams() -> None:
    """Have standard input, output and error where whoever started us closed them: what is written goes nowhere.

    Else the next file that is opened, or the runtime's own words, would take their numbers.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: those of the streams, in their order
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))


def _find(command: str) -> Callable[[argparse.Namespace], int]:
    """What does the command. Imported after parsing: help and usage errors need neither OpenCV nor a database."""
    if command == "report":
        from agent import report_commands as module
    elif command == "replay":
        from agent import replay_commands as module  # type: ignore[no-redef]
    elif command == "review":
        from agent import review_commands as module  # type: ignore[no-redef]
    elif command not in CENTRAL_COMMANDS:
        from agent import commands as module  # type: ignore[no-redef]
    else:
        try:
            from agent.central import commands as module  # type: ignore[no-redef]
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in ("sqlalchemy", "alembic"):
                raise
            fault = f"{error.name} is not installed; `pip install 'hematovision-agent[central]'` brings it"
            raise ConfigError(f"hematovision {command}", (fault,)) from None
    found: Callable[[argparse.Namespace], int] = getattr(module, command.replace("-", "_"))
    return found


def _exit_code(error: HematoVisionError) -> int:
    own = getattr(error, "exit_code", None)
    if own is not None:
        return int(own)
    return next((code for kind, code in EXIT_CODE_OF.items() if isinstance(error, kind)), SOME_FAILED)


# The parser -----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    parser = argparse.ArgumentParser(
        prog="hematovision",
        description=f"Finds, names and counts the cells of a blood smear. {RESEARCH_USE_ONLY}",
        epilog=f"start here:\n  hematovision demo\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hematovision-agent {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, words: str, more: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=words,
            description=f"{words[0].upper()}{words[1:]}. {more} {RESEARCH_USE_ONLY}",
            epilog=f"example:\n  {example}\n\n{EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    run = add(
        "run",
        "run the agent: camera, models, outbox, MQTT",
        "Ends at SIGTERM, at Ctrl-C,\nor when a folder or video that is read once has come to its end.",
        "hematovision run --config /etc/hematovision/config.yaml",
    )
    _add_config(run)

    infer = add(
        "infer",
        "find and name the cells in stored pictures of fields",
        "Both models, no broker.\n"
        "A picture that cannot be read is told on standard error, the rest goes on (exit code 1).\n"
        "A frame that the quality gate would refuse is analysed all the same and marked.",
        "hematovision infer --json fields/ > cells.jsonl",
    )
    _add_paths(infer, "picture of a field, or a folder (read with its sub-folders, in natural order)")
    infer.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line for each picture: the `field` payload and `source`; or `source` and `error`",
    )
    infer.add_argument("--min-score", type=_share, metavar="0..1", help="the detector's threshold; default: manifest")
    infer.add_argument("--save-annotated", type=Path, metavar="DIR", help="write pictures with boxes and classes there")
    _add_models(infer)
    _add_config(infer)

    classify = add(
        "classify",
        "name single cells: each picture is the crop of one cell",
        "Cut tightly or with its surroundings: the cell in the middle\n"
        "is looked for and cut anew; where none lies there, the largest.",
        "hematovision classify --json crops/*.png",
    )
    _add_paths(classify, "picture of one cell, or a folder of such pictures")
    classify.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line: source, class, probability, whether it is trusted, probabilities,"
        " what the cell looks like, and which models named it; or source and error",
    )
    _add_models(classify)
    _add_config(classify)

    demo = add(
        "demo",
        "show it: a broker, the agent on a simulated slide, a live table and the page",
        "Everything runs on this computer,\nreachable from it alone, and leaves nothing behind. Ctrl-C ends it.",
        "hematovision demo --source my-fields/",
    )
    demo.add_argument(
        "--source",
        metavar="PATH",
        help="folder of pictures, video file, camera /dev/video0 or address of a stream; default: a simulated slide",
    )
    demo.add_argument(
        "--sample",
        type=_count,
        metavar="CELLS",
        help="count one sample to so many nucleated cells, write its signed report, and end (extra `report`)",
    )
    demo.add_argument(
        "--report",
        type=Path,
        default=Path("hematovision-report"),
        metavar="DIR",
        help="with --sample: folder of the report; default: hematovision-report",
    )
    demo.add_argument("--fields", type=_count, metavar="N", help="end after N fields; default: go on")
    demo.add_argument("--port", type=_port, metavar="PORT", help="port of the broker on 127.0.0.1; default: a free one")

    check = add(
        "check-config",
        "check a configuration file, and try what it names",
        "The models are loaded, the camera gives\na picture, the broker answers, the outbox's disk takes rows.",
        "hematovision check-config config.yaml",
    )
    check.add_argument("file", nargs="?", type=Path, metavar="FILE", help="default: the packaged configuration")
    check.add_argument("--schema", action="store_true", help="print the JSON Schema for editors, and end")
    check.add_argument("--template", action="store_true", help="print a file with all keys and comments, and end")

    selftest = add(
        "selftest",
        "ask the models the golden fields and compare with the known answers",
        "The running agent\ndoes the same at its start, after each change of models and daily.",
        "hematovision selftest --config /etc/hematovision/config.yaml",
    )
    _add_models(selftest)
    selftest.add_argument("--classifier", metavar="NAME", help="of those in the manifest; default: the configured one")
    selftest.add_argument(
        "--make-answers",
        action="store_true",
        help="take what the models answer now for right, and store it beside them",
    )
    _add_config(selftest)

    outbox = add(
        "outbox",
        "look into the outbox: what waits for the broker",
        "Works beside a running agent.",
        "hematovision outbox --config /etc/hematovision/config.yaml export > waiting.jsonl",
    )
    outbox.add_argument(
        "action",
        nargs="?",
        default="status",
        choices=("status", "list", "inspect", "requeue", "discard", "export"),
        help="status: how many wait, and how long (default); list: one line a message; inspect: dead letters, whole; "
        "requeue: send dead letters again; discard: throw dead letters away; export: JSON Lines",
    )
    outbox.add_argument(
        "numbers",
        nargs="*",
        type=_count,
        metavar="NUMBER",
        help="inspect, requeue, discard: numbers of dead letters, from `list --dead`; requeue without any: all",
    )
    outbox.add_argument("--dead", action="store_true", help="list, export: the dead letters (refused messages) instead")
    outbox.add_argument("--limit", type=_count, default=100, metavar="N", help="list: at most N; default: 100")
    _add_outbox_folder(outbox)

    ask = add(
        "ask",
        "send a command to a running agent and print its reply",
        "The configuration names the broker, the site\nand the device; the keys are those of docs/contract.md, part 7. "
        "0: done; 1: refused or failed.",
        "hematovision ask start sample=s-17 stop_at_cells=200 --config config.yaml",
    )
    ask.add_argument("name", metavar="COMMAND", help="ping, start, stop, pause, resume, selftest, relearn, amend, ...")
    ask.add_argument("words", nargs="*", metavar="KEY=VALUE", help="keys of the command")
    ask.add_argument("--key-file", type=Path, metavar="FILE", help="operators' key: sign the command with it")
    ask.add_argument(
        "--timeout", type=_seconds, default=40.0, metavar="S", help="wait so long for the reply; default 40"
    )
    _add_config(ask)

    report = add(
        "report",
        "write the report of a sample: HTML, PDF, CSV or JSON",
        "From the outbox of this device, beside a\nrunning agent, or with --database from what a collector has. "
        "HTML is one file that needs no other.",
        "hematovision report s-17 --format html --output s-17.html --config config.yaml",
    )
    report.add_argument(
        "what",
        metavar="SAMPLE",
        help="the sample's id; list: names those that are here; with --database cohort: compares samples by age band, "
        "fleet: microscopes; key: the public key that signs here; verify FILE",
    )
    report.add_argument("file", nargs="?", type=Path, metavar="FILE", help="verify: a report; FILE.sig lies beside it")
    report.add_argument("--sign", action="store_true", help="write the signature beside --output (extra `report`)")
    report.add_argument("--by", metavar="TOKEN", help="with --sign: who signs; an opaque token, never a name")
    report.add_argument(
        "--key-file", type=Path, metavar="FILE", help="Ed25519 key; default: the device's own, made once"
    )
    report.add_argument("--public-key", metavar="HEX", help="verify: the key that must have signed")
    report.add_argument("--format", default="html", choices=("html", "pdf", "csv", "json"), help="default: html")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    report.add_argument("--database", metavar="URL", help="the collector's database instead of this device's outbox")
    _add_database_password(report)
    report.add_argument("--site", type=_identifier, metavar="NAME", help="with --database: only this site")
    report.add_argument("--device", type=_identifier, metavar="NAME", help="with --database: only this device")
    report.add_argument("--since", type=_time, metavar="TIME", help="cohort: reports from this time on")
    report.add_argument("--until", type=_time, metavar="TIME", help="cohort: reports before then")
    report.add_argument(
        "--fewest-samples",
        type=_group_size,
        default=FEWEST_SAMPLES,
        metavar="N",
        help=f"cohort: nothing is told of smaller age bands; from {LEAST_FEWEST}; default: {FEWEST_SAMPLES}",
    )
    report.add_argument(
        "--fewest-cells",
        type=_count,
        default=FEWEST_LEUKOCYTES,
        metavar="N",
        help=f"cohort: no shares of samples with fewer classified leukocytes; default: {FEWEST_LEUKOCYTES}",
    )
    _add_outbox_folder(report)

    review = add(
        "review",
        "cells that a person should look at: list, show, answer, export",
        "The list and its pictures stay on the\ndevice; an answer is sent to the running agent as the command amend.",
        "hematovision review answer s-17-204 lymphocyte --by mtl-7 --config config.yaml",
    )
    review.add_argument(
        "action",
        choices=("list", "show", "answer", "export", "agreement"),
        help="list: cells that wait; show: one cell; answer: name it; export: answered crops in class folders, for "
        "models.finetune; agreement: persons against the model",
    )
    review.add_argument(
        "words", nargs="*", metavar="WORD", help="list, agreement: SAMPLE; show: CELL; answer: CELL CLASS; export: DIR"
    )
    review.add_argument("--all", action="store_true", help="list: the answered ones and the gallery too")
    review.add_argument("--by", metavar="TOKEN", help="answer: who says so; an opaque token, never a name")
    review.add_argument("--reason", metavar="WORDS", help="answer: why, for the audit; no personal facts")
    review.add_argument("--json", action="store_true", help="list, show, agreement: as JSON")
    review.add_argument("--timeout", type=_seconds, default=40.0, metavar="S", help="answer: wait so long; default 40")
    _add_outbox_folder(review)

    replay = add(
        "replay",
        "analyse a counted field again and compare every cell and count",
        "Finds its picture by the digest of\nits pixels: --image, --images, what the device keeps (pictures.keep_mb), "
        "the camera's folder.\nSays identical, or which cells differ, and what else counts now. 0: identical.",
        "hematovision replay microscope-3:12:345 --image field.png --config config.yaml",
    )
    replay.add_argument("what", metavar="FIELD", help="a field's id, or a sample's id: all its fields, in order")
    replay.add_argument("--image", type=Path, metavar="FILE", help="the picture of the field")
    replay.add_argument("--images", type=Path, metavar="DIR", help="look for the pictures below this folder")
    _add_models(replay)
    replay.add_argument("--json", action="store_true", help="as JSON, with all differences")
    replay.add_argument("--database", metavar="URL", help="what was said then, from the collector's database")
    _add_database_password(replay)
    replay.add_argument("--site", type=_identifier, metavar="NAME", help="with --database: only this site")
    replay.add_argument("--device", type=_identifier, metavar="NAME", help="with --database: only this device")
    _add_outbox_folder(replay)

    audit = add(
        "audit",
        "check the chain of audit messages",
        "Reads the messages of one device as JSON Lines\n"
        "(mosquitto_sub, an export); fails when something was changed, left out or put in.",
        "hematovision audit verify audit.jsonl",
    )
    audit.add_argument("action", choices=("verify",), help="verify: follow the chain from entry to entry")
    audit.add_argument("file", type=Path, metavar="FILE", help="JSON Lines; - = standard input")

    collect = add(
        "collect",
        "run the receiver: from the broker into a database",
        "Commits what the agents send, and only then\nacknowledges it; asks for what is missing. Ends at SIGTERM.",
        "hematovision collect --database sqlite:////srv/hematovision.db --broker mqtts://broker.example",
    )
    collect.add_argument("--config", type=Path, metavar="FILE", help="settings (see --template); default: all defaults")
    collect.add_argument("--database", metavar="URL", help="sqlite:////path.db or postgresql://user@host/database")
    collect.add_argument("--broker", metavar="ADDRESS", help="host, host:port, mqtt://host or mqtts://host (TLS)")
    collect.add_argument("--receiver", type=_identifier, metavar="NAME", help="this receiver's name; default: central")
    collect.add_argument("--share", type=_identifier, metavar="GROUP", help="divide the messages among collectors")
    collect.add_argument("--template", action="store_true", help="print settings with all keys and comments, and end")

    export = add(
        "export",
        "write what was collected: CSV, JSON Lines, Parquet or FHIR R4",
        "Works beside a running collector.",
        "hematovision export --database sqlite:////srv/hematovision.db --format csv --sample s-17 > cells.csv",
    )
    export.add_argument("--database", metavar="URL", required=True, help="as for collect")
    _add_database_password(export)
    export.add_argument(
        "--format",
        required=True,
        choices=("csv", "jsonl", "parquet", "fhir"),
        help="jsonl: messages as they were sent; fhir: a Bundle a line, for each sample its newest report",
    )
    export.add_argument("--table", default="cells", choices=EXPORT_TABLES, help="default: cells; not for fhir")
    export.add_argument("--site", type=_identifier, metavar="NAME", help="only this site")
    export.add_argument("--device", type=_identifier, metavar="NAME", help="only this device")
    export.add_argument("--sample", type=_identifier, metavar="ID", help="only this sample")
    export.add_argument(
        "--since", type=_time, metavar="TIME", help="from this time on: 2026-11-25 or 2026-11-25T08:00Z"
    )
    export.add_argument("--until", type=_time, metavar="TIME", help="before then")
    export.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    export.add_argument("--codes", type=Path, metavar="FILE", help="fhir: the laboratory's codes; default: an example")

    version = add("version", "print versions of agent, runtime and models", "", "hematovision version")
    _add_config(version)
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, metavar="FILE", help="configuration; default: the packaged one")


def _add_models(command: argparse.ArgumentParser) -> None:
    words = "a folder of models; default: those that the agent uses, configured or activated"
    command.add_argument("--models", type=Path, metavar="DIR", help=words)


def _add_outbox_folder(command: argparse.ArgumentParser) -> None:
    words = "the outbox's folder; default: from the configuration"
    command.add_argument("--folder", type=Path, metavar="DIR", help=words)
    _add_config(command)


def _add_database_password(command: argparse.ArgumentParser) -> None:
    words = "default: HEMATOVISION_DATABASE_PASSWORD, ~/.pgpass"
    command.add_argument("--database-password-file", type=Path, metavar="FILE", help=words)


def _add_paths(command: argparse.ArgumentParser, words: str) -> None:
    words += "; a name that begins with a dash as ./-name"
    command.add_argument("paths", nargs="+", metavar="PATH", help=words)


def _identifier(text: str) -> str:
    if not is_part(text):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: 1 to 63 of a-z, 0-9 and hyphen")
    return text


def _time(text: str) -> datetime:
    """UTC unless it says otherwise."""
    try:
        # Python 3.10 does not know the Z.
        at = datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith(("Z", "z")) else text)
        return (at if at.tzinfo else at.replace(tzinfo=timezone.utc)).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"found {text!r}; allowed: a date or time such as 2026-11-25 or 2026-11-25T08:00:00Z"
        ) from None


def _share(text: str) -> float:
    return _checked(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def _count(text: str) -> int:
    return _checked(text, int, lambda value: value >= 1, "a whole number from 1")


def _group_size(text: str) -> int:
    return _checked(text, int, lambda value: value >= LEAST_FEWEST, f"a whole number from {LEAST_FEWEST}")


def _seconds(text: str) -> float:
    return _checked(text, float, lambda value: 0 < value <= 3600, "seconds, up to 3600")


def _port(text: str) -> int:
    return _checked(text, int, lambda value: 1 <= value <= 65535, "a whole number from 1 to 65535")


def _checked(text: str, kind: type[NumberT], is_allowed: Callable[[NumberT], bool], words: str) -> NumberT:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not is_allowed(value):
        raise argparse.ArgumentTypeError(f"found {text!r}; allowed: {words}")
    return value
