"""The command line of the kit."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .asking import Desk, ask_harmless, ask_retained, ask_samples
from .clauses import Findings, read_clauses
from .confirming import Receiver, ask_confirmation
from .ears import Access, Ears, Unreachable
from .listening import judge_all
from .receiving import judge_fleet, judge_receiver
from .restarting import ask_restart

FIRST_HEALTH_S = 35.0
"""A device that has just started says it within its interval, 30 s by default."""

LATE_S = 5.0
"""For what lies retained at the broker."""

NEEDS_SAMPLES = ("6.1", "6.2", "6.3", "6.5", "6.6", "6.7")
NEEDS_DISTURBING = ("2.2", "2.3", "7.3")
NEEDS_RESTART = ("6.8", "7.11")
NEEDS_ACKNOWLEDGING = ("3.6", "9.4")


def main(arguments: Sequence[str] | None = None) -> int:
    """0: no clause failed; 1: some did; 2: nothing could be looked at."""
    options = parse(arguments)
    access = Access(
        options.broker[0],
        options.broker[1],
        options.username,
        None if options.password_file is None else options.password_file.read_text().strip(),
        options.ca_file,
        options.certificate_file,
        options.key_file,
        options.protocol,
    )
    base = f"hv/1/{options.device}"
    findings = Findings()
    clauses = read_clauses()
    try:
        access = access.settled()
        ears = Ears(access, (f"{base}/#",), base)
    except Unreachable as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 2
    try:
        if options.receiver is not None:
            judge_receiver(ears, base, options.receiver, findings)
            judge_fleet(ears.heard, base, options.receiver, findings)
            chosen = [clause for clause in clauses.values() if clause.is_for_receivers]
        else:
            if not judge_device(access, ears, base, findings, options):
                print(
                    f"conformance: nothing is heard of {base}; is it running, and is the name right?", file=sys.stderr
                )
                return 2
            chosen = [clause for clause in clauses.values() if not clause.is_for_receivers]
    except Unreachable as error:
        print(f"conformance: {error}; has this user the right to write there?", file=sys.stderr)
        return 2
    finally:
        ears.close()
    for line in findings.lines(chosen):
        print(line)
    results = [findings.result(clause.number) for clause in chosen]
    failed = results.count("FAIL")
    print(f"{results.count('pass')} pass, {failed} FAIL, {results.count('not tested')} not tested")
    return 1 if failed else 0


def judge_device(access: Access, ears: Ears, base: str, findings: Findings, options: argparse.Namespace) -> bool:
    """All clauses about a device; returns whether there is one."""
    receiver = None if options.acknowledge_as is None else Receiver(ears, base, options.acknowledge_as)
    try:
        return judge_all_of_device(access, ears, base, findings, options, receiver)
    finally:
        if receiver is not None:
            receiver.close()


def judge_all_of_device(
    access: Access,
    ears: Ears,
    base: str,
    findings: Findings,
    options: argparse.Namespace,
    receiver: Receiver | None,
) -> bool:
    """receiver: that the device waits for; None = not ours to play."""
    if ears.wait_for(lambda heard: bool(heard.kind), options.seconds) is None:
        return False
    # 2.1: what lies there for who comes late. By exact names: some brokers keep it from a wildcard.
    ears.wait_for(lambda heard: heard.kind == "health", FIRST_HEALTH_S)
    documents = ("state", "info", "health")
    late = Ears(access, tuple(f"{base}/{name}" for name in documents), base)
    for name in documents:
        there = late.wait_for(lambda heard, name=name: heard.kind == name and heard.is_retained, LATE_S)
        findings.look("2.1", there is not None, f"{name} is not there for a late subscriber")
    late.close()
    time.sleep(options.seconds)
    desk = Desk(ears, base, findings, is_v5=access.is_v5)
    is_answering = ask_harmless(desk)
    if is_answering and options.samples:
        ask_samples(desk)
    if not options.samples:
        findings.leave(NEEDS_SAMPLES, "needs --samples: it would end the sample that is open")
    if options.disturb:
        ask_retained(access, desk)
    else:
        findings.leave(NEEDS_DISTURBING, "needs --disturb: it would break the device's connection once")
    if receiver is None:
        findings.leave(
            NEEDS_ACKNOWLEDGING, "needs --acknowledge-as: it would play the receiver that the device waits for"
        )
    elif is_answering:
        ask_confirmation(desk, receiver)
    restarts = 0
    if options.restart is None:
        findings.leave(NEEDS_RESTART, "needs --restart: it would kill the agent once")
    elif is_answering:
        restarts = ask_restart(desk, options.restart)
    judge_all(ears.heard, findings, base, is_v5=access.is_v5, restarts=restarts)
    if not access.is_v5:
        findings.leave(("1.5",), "MQTT 3.1.1 has no content types")
    return True


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("--broker", type=_broker, required=True, metavar="HOST:PORT")
    parser.add_argument("--device", required=True, metavar="SITE/DEVICE", help="of a receiver: the device to play")
    parser.add_argument("--receiver", metavar="ID", help="check the receiver of this name instead of a device")
    parser.add_argument("--samples", action="store_true", help="begin and end samples; ends the one that is open")
    parser.add_argument("--disturb", action="store_true", help="break the device's connection to the broker once")
    parser.add_argument(
        "--restart",
        metavar="COMMAND",
        help="kill the agent with this command of the shell, which must see to it that it starts again, for example"
        " 'ssh scope sudo systemctl kill -s KILL hematovision'; ends the sample that is open",
    )
    parser.add_argument(
        "--acknowledge-as",
        metavar="ID",
        help="play the receiver that the device waits for (delivery.receiver), on a device whose real one is not there:"
        " what is acknowledged is then nobody's",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to listen before asking; default 10")
    parser.add_argument("--protocol", choices=("auto", "5", "3.1.1"), default="auto", help="MQTT version of the kit")
    parser.add_argument("--username")
    for name in ("--password-file", "--ca-file", "--certificate-file", "--key-file"):
        parser.add_argument(name, type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def _broker(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: HOST:PORT is needed, for example broker.lan:1883")
    return host, int(port)


if __name__ == "__main__":
    sys.exit(main())
