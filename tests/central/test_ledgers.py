"""The comparison at the end of the fault schedule finds what it is made to find."""

from __future__ import annotations

from collections import Counter

import pytest
from sqlalchemy import Engine

from agent.central.store import Store
from tests.central.conftest import arrival
from tests.central.fake_device import FakeDevice, Sent
from tests.proofs.fault_schedule import OutboxLedger, Verdict, compare

DEVICE = FakeDevice()
FIELDS = DEVICE.fields(4)


def judged(
    engine: Engine, arrived: list[Sent], kept: list[Sent] | None = None, given: int = 4, dead: int = 0
) -> Verdict:
    Store(engine).commit([arrival(one) for one in arrived])
    history = {(one.stream, one.boot, one.seq): one.payload for one in (FIELDS if kept is None else kept)}
    return compare(OutboxLedger({"field": given}, 0, dead, history), engine, 1, Counter())


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
class TestComparison:
    def test_two_whole_ledgers_agree(self, engine: Engine) -> None:
        assert judged(engine, FIELDS).is_kept

    def test_a_missing_message_is_found(self, engine: Engine) -> None:
        verdict = judged(engine, [*FIELDS[:2], FIELDS[3]])
        assert not verdict.is_kept
        assert verdict.lost > 0

    def test_the_last_one_missing_is_found_too(self, engine: Engine) -> None:
        assert judged(engine, FIELDS[:3], kept=FIELDS[:3]).lost > 0

    def test_a_message_that_says_something_else_is_found(self, engine: Engine) -> None:
        changed = Sent("field", 1, 2, FIELDS[1].topic, FIELDS[1].payload.replace(b"100.0", b"99.0"))
        assert judged(engine, [FIELDS[0], changed, *FIELDS[2:]]).different == 1

    def test_a_dead_letter_at_either_end_is_found(self, engine: Engine) -> None:
        broken = Sent("field", 1, 2, FIELDS[1].topic, FIELDS[1].payload.replace(b'"cells":[', b'"cells":7,"x":['))
        assert judged(engine, [FIELDS[0], broken, *FIELDS[2:]]).dead_letters == 1
        assert judged(engine, [], dead=1).dead_letters == 2

    def test_a_number_that_came_under_two_boots_is_found(self, engine: Engine) -> None:
        again = FakeDevice(boot=2).field()
        assert judged(engine, [*FIELDS, again]).twice == 1
